"""Feature columns to `Value` protos, byte for byte as Feast's own converter writes them (null: zero bytes).

Numbers, times, texts and lists of floats are encoded by column; every other type goes through Feast's converter. One
`ColumnEncoder` per feature; `one` is its path for single values. NaN is null, as in Feast. Pure.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache, partial
from operator import attrgetter, methodcaller
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import DataError
from feature_store.row_bytes import (
    Narrow,
    Piece,
    Times,
    by_length,
    lengths_of,
    short_cells,
    string_head,
    varint,
    varints,
)
from feature_store.value_cells import CELLS, SCALARS, text_heads

if TYPE_CHECKING:
    from feast import ValueType
    from feast.protos.feast.types.Value_pb2 import Value

_UNITS = {"s": 1, "ms": 1_000, "us": 1_000_000, "ns": 1_000_000_000}
_INTEGERS = {"INT32": (b"\x18", pa.int32()), "INT64": (b"\x20", pa.int64())}
_FLOATS = {"DOUBLE": (b"\x29", pa.float64(), "<f8"), "FLOAT": (b"\x35", pa.float32(), "<f4")}
_TEXTS = {"STRING": (b"\x12", pa.string()), "BYTES": (b"\x0a", pa.binary())}
_TEXTS |= {"PDF_BYTES": _TEXTS["BYTES"], "IMAGE_BYTES": _TEXTS["BYTES"]}
_COLUMNS = {kind: arrow for kind, (_, arrow) in (_INTEGERS | _TEXTS).items()}
FLOATS = {kind: arrow for kind, (_, arrow, _) in _FLOATS.items()}
_COLUMNS |= FLOATS
# Tags of `Value`'s fields double_list_val and float_list_val; within them field 1, packed.
_LISTS = {"DOUBLE_LIST": (b"\x7a", pa.float64()), "FLOAT_LIST": (b"\x82\x01", pa.float32())}
BY_COLUMN = {*_COLUMNS, *_LISTS, "BOOL", "UNIX_TIMESTAMP"}
"""Types that are encoded by column; every other one goes through Feast's converter."""

# Types whose protos are read by column: the field of `Value`, and the Arrow type that `column` takes.
_PLAIN = {"INT32": ("int32_val", pa.int32()), "INT64": ("int64_val", pa.int64())}
_PLAIN |= {"DOUBLE": ("double_val", pa.float64()), "FLOAT": ("float_val", pa.float32())}
_PLAIN |= {"STRING": ("string_val", pa.string()), "BYTES": ("bytes_val", pa.binary())}
_PLAIN |= {"BOOL": ("bool_val", pa.bool_()), "UNIX_TIMESTAMP": ("unix_timestamp_val", pa.int64())}
_NUMBERS = {*_INTEGERS, *_FLOATS, "BOOL", "UNIX_TIMESTAMP"}
_TOGETHER = {*_INTEGERS, *_FLOATS}
_SERIALISE = methodcaller("SerializeToString")


