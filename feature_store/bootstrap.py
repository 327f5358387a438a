"""The online state of windowed views from history known by a time; the stream takes over where it stops.

Reads the event log (history and stream) with DuckDB, builds the entities' states some at a time, writes states and values,
sets the replay clock and the consumer group's start. `from_log` does the same for a Redis that lost its states, and leaves
the consumer group alone. Public: `bootstrap`, `write_states`.
"""

from __future__ import annotations

import logging
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store import stream_place
from feature_store.bootstrap_plan import (
    BootstrapPlan,
    Start,
    StreamPlace,
    plan_bootstrap,
    refuse_running,
    views_together,
)
from feature_store.bootstrap_states import LoggedStates, LogSummary
from feature_store.clock import ClockMode, to_micros
from feature_store.erasure_list import ErasureList, not_erased
from feature_store.errors import DataError
from feature_store.event_log import EventLog, log_files
from feature_store.log_rows import log_directory
from feature_store.rewound import mark_rewound
from feature_store.topic import commit_group, committed_offsets
from feature_store.topic_record import TopicRecord, read_record, write_record
from feature_store.window_store import WindowStore
from feature_store.windows.definition import WindowedView
from feature_store.windows.state import NEVER, States

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)


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
    without one, at the first message known after history's newest event (without history: the oldest); or (`start`) at the
    topic's end. `rewind` first forgets what the stream logged after `known_by` and deletes the views' online rows; without it, such rows are a
    DataError. When it was is kept beside the log, by `wall_clock`: the check leaves out what was served before (without a
    clock nothing is kept, and the check would call that different). Online rows of another definition go, too. Under `replay` the clock is set to `known_by` (rewind)
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
        _commit(store, config, stream.group, chosen, plans, forward=True)
    for (view, definition), plan in zip(chosen, plans, strict=True):
        event_log = EventLog(log_directory(offline_path, view), definition.topic)
        online = WindowStore(store, view)
        if rewind:
            if wall_clock is not None:
                mark_rewound(event_log.directory.parent, wall_clock())
            online.delete()
            event_log.rewind(known_by_us, plan.topic_id)
        elif online.is_of_another_definition():
            online.delete()  # states of the definition before, which nobody can go on with; also after a kill within here
        if log_files(event_log.directory.parent):
            found, fenced = write_states(online, event_log, erasures, known_by_us, advance)
        else:  # all its events will come from the topic
            found, fenced = LogSummary(0, 0, NEVER, {}), 0
            online.begin(uuid.uuid4().hex)
        if fenced:
            raise DataError(
                f"{view.name}: {fenced} of {found.entities} entities hold states from later events than the log has",
                value=known_by.isoformat(),
                next_step=f"stop every sync of the view's topic; `predictflow windows bootstrap {view.name} --rewind --dry-run`",
            )
        if clock == "replay":
            (online.clock.set if rewind else online.clock.advance)(known_by_us)
        known = TopicRecord(definition.topic, plan.topic_id, len(plan.starts), starts=plan.starts)
        if not stream:
            known = read_record(event_log) or TopicRecord(definition.topic, "", 0)
        write_record(event_log, replace(known, history_watermark_us=found.history_watermark_us))
        done.append(Bootstrapped(view.name, known_by, found.entities, found.events, plan.forgotten, dict(plan.starts)))
    if rewind and wall_clock is not None:
        # Again at the end: until now a server that runs meanwhile found rows missing.
        for view, _ in chosen:
            mark_rewound(log_directory(offline_path, view).parent, wall_clock())
    if stream and not rewind:
        _commit(store, config, stream.group, chosen, plans, forward=start == "end")
    return done


def _commit(
    store: FeatureStore,
    config: dict[str, Any],
    group: str,
    chosen: Sequence[tuple[Any, WindowedView]],
    plans: Sequence[BootstrapPlan],
    *,
    forward: bool = False,
) -> None:
    """Sets the group to the least of the views' starts; each view knows its own (`_topic.json`).

    Not beyond what the group has committed, unless `forward`: a batch may be in a view's log whose other messages, of
    ordinary views or for the dead letters, are not done.
    """
    for topic in {d.topic for _, d in chosen}:
        of_topic = [plan.starts for plan, (_, d) in zip(plans, chosen, strict=True) if d.topic == topic]
        starts = {p: min(s[p] for s in of_topic) for p in of_topic[0]}
        held = {} if forward else committed_offsets(config, group, topic, list(starts))
        starts = {p: min(o, held.get(p, o)) for p, o in starts.items()}
        online: Any = store._get_provider().online_store  # Feast has no public way
        place = stream_place.StreamPlace(online._get_client(store.config.online_store), store.project, group, topic)
        place.note(starts)  # first: a note below the committed offset would say that states were lost
        commit_group(config, group, topic, starts)
        place.set(starts)


def write_states(
    online: WindowStore,
    event_log: EventLog,
    erasures: ErasureList,
    known_by_us: int | None,
    advance: Callable[[int], None] | None,
) -> tuple[LogSummary, int]:
    """Writes what history and log give by `known_by_us` (None: all): states, values, watermarks; then the marker that says
    that they are there. Returns what was read, and how many entities kept a newer state. Safe to repeat.
    """
    definition = online.definition
    listed = [(k, k, erasures.digests_of(k)) for k in definition.entity_key]
    fenced = 0
    with LoggedStates(definition, event_log.directory.parent, known_by_us, not_erased(listed)) as logged:
        watermarks = logged.summary.watermarks if definition.closes_windows else {}
        for chunk in logged.chunks():
            fenced += online.rewrite(chunk.keys, chunk.states, watermarks).fenced
            if advance is not None:
                advance(len(chunk.keys))
        online.write([], States.empty(definition, 0), watermarks)  # also where no event counts
        online.begin(uuid.uuid4().hex)  # last: sync must not take half of the states for all of them
        return logged.summary, fenced
