"""Redis keys of the rows of a table, by column; and of one of Feast's EntityKey protos. Layout: `redis_layout.KeyLayout`."""

from __future__ import annotations

import struct
from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.errors import DataError
from feature_store.redis_layout import KeyLayout, KeyPart
from feature_store.row_bytes import Narrow, Piece, by_length, constant, join, lengths_of
from feature_store.value_bytes import times_of

KEY = "k:"
"""Before a join key's name in the tables given to `KeyColumns`: a feature may have the same name."""
_NUMBERS = {"BYTES": 1, "STRING": 2, "INT32": 3, "INT64": 4, "UNIX_TIMESTAMP": 8}
_HEAD = struct.Struct("<II")
_FIXED = {"INT32": (pa.int32(), "<i4"), "INT64": (pa.int64(), "<i8"), "UNIX_TIMESTAMP": (pa.int64(), "<i8")}
_ARROW = {kind: arrow for kind, (arrow, _) in _FIXED.items()} | {"STRING": pa.string(), "BYTES": pa.binary()}
_Encoding = tuple[int, Callable[[Any], bytes]]
_FIELD: dict[str, _Encoding] = {
    "STRING": (2, bytes),
    "BYTES": (1, bytes),
    "INT32": (3, struct.Struct("<i").pack),
    "INT64": (4, struct.Struct("<q").pack),
    "UNIX_TIMESTAMP": (8, struct.Struct("<q").pack),
}
"""By type the number before a key's value, and what makes its bytes of the value, a text being bytes already."""
_PROTO: dict[str | None, _Encoding] = {f"{kind.lower()}_val": encoding for kind, encoding in _FIELD.items()}
_PROTO["string_val"] = (2, str.encode)