class ColumnEncoder:
    """One feature: `column` makes the cells of packed rows, `one` a single `Value`.

    `prefix`: its packed hash field; `kind`: its type's name.
    """

    def __init__(self, name: str, value_type: ValueType, prefix: bytes) -> None:
        self.name = name
        self._type = value_type
        self.prefix = prefix
        self._heads = [prefix + string_head(n) for n in range(32)]
        kind = value_type.name
        self.kind: str = kind
        self._column: Callable[[pa.Array], list[Piece] | None] = lambda _: None
        if kind in _INTEGERS or kind in _FLOATS:
            self._column = lambda array: _numbers([self], [array]) if array.type == _COLUMNS[kind] else None
        elif kind in _TEXTS:
            self._column = self._texts
        elif kind in _LISTS:
            self._column = self._lists
        elif kind == "BOOL":
            self._column = self._booleans
        elif kind == "UNIX_TIMESTAMP":
            self._column = self._seconds
        self.varying = kind not in _NUMBERS
        self._scalar = SCALARS.get(kind)
        self._cells = CELLS[kind](prefix, self._cell) if kind in CELLS else None
        self._text_heads = text_heads(prefix, _TEXTS[kind][0]) if kind in _TEXTS else None
        field = _PLAIN.get(kind)
        self._plain_field = None if field is None else (field[0], attrgetter(field[0]), field[1])

    def checked(self, array: pa.ChunkedArray) -> pa.ChunkedArray:
        """The column in the type that `column` encodes. DataError, naming the feature, where a value does not fit it.

        Values of types that go through Feast's converter are looked at by `column` only.
        """
        kind, found = self._type.name, array.type
        if pa.types.is_dictionary(found):
            array = array.cast(found.value_type)
            found = array.type
        if kind in _COLUMNS and found == _COLUMNS[kind]:
            return array
        try:
            if kind in _INTEGERS and (pa.types.is_integer(found) or pa.types.is_floating(found)):
                if pa.types.is_floating(found):
                    array = pc.if_else(pc.is_nan(array), None, array)  # whole numbers with gaps, as pandas holds them
                return array.cast(_INTEGERS[kind][1])
            if kind in _FLOATS and (pa.types.is_integer(found) or pa.types.is_floating(found)):
                # 2**53 + 1 becomes the nearest double, as protobuf makes it
                return array.cast(_FLOATS[kind][1], safe=pa.types.is_floating(found))
            if kind == "UNIX_TIMESTAMP" and pa.types.is_integer(found):
                return array.cast(pa.int64())
        except pa.ArrowInvalid as e:
            raise self._wrong(str(e).split("\n")[0]) from e
        return array

    def column(self, array: pa.Array) -> list[Piece]:
        """The cells of all rows, of a `checked` column. DataError, naming the feature, where Feast cannot convert a value."""
        if pa.types.is_null(array.type):
            return self.serialised(array.cast(pa.binary()))
        pieces = self._column(array)
        return pieces if pieces is not None else self.serialised(pa.array(self._protos(array.to_pylist()), pa.binary()))

    def serialised(self, protos: pa.Array) -> list[Piece]:
        """The cells, from `Value` protos that are bytes already; null and zero bytes are null."""
        heads = by_length(lengths_of(protos), lambda n: self.prefix + string_head(max(n, 0)))
        return [heads, protos.fill_null(b"") if protos.null_count else protos]

    def of_protos(self, values: Sequence[Value]) -> pa.Array | list[Piece]:
        """What `cells_of` takes, from `Value` protos: their bytes are those that protobuf writes."""
        plain = self._plain(values)
        return self.serialised(pa.array(list(map(_SERIALISE, values)), pa.binary())) if plain is None else plain

    def _plain(self, values: Sequence[Value]) -> pa.Array | None:
        """The values as `column` encodes them, a third of the work of serialising each; None where there are others."""
        if self._plain_field is None:
            return None
        name, attribute, arrow = self._plain_field
        found = list(map(attribute, values))
        if not all(found):  # protobuf gives zeros for what is not set, too
            for i, value in enumerate(found):
                if not value:
                    kind = values[i].WhichOneof("val")
                    if kind is None and not values[i].ByteSize():
                        found[i] = None
                    elif kind != name:
                        return None
        array = pa.array(found, arrow)
        if pa.types.is_floating(arrow) and pc.any(pc.is_nan(array)).as_py():
            return None  # a column's NaN is null, a proto's is NaN
        return array

    def few_of_protos(self, values: Sequence[Value]) -> list[bytes]:
        """As `of_protos`, of few rows: without numpy."""
        if self._cells is not None and self._plain_field is not None:
            name, read, _ = self._plain_field
            found = list(map(read, values))
            # What is not set reads as a zero or an empty text; a column's NaN is null, a proto's is NaN.
            set_all = all(found) or all(f or v.WhichOneof("val") == name for f, v in zip(found, values, strict=True))
            if set_all and not (self.kind in _FLOATS and any(map(math.isnan, found))):
                return self._cells(found)
        return self._packed(map(_SERIALISE, values))

    def few_of_column(self, column: pa.ChunkedArray) -> list[bytes]:
        """As `column`, of few rows of a `checked` column, without numpy. DataError, naming the feature, as `column`."""
        heads = self._text_heads
        if heads is not None and column.type == _COLUMNS[self.kind]:
            # Seen as bytes: a cast takes as long as 30 texts.
            texts = [t for chunk in column.chunks for t in chunk.view(pa.binary()).to_pylist()]
            if None not in texts:
                tag = _TEXTS[self.kind][0]
                return [(heads[len(t)] if len(t) < 128 else _text_head(self.prefix, tag, len(t))) + t for t in texts]
        return self._few(column.to_pylist())

    def _few(self, values: Sequence[Any]) -> list[bytes]:
        if self._cells is not None:
            try:
                return self._cells(values)
            except (ValueError, OverflowError):  # told, or seen to, value by value
                return [self._cell(v) for v in values]
        return self._packed(self._protos(values) if self._scalar is None else map(self.one, values))

    def _cell(self, value: Any) -> bytes:
        return self._packed([self.one(value)])[0]

    def _packed(self, protos: Iterable[bytes]) -> list[bytes]:
        heads = self._heads
        return [(heads[len(p)] if len(p) < len(heads) else self.prefix + string_head(len(p))) + p for p in protos]

    def one(self, value: Any) -> bytes:
        """The `Value` of one Python value as Arrow gives it; zero bytes for null."""
        if value is None:
            return b""
        if self._scalar is not None:
            try:
                data = self._scalar(value)
            except ValueError as e:
                raise self._wrong(str(e)) from e
            if data is not None:
                return data
        return self._protos([value])[0]

    # --- by column: None where the column's type is not one that is encoded here --------------------------------------

    def _booleans(self, array: pa.Array) -> list[Piece] | None:
        if not pa.types.is_boolean(array.type):
            return None
        data = _numpy(array.cast(pa.uint8()), 0).astype(np.uint8)[:, None, None]
        return [short_cells([self.prefix], data, None, b"\x38", _nulls([array]))]

    def _seconds(self, array: pa.Array) -> list[Piece] | None:
        if array.type != pa.int64():
            if not pa.types.is_timestamp(array.type):
                return None
            null = _nulls([array])
            array = pa.array(times_of(array).seconds, mask=None if null is None else null[:, 0])
        return [_varint_cells([self.prefix], b"\x40", [array])]

    def _texts(self, array: pa.Array) -> list[Piece] | None:
        tag, wanted = _TEXTS[self._type.name]
        text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        binary = pa.types.is_binary(array.type) or pa.types.is_large_binary(array.type)
        if not (text if wanted == pa.string() else binary):
            return None
        data = array.cast(wanted).cast(pa.binary())

        return [
            by_length(lengths_of(data), partial(_text_head, self.prefix, tag)),
            data.fill_null(b"") if data.null_count else data,
        ]

    def _lists(self, array: pa.Array) -> list[Piece] | None:
        tag, wanted = _LISTS[self._type.name]
        if pa.types.is_fixed_size_list(array.type) or pa.types.is_large_list(array.type):
            array = array.cast(pa.list_(array.type.value_type))
        if not pa.types.is_list(array.type) or not pa.types.is_floating(array.type.value_type):
            return None
        counts: Any = pc.list_value_length(array).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
        size = wanted.bit_width // 8
        numbers = _numpy(array.flatten().cast(wanted), 0).astype(f"<f{size}", copy=False)
        ends = np.zeros(len(array) + 1, np.int32)
        np.cumsum(np.maximum(counts, 0) * size, out=ends[1:])
        body = pa.py_buffer(np.ascontiguousarray(numbers))
        data = pa.Array.from_buffers(pa.binary(), len(array), [None, pa.py_buffer(ends), body])

        def head(count: int) -> bytes:
            if count < 0:
                return self.prefix + b"\xa0"
            inner = b"\x0a" + varint(count * size) if count else b""
            outer = tag + varint(len(inner) + count * size) + inner
            return self.prefix + string_head(len(outer) + count * size) + outer

        return [by_length(counts, head), data]

    # --- Feast's converter --------------------------------------------------------------------------------------------

    def _protos(self, values: Sequence[Any]) -> list[bytes]:
        from feast.type_map import python_values_to_proto_values

        try:
            protos = python_values_to_proto_values(list(values), self._type)
            return [p.SerializeToString() for p in protos]
        except (TypeError, ValueError, AssertionError, OverflowError) as e:
            raise self._wrong(" ".join(str(e).split())) from e

    def _wrong(self, why: str) -> DataError:
        return DataError(f"feature {self.name} must be {self._type.name} ({why[:200]})")


