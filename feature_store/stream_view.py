"""One windowed view fed by a topic: a micro-batch of messages becomes log rows, states and online values. No Kafka.

Order within a batch: the log is on disk before the states change, so that whatever was served can be recomputed, and an
event that is delivered again keeps the time at which it first became visible.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from feature_store.clock import MAX_SKEW, MICROSECOND, ClockMode, from_micros
from feature_store.erasure_list import ErasureList, digest_of
from feature_store.errors import DefinitionError, UsageError
from feature_store.event_log import LOG_FIELDS, STREAM, UTC_MICROS, EventLog
from feature_store.events import BadMessageError, Message, parse_message
from feature_store.window_store import Key, WindowStore
from feature_store.windows.definition import WindowedView
from feature_store.windows.state import Event

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

_TYPES = {"string": pa.string(), "int64": pa.int64()}
_KEY_TYPES = {"STRING": pa.string(), "INT64": pa.int64()}
_SKEW_US = MAX_SKEW // MICROSECOND


@dataclass(frozen=True, slots=True)
class Raw:
    """A message as it came."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


@dataclass
class BatchResult:
    """What became of a batch. `clock_us`: the newest `_visible_at` given, 0 if none; `refused`: with the reason.

    `erased`: of entities on the erasure list, which go nowhere, not even to the dead letters.
    """

    applied: int = 0
    erased: int = 0
    duplicates: int = 0
    replayed: int = 0
    late: int = 0
    without_value: int = 0
    clock_us: int = 0
    refused: list[tuple[Raw, str]] = field(default_factory=list)