class KeyColumns:
    """Makes the keys of one view's rows. `names`: the columns it needs, none for a view without entities."""

    def __init__(self, project: str, view: str, parts: Sequence[KeyPart]) -> None:
        stored = [KeyPart(p.stored, None if p.requested is None else p.stored, p.type) for p in parts]
        self._layout = KeyLayout(project, stored)
        self._view = view
        self.names = [p.stored for p in self._layout.parts if p.requested is not None]
        self._prefixes: dict[tuple[str, ...], tuple[bytes, list[int]]] = {}

    def checked(self, name: str, column: pa.ChunkedArray) -> pa.ChunkedArray:
        """The join key's column in its type. DataError for a null, or a value of another type."""
        part = next(p for p in self._layout.parts if p.stored == name)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy()))
            raise DataError(
                f"{self._view}: row {row} has no join key {name}, and cannot be kept online; nothing was written"
            )
        if column.type == _ARROW[part.type]:
            return column
        try:
            if part.type == "STRING" and (pa.types.is_string(column.type) or pa.types.is_large_string(column.type)):
                return column.cast(pa.string())
            if part.type == "BYTES" and (pa.types.is_binary(column.type) or pa.types.is_large_binary(column.type)):
                return column.cast(pa.binary())
            if part.type in ("INT32", "INT64", "UNIX_TIMESTAMP") and pa.types.is_integer(column.type):
                return column.cast(_FIXED[part.type][0])
            if part.type == "UNIX_TIMESTAMP" and pa.types.is_timestamp(column.type):
                return pa.chunked_array([pa.array(times_of(c).seconds) for c in column.chunks], pa.int64())
        except pa.ArrowInvalid as e:
            raise DataError(f"{self._view}: join key {name} must be {part.type} ({str(e).splitlines()[0]})") from e
        raise DataError(f"{self._view}: join key {name} must be {part.type}", value=str(column.type))

    def encode(self, table: pa.Table) -> pa.Array:
        """The keys, in order, of `checked` columns named KEY + join key."""
        columns = {}
        for name in self.names:
            column = table.column(KEY + name).combine_chunks()
            columns[name] = column.chunk(0) if isinstance(column, pa.ChunkedArray) else column
        return self._joined(table.num_rows, columns)

    def _joined(self, rows: int, columns: Mapping[str, pa.Array]) -> pa.Array:
        pieces: list[Piece] = [self._layout.prefix]
        for part in self._layout.parts:
            number = _NUMBERS[part.type]
            if part.requested is None:
                pieces.append(_HEAD.pack(number, 0))
                continue
            array = columns[part.stored]
            if part.type in _FIXED:
                layout = _FIXED[part.type][1]
                data = array.to_numpy(zero_copy_only=False).astype(layout)[:, None].view(np.uint8).reshape(rows, -1)
                head = _HEAD.pack(number, data.shape[1])
                pieces += [Narrow(constant(rows, head), None), Narrow(data, None)]
            else:
                pieces.append(by_length(lengths_of(array), lambda n, number=number: _HEAD.pack(number, n)))  # type: ignore[misc]  # bound now
                pieces.append(array.cast(pa.binary()))
        return join(rows, [*pieces, self._layout.suffix])

    def few(self, columns: Mapping[str, pa.ChunkedArray], rows: int) -> list[bytes]:
        """As `encode`, of few rows, without numpy: of `checked` columns by join key."""
        parts = []
        for part in self._layout.parts:
            if part.requested is None:
                parts.append([_HEAD.pack(_NUMBERS[part.type], 0)] * rows)
                continue
            column = columns[part.stored]
            if part.type == "STRING":
                column = column.cast(pa.binary())
            parts.append(_encoded(_FIELD[part.type], column.to_pylist()))
        return self._assembled(self._layout.prefix, parts)

    def _assembled(self, prefix: bytes, parts: Sequence[Sequence[bytes]]) -> list[bytes]:
        suffix = self._layout.suffix
        return [b"".join((prefix, *values, suffix)) for values in zip(*parts, strict=True)]

    def shown(self, table: pa.Table, row: int) -> str:
        """The row's join keys, for a message."""
        return ", ".join(f"{n}={table.column(KEY + n)[row].as_py()!r}" for n in self.names) or self._view

    def of_protos(self, keys: Sequence[Any]) -> list[bytes] | None:
        """As `of_proto` of many keys, by column; None where their shapes differ or one has none: ask for them one by one."""
        names = list(keys[0].join_keys) if keys else []
        if not names or not all(key.join_keys == names for key in keys):
            return None
        values = [key.entity_values for key in keys]
        if set(map(len, values)) != {len(names)}:
            return None
        prefix, order = self._prefix(tuple(names))
        columns = []
        for i in order:
            column = [value[i] for value in values]
            kind = column[0].WhichOneof("val")
            if kind not in _PROTO:
                return None
            found = list(map(attrgetter(kind), column))
            if not all(found) and any(
                not v and p.WhichOneof("val") != kind for v, p in zip(found, column, strict=True)
            ):
                return None
            columns.append(_encoded(_PROTO[kind], found))
        return self._assembled(prefix, columns)

    def _prefix(self, names: tuple[str, ...]) -> tuple[bytes, list[int]]:
        """What a key with these join keys begins with, and the order of their values in it."""
        made = self._prefixes.get(names)
        if made is None:
            order = sorted(range(len(names)), key=lambda i: names[i])
            encoded = [names[i].encode() for i in order]
            prefix = struct.pack("<I", len(names)) + b"".join(_HEAD.pack(2, len(n)) + n for n in encoded)
            made = self._prefixes[names] = prefix, order
        return made

    def of_proto(self, key: Any) -> bytes | None:
        """The Redis key of one of Feast's EntityKey protos, whose order of join keys may be any; None: it has none.

        Feast's write API leaves out the constant key of an entity-less view, under which Feast reads it.
        """
        names = tuple(key.join_keys)
        if not names:
            return self._layout.encode({}, 0) if not self.names else None
        prefix, order = self._prefix(names)
        out = [prefix]
        values = key.entity_values
        for i in order:
            value = values[i]
            kind = value.WhichOneof("val")
            encoder = _PROTO.get(kind)
            if encoder is None:
                return None
            data = encoder[1](getattr(value, kind))
            out.append(_HEAD.pack(encoder[0], len(data)) + data)
        out.append(self._layout.suffix)
        return b"".join(out)


def _encoded(encoding: _Encoding, values: Sequence[Any]) -> list[bytes]:
    number, encode = encoding
    return [_HEAD.pack(number, len(data)) + data for data in map(encode, values)]