def cells_of(
    encoders: Sequence[ColumnEncoder], columns: Sequence[pa.Array | list[Piece]], together: bool
) -> list[list[Piece]]:
    """The cells of all columns, `checked` arrays or cells already, each as `ColumnEncoder.column` makes them.

    `together`: numbers of a kind at once, which is cheaper; then not in the columns' order nor one list per column.
    """
    out: list[list[Piece]] = []
    alike: dict[str, list[int]] = {}
    for i, (encoder, column) in enumerate(zip(encoders, columns, strict=True)):
        if isinstance(column, list):
            out.append(column)
        elif together and encoder.kind in _TOGETHER and column.type == _COLUMNS[encoder.kind]:
            alike.setdefault(encoder.kind, []).append(i)
        else:
            out.append(encoder.column(column))
    return out + [_numbers([encoders[i] for i in some], [columns[i] for i in some]) for some in alike.values()]


def _numbers(encoders: Sequence[ColumnEncoder], arrays: Sequence[pa.Array]) -> list[Piece]:
    """Columns of integers, or of floats, of the same kind."""
    kind, prefixes = encoders[0].kind, [e.prefix for e in encoders]
    if kind in _INTEGERS:
        return [_varint_cells(prefixes, _INTEGERS[kind][0], [a.cast(pa.int64()) for a in arrays])]
    tag, _, little_endian = _FLOATS[kind]
    numbers = np.stack([_numpy(a, np.nan) for a in arrays], axis=1).astype(little_endian, copy=False)
    null = np.isnan(numbers)
    data = numbers.view(np.uint8).reshape(*numbers.shape, -1)
    return [short_cells(prefixes, data, None, tag, null if null.any() else None)]