class StreamView:
    """Applies messages of one topic to one view. One instance per process; a partition belongs to one process at a time.

    `late` counts events older than the newest of their partition that this instance has applied.
    """

    def __init__(
        self, store: FeatureStore, view: FeatureView, offline_path: str, topic_id: str, clock: ClockMode
    ) -> None:
        self.online = WindowStore(store, view)
        self.definition = self.online.definition
        self.name = view.name
        self.log = EventLog(log_directory(offline_path, view), self.definition.topic)
        self._schema = log_schema(self.definition, view)
        self._integer_keys = {k for k in self.definition.entity_key if self._schema.field(k).type == pa.int64()}
        self._topic_id = topic_id
        self._clock = clock
        self._logged: dict[int, dict[int, int]] = {}
        self._visible_us = 0
        self._newest: dict[int, int] = {}
        self._erasures = ErasureList(offline_path)
        self._erasures_read: tuple[int, ...] | None = None
        self._erased: list[tuple[int, str, frozenset[str]]] = []  # place in the key, join key, digests

    def start_partition(self, partition: int, from_offset: int) -> None:
        """Call when a partition is assigned: rows logged beyond its committed offset will be delivered again."""
        self.log.compact(partition)
        self._logged[partition] = self.log.logged(partition, from_offset)
        self._newest.pop(partition, None)

    def stop_partition(self, partition: int) -> None:
        """Call when a partition was taken away."""
        self._logged.pop(partition, None)

    def apply(self, batch: Sequence[Raw], now_us: int, wall_us: int) -> BatchResult:
        """Logs and applies messages (offsets ascending per partition). `now_us`: the clock, wall or replay; `wall_us`: the
        machine's, beyond which nothing can have happened or been known yet, whatever the clock.

        Safe to repeat after any error (UnavailableError: Redis; OSError: log not writable): nothing counts twice.
        DataError: an erasure list that cannot be read.
        """
        result = BatchResult()
        parsed: list[tuple[Raw, Message]] = []
        self._read_erasures()
        for raw in batch:
            try:
                message = parse_message(self.definition, raw.key, raw.value, self._integer_keys)
            except BadMessageError as e:
                result.refused.append((raw, e.message))
                continue
            if self._is_erased(message):
                result.erased += 1
            else:
                parsed.append((raw, message))
        states = self.online.load(sorted({m.key for _, m in parsed}, key=str))
        # Strictly after everything that a reader may have been told at the present clock.
        floor = max([now_us if self._clock == "replay" else now_us - 1, self._visible_us, 0])
        if self._clock == "wall":
            floor = max([floor, *(s.visible_at for s in states.values())])
        accepted = self._admit(parsed, floor, wall_us, result)
        result.refused.sort(key=lambda refused: (refused[0].partition, refused[0].offset))

        by_key: dict[Key, list[Event]] = defaultdict(list)
        for message, event in accepted:
            by_key[message.key].append(event)
        changed, dropped = {}, {}
        for key, events in by_key.items():
            for applied in states[key].apply(self.definition, events):
                place = (applied.event.partition, applied.event.offset)
                if applied.outcome == "replayed":
                    result.replayed += 1
                    continue
                changed[key] = states[key]
                dropped[place] = applied.outcome if applied.outcome == "duplicate" else None
                result.duplicates += applied.outcome == "duplicate"
                result.applied += applied.outcome == "applied"
        self._append(accepted, dropped)
        result.without_value = self.online.write(changed)
        for _, event in accepted:
            result.clock_us = max(result.clock_us, event.visible_at)
            newest = self._newest.get(event.partition, event.timestamp)
            result.late += event.timestamp < newest
            self._newest[event.partition] = max(newest, event.timestamp)
        self._visible_us = max(self._visible_us, result.clock_us)
        return result

    def committed(self, partition: int, next_offset: int) -> None:
        """Call when a batch is done: what was logged before `next_offset` will not be delivered again."""
        logged = self._logged.get(partition)
        if logged:
            self._logged[partition] = {o: t for o, t in logged.items() if o >= next_offset}

    def _read_erasures(self) -> None:
        now = self._erasures.changed()
        if now == self._erasures_read:
            return
        listed = [(i, k, self._erasures.digests_of(k)) for i, k in enumerate(self.definition.entity_key)]
        self._erased = [of_key for of_key in listed if of_key[2]]
        self._erasures_read = now

    def _is_erased(self, message: Message) -> bool:
        return any(digest_of(join_key, message.key[i]) in digests for i, join_key, digests in self._erased)

    def _admit(
        self, parsed: Sequence[tuple[Raw, Message]], floor: int, wall_us: int, result: BatchResult
    ) -> list[tuple[Message, Event]]:
        """Gives every message the time at which it becomes visible; refuses those dated too far ahead of it."""
        accepted = []
        for raw, m in parsed:
            visible = self._logged.get(raw.partition, {}).get(raw.offset)
            if visible is None:
                known = m.created if m.created is not None else m.timestamp
                visible = max(floor + 1, known) if self._clock == "replay" else floor + 1
                reason = self._too_far_ahead(m, visible, wall_us)
                if reason is not None:
                    result.refused.append((raw, reason))
                    continue
            floor = max(floor, visible)
            accepted.append((m, Event(m.timestamp, raw.partition, raw.offset, visible, m.values, m.event_id)))
        return accepted

    def _too_far_ahead(self, m: Message, visible: int, wall_us: int) -> str | None:
        """Why a message is refused. One from the future would move the replay clock there, and it never goes back."""
        for name, time, clock, limit in (
            ("created", m.created, "the machine's clock", wall_us),
            (self.definition.timestamp, m.timestamp, "the machine's clock", wall_us),
            (self.definition.timestamp, m.timestamp, "the clock", visible),
        ):
            if time is not None and time > limit + _SKEW_US:
                return (
                    f"{name} {from_micros(time).isoformat()} is more than {MAX_SKEW.total_seconds():g} s ahead of "
                    f"{clock}, {from_micros(limit).isoformat()}"
                )
        return None

    def _append(self, accepted: Sequence[tuple[Message, Event]], dropped: Mapping[tuple[int, int], str | None]) -> None:
        """Logs the rows that are not in the log yet, also those that only a lost log would lack."""
        rows = [(m, e) for m, e in accepted if e.offset not in self._logged.get(e.partition, {})]
        if not rows:
            return
        d = self.definition
        columns: dict[str, list[object]] = {k: [m.key[i] for m, _ in rows] for i, k in enumerate(d.entity_key)}
        if d.event_id is not None:
            columns[d.event_id] = [m.event_id for m, _ in rows]
        for name in d.columns:
            columns[name] = [m.values[name] for m, _ in rows]
        columns[d.timestamp] = [m.timestamp for m, _ in rows]
        columns["created"] = [e.visible_at if m.created is None else m.created for m, e in rows]
        columns["_topic_id"] = [self._topic_id] * len(rows)
        columns["_partition"] = [e.partition for _, e in rows]
        columns["_offset"] = [e.offset for _, e in rows]
        columns["_visible_at"] = [e.visible_at for _, e in rows]
        columns["_watermark"] = [None] * len(rows)
        columns["_dropped"] = [dropped.get((e.partition, e.offset)) for _, e in rows]
        self.log.append(pa.table({f.name: pa.array(columns[f.name], f.type) for f in self._schema}))
        for _, e in rows:
            self._logged.setdefault(e.partition, {})[e.offset] = e.visible_at


def log_schema(definition: WindowedView, view: FeatureView) -> pa.Schema:
    """The columns of a view's event log. DefinitionError for an entity key that is neither text nor integer."""
    fields = [] if definition.event_id is None else [pa.field(definition.event_id, pa.string())]
    for column in view.entity_columns:
        kind = column.dtype.to_value_type().name
        if kind not in _KEY_TYPES:
            raise DefinitionError(f"{view.name}: entity key {column.name} of this type", value=kind, valid=_KEY_TYPES)
        fields.append(pa.field(column.name, _KEY_TYPES[kind]))
    fields += [pa.field(definition.timestamp, UTC_MICROS), pa.field("created", UTC_MICROS)]
    fields += [pa.field(name, _TYPES[kind]) for name, kind in definition.columns.items()]
    return pa.schema(fields + LOG_FIELDS)


def log_directory(offline_path: str, view: FeatureView, part: str = STREAM) -> Path:
    """Where the log of a view is: `stream/` or `history/` below its source's path."""
    source = getattr(view.batch_source, "path", None) or view.name
    if "://" in offline_path or "://" in source:
        raise UsageError(
            "the event log needs a local directory",
            value=source if "://" in source else offline_path,
            next_step="set PREDICTFLOW_OFFLINE to a directory that sync, training and check share",
        )
    return Path(offline_path) / source / part
