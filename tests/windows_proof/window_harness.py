"""Runs a scenario through the stream's states and through history, and asks both many times; `window_judge.py` compares.

The stream side is the real `States` with blobs in a dictionary for Redis: batches of random size over the partitions,
crashes after any step (log written, some of the dirty entities written, nothing committed), restarts from the committed
offsets with other batch sizes. The history side is the real `history_sql` over the event log that this left. A read is
one (entity, t, what was known).
"""

from __future__ import annotations

import contextlib
import traceback
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import Literal

import duckdb
import numpy as np
import window_platform as platform
from window_histories import Message, Scenario
from window_oracle import HISTORY, Answer, Oracle, OutOfRangeError, Raw
from window_platform import DROPPED, NEVER, Got, Numbers, Platform, Row

from feature_store.windows.state import APPLIED, REPLAYED, Events, States

NOBODY = "nobody"
"""An entity without events."""

MakeOracle = Callable[..., Oracle]


@dataclass
class Read(platform.Read):
    """One read and what the platform answered. `by_time`: history knows at t just what the state knew."""

    by_time: bool = False
    state: Got | None = None
    history_by_time: Got | None = None
    history_by_offset: Got | None = None
    too_early: bool = False


class Run:
    """One scenario, run once: the log it left and the answers to all reads. `faults`: what contradicts itself."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self.random = Random(scenario.plan)
        self.view = scenario.meant.view
        self.platform = Platform(self.view, self.random.choice(["UTC", "America/New_York", "Asia/Kolkata"]))
        self.reference = self.oracle()
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.reads: list[Read] = []
        self.rows: list[Row] = []
        """The log, in the order in which the events became known."""

    def oracle(self, make: MakeOracle = Oracle) -> Oracle:
        """One for this scenario's definition, not fed yet."""
        source = self.view.source
        return make(
            self.scenario.meant.statements,
            retention_us=source.retention_us,
            lateness_us=source.allowed_lateness_us,
            ttl_us=self.platform.ttl_us,
            has_event_id=source.event_id is not None,
            history_watermark=self.history_watermark,
        )

    @property
    def history_watermark(self) -> int | None:
        """Where every partition's watermark begins: bootstrap hands the history's over to the stream."""
        times = [m.time for m in self.scenario.history]
        return max(times) - self.view.source.allowed_lateness_us if times else None

    def go(self) -> Run:
        with contextlib.closing(self.platform):
            try:
                self._prepare()
                self._stream()
                self.rows = [*self.history_rows, *self._arrived()]
                self.reference.feed(self.raws())
                self._ask_about_the_past()
                self._ask_history()
            except Exception:  # noqa: BLE001 - whatever is raised is a fault too, to be made small like any other
                self.faults.append(traceback.format_exc())
        return self

    def raws(self) -> list[Raw]:
        """The rows of the log as events that nobody has judged yet."""
        return [
            Raw(m.entity, m.time, r.partition, r.offset, r.visible_at, m.columns, m.event_id, m.idle)
            for r in self.rows
            for m in [r.message]
        ]

    # The topic, without what no engine could take

    def _prepare(self) -> None:
        self.history = [m for m in self.scenario.history if self._fits(m)]
        self.topic: list[list[tuple[int, Message]]] = []
        for partition in self.scenario.partitions:
            placed, offset = [], self.random.choice([0, 0, 5])
            for m in partition:
                if m.idle is None and not self._fits(m):
                    offset += 1  # dead-lettered: its offset is nobody's
                    continue
                placed.append((offset, m))
                offset += 0 if m.idle is not None else self.random.choice([1, 1, 1, 1, 3])
            self.topic.append(placed)
        events = [*self.history, *(m for p in self.topic for _, m in p if m.idle is None)]
        self._place = {id(m): i for i, m in enumerate(events)}
        self.numbers = self.platform.numbers(events) if events else Numbers(np.empty(0), np.empty(0), [])

    def _fits(self, m: Message) -> bool:
        try:
            self.reference.inputs(Raw(m.entity, m.time, 0, 0, 0, m.columns))
        except OutOfRangeError:
            self.counts["refused"] += 1
            if self.random.random() < 0.1:
                self._check_refused(m)
            return False
        return True

    def _check_refused(self, m: Message) -> None:
        with contextlib.suppress(duckdb.OutOfRangeException, duckdb.ConversionException):
            if all(np.isfinite(v).all() for v in self.platform.numbers([m]).values):
                self.faults.append(f"DuckDB takes an event that overflows: {m}")

    # The stream

    def _stream(self) -> None:
        r = self.random
        self.blobs: dict[str, bytes] = {}
        self.log: dict[tuple[int, int], Row] = {}
        self.idle: list[Row] = []
        self.committed = [0] * len(self.topic)
        self.watermarks: dict[int, int] = {}
        self.clock = NEVER
        self.positions = list(self.committed)
        self._bootstrap()
        size = r.choice([1, 3, 10, 1000])
        while any(p < len(t) for p, t in zip(self.positions, self.topic)):
            if not self._idle_advance():
                self._batch(r.randint(1, size), crash=r.random() < 0.2)
            size = r.choice([1, 3, 10, 1000])
        self._read_states(last=True)

    def _bootstrap(self) -> None:
        rows = [Row(m, HISTORY, i, m.produced, None, None) for i, m in enumerate(self.history)]
        self.history_rows = rows
        if not rows:
            return
        self.clock = max(r.visible_at for r in rows)
        self.watermarks[HISTORY] = max(m.time for m in self.history) - self.view.source.allowed_lateness_us
        entities = sorted({m.entity for m in self.history if m.entity is not None})
        states = States.empty(self.view, len(entities))
        codes = states.apply(self._events(rows, entities))
        if set(codes.tolist()) != {APPLIED}:
            self.faults.append(f"rows of history were not all applied: {codes.tolist()}")
        self.blobs.update(zip(entities, states.encode()))
        self._read_states()

    def _idle_advance(self) -> bool:
        """Moves a silent partition's watermark on, where that is what comes next."""
        for p, topic in enumerate(self.topic):
            at = self.positions[p]
            if at < len(topic) and topic[at][1].idle is not None and self.committed[p] == at:
                offset, m = topic[at]
                assert m.idle is not None
                before = self._watermark_before(p, at)
                after = m.idle if before is None else max(before, m.idle)
                self.clock = max(self.clock + 1, m.produced)
                self.idle.append(self._idle_row(m, p, offset, after))
                self.positions[p] = self.committed[p] = at + 1
                self.watermarks[p] = after
                self._read_states()
                return True
        return False

    def _idle_row(self, m: Message, partition: int, offset: int, after: int) -> Row:
        """`offset`: that of the partition's next event."""
        return Row(m, partition, offset - 1, self.clock, after, "idle")

    def _watermark_before(self, partition: int, position: int) -> int | None:
        """From the log, as a consumer that has just started finds it."""
        found = self.history_watermark
        lateness = self.view.source.allowed_lateness_us
        for offset, m in self.topic[partition][:position]:
            row = self.log.get((partition, offset))
            after = m.idle if m.idle is not None else m.time - lateness
            if row is not None or m.idle is not None:
                found = after if found is None else max(found, after)
        return found

    def _take(self, size: int) -> list[tuple[int, int, int, Message]]:
        """The next messages, mostly in the order in which they were produced: (partition, place, offset, message)."""
        taken = []
        at = list(self.positions)
        while len(taken) < size:
            ready = [p for p, t in enumerate(self.topic) if at[p] < len(t) and t[at[p]][1].idle is None]
            if not ready:
                break
            if self.random.random() < 0.9:
                p = min(ready, key=lambda p: self._expected(p, at[p]))
            else:
                p = self.random.choice(ready)
            offset, m = self.topic[p][at[p]]
            taken.append((p, at[p], offset, m))
            at[p] += 1
        return taken

    def _expected(self, partition: int, position: int) -> int:
        """When the message there becomes visible, were it next."""
        offset, m = self.topic[partition][position]
        row = self.log.get((partition, offset))
        return row.visible_at if row is not None else max(self.clock + 1, m.produced)

    def _batch(self, size: int, crash: bool) -> None:
        r = self.random
        taken = self._take(size)
        if not taken:
            return
        rows = []
        floor = self.clock
        watermarks = {p: self._watermark_before(p, self.positions[p]) for p in {p for p, *_ in taken}}
        lateness = self.view.source.allowed_lateness_us
        for p, _, offset, m in taken:
            logged = self.log.get((p, offset))
            visible = logged.visible_at if logged is not None else max(floor + 1, m.produced)
            floor = max(floor, visible)
            before = watermarks[p]
            rows.append(Row(m, p, offset, visible, before, None))
            watermarks[p] = m.time - lateness if before is None else max(before, m.time - lateness)
        entities = sorted({m.entity for *_, m in taken if m.entity is not None})
        states = States.decode(self.view, [self.blobs.get(e) for e in entities])
        codes = states.apply(self._events(rows, entities)).tolist()
        stage = r.choice(["before the log", "some of the log", "some states", "before the commit"]) if crash else ""
        if stage == "before the log":
            self.positions = list(self.committed)
            return
        skipped = {r.choice([p for p, *_ in taken])} if stage == "some of the log" else set()
        self._append(rows, codes, skipped)
        if stage == "some of the log":
            self.positions = list(self.committed)
            return
        dirty = [i for i in range(len(entities)) if stage != "some states" or r.random() < 0.5]
        encoded = states.encode()
        for i in dirty:
            self.blobs[entities[i]] = encoded[i]
        self.clock = max(self.clock, floor)
        if stage:
            self.counts["crashes"] += 1
            self._read_states(by_time=False)
            self.positions = list(self.committed)
            return
        for p, place, _, _ in taken:
            self.positions[p] = place + 1
        self.committed = list(self.positions)
        self.watermarks.update({p: w for p, w in watermarks.items() if w is not None})
        self.counts["batches"] += 1
        self._read_states()

    def _append(self, rows: Sequence[Row], codes: Sequence[int], skipped: set[int]) -> None:
        for row, code in zip(rows, codes):
            place = (row.partition, row.offset)
            logged = self.log.get(place)
            if code == REPLAYED:
                if logged is None:
                    self.faults.append(f"replayed, but never logged: {place}")
            elif logged is not None:
                if logged.dropped != DROPPED[code] or logged.watermark != row.watermark:
                    self.faults.append(
                        f"another outcome when delivered again: {place} {logged.dropped} {DROPPED[code]}"
                    )
            elif row.partition not in skipped:
                self.log[place] = Row(
                    row.message, row.partition, row.offset, row.visible_at, row.watermark, DROPPED[code]
                )
                self.clock = max(self.clock, row.visible_at)

    def _events(self, rows: Sequence[Row], entities: Sequence[str]) -> Events:
        places = np.array([self._place[id(r.message)] for r in rows], dtype=np.int64)
        return self.platform.events(rows, entities, self.numbers.at(places))

    # Reads

    def _read_states(self, by_time: bool = True, last: bool = False) -> None:
        r = self.random
        if not last and r.random() < 0.3:
            return
        coming = [self._expected(p, at) for p, at in enumerate(self.positions) if at < len(self.topic[p])]
        # A state cannot know by time what was logged before a crash and not applied again yet.
        until = min(coming, default=self.clock + 200 * self.scenario.meant.unit_us + 1) - 1
        mapping = dict(self.watermarks) if r.random() < 0.8 else None
        asked: list[Read] = []
        for entity in [*self.scenario.entities, NOBODY]:
            for t in self._times(entity, self.clock, until, 120 if last else 30):
                exact = by_time and self.clock <= t <= until and mapping is not None
                asked.append(Read(entity, t, {}, by_time=exact))
        states = States.decode(self.view, [self.blobs.get(q.entity) for q in asked])
        for q, visible in zip(asked, states.visible_at.tolist()):
            if visible != NEVER and r.random() < 0.02:
                q.t, q.by_time, q.too_early = visible - 1, False, True
        answers = self.platform.ask_states(states, [q.t for q in asked], mapping)
        for q, question, got in zip(asked, answers[::2], answers[1::2]):
            assert isinstance(question, platform.Read)
            assert isinstance(got, Got)
            q.offsets, q.watermark, q.state = question.offsets, question.watermark, got
        self.reads += asked

    def _times(self, entity: str, start: int, until: int, count: int) -> list[int]:
        """Where something changes, and one microsecond to each side: from `start`, to `until` and some beyond."""
        r = self.random
        found = {start, until}
        times = [row.message.time for row in (*self.log.values(), *self.history_rows) if row.message.entity == entity]
        for time in r.sample(times, min(len(times), 12)):
            for s in self.scenario.meant.statements:
                w = s.window
                edges = [time, time + w.size_us]
                if w.slide_us:
                    edges = [time, time // w.slide_us * w.slide_us + r.randint(0, 3) * w.slide_us + w.size_us]
                for edge in edges:
                    found.update((edge - 1, edge, edge + 1))
            ttl = self.platform.ttl_us
            found.update((time + ttl, time + ttl + 1) if ttl else ())
        near = [t for t in found if start <= t <= until]
        span = max(1, until - start)
        near += [start + r.randrange(span) for _ in range(count // 4)]
        far = [t for t in found if t > max(until, start)] + [
            max(until, start) + 1 + r.randrange(30 * self.scenario.meant.unit_us)
        ]
        return r.sample(near, min(len(near), count)) + r.sample(far, min(len(far), count // 4))

    # History

    def _arrived(self) -> list[Row]:
        """In the order in which they became visible, and within each partition in that of their offsets: a crash between
        the log files of two partitions may leave visible_at descending there."""
        rows = sorted([*self.log.values(), *self.idle], key=lambda r: (r.visible_at, r.partition, r.offset))
        places: dict[int, list[int]] = {}
        for i, row in enumerate(rows):
            places.setdefault(row.partition, []).append(i)
        out = list(rows)
        for of in places.values():
            for i, row in zip(of, sorted((rows[i] for i in of), key=lambda r: (r.offset, r.dropped == "idle"))):
                out[i] = row
        return out

    def _ask_about_the_past(self) -> None:
        """Reads by time alone, at any time of the log, between batches and before everything too."""
        rows = [*self.history_rows, *self.log.values()]
        if rows:
            first, last = min(r.visible_at for r in rows), max(r.visible_at for r in rows)
            for entity in [*self.scenario.entities, NOBODY]:
                own = [r.visible_at for r in rows if r.message.entity == entity] or [first]
                for _ in range(40):
                    t = self.random.choice(
                        [self.random.choice(own) + self.random.choice([-1, 0, 1]), self.random.randint(first, last)]
                    )
                    self.reads.append(Read(entity, t, by_time=True))

    def _ask_history(self) -> None:
        rows = [*self.rows]
        rows += [r for r in rows if r.partition >= 0 and r.dropped != "idle" and self.random.random() < 0.05]
        self.random.shuffle(rows)
        self.platform.set_log(rows)
        expected = [expected_of(self.reference, q) for q in self.reads]
        ways: tuple[Literal["by_time", "by_offset"], ...] = ("by_time", "by_offset")
        for known in ways:
            wanted = [
                q
                for q, e in zip(self.reads, expected)
                if (q.by_time if known == "by_time" else q.offsets is not None)
                and not any(p.error for p in e.values.values())
            ]
            answers = self.platform.ask_history(wanted, known) if wanted else []
            for q, got in zip(wanted, answers):
                setattr(q, f"history_{known}", got)
        for q, e in zip(self.reads, expected):
            if any(p.error and p.low is None and not p.null for p in e.values.values()):
                self._check_overflow(q, e)
                break  # one of a scenario: each takes a query of its own

    def _check_overflow(self, q: Read, e: Answer) -> None:
        """A read that is an error for certain must be one in history too."""
        try:
            got = self.platform.ask_history([q], "by_time" if q.by_time else "by_offset")
        except duckdb.Error:
            self.counts["overflows"] += 1
        else:
            self.faults.append(f"history gives a value where there is none: {q} {e} {got}")


def expected_of(oracle: Oracle, q: Read) -> Answer:
    """What the oracle says: of what the state had applied, or of what was visible."""
    if q.offsets is None:
        return oracle.read_by_time(q.entity, q.t)
    return oracle.read_by_offset(q.entity, q.t, q.offsets, q.watermark)