def _varint_cells(prefixes: Sequence[bytes], tag: bytes, arrays: Sequence[pa.Array]) -> Narrow:
    numbers = np.stack([_numpy(a, 0) for a in arrays], axis=1)
    data, lengths = varints(numbers.reshape(-1))
    return short_cells(prefixes, data.reshape(*numbers.shape, -1), lengths.reshape(numbers.shape), tag, _nulls(arrays))


@lru_cache(maxsize=65_536)  # states of windowed views have thousands of lengths, the same ones in every batch
def _text_head(prefix: bytes, tag: bytes, length: int) -> bytes:
    """What stands before a text or bytes of `length` (-1: null)."""
    if length < 0:
        return prefix + b"\xa0"
    inner = tag + varint(length)
    return prefix + string_head(len(inner) + length) + inner


def nanos_of_column(column: pa.ChunkedArray) -> list[int | None]:
    """`times_of` of few timestamps, without numpy: nanoseconds since the epoch, None for null."""
    factor = 1_000_000_000 // _UNITS[column.type.unit]
    times = [t for chunk in column.chunks for t in chunk.view(pa.int64()).to_pylist()]
    return [None if t is None else t * factor for t in times]


def times_of(array: pa.Array) -> Times:
    """Arrow timestamps of any unit, or dates; a naive one is UTC. ArrowInvalid for any other type."""
    if pa.types.is_dictionary(array.type):
        array = array.cast(array.type.value_type)
    if not pa.types.is_timestamp(array.type):
        array = array.cast(pa.timestamp("us")) if pa.types.is_date(array.type) else _no_time(array.type)
    unit = _UNITS[array.type.unit]
    null = _nulls([array])
    seconds, rest = np.divmod(_numpy(array.cast(pa.int64()), 0), unit)
    return Times(seconds, rest * (1_000_000_000 // unit), None if null is None else ~null[:, 0])


def _no_time(kind: pa.DataType) -> pa.Array:
    raise pa.ArrowInvalid(f"not a time: {kind}")


def _numpy(array: pa.Array, null: Any) -> Any:
    if array.null_count:
        array = array.fill_null(null)
    return array.to_numpy(zero_copy_only=False)


def _nulls(arrays: Sequence[pa.Array]) -> Any:
    """Which values are null, a column of truth values for each array; None: no value is."""
    if not any(a.null_count for a in arrays):
        return None
    return np.stack([a.is_null().to_numpy(zero_copy_only=False) for a in arrays], axis=1)
