"""One windowed view fed by a topic: a micro-batch of messages becomes log rows, states and online values. No Kafka.

Order within a batch: the log is on disk before the states change, so that whatever was served can be recomputed, and an
event that is delivered again keeps the time at which it first became visible, and the watermark that stood before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

from feature_store.batch_columns import entities_of, int64_of, valid_of
from feature_store.batch_result import BatchResult, PartitionResult
from feature_store.clock import ClockMode
from feature_store.durable import StorageError
from feature_store.erased_rows import ErasedRows
from feature_store.event_decode import UTC_MICROS, Decoder, RawBatch
from feature_store.event_log import IDLE, EventLog, Rest
from feature_store.event_numbers import EventNumbers
from feature_store.events import CREATED, MessageSchema
from feature_store.held_states import Key
from feature_store.log_rows import log_directory, log_rows, log_schema
from feature_store.logged import NEVER, Bools, Ints, Logged, LoggedTails
from feature_store.stream_batch import Begun, GoodEvents, Placed, Prepared
from feature_store.topic_record import read_record
from feature_store.visibility import ahead, too_far_ahead, visible_times
from feature_store.watermarks import Watermarks
from feature_store.window_store import HELD_BYTES, WindowStore
from feature_store.windows.state import APPLIED, DUPLICATE, LATE, REPLAYED, Events, States

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

log = logging.getLogger(__name__)


class StreamView:
    """Applies messages of one topic to one view. One instance per process; a partition belongs to one process at a time."""

    def __init__(
        self,
        store: FeatureStore,
        view: FeatureView,
        offline_path: str,
        topic_id: str,
        clock: ClockMode,
        *,
        schema_registry: str | None = None,
    ) -> None:
        self.online = WindowStore(store, view, HELD_BYTES)
        self.definition = self.online.definition
        self.name = view.name
        self.log = EventLog(log_directory(offline_path, view), self.definition.topic)
        schema = MessageSchema.of_windowed(self.definition)
        self._decoder = Decoder(schema, schema.codec(schema_registry))
        self._numbers = EventNumbers(self.definition)
        self._schema = log_schema(self.definition)
        self._topic_id = topic_id
        self._clock = clock
        self._logged = LoggedTails()
        self._watermarks = Watermarks(self.definition.source.allowed_lateness_us)
        self._visible_us = 0
        self._newest: dict[int, int] = {}  # partition -> its greatest event time here: where idle advances end
        self._starts: dict[int, int] = {}  # partition -> the first offset that is not in history, until it came
        self._heard: dict[int, int] = {}  # partition -> the machine's clock at its last message
        self._erased = ErasedRows(offline_path, self.definition.entity_key)
        self._told_moved = False

    # Partitions

    def start_partition(self, partition: int, from_offset: int, wall_us: int = 0) -> None:
        """Call when a partition is assigned: rows logged beyond its committed offset will be delivered again."""
        self.online.forget()  # another process wrote the partition's entities
        try:
            self.log.compact(partition, wall_us)
        except (OSError, StorageError) as e:  # it can wait, for instance for room on the disk
            log.warning("event log of %s not compacted: %s", self.name, e)
        logged = self.log.logged(partition, from_offset)
        record = read_record(self.log)
        history = NEVER if record is None or record.history_watermark_us is None else record.history_watermark_us
        self._logged.start(partition, logged)
        self._watermarks.start(self.log, self.definition.source.timestamp, partition, from_offset, logged, history)
        self._heard[partition] = wall_us
        if record is not None and from_offset < (start := record.starts.get(partition, 0)):
            self._starts[partition] = start

    def stop_partition(self, partition: int) -> None:
        """Call when a partition was taken away."""
        self._logged.stop(partition)
        self._watermarks.stop(partition)
        self._heard.pop(partition, None)
        self._starts.pop(partition, None)
        self._newest.pop(partition, None)
        self.log.forget(partition)

    def _not_in_history(self, batch: RawBatch) -> RawBatch:
        """Without messages that another view of the topic still needed, but whose events this view's history holds."""
        return RawBatch.of([m for i in range(len(batch)) if (m := batch[i]).offset >= self._starts.get(m.partition, 0)])

    def committed(self, partition: int, next_offset: int) -> None:
        """Call when offsets are committed: what was logged before `next_offset` will not be delivered again."""
        self._logged.committed(partition, next_offset)
        if next_offset >= self._starts.get(partition, next_offset):
            self._starts.pop(partition, None)

    def watermark(self, partition: int) -> int:
        """After all that was read of a partition; NEVER: none."""
        return self._watermarks.of(partition)

    def compact(self, partition: int, wall_us: int, rest: Rest) -> None:
        """Merges the partition's small log files, beside batches: `rest` sleeps for seconds. `wall_us`: the machine's clock."""
        self.log.compact(partition, wall_us, rest=rest)

    def went_back(self) -> None:
        """Call when Redis lost what was written last."""
        self.online.forget()

    def close(self) -> None:
        """Call when no batch will follow."""
        self._numbers.close()

    # Batches

    def apply(self, batch: RawBatch, now_us: int, wall_us: int) -> BatchResult:
        """`prepare`, `begin` and `finish`."""
        return self.begin(self.prepare(batch, now_us, wall_us)).finish()

    def prepare(self, batch: RawBatch, now_us: int, wall_us: int) -> Prepared:
        """Reads messages (offsets ascending per partition), and applies them to their states where all of them are kept from
        the last writes. Writes nothing, and says nothing to Redis, which may still work on the last batch.

        `now_us`: the clock, wall or replay; `wall_us`: the machine's, beyond which nothing can have happened or been known
        yet, whatever the clock. DataError: an erasure list that cannot be read. UnavailableError: no schema registry.
        """
        result = BatchResult()
        if self._starts:
            batch = self._not_in_history(batch)
        for p in set(batch.partitions):
            self._heard[p] = wall_us
            result.partitions[p] = PartitionResult()
        events = self._good(batch, wall_us, result)
        prepared = Prepared(batch, now_us, wall_us, result, events)
        placed = self._placed(prepared, events, self.online.load_held)
        return prepared if placed is None else replace(prepared, placed=placed)

    def begin(self, prepared: Prepared) -> Begun:
        """Logs and applies what `prepare` made, when the batch before is finished without a newer owner's states met.

        Safe to repeat, with `prepare`, after any error (UnavailableError: Redis; OSError: log not writable): nothing counts twice.
        """
        result, placed = prepared.result, prepared.placed
        assert prepared.events is not None
        if placed is not None:
            self.online.confirm()
        else:
            placed = self._loaded(prepared, prepared.events)
        again = dict.fromkeys(result.partitions, 0)
        while (behind := (placed.outcome == REPLAYED) & ~placed.logged).any():
            # Logged by another owner since we read the log; else it was refused when it came first, or left the log: it
            # was never counted as a new event, and is none now.
            gone = behind & ~self._read_again(placed.events, behind)
            for p in placed.events.partition[gone].tolist():
                again[p] += 1
            placed = self._loaded(prepared, placed.events.where(~gone))
        result.refused.sort(key=lambda refused: refused[0][:2])
        self._append(placed)
        result.ids_forgotten = placed.states.ids_forgotten
        self._watermarks.advance(placed.after, _next_offsets(placed.events))
        self._count(placed, result)
        for p, n in again.items():
            result.partitions[p].replayed += n
        result.clock_us = int(np.max(placed.visible, initial=0))
        self._visible_us = max(self._visible_us, result.clock_us)
        keys, states, marks = placed.keys, placed.states, self._known_watermarks(placed)
        if (placed.outcome == REPLAYED).all():
            if not marks:
                return Begun(result)
            keys, states = [], states.slice(0, 0)  # who wrote them may have been killed before it told the watermarks
        self._tell_damaged(result)
        self._tell_moved(placed, result)
        return Begun(result, self.online.begin_write(keys, states, marks))

    def listened(self, wall_us: int) -> None:
        """Call after a pause, for whatever reason: what was not heard meanwhile was no silence."""
        self._heard = dict.fromkeys(self._heard, wall_us)

    def silent(self, read_to: Mapping[int, int], wall_us: int) -> dict[int, int]:
        """Those of the partitions that `advance_idle` would move."""
        timeout = self.definition.source.idle_timeout_us
        if timeout is None or self._clock != "wall" or not self.definition.closes_windows:
            return {}
        watermark = wall_us - timeout - self.definition.source.allowed_lateness_us
        silent = {}
        for p, offset in read_to.items():
            now = self._watermarks.of(p)
            end = self._newest.get(p, now) + 2 * self.definition.longest_window_us
            if (
                offset > 0
                and now != NEVER
                and wall_us - self._heard.get(p, wall_us) >= timeout
                and now < min(watermark, end)
            ):
                silent[p] = offset
        return silent

    def advance_idle(self, read_to: Mapping[int, int], wall_us: int) -> int:
        """Moves the watermark of partitions that were silent for the source's idle timeout; how many rows that logged.

        `read_to`: the next offset of each partition of which the broker has just said that this is its end. Only where windows close, and only under
        the wall clock. A silent partition stands at the clock less timeout and allowed lateness, until no window of its
        events is open. Errors as `apply`; safe to repeat.
        """
        timeout = self.definition.source.idle_timeout_us
        silent = list(self.silent(read_to, wall_us))
        if not silent or timeout is None:
            return 0
        watermark = wall_us - timeout - self.definition.source.allowed_lateness_us
        visible = max(wall_us, self._visible_us + 1)
        n = len(silent)
        columns = {f.name: pa.nulls(n, f.type) for f in self._schema}
        columns["_topic_id"] = pa.array([self._topic_id] * n, pa.string())
        columns["_partition"] = pa.array(silent, pa.int32())
        columns["_offset"] = pa.array([read_to[p] - 1 for p in silent], pa.int64())
        columns["_visible_at"] = pa.array([visible] * n, UTC_MICROS)
        columns["_watermark"] = pa.array([watermark] * n, UTC_MICROS)
        columns["_dropped"] = pa.array([IDLE] * n, pa.string())
        self.log.append(pa.table(columns, schema=self._schema))
        self._visible_us = visible
        for p in silent:
            self._watermarks.idle(p, watermark)
            self._heard[p] = wall_us
        self.online.write([], self.online.load([]), dict.fromkeys(silent, (watermark, visible)))
        return n

    # The steps of a batch

    def _loaded(self, prepared: Prepared, events: GoodEvents) -> Placed:
        placed = self._placed(prepared, events, self.online.load)
        assert placed is not None
        return placed

    def _placed(
        self, prepared: Prepared, events: GoodEvents, load: Callable[[Sequence[Key]], States | None]
    ) -> Placed | None:
        """The events applied to their entities' states; nothing is written. Those ahead of the clock are left out, and go
        into the result. None: `load` does not have all states."""
        keys, entity = entities_of(events.rows, self.definition.entity_key)
        states, now_us = load(keys), prepared.now_us
        if states is None:
            return None
        logged, first_visible, first_watermark = self._logged.find(events.partition, events.offset)
        # Strictly after everything that a reader may have been told at the present clock.
        floor = max([now_us if self._clock == "replay" else now_us - 1, self._visible_us, 0])
        if self._clock == "wall":
            floor = max(floor, int(np.max(states.visible_at, initial=0)), int(np.max(first_visible, initial=0)))
        visible, early = visible_times(events.time, self._known(events), logged, first_visible, floor, self._clock)
        if early.any():
            self._refuse_early(prepared.batch, events, visible, early, prepared.result)
            keep = ~early
            events, visible, logged, first_watermark = (
                events.where(keep),
                visible[keep],
                logged[keep],
                first_watermark[keep],
            )
            keys, entity = entities_of(events.rows, self.definition.entity_key)
            states = load(keys)
            if states is None:
                return None
        partitions = states.in_partitions
        before, after = self._watermarks.before(events.partition, events.offset, events.time, first_watermark)
        outcome = states.apply(
            Events(
                entity=entity,
                time=events.time,
                partition=events.partition,
                offset=events.offset,
                visible_at=visible,
                watermark=before,
                mask=events.numbers["_mask"],
                id=events.numbers["_id"],
                values=[events.numbers[name] for name in self._numbers.values],
            )
        )
        moved = np.flatnonzero(states.in_partitions > np.maximum(partitions, 1))
        return Placed(events, keys, states, visible, logged, before, after, outcome, moved)

    def _read_again(self, events: GoodEvents, wanted: Bools) -> Bools:
        """Which events the log holds by now; it is read from the first of `wanted` on."""
        for p in np.unique(events.partition[wanted]).tolist():
            first = int(events.offset[wanted & (events.partition == p)].min())
            self._logged.add(p, self.log.logged(p, first))
        return self._logged.find(events.partition, events.offset)[0]

    def _good(self, batch: RawBatch, wall_us: int, result: BatchResult) -> GoodEvents:
        """The events that can be applied, but for those ahead of the clock; the others go into `result`."""
        decoded = self._decoder.decode(batch)
        for at, reason in decoded.refused:
            result.refused.append((batch[at], reason))
        rows, place = decoded.rows, decoded.places
        erased = self._erased.of(rows)
        if erased.any():
            for i in place[erased].tolist():
                result.partitions[batch.partitions[i]].erased += 1
            rows, place = rows.filter(pa.array(~erased)), place[~erased]
        numbers, failed = self._numbers.of(rows)
        time = int64_of(rows[self.definition.source.timestamp])
        partition = np.asarray(batch.partitions, np.int64)[place]
        offset = np.asarray(batch.offsets, np.int64)[place]
        events = GoodEvents(rows, place, partition, offset, time, numbers)
        bad = np.zeros(len(events), bool)
        for i, reason in failed:
            bad[i] = True
            result.refused.append((batch[int(place[i])], reason))
        created = rows[CREATED]
        late = (
            (CREATED, np.where(valid_of(created), int64_of(created), NEVER)),
            (self.definition.source.timestamp, time),
        )
        for name, times in late:
            beyond = too_far_ahead(times, wall_us) & ~bad
            for i in np.flatnonzero(beyond):
                reason = ahead(name, int(times[i]), "the machine's clock", wall_us)
                result.refused.append((batch[int(place[i])], reason))
            bad |= beyond
        return events.where(~bad)

    def _known(self, events: GoodEvents) -> Ints:
        """When the source knew each event."""
        created = events.rows[CREATED]
        return np.where(valid_of(created), int64_of(created), events.time)

    def _refuse_early(
        self, batch: RawBatch, events: GoodEvents, visible: Ints, early: Bools, result: BatchResult
    ) -> None:
        for i in np.flatnonzero(early):
            reason = ahead(self.definition.source.timestamp, int(events.time[i]), "the clock", int(visible[i]))
            result.refused.append((batch[int(events.place[i])], reason))

    def _append(self, placed: Placed) -> None:
        """Logs the rows that are not in the log yet."""
        events, new = placed.events, ~placed.logged
        if not new.any():
            return
        self.log.append(log_rows(self._schema, self._topic_id, placed))
        for p in np.unique(events.partition[new]).tolist():
            mine = new & (events.partition == p)
            self._logged.add(p, Logged(events.offset[mine], placed.visible[mine], placed.before[mine]))

    def _known_watermarks(self, placed: Placed) -> dict[int, tuple[int, int]]:
        """What readers of closed windows need: each partition's watermark, and from when on it is known."""
        if not self.definition.closes_windows:
            return {}
        of = placed.events.partition
        return {p: (w, int(placed.visible[of == p].max())) for p, w in placed.after.items() if w != NEVER}

    def _tell_damaged(self, result: BatchResult) -> None:
        """A damaged state stays as it is, so that reads of it are errors; its entity's events are in the log."""
        result.damaged = len(self.online.damaged)
        for key, error in list(self.online.damaged.items())[:1]:
            log.warning(
                "%s: %d entities are not written, their states in Redis being damaged, as that of %s (%s): "
                "stop sync, then `predictflow sync --from-log`",
                self.name, result.damaged, key, error.message,
            )  # fmt: skip

    def _tell_moved(self, placed: Placed, result: BatchResult) -> None:
        """One owner counts such an entity right; two owners write over each other, since a state has one fence."""
        result.moved = len(placed.moved)
        if result.moved and not self._told_moved:
            self._told_moved = True
            i = int(placed.moved[0])
            log.warning(
                "%s: events of %s are in partitions %s of topic %s: while several consumers run, some of them may be lost. "
                "Give all producers of the topic the same partitioner, then stop sync and `predictflow sync --from-log`",
                self.name, placed.keys[i], sorted(placed.states.offsets_of(i)), self.definition.topic,
            )  # fmt: skip

    def _count(self, placed: Placed, result: BatchResult) -> None:
        events, before, outcome = placed.events, placed.before, placed.outcome
        lateness = self.definition.source.allowed_lateness_us
        late = (before != NEVER) & (events.time < before + lateness)
        for p, watermark in placed.after.items():
            mine = events.partition == p
            of = outcome[mine]
            counts = np.bincount(of, minlength=4)
            found = result.partitions[p]
            found.applied, found.duplicates = int(counts[APPLIED]), int(counts[DUPLICATE])
            found.replayed, found.dropped = int(counts[REPLAYED]), int(counts[LATE])
            found.late = int((late[mine] & (of != REPLAYED)).sum())
            found.watermark_us = watermark
            self._newest[p] = max(self._newest.get(p, NEVER), int(events.time[mine].max()))


def _next_offsets(events: GoodEvents) -> dict[int, int]:
    return {p: int(events.offset[events.partition == p].max()) + 1 for p in np.unique(events.partition).tolist()}
