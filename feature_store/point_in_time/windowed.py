"""Values of a windowed view for entity rows, computed exactly from its event history and event log.

The window SQL is `feature_store.windows.history`, the same definition that the stream applies. Entity times are read
in microseconds, the unit of the online clock: a nanosecond entity time is floored, so nothing after it is seen.
"""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.point_in_time.engine import ident
from feature_store.point_in_time.join import entity_keys, spread
from feature_store.point_in_time.request import Feature, ViewRequest
from feature_store.point_in_time.source import ParquetSource, open_source, scanning
from feature_store.windows.definition import STATE_FIELD

HISTORY, STREAM = "history", "stream"
"""Directories below a windowed view's path: what backfill wrote, and the log of what sync applied."""


def open_events(con: duckdb.DuckDBPyConnection, request: ViewRequest) -> ParquetSource:
    """The events of a windowed view; a missing directory means no events of that kind yet, both missing is an error."""
    places = [f"{request.place.rstrip('/')}/{part}" for part in (HISTORY, STREAM)]
    return open_source(con, request.label, places, request.next_step)


def window_values(con: duckdb.DuckDBPyConnection, request: ViewRequest, entities: pa.Table, t_ns: pa.Array) -> pa.Table:
    """One row per entity row, in order: the requested aggregates at t over the events visible by t.

    `window_state` is null: the state of the stream has no history.
    """
    from feature_store.windows.history import history_sql

    assert request.definition is not None
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
    columns = "".join(f", CAST({ident(f.source)} AS BIGINT) AS {ident(f.output)}" for f in wanted)
    con.register("_entities", rows)
    try:
        with scanning(source, list(source.columns)):
            sql = history_sql(request.definition, "_entities", f"(SELECT * FROM {source.relation})", known="by_time")
            found = con.sql(f"SELECT _row{columns} FROM ({sql})").to_arrow_table()
    finally:
        con.unregister("_entities")
    values = spread(found, len(t_ns), [f.output for f in wanted])
    return pa.table({f.output: _column(values, f) for f in request.features})


def _column(values: pa.Table, feature: Feature) -> pa.ChunkedArray | pa.Array:
    if feature.source == STATE_FIELD:
        return pa.nulls(values.num_rows, pa.binary())
    return values.column(feature.output)
