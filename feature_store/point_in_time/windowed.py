"""Values of a windowed view for entity rows, computed exactly from its event history and event log.

The window SQL is `feature_store.windows.history`, the same definition that the stream applies. Entity times are read
in microseconds, the unit of the online clock: a nanosecond entity time is floored, so nothing after it is seen.
"""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import DataError
from feature_store.event_log import HISTORY, STREAM
from feature_store.point_in_time.engine import ident
from feature_store.point_in_time.join import entity_keys, spread
from feature_store.point_in_time.request import Feature, ViewRequest
from feature_store.point_in_time.source import ParquetSource, open_source, require_same_kind, scanning
from feature_store.point_in_time.types import as_declared, ns_per_tick, ticks
from feature_store.windows.definition import STATE_FIELD, WindowedView
from feature_store.windows.ir import Type
from feature_store.windows.plan import NOT_FINITE, not_finite_sql

EVENTS = "_window_events"
"""The temporary view that `make_events` creates."""

_SQL: dict[Type, str] = {
    "int64": "BIGINT",
    "float64": "DOUBLE",
    "string": "VARCHAR",
    "bool": "BOOLEAN",
    "timestamp": "TIMESTAMP WITH TIME ZONE",
}
_LOG: dict[str, str] = {"_partition": "INTEGER", "_offset": "BIGINT", "_dropped": "VARCHAR"}
_SKETCH_ROWS = 50_000
"""COUNT(DISTINCT) holds up to a few thousand hashes per entity row while it merges."""


def open_events(con: duckdb.DuckDBPyConnection, request: ViewRequest) -> ParquetSource:
    """The events of a windowed view; a missing directory means no events of that kind yet, both missing is an error."""
    places = [f"{request.place.rstrip('/')}/{part}" for part in (HISTORY, STREAM)]
    return open_source(con, request.label, places, request.next_step)


def make_events(
    con: duckdb.DuckDBPyConnection, source: ParquetSource, definition: WindowedView, *, ids: bool = False
) -> list[str]:
    """Creates the view EVENTS, the event log in the definition's types, and returns its columns.

    `ids`: with the event id, which states keep; values need none, since the log says what was a repetition. Times finer than a microsecond are cut. DataError naming the column that no file holds, or that changes its kind.
    """
    times = [definition.source.timestamp, "_visible_at", "_watermark"]
    items = [ident(k) for k in definition.entity_key]
    not_finite = not_finite_sql(definition.source)
    for key in definition.entity_key:
        source.require(key, "an entity key")
    read: dict[str, str] = {**definition.source.columns, **_LOG}
    if ids and definition.source.event_id is not None:
        read[definition.source.event_id] = "string"
    for name, kind in read.items():
        if name in definition.entity_key:
            continue
        stored = source.require(name, "the event log")
        value = as_type(name, stored, _SQL.get(kind, kind))  # type: ignore[call-overload]  # kind is a Type or SQL
        if name == "_dropped" and not_finite is not None:  # files of before backfill marked them
            value = f"coalesce({value}, CASE WHEN {not_finite} THEN '{NOT_FINITE}' END)"
        items.append(f"{value} AS {ident(name)}")
    for name in times:
        stored = source.columns.get(name, "") if name == "_watermark" else source.require_time(name, "an event's time")
        items.append(f"{as_type(name, stored, _SQL['timestamp'])} AS {ident(name)}")
    names = [*dict.fromkeys([*definition.entity_key, *read, *times])]
    require_same_kind(source, names)
    con.execute(f"CREATE OR REPLACE TEMP VIEW {EVENTS} AS SELECT {', '.join(items)} FROM {source.relation}")
    return [n for n in names if n in source.columns]


def as_type(name: str, stored: str, wanted: str) -> str:
    """SQL that reads a column of DuckDB type `stored` ('': there is none) as another."""
    if not stored:
        return f"CAST(NULL AS {wanted})"
    if wanted == _SQL["timestamp"] and stored not in ('"NULL"', wanted):
        tick = ticks(ident(name), stored)
        return f"make_timestamptz({tick if ns_per_tick(stored) == 1000 else _micros(tick)})"
    return f"CAST({ident(name)} AS {wanted})"


def _micros(ns: str) -> str:
    return f"(({ns} - (({ns} % 1000) + 1000) % 1000) // 1000)"


def window_values(con: duckdb.DuckDBPyConnection, request: ViewRequest, entities: pa.Table, t_ns: pa.Array) -> pa.Table:
    """One row per entity row, in order: the requested outputs at t over the events visible by t, in their declared types.

    `window_state` is null: the state of the stream has no history.
    """
    definition = request.definition
    assert definition is not None
    source = open_events(con, request)
    keys = entity_keys(entities, request.keys, source)
    rows = pa.table(
        {
            "_row": pa.array(np.arange(len(t_ns))),
            **{k.source: column for k, column in zip(request.keys, keys, strict=True)},
            "_t": pa.array(t_ns.to_numpy() // 1000, pa.int64()).cast(pa.timestamp("us", "UTC")),
        }
    )
    for key in request.keys:
        rows = rows.filter(pc.is_valid(rows.column(key.source)))
    wanted = [f for f in request.features if f.source != STATE_FIELD]
    types = {o.name: _SQL[o.type] for o in definition.outputs}
    for f in wanted:
        if f.source not in types:
            raise DataError(
                f"{request.label}: its SQL has no such output", value=f.source, valid=types, next_step="feast apply"
            )
    columns = "".join(
        f", {as_declared(ident(f.source), types[f.source], f.dtype, f'{request.label}: feature {f.name}')} AS {ident(f.output)}"
        for f in wanted
    )
    logged = make_events(con, source, definition)
    has_sketch = any(a.function == "count_distinct" for s in definition.statements for a in s.aggregates)
    size = _SKETCH_ROWS if has_sketch else max(rows.num_rows, 1)
    parts = [
        _select(con, source, definition, rows.slice(start, size), columns, logged)
        for start in range(0, max(rows.num_rows, 1), size)
    ]
    values = spread(pa.concat_tables(parts), len(t_ns), [f.output for f in wanted])
    return pa.table({f.output: _column(values, f) for f in request.features})


def _select(
    con: duckdb.DuckDBPyConnection,
    source: ParquetSource,
    definition: WindowedView,
    rows: pa.Table,
    columns: str,
    logged: list[str],
) -> pa.Table:
    from feature_store.windows.history import history_sql

    con.register("_entities", rows)
    try:
        with scanning(source, logged):
            sql = history_sql(definition, "_entities", EVENTS, known="by_time")
            return con.sql(f"SELECT _row{columns} FROM ({sql})").to_arrow_table()
    finally:
        con.unregister("_entities")


def _column(values: pa.Table, feature: Feature) -> pa.ChunkedArray | pa.Array:
    if feature.source == STATE_FIELD:
        return pa.nulls(values.num_rows, pa.binary())
    return values.column(feature.output)
