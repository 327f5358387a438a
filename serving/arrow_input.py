"""Reads an Arrow stream that a stranger sent: plain columns only, nothing that could grow when it is unpacked."""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING

from feature_store.errors import UsageError
from serving.errors import TooManyError

if TYPE_CHECKING:
    import pyarrow as pa

MEDIA_TYPE = "application/vnd.apache.arrow.stream"
_DICTIONARY_BATCH, _RECORD_BATCH = 2, 3  # the union MessageHeader of Arrow's Message.fbs
_SCALARS = "integers, floats, booleans, strings, binary, timestamps, dates and decimals"


class ArrowError(UsageError):
    """A body that is no Arrow stream of plain columns."""

    code = "arrow"


def read_stream(body: bytes, max_rows: int) -> pa.Table:
    """The table in `body`, checked to its last offset. ArrowError for what is no Arrow stream, compressed or of nested
    or encoded types, TooManyError over `max_rows`. Its size in memory is about that of `body`.
    """
    import pyarrow as pa

    try:
        _refuse_compressed(body)
        with pa.ipc.open_stream(pa.py_buffer(body)) as reader:
            for field in reader.schema:
                _require_plain(field)
            batches, rows = [], 0
            for batch in reader:
                rows += batch.num_rows
                if rows > max_rows:
                    raise TooManyError("rows", rows, max_rows)
                batch.validate(full=True)
                batches.append(batch)
            return pa.Table.from_batches(batches, reader.schema).replace_schema_metadata(None).combine_chunks()
    except (pa.ArrowException, OSError, struct.error, ValueError) as e:
        raise ArrowError(
            "the body is not an Arrow stream", value=str(e)[:200], next_step="write it with pyarrow.ipc.new_stream"
        ) from e


def _require_plain(field: pa.Field) -> None:
    import pyarrow.types as t

    kind = field.type
    (
        str(field.name),
        str(getattr(kind, "tz", None)),
    )  # both are bytes until asked for, and UnicodeDecodeError is ours to tell
    checks = (t.is_integer, t.is_floating, t.is_boolean, t.is_string, t.is_large_string, t.is_binary, t.is_large_binary)
    if not any(check(kind) for check in (*checks, t.is_timestamp, t.is_date, t.is_decimal)):
        raise ArrowError(
            f"column {field.name} has a type that is not taken here", value=str(kind), next_step=f"send {_SCALARS}"
        )


def _refuse_compressed(body: bytes) -> None:
    """A few compressed bytes can stand for gigabytes, and pyarrow unpacks a whole batch before it can be asked."""
    import pyarrow as pa

    reader = pa.ipc.MessageReader.open_stream(pa.py_buffer(body))
    while True:
        try:
            message = reader.read_next_message()
        except StopIteration:
            return
        metadata = message.metadata.to_pybytes()
        root = _Table(metadata, struct.unpack_from("<I", metadata, 0)[0])
        header = root.byte(1)  # header_type
        batch = root.table(2) if header in (_DICTIONARY_BATCH, _RECORD_BATCH) else None
        if batch is not None and header == _DICTIONARY_BATCH:
            raise ArrowError("dictionary-encoded columns are not taken here", next_step="send them decoded")
        if batch is not None and batch.offset(3):  # RecordBatch.compression
            raise ArrowError("a compressed Arrow stream is not taken here", next_step="send it uncompressed")


class _Table:
    """As much of a FlatBuffers table as it takes to see which fields are set."""

    def __init__(self, data: bytes, at: int) -> None:
        self._data, self._at = data, at
        self._vtable = at - struct.unpack_from("<i", data, at)[0]
        self._size = struct.unpack_from("<H", data, self._vtable)[0]

    def offset(self, field: int) -> int:
        """Where in the table a field stands; 0: not set."""
        slot = 4 + 2 * field
        return int(struct.unpack_from("<H", self._data, self._vtable + slot)[0]) if slot + 2 <= self._size else 0

    def byte(self, field: int) -> int:
        offset = self.offset(field)
        return self._data[self._at + offset] if offset else 0

    def table(self, field: int) -> _Table | None:
        offset = self.offset(field)
        if not offset:
            return None
        at = self._at + offset
        return _Table(self._data, at + struct.unpack_from("<I", self._data, at)[0])
