"""Window states of a few events, for tests of what reads and writes them: the definition's own SQL says what events hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.clock import to_micros
from feature_store.windows.definition import WindowedView
from feature_store.windows.plan import plan_of
from feature_store.windows.state import NEVER, Events, States

_TYPES = {
    "int64": pa.int64(),
    "float64": pa.float64(),
    "string": pa.string(),
    "bool": pa.bool_(),
    "timestamp": pa.timestamp("us", "UTC"),
}


def states_of(
    definition: WindowedView, events: Sequence[tuple[datetime, Mapping[str, Any]]], known: datetime
) -> States:
    """The state of one entity after events (time, columns; a missing column is null), all `known` at one time, offsets
    from 0 in partition 0."""
    states = States.empty(definition, 1)
    if not events:
        return states
    plan, n = plan_of(definition), len(events)
    source = definition.source
    columns: dict[str, pa.Array] = {
        name: pa.array([cells.get(name) for _, cells in events], _TYPES[kind]) for name, kind in source.columns.items()
    }
    columns[source.timestamp] = pa.array([t for t, _ in events], _TYPES["timestamp"])
    if source.event_id is not None:
        columns[source.event_id] = pa.array(
            [cells.get(source.event_id, f"e{i}") for i, (_, cells) in enumerate(events)]
        )
    rows = pa.table(columns)
    with duckdb.connect() as connection:
        connection.register("events", rows)
        numbers = connection.sql(f"SELECT {plan.numbers_sql()}, {plan.event_id_sql()} FROM events").to_arrow_table()

    def all_of(value: int) -> np.ndarray:
        return np.full(n, value)

    states.apply(
        Events(
            all_of(0),
            np.array([to_micros(t) for t, _ in events]),
            all_of(0),
            np.arange(n),
            all_of(to_micros(known)),
            all_of(NEVER),
            numbers["_mask"].to_numpy(),
            numbers["_id"].to_numpy(),
            [numbers[f"_v{i}"].to_numpy() for i in range(len(plan.values))],
        )
    )
    return states
