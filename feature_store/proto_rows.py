"""Rows of protos, as Feast's provider hands them to an online store, as batches of packed rows. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from feature_store.errors import DataError
from feature_store.redis_batch import Batch, Cells
from feature_store.redis_layout import nanos_of
from feature_store.row_bytes import Times
from feature_store.value_bytes import cells_of, times_of
from feature_store.windows.definition import STATE_FIELD
from feature_store.write_layout import CHUNK_BYTES, CHUNK_ROWS, FEW_ROWS, Limit, WriteLayout, first_after

if TYPE_CHECKING:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

Row = tuple["EntityKey", Mapping[str, "Value"], datetime, "datetime | None"]
"""Key, values, event time, created (None: unknown)."""
_SECOND = 1_000_000_000
_NUMBER_BYTES = 11
_CELLS = 500
"""From so many on, a part less to wait for is worth another call."""


def batches_of_rows(layout: WriteLayout, rows: Sequence[Row], limit: Limit | None) -> tuple[int, Iterator[Batch]]:
    """How many rows have no window state and are left out, and the batches of the others. DataError, before the first batch
    is made, for a row without an event time or dated after the limit, and a key that cannot be kept."""
    kept = rows
    if layout.windowed:
        kept = [row for row in rows if STATE_FIELD in row[1] and row[1][STATE_FIELD].bytes_val]
        layout.warn_stateless(len(rows) - len(kept), len(rows))
    event = times_of_datetimes([row[2] for row in kept])
    if event.known is not None:
        row = int(np.argmin(event.known))
        raise DataError(
            f"{layout.view}: row {row} ({_shown(kept[row][0])}) has no event timestamp, and cannot be stored online"
        )
    late = first_after(event, limit)
    if late is not None and limit is not None:
        name = f"row {late} ({_shown(kept[late][0])})"
        raise layout.refuse_future(name, event.nanoseconds(late) or 0, limit)
    return len(rows) - len(kept), _batches(layout, kept, _keys(layout, [row[0] for row in kept]), event)


def _keys(layout: WriteLayout, protos: Sequence[EntityKey]) -> Cells:
    found = layout.keys.of_protos(protos) if len(protos) > 10 else None
    if found is not None:
        return found
    keys = []
    for proto in protos:
        key = layout.keys.of_proto(proto)
        if key is None:
            raise DataError(f"{layout.view}: this entity key cannot be kept online", value=_shown(proto))
        keys.append(key)
    return keys


def _batches(layout: WriteLayout, rows: Sequence[Row], keys: Cells, events: Times) -> Iterator[Batch]:
    start = 0
    while start < len(rows):
        wanted = rows[start][1].keys()
        names = tuple(wanted)
        end, most = start + 1, start + _rows_at_once(len(rows), len(names))
        while end < min(most, len(rows)) and rows[end][1].keys() == wanted:
            end += 1
        fields = layout.fields(names)
        varying = [n for e, n in zip(fields.encoders, names, strict=True) if e.varying]
        end = _within_bytes(rows, start, end, varying, (len(names) - len(varying)) * _NUMBER_BYTES)
        some = keys[start:end]
        event = events.slice(start, end)
        created = times_of_datetimes([row[3] for row in rows[start:end]])
        values = [row[1] for row in rows[start:end]]
        parts: list[Cells]
        if end - start <= FEW_ROWS:
            few = [
                e.few_of_protos([row[name] for row in values]) for e, name in zip(fields.encoders, names, strict=True)
            ]
            parts = [*fields.packer.pack_few(fields.packer.heads(event, created), few)]
            some = some if isinstance(some, list) else some.to_pylist()
        else:
            found = [e.of_protos([row[name] for row in values]) for e, name in zip(fields.encoders, names, strict=True)]
            cells = cells_of(fields.encoders, found, fields.packer.parts == 1)
            known = None if created.known is not None and not created.known.any() else created
            parts = fields.packer.pack(event, known, cells)
            some = pa.array(some, pa.binary()) if isinstance(some, list) else some
        yield Batch(some, parts, fields.head, fields.count)
        start = end


def _rows_at_once(rows: int, features: int) -> int:
    """Of few rows a half or a third, so that Redis works on one part while the next is encoded."""
    cells = rows * features
    if rows > FEW_ROWS or cells < _CELLS:
        return CHUNK_ROWS
    return -(-rows // (2 if cells < 3 * _CELLS else 3))


def _within_bytes(rows: Sequence[Row], start: int, end: int, varying: Sequence[str], fixed: int) -> int:
    """Where rows from `start` reach 2 MB, not counting keys; at least one row on. `fixed`: bytes of all but `varying`."""
    sizes = np.full(end - start, fixed, np.int64)
    for name in varying:  # a call per cell: only where a cell may be large
        sizes += [row[1][name].ByteSize() for row in rows[start:end]]
    return start + max(1, int(np.searchsorted(np.cumsum(sizes), CHUNK_BYTES, side="right")))


def times_of_datetimes(times: Sequence[datetime | None]) -> Times:
    """Python's or pandas' times, a naive one being UTC; None and NaT are unknown."""
    if set(map(type, times)) <= {datetime, type(None)}:  # not a subclass: pandas' have nanoseconds
        return times_of(pa.array(times, pa.timestamp("us", "UTC")))
    known = np.array([t is not None and t == t for t in times])  # NaT differs from itself
    pairs = [divmod(nanos_of(t) if k and t is not None else 0, _SECOND) for t, k in zip(times, known, strict=True)]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Times(both[:, 0], both[:, 1], None if known.all() else known)


def _shown(key: EntityKey) -> str:
    parts = zip(key.join_keys, key.entity_values, strict=False)
    return ", ".join(f"{n}: {getattr(v, v.WhichOneof('val') or '', 'null')}" for n, v in parts)
