"""A few rows of an Arrow table as one batch of packed rows: what `table_rows.py` does of many, mostly in plain Python. No I/O.

A call of numpy or Arrow takes as long as some tens of cells do here, whatever its number of rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import pyarrow as pa

from feature_store.redis_batch import Batch
from feature_store.redis_layout import encode_pair, encode_timestamp
from feature_store.row_bytes import join
from feature_store.value_bytes import FLOATS, ColumnEncoder, cells_of, nanos_of_column
from feature_store.write_layout import CHUNK_BYTES, Fields, Limit, WriteLayout

_BLOCK_ROWS = 12
"""From so many rows on, numpy makes the cells of columns of floats faster."""


def few_batch(
    layout: WriteLayout,
    fields: Fields,
    keys: Mapping[str, pa.ChunkedArray],
    features: Sequence[pa.ChunkedArray],
    event: pa.ChunkedArray,
    created: pa.ChunkedArray | None,
    limit: Limit | None,
) -> Batch | None:
    """One batch of all rows, of `checked` columns; of `keys` by join key.

    None where it takes a closer look, by `table_rows.py`: a key that comes twice, times that are missing, after the limit or no
    timestamps, rows too large for one batch. DataError for a value that Feast cannot convert.
    """
    if not all(pa.types.is_timestamp(column.type) for column in (event, event if created is None else created)):
        return None
    events = [t for t in nanos_of_column(event) if t is not None]
    if len(events) < len(event) or (limit is not None and max(events) > limit.ns):
        return None
    rows = len(events)
    encoded = layout.keys.few(keys, rows)
    if len(set(encoded)) < rows:
        return None
    heads = _heads(fields, events, [None] * rows if created is None else nanos_of_column(created))
    packed = fields.packer.pack_few(heads, _cells(fields.encoders, features, fields.packer.parts == 1))
    if sum(sum(map(len, part)) for part in packed) > CHUNK_BYTES and rows > 1:
        return None
    return Batch(encoded, packed, fields.head, fields.count)


def _heads(fields: Fields, events: Sequence[int], created: Sequence[int | None]) -> list[bytes]:
    """What each row begins with, its times: few differ within a table."""
    made: dict[tuple[int, int | None], bytes] = {}
    out = []
    for at in zip(events, created, strict=True):
        head = made.get(at)
        if head is None:
            head = made[at] = fields.packer.head(encode_pair(*at), encode_timestamp(at[0]))
        out.append(head)
    return out


def _cells(encoders: Sequence[ColumnEncoder], columns: Sequence[pa.ChunkedArray], together: bool) -> list[list[bytes]]:
    """Of each feature its cells; those of floats of a kind as one, where that is faster and `together`."""
    out: list[list[bytes]] = []
    floats: dict[ColumnEncoder, pa.Array] = {}
    block = together and len(columns) > 1 and len(columns[0]) >= _BLOCK_ROWS
    for encoder, column in zip(encoders, columns, strict=True):
        if block and FLOATS.get(encoder.kind) == column.type:
            floats[encoder] = column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()
        else:
            out.append(encoder.few_of_column(column))
    if floats:
        blocks = cells_of(list(floats), list(floats.values()), True)
        out += [join(len(columns[0]), block).to_pylist() for block in blocks]
    return out
