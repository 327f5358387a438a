"""A few rows of protos as batches of packed rows: what `proto_rows.py` does of many, without numpy and Arrow. No I/O.

Feast has just made thousands of protos when it calls a store, and the processor's caches are full of them: each library
function then costs several times what it does in a loop of its own, so few plain ones win.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from operator import itemgetter
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.redis_batch import Batch
from feature_store.redis_layout import encode_pair, encode_timestamp, nanos_of
from feature_store.write_layout import CHUNK_BYTES, CHUNK_ROWS, Fields, Limit, WriteLayout

if TYPE_CHECKING:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

Row = tuple["EntityKey", Mapping[str, "Value"], datetime, "datetime | None"]
"""Key, values, event time, created (None: unknown)."""
_NUMBER_BYTES = 11
_CELLS = 500
"""From so many on, a part less to wait for is worth another call."""


def heads_of(layout: WriteLayout, rows: Sequence[Row], limit: Limit | None) -> list[bytes] | int:
    """What each row begins with, its times; or the number of the first row without an event time or dated after the limit."""
    head = layout.fields(()).packer.head
    made: dict[Any, bytes] = {}
    out = []
    for i, (_, _, event, created) in enumerate(rows):
        found = made.get((event, created))
        if found is None:
            if event is None or event != event:  # NaT differs from itself
                return i
            ns = nanos_of(event)
            if limit is not None and ns > limit.ns:
                return i
            known = None if created is None or created != created else nanos_of(created)
            found = made[event, created] = head(encode_pair(ns, known), encode_timestamp(ns))
        out.append(found)
    return out


def few_batches(layout: WriteLayout, rows: Sequence[Row], keys: list[bytes], heads: list[bytes]) -> Iterator[Batch]:
    """The batches of at most FEW_ROWS rows; a row with other features than the one before begins a new one."""
    start = 0
    while start < len(rows):
        names = tuple(rows[start][1])
        fields = layout.fields(names)
        values = _alike(names, rows[start : start + _rows_at_once(len(rows), len(names))])
        cells = _cells(fields, values, CHUNK_BYTES)
        if cells is None:
            columns = list(zip(*values, strict=True))
            varying = [column for e, column in zip(fields.encoders, columns, strict=True) if e.varying]
            values = values[: rows_within(len(values), varying, len(names) - len(varying))]
            cells = _cells(fields, values, None)
        end = start + len(values)
        yield Batch(keys[start:end], fields.packer.pack_few(heads[start:end], cells or []), fields.head, fields.count)
        start = end


def _alike(names: tuple[str, ...], rows: Sequence[Row]) -> list[tuple[Value, ...]]:
    """The values of the first rows that have these features and no others."""
    several = itemgetter(*names) if len(names) > 1 else None  # of one name it would give no tuple
    found: list[tuple[Value, ...]] = []
    for _, values, _, _ in rows:
        if len(values) != len(names):
            break
        try:
            found.append(several(values) if several else tuple([values[n] for n in names]))
        except KeyError:  # as many, but others
            break
    return found


def _cells(fields: Fields, values: Sequence[Sequence[Value]], most: int | None) -> list[list[bytes]] | None:
    """Of each feature its cells; None where they take more than `most` bytes."""
    cells: list[list[bytes]] = []
    size = 0
    for encoder, column in zip(fields.encoders, zip(*values, strict=True), strict=True):
        cells.append(encoder.few_of_protos(column))
        if most is not None and encoder.varying:
            size += sum(map(len, cells[-1]))
            if size > most:
                return None
    return cells


def _rows_at_once(rows: int, features: int) -> int:
    """Of few rows a half or a third, so that Redis works on one part while the next is encoded."""
    cells = rows * features
    if cells < _CELLS:
        return CHUNK_ROWS
    return -(-rows // (2 if cells < 3 * _CELLS else 3))


def rows_within(rows: int, varying: Sequence[Sequence[Value]], numbers: int) -> int:
    """How many of the rows take 2 MB, not counting keys; at least one. `varying`: the columns of which a cell may be large,
    `numbers`: how many others there are."""
    sizes = np.full(rows, numbers * _NUMBER_BYTES, np.int64)
    for column in varying:
        sizes += [value.ByteSize() for value in column]
    return max(1, int(np.searchsorted(np.cumsum(sizes), CHUNK_BYTES, side="right")))
