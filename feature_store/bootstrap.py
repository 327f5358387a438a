"""The online state of windowed views from history known by a time; the stream takes over where it stops.

Reads the event log (history and stream) with DuckDB, builds every entity's state at once, writes states and values,
sets the replay clock and the consumer group's start.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.bootstrap_plan import (
    BootstrapPlan,
    Start,
    StreamPlace,
    plan_bootstrap,
    refuse_running,
    views_together,
)
from feature_store.clock import ClockMode, from_micros, to_micros
from feature_store.erasure_list import ErasureList, not_erased
from feature_store.event_log import EventLog, log_files
from feature_store.rewound import mark_rewound
from feature_store.stream_view import log_directory
from feature_store.topic import commit_group
from feature_store.topic_record import TopicRecord, write_record
from feature_store.window_store import Key, WindowStore
from feature_store.windows.definition import WindowedView
from feature_store.windows.state import NEVER, RETENTION_SLACK, EntityState, event_id_hash, masks_of, summed_columns

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)
_ROWS_PER_WRITE = 2_000


@dataclass(frozen=True)
class Bootstrapped:
    """What was done for one view. `starts`: partition -> first offset that sync will read; empty without a broker."""

    view: str
    known_by: datetime
    entities: int
    events: int
    forgotten: int
    starts: dict[int, int]


def bootstrap(
    store: FeatureStore,
    offline_path: str,
    known_by: datetime,
    *,
    clock: ClockMode,
    stream: StreamPlace | None = None,
    views: Sequence[str] = (),
    rewind: bool = False,
    start: Start = "known_by",
    wall_clock: Callable[[], datetime] | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Bootstrapped]:
    """Writes the state of every entity as known by `known_by` (UTC, inclusive), for `views` (default: all).

    All views of a topic go together, since one consumer group feeds them. The group starts where the stream's log ends;
    without one, at the first message known after history's newest event; or (`start`) at the topic's end. `rewind` first
    forgets what the stream logged after `known_by` and deletes the views' online rows; without it, such rows are a
    DataError. When it was is kept beside the log, by `wall_clock`: the check leaves out what was served before (without a
    clock nothing is kept, and the check would call that different). Under `replay` the clock is set to `known_by` (rewind)
    or moved on to it. Safe to repeat, also after a kill. `plan_bootstrap` tells beforehand. `advance` is told of entities
    written.

    Raises what `plan_bootstrap` raises, before anything is changed; UnavailableError: servers.
    """
    from feature_store.topic import client_config, ensure_topic

    chosen = views_together(store, views)
    config = client_config(stream.bootstrap_servers) if stream else {}
    if stream:
        refuse_running(stream)
        for topic in {d.topic for _, d in chosen}:
            ensure_topic(config, topic)
    plans = plan_bootstrap(
        store, offline_path, known_by, clock=clock, stream=stream, views=views, rewind=rewind, start=start
    )
    known_by_us = to_micros(known_by)
    erasures = ErasureList(offline_path)
    done = []
    if stream and rewind:
        # First: were we to end half-way, sync must find again what the log forgets. What it still holds is recognised.
        _commit(config, stream.group, chosen, plans)
    for (view, definition), plan in zip(chosen, plans, strict=True):
        event_log = EventLog(log_directory(offline_path, view), definition.topic)
        online = WindowStore(store, view)
        if rewind:
            if wall_clock is not None:
                mark_rewound(event_log.directory.parent, wall_clock())
            online.delete()
            event_log.rewind(known_by_us, plan.topic_id)
        listed = [(k, k, erasures.digests_of(k)) for k in definition.entity_key]
        files = log_files(event_log.directory.parent)
        states, events = states_of(definition, files, known_by_us, not_erased(listed))
        keys = list(states)
        for i in range(0, len(keys), _ROWS_PER_WRITE):
            part = keys[i : i + _ROWS_PER_WRITE]
            online.write({k: states[k] for k in part})
            if advance is not None:
                advance(len(part))
        if clock == "replay":
            (online.set_clock if rewind else online.advance_clock)(known_by_us)
        if stream:
            write_record(event_log, TopicRecord(definition.topic, plan.topic_id, len(plan.starts)))
        done.append(Bootstrapped(view.name, known_by, len(states), events, plan.forgotten, dict(plan.starts)))
    if rewind and wall_clock is not None:
        # Again at the end: until now a server that runs meanwhile found rows missing.
        for view, _ in chosen:
            mark_rewound(log_directory(offline_path, view).parent, wall_clock())
    if stream and not rewind:
        _commit(config, stream.group, chosen, plans)
    return done


def _commit(
    config: dict[str, Any], group: str, chosen: Sequence[tuple[Any, WindowedView]], plans: Sequence[BootstrapPlan]
) -> None:
    for topic in {d.topic for _, d in chosen}:
        of_topic = [plan.starts for plan, (_, d) in zip(plans, chosen, strict=True) if d.topic == topic]
        commit_group(config, group, topic, {p: min(s[p] for s in of_topic) for p in of_topic[0]})


def states_of(
    definition: WindowedView, files: Sequence[str], known_by_us: int, conditions: Sequence[str] = ()
) -> tuple[dict[Key, EntityState], int]:
    """The state of every entity from log files, and the number of events counted. Pure but for reading the files.

    Only rows that meet all `conditions` (SQL) count.
    Trusts `_dropped` (duplicates are marked when they are logged). Entities silent for longer than ttl get a state too:
    they were seen, which is not the same as NOT_FOUND.
    """
    import duckdb

    names = [_name(k) for k in definition.entity_key]
    keys = ", ".join(names)
    columns = [c for c, _ in definition.columns.items()]
    floor = known_by_us - (definition.longest_window + RETENTION_SLACK) // _US
    event_id = _name(definition.event_id) if definition.event_id else "NULL"
    listed = ", ".join(_name(c) for c in columns)
    with duckdb.connect() as con:
        con.execute(
            f"""CREATE TEMP TABLE log AS
            SELECT {keys}, {listed}, {event_id} AS _id, _partition, _offset, _dropped,
                   epoch_us({_name(definition.timestamp)}) AS _us
            FROM read_parquet($files, union_by_name => true) WHERE {" AND ".join(["epoch_us(_visible_at) <= $known_by", *conditions])}
            QUALIFY _partition < 0 OR row_number() OVER (PARTITION BY _partition, _offset ORDER BY _visible_at) = 1""",
            {"files": list(files), "known_by": known_by_us},
        )
        con.execute(
            f"""CREATE TEMP TABLE entity AS
            SELECT {keys}, row_number() OVER (ORDER BY {keys}) - 1 AS _e,
                   max(_us) FILTER (WHERE _dropped IS NULL AND _us < {floor}) AS _evicted, count(*) FILTER (WHERE _dropped IS NULL) AS _n
            FROM log GROUP BY {keys}"""
        )
        entities = con.execute(f"SELECT {keys}, _evicted, _n FROM entity ORDER BY _e").fetchall()
        offsets: list[dict[int, int]] = [{} for _ in entities]
        for e, partition, offset in con.execute(
            f"SELECT _e, _partition, max(_offset) FROM log JOIN entity USING ({keys}) GROUP BY ALL"
        ).fetchall():
            offsets[e][partition] = offset
        kept: Any = con.sql(
            f"""SELECT _e, _us, _id, {listed} FROM log JOIN entity USING ({keys})
            WHERE _dropped IS NULL AND _us >= {floor} ORDER BY _e, _us, _partition, _offset"""
        ).to_arrow_table()

    values = {c: kept[c].to_pylist() for c in columns}
    times = kept["_us"].to_numpy().astype(np.int64)
    ids: np.ndarray[Any, Any] = np.empty(0, dtype="<u8")
    if definition.event_id:
        ids = np.fromiter((event_id_hash(i) for i in kept["_id"].to_pylist()), dtype="<u8", count=kept.num_rows)
    masks = masks_of(definition, values, kept.num_rows)
    summed = [kept[c].fill_null(0).to_numpy().astype(np.int64) for c in summed_columns(definition)]
    bounds = np.searchsorted(kept["_e"].to_numpy(), np.arange(len(entities) + 1))
    states: dict[Key, EntityState] = {}
    for e, (*key, evicted, n) in enumerate(entities):
        if not n:
            continue
        a, b = int(bounds[e]), int(bounds[e + 1])
        states[tuple(key)] = EntityState.of_history(
            definition,
            times[a:b],
            ids[a:b],
            masks[a:b],
            [c[a:b] for c in summed],
            offsets[e],
            known_by_us,
            NEVER if evicted is None else evicted,
        )
    return states, sum(n for *_, n in entities)


_US = from_micros(1) - from_micros(0)


def _name(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
