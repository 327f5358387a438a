"""What a bootstrap would do, found without changing anything: what it forgets, and where the stream takes over."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa

from feature_store.clock import ClockMode, from_micros, to_micros
from feature_store.errors import DataError, UnavailableError
from feature_store.event_log import HISTORY, EventLog, log_files, split
from feature_store.log_rows import log_directory
from feature_store.topic import client_config, group_members, offset_ranges, topic_id
from feature_store.topic_record import refuse_other_topic
from feature_store.window_store import windowed_views
from feature_store.windows.definition import SQL_TAG, WindowedView

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

log = logging.getLogger(__name__)

Start = Literal["known_by", "end"]
"""Where the group starts: at the first message that log and history may lack, or after all that the topic holds (only
where a producer sends them again, as the demo does)."""


@dataclass(frozen=True)
class StreamPlace:
    """Where the stream takes over: a broker and a consumer group. `schema_registry`: URL, for Avro messages without a
    schema of their own in the definition."""

    bootstrap_servers: str
    group: str
    schema_registry: str | None = None


@dataclass(frozen=True)
class BootstrapPlan:
    """What is to be done for one view.

    `forgotten`: rows that leave the stream's log (in `files` files), with their first and last offset per partition in
    `offsets`; `gone` of them the topic no longer holds, so that no consumer will bring them back. `starts`: partition ->
    first offset that sync will read; empty without a broker or topic. `topic_id`: the topic's now, '' where unknown.
    """

    view: str
    known_by: datetime
    forgotten: int = 0
    files: int = 0
    offsets: Mapping[int, tuple[int, int]] = field(default_factory=dict)
    gone: int = 0
    starts: Mapping[int, int] = field(default_factory=dict)
    topic_id: str = ""


def plan_bootstrap(
    store: FeatureStore,
    offline_path: str,
    known_by: datetime,
    *,
    clock: ClockMode,
    stream: StreamPlace | None = None,
    views: Sequence[str] = (),
    rewind: bool = False,
    start: Start = "known_by",
) -> list[BootstrapPlan]:
    """One plan per view of the topics of `views` (default: all), in the registry's order. Changes nothing.

    Raises DataError: no history of a view that can have one, or rows later than `known_by`; NotFoundError: unknown view; UnavailableError: no
    broker, or the group has running members.
    """
    chosen = views_together(store, views)
    if stream is not None:
        refuse_running(stream)
    known_by_us = to_micros(known_by)
    directories = {v.name: log_directory(offline_path, v).parent for v, _ in chosen}
    until = {v.name: _history_until(v, directories[v.name], known_by_us, rewind) for v, _ in chosen}
    config = client_config(stream.bootstrap_servers) if stream else {}
    topics = {d.topic for _, d in chosen} if stream else set()
    ranges = {t: offset_ranges(config, t) for t in topics}
    ids = {t: topic_id(config, t) if ranges[t] else "" for t in topics}
    plans = []
    for view, d in chosen:
        held = ranges.get(d.topic, {})
        now = ids.get(d.topic, "")
        event_log = EventLog(log_directory(offline_path, view), d.topic)
        rows = event_log.read(["_topic_id", "_partition", "_offset", "_visible_at"])
        kept, forgotten = split(rows, known_by_us, now) if rewind and rows is not None else (rows, None)
        if not rewind:
            refuse_other_topic(view.name, event_log, now)
        ends = {p: last for p, (_, last) in _extent(kept).items()}
        if start == "end":
            starts = {p: high for p, (_, high) in held.items()}
        else:
            starts = {p: min(ends[p] + 1, high) for p, (_, high) in held.items() if p in ends}
            rest = {p: bounds for p, bounds in held.items() if p not in ends}
            registry = stream.schema_registry if stream else None
            starts |= _first_newer(config, view, d, rest, until[view.name], clock, registry)
        offsets = _extent(forgotten)
        gone = 0
        if forgotten is not None and offsets and stream is not None:
            places = zip(*(forgotten[c].to_pylist() for c in ("_topic_id", "_partition", "_offset")))
            gone = sum((bool(now) and i != now) or o < held.get(p, (0, 0))[0] for i, p, o in places)
        plans.append(
            BootstrapPlan(
                view.name,
                known_by,
                0 if forgotten is None else forgotten.num_rows,
                _files_of(event_log, offsets),
                offsets,
                gone,
                starts,
                now,
            )
        )
    return plans


def views_together(store: FeatureStore, views: Sequence[str]) -> list[tuple[FeatureView, WindowedView]]:
    """All views of the topics of `views`: one consumer group feeds them, so they are bootstrapped together."""
    topics = {d.topic for _, d in windowed_views(store, views)}
    return [(v, d) for v, d in windowed_views(store) if d.topic in topics]


def refuse_running(stream: StreamPlace) -> None:
    """UnavailableError while the group has members: a running sync would write its states over the new ones."""
    members = group_members(client_config(stream.bootstrap_servers), stream.group)
    if members:
        raise UnavailableError(
            f"consumer group {stream.group} has {len(members)} running member(s); nothing was changed",
            value=members[0],
            next_step="stop `predictflow sync` of this group (one that was killed is gone after 6 s), then try again",
        )


def _extent(rows: pa.Table | None) -> dict[int, tuple[int, int]]:
    """partition -> first and last offset."""
    if rows is None or not rows.num_rows:
        return {}
    found = rows.group_by("_partition").aggregate([("_offset", "min"), ("_offset", "max")]).to_pylist()
    return {r["_partition"]: (r["_offset_min"], r["_offset_max"]) for r in sorted(found, key=lambda r: r["_partition"])}


def _files_of(event_log: EventLog, offsets: Mapping[int, tuple[int, int]]) -> int:
    return sum(
        f.first <= offsets[f.partition][1] and f.last >= offsets[f.partition][0]
        for f in event_log.files()
        if f.partition in offsets
    )


def _history_until(view: FeatureView, directory: Path, known_by_us: int, rewind: bool) -> int | None:
    """The newest time known to history, None where all events come from the stream."""
    import duckdb

    files = log_files(directory)
    if not files:
        if view.batch_source is None or SQL_TAG not in view.batch_source.tags:
            return None  # no backfill could write any
        raise DataError(
            f"{view.name}: no event history",
            value=str(directory / HISTORY),
            next_step=f"`predictflow backfill {view.name}`",
        )
    with duckdb.connect() as con:
        con.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
        newest, streamed, streamed_until = con.execute(
            """SELECT max(us) FILTER (WHERE p < 0), count(*) FILTER (WHERE p >= 0 AND us > $known_by), max(us)
            FROM (SELECT _partition AS p, epoch_us(_visible_at) AS us FROM read_parquet($files, union_by_name => true))""",
            {"files": files, "known_by": known_by_us},
        ).fetchall()[0]
    if newest is not None and newest > known_by_us:
        # The states would lack these events, and the stream's copies of them would count beside history's.
        raise DataError(
            f"{view.name}: history holds events known after known_by",
            value=from_micros(known_by_us).isoformat(),
            next_step=f"bootstrap at {from_micros(newest).isoformat()} or later",
        )
    if streamed and not rewind:
        raise DataError(
            f"{view.name}: the stream has logged {streamed} events known after known_by",
            value=from_micros(known_by_us).isoformat(),
            next_step=f"bootstrap at {from_micros(streamed_until).isoformat()} or later, or pass --rewind to forget them",
        )
    return None if newest is None else int(newest)


def _first_newer(
    config: dict[str, Any],
    view: FeatureView,
    definition: WindowedView,
    held: Mapping[int, tuple[int, int]],
    until_us: int | None,
    clock: ClockMode,
    schema_registry: str | None,
) -> dict[int, int]:
    """Partition -> offset of the first message that history may lack: known after its newest event, or not an event.

    The messages themselves are read up to there, since a broker's own times say nothing of data that is sent again.
    """
    from feature_store.events import BadMessageError, MessageSchema, parse_message
    from feature_store.topic import read_until

    if until_us is None or not held:
        return {p: low for p, (low, _) in held.items()}
    schema = MessageSchema.of_windowed(definition)
    codec = schema.codec(schema_registry)
    starts: dict[int, int | None] = dict.fromkeys(held)

    def is_newer(message: Any) -> bool:
        p = message.partition()
        try:
            m = parse_message(schema, message.key(), message.value(), codec)
        except BadMessageError:
            # For the dead-letter topic, unless older events follow: then it was dealt with when they were.
            if starts[p] is None:
                starts[p] = message.offset()
            return False
        known = m.created
        if known is None:
            known = m.timestamp if clock == "replay" else max(m.timestamp, message.timestamp()[1] * 1000)
        if known <= until_us:
            starts[p] = None
            return False
        if starts[p] is None:
            starts[p] = message.offset()
        return True

    read_until(config, definition.topic, dict(held), is_newer)
    for p, (low, _) in held.items():
        if starts[p] == low > 0:
            log.warning(
                "%s: the oldest message that partition %d still holds is newer than history (%s): events between are lost",
                view.name,
                p,
                from_micros(until_us).isoformat(),
            )
    return {p: high if (found := starts[p]) is None else found for p, (_, high) in held.items()}
