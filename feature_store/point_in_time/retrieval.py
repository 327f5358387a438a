"""A whole retrieval: entity rows in, the same rows with every view's features out; and rows for entity-less retrieval."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime

import duckdb
import pyarrow as pa

from feature_store.clock import to_micros
from feature_store.errors import UsageError
from feature_store.point_in_time.engine import ident, memory_limit, reading
from feature_store.point_in_time.entities import EVENT_TIMESTAMP, EntityRows
from feature_store.point_in_time.fetch import Column, feature_columns, fetch
from feature_store.point_in_time.join import Strategy, match_view
from feature_store.point_in_time.request import ViewRequest
from feature_store.point_in_time.slots import Ints
from feature_store.point_in_time.source import ParquetSource, open_source, scanning_all
from feature_store.point_in_time.types import ns_per_tick, ticks
from feature_store.point_in_time.windowed import open_events, window_values

MIN_SLICE_ROWS = 100_000


def retrieve(
    con: duckdb.DuckDBPyConnection,
    requests: Sequence[ViewRequest],
    entities: EntityRows,
    as_known: bool,
    strategy: Strategy = "slots",
) -> pa.Table:
    """The entity rows, each exactly once, in their order and with their columns, followed by the features.

    Windowed values are always as known by t; `as_known` extends that to row views.
    """
    return next(iter(retrieve_slices(con, requests, entities, as_known, max(entities.table.num_rows, 1), strategy)))


def retrieve_slices(
    con: duckdb.DuckDBPyConnection,
    requests: Sequence[ViewRequest],
    entities: EntityRows,
    as_known: bool,
    slice_rows: int | None = None,
    strategy: Strategy = "slots",
) -> Iterator[pa.Table]:
    """`retrieve` in tables of `slice_rows` entity rows (None: as many as fit in a part of the memory limit); at least one.

    All views are matched first, which leaves 8 bytes per entity row and view; then only one slice of values is held.
    Every slice reads the row groups that it needs again.
    """
    found: list[tuple[ViewRequest, ParquetSource, list[Column], Ints] | pa.Table] = []
    for request in requests:
        if request.definition is not None:
            found.append(window_values(con, request, entities.table, entities.t_ns))
        else:
            source, places = match_view(con, request, entities.table, entities.t_ns, as_known, strategy)
            with reading(source.label):
                columns = feature_columns(con, source, request.features)
            found.append((request, source, columns, places))
    if slice_rows is None:
        slice_rows = _slice_rows(con, sum(len(r.features) for r in requests))
    for start in range(0, max(entities.table.num_rows, 1), slice_rows):
        result = entities.table.slice(start, slice_rows).combine_chunks()
        for view in found:
            if isinstance(view, pa.Table):
                values = view.slice(start, slice_rows)
            else:
                values = fetch(con, view[1], view[3][start : start + slice_rows], view[2])
            for name in values.column_names:
                result = result.append_column(name, values.column(name))
        yield result


def _slice_rows(con: duckdb.DuckDBPyConnection, features: int) -> int:
    """A quarter of the memory limit, at a guess of 16 bytes per value, of which three copies may exist at a time."""
    limit = memory_limit(con)
    return max(limit // 4 // (48 * max(features, 1)), MIN_SLICE_ROWS)


def known_keys(
    con: duckdb.DuckDBPyConnection,
    requests: Sequence[ViewRequest],
    start: datetime | None,
    end: datetime,
    as_known: bool,
) -> pa.Table:
    """Rows for entity-less retrieval: each key with a row or event in [start, end], once, at `end`, in key order.

    The views must share one set of join keys, or have subsets of it; UsageError otherwise.
    """
    widest = max((tuple(k.entity for k in r.keys) for r in requests), key=len)
    for r in requests:
        if not {k.entity for k in r.keys} <= set(widest):
            raise UsageError(
                "retrieval without entity rows needs views with one set of join keys",
                value=[k.entity for k in r.keys],
                valid=widest,
                next_step="pass entity_df",
            )
    asked = [r for r in requests if {k.entity for k in r.keys} == set(widest)]
    sources = [
        open_events(con, r) if r.definition is not None else open_source(con, r.label, [r.place], r.next_step)
        for r in asked
    ]
    selects = [_keys_sql(s, r, widest, start, end, as_known) for s, r in zip(sources, asked, strict=True)]
    scans = [
        (s, [*(k.source for k in r.keys), r.timestamp, r.created, "_visible_at"])
        for s, r in zip(sources, asked, strict=True)
    ]
    columns = ", ".join(ident(k) for k in widest)
    with scanning_all("retrieval without entity rows", scans):
        if widest:
            keys = con.sql(f"SELECT DISTINCT {columns} FROM ({' UNION ALL '.join(selects)}) ORDER BY {columns}")
            table = keys.to_arrow_table()
        else:
            table = pa.table({})
    rows = table.num_rows if widest else 1
    return table.append_column(EVENT_TIMESTAMP, pa.array([to_micros(end)] * rows, pa.timestamp("us", "UTC")))


def _keys_sql(
    source: ParquetSource,
    request: ViewRequest,
    keys: Sequence[str],
    start: datetime | None,
    end: datetime,
    as_known: bool,
) -> str:
    windowed = request.definition is not None
    conditions = [f"{ident(k.source)} IS NOT NULL" for k in request.keys]
    created = "_visible_at" if windowed else request.created if as_known else None
    for column, operator, bound in (
        (request.timestamp, ">=", start),
        (request.timestamp, "<=", end),
        (created, "<=", end),
    ):
        if column and bound is not None:
            sql_type = source.require_time(column, "time")
            tick = to_micros(bound) * 1000 // ns_per_tick(sql_type)
            conditions.append(f"{ticks(ident(column), sql_type)} {operator} {tick}")
    if windowed:
        conditions.append("_dropped IS NULL")
    by_entity = {k.entity: k.source for k in request.keys}
    selected = ", ".join(f"{ident(by_entity[k])} AS {ident(k)}" for k in keys)
    return f"SELECT {selected} FROM {source.relation} WHERE {' AND '.join(conditions)}"
