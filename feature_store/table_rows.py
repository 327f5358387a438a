"""The rows of an Arrow table as batches of packed rows: checked as a whole, then encoded chunk by chunk. No I/O."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import DataError
from feature_store.few_table_rows import few_batch
from feature_store.key_bytes import KEY
from feature_store.redis_batch import Batch
from feature_store.row_bytes import Times
from feature_store.value_bytes import cells_of, times_of
from feature_store.windows.definition import STATE_FIELD
from feature_store.write_layout import CHUNK_BYTES, CHUNK_ROWS, FEW_ROWS, Fields, Limit, WriteLayout, first_after

_FEATURE, _EVENT, _CREATED = "f:", "event", "created"
"""Columns of the checked table: a feature may be named as a join key or a time column is."""


def batches_of_table(layout: WriteLayout, table: pa.Table, limit: Limit | None) -> tuple[int, Iterator[Batch]]:
    """How many rows have no window state and are left out, and the batches of the others. DataError as
    `OnlineWriter.write` says, before the first batch is made."""
    names = tuple(layout.types)
    wanted = [*layout.keys.names, *names, layout.event_column]
    held = set(table.column_names)  # asked once: Arrow makes the list anew each time
    missing = [n for n in wanted if n not in held]
    if missing:
        raise DataError(
            f"{layout.view}: the rows lack {'a column' if len(missing) == 1 else 'columns'}",
            value=", ".join(missing),
            valid=wanted,
        )
    left_out = 0
    if layout.windowed:
        sizes = pc.binary_length(table.column(STATE_FIELD).cast(pa.large_binary())).fill_null(0)
        stated = table.filter(pc.greater(sizes, 0))
        left_out = table.num_rows - stated.num_rows
        layout.warn_stateless(left_out, table.num_rows)
        table = stated
    fields = layout.fields(names)
    features = [e.checked(table.column(e.name)) for e in fields.encoders]
    keys = {n: layout.keys.checked(n, table.column(n)) for n in layout.keys.names}
    event, created = table.column(layout.event_column), None
    if layout.created_column in held and layout.created_column not in layout.types:
        created = table.column(layout.created_column)
    if 0 < table.num_rows <= FEW_ROWS:
        few = few_batch(layout, fields, keys, features, event, created, limit)
        if few is not None:
            return left_out, iter([few])
    columns = {_FEATURE + e.name: feature for e, feature in zip(fields.encoders, features, strict=True)}
    columns |= {KEY + n: column for n, column in keys.items()}
    columns |= {_EVENT: event} if created is None else {_EVENT: event, _CREATED: created}
    checked = pa.table(columns)
    for start in range(0, checked.num_rows, 1_000_000):  # all of it, before anything is written
        _times(layout, checked.slice(start, 1_000_000), start, limit)
    return left_out, _batches(layout, checked, fields)


def _batches(layout: WriteLayout, table: pa.Table, fields: Fields) -> Iterator[Batch]:
    for chunk in _chunks(table):
        event, created = _times(layout, chunk)
        keys = layout.keys.encode(chunk)
        rows = _newest(keys, event, created)
        if rows is not None:
            keys, chunk, event = keys.take(pa.array(rows)), chunk.take(pa.array(rows)), event.take(rows)
            created = created.take(rows) if created is not None else None
        arrays = [_whole(chunk.column(_FEATURE + e.name)) for e in fields.encoders]
        parts = fields.packer.pack(event, created, cells_of(fields.encoders, arrays, fields.packer.parts == 1))
        yield Batch(keys, parts, fields.head, fields.count)


def _times(
    layout: WriteLayout, chunk: pa.Table, first: int = 0, limit: Limit | None = None
) -> tuple[Times, Times | None]:
    """Event times and, where there are any, created times. DataError for a null event, or one after `limit`."""
    event = _time_column(layout, chunk, _EVENT, layout.event_column)
    created = _time_column(layout, chunk, _CREATED, layout.created_column) if _CREATED in chunk.column_names else None
    if event.known is not None:
        row = int(np.argmin(event.known))
        raise DataError(
            f"{layout.view}: row {first + row} ({layout.keys.shown(chunk, row)}) has no {layout.event_column}, and cannot "
            "be stored online; nothing was written"
        )
    late = first_after(event, limit)
    if late is not None and limit is not None:
        name = f"row {first + late} ({layout.keys.shown(chunk, late)})"
        raise layout.refuse_future(name, event.nanoseconds(late) or 0, limit)
    return event, created


def _time_column(layout: WriteLayout, chunk: pa.Table, column: str, name: str) -> Times:
    try:
        return times_of(_whole(chunk.column(column)))
    except pa.ArrowInvalid as e:
        raise DataError(f"{layout.view}: column {name} holds no times", value=str(e)) from e


def _chunks(table: pa.Table) -> Iterator[pa.Table]:
    """Slices of at most 1,000 rows and, but for a single large row, 2 MB."""
    for start in range(0, table.num_rows, CHUNK_ROWS):
        todo = [table.slice(start, CHUNK_ROWS)]
        while todo:
            chunk = todo.pop()
            half = chunk.num_rows // 2
            if half and chunk.nbytes > CHUNK_BYTES:
                todo += [chunk.slice(half), chunk.slice(0, half)]
            else:
                yield chunk


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # no chunk at all, or too large for one: chunks are small, so the former
        return whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    return whole


def _newest(keys: pa.Array, event: Times, created: Times | None) -> Any:
    """The rows to write when keys repeat: the newest of each, of equal ones the last; None when no key repeats."""
    coded = keys.dictionary_encode()
    if len(coded.dictionary) == len(keys):
        return None
    codes = coded.indices.to_numpy()
    known_s, known_n = event.seconds, event.nanos
    if created is not None:
        known = np.ones(len(codes), bool) if created.known is None else created.known
        known_s = np.where(known, created.seconds, known_s)
        known_n = np.where(known, created.nanos, known_n)
    order = np.lexsort((np.arange(len(codes)), known_n, known_s, event.nanos, event.seconds, codes))
    last = np.append(np.diff(codes[order]) != 0, True)
    return np.sort(order[last])
