"""Rows of protos, as Feast's provider hands them to an online store, as batches of packed rows. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from feature_store.errors import DataError
from feature_store.few_proto_rows import Row, few_batches, heads_of, rows_within
from feature_store.redis_batch import Batch
from feature_store.redis_layout import nanos_of
from feature_store.row_bytes import Times
from feature_store.value_bytes import cells_of, times_of
from feature_store.windows.definition import STATE_FIELD
from feature_store.write_layout import CHUNK_ROWS, FEW_ROWS, Limit, WriteLayout, first_after

if TYPE_CHECKING:
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

_SECOND = 1_000_000_000


def batches_of_rows(layout: WriteLayout, rows: Sequence[Row], limit: Limit | None) -> tuple[int, Iterator[Batch]]:
    """How many rows have no window state and are left out, and the batches of the others. DataError, before the first batch
    is made, for a row without an event time or dated after the limit, and a key that cannot be kept."""
    kept = rows
    if layout.windowed:
        kept = [row for row in rows if STATE_FIELD in row[1] and row[1][STATE_FIELD].bytes_val]
        layout.warn_stateless(len(rows) - len(kept), len(rows))
    if len(kept) <= FEW_ROWS:
        heads = heads_of(layout, kept, limit)
        if isinstance(heads, int):
            raise _wrong_time(layout, heads, kept[heads], limit)
        return len(rows) - len(kept), few_batches(layout, kept, _keys(layout, kept), heads)
    event = times_of_datetimes([row[2] for row in kept])
    wrong = int(np.argmin(event.known)) if event.known is not None else first_after(event, limit)
    if wrong is not None:
        raise _wrong_time(layout, wrong, kept[wrong], limit)
    return len(rows) - len(kept), _batches(layout, kept, _keys(layout, kept), event)


def _wrong_time(layout: WriteLayout, i: int, row: Row, limit: Limit | None) -> DataError:
    name = f"row {i} ({_shown(row[0])})"
    if limit is None or row[2] is None or row[2] != row[2]:
        return DataError(f"{layout.view}: {name} has no event timestamp, and cannot be stored online")
    return layout.refuse_future(name, nanos_of(row[2]), limit)


def _keys(layout: WriteLayout, rows: Sequence[Row]) -> list[bytes]:
    found = layout.keys.of_protos([row[0] for row in rows])
    if found is not None:
        return found
    keys = []
    for proto, *_ in rows:
        key = layout.keys.of_proto(proto)
        if key is None:
            raise DataError(f"{layout.view}: this entity key cannot be kept online", value=_shown(proto))
        keys.append(key)
    return keys


def _batches(layout: WriteLayout, rows: Sequence[Row], keys: list[bytes], events: Times) -> Iterator[Batch]:
    start = 0
    while start < len(rows):
        wanted = rows[start][1].keys()
        names = tuple(wanted)
        end, most = start + 1, min(start + CHUNK_ROWS, len(rows))
        while end < most and rows[end][1].keys() == wanted:
            end += 1
        fields = layout.fields(names)
        varying = [[row[1][e.name] for row in rows[start:end]] for e in fields.encoders if e.varying]
        end = start + rows_within(end - start, varying, len(names) - len(varying))
        values = [row[1] for row in rows[start:end]]
        found = [e.of_protos([row[e.name] for row in values]) for e in fields.encoders]
        created = times_of_datetimes([row[3] for row in rows[start:end]])
        known = None if created.known is not None and not created.known.any() else created
        cells = cells_of(fields.encoders, found, fields.packer.parts == 1)
        yield Batch(
            pa.array(keys[start:end], pa.binary()),
            fields.packer.pack(events.slice(start, end), known, cells),
            fields.head,
            fields.count,
        )
        start = end


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
