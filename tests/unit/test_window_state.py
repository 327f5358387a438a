"""The states of many entities: against brute force over random histories, and one by one what the rules say."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import pytest

from feature_store.errors import DefinitionError
from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.ir import Aggregate, AggregateRef, Column, Output, Statement, Window
from feature_store.windows.plan import plan_of
from feature_store.windows.sketch import K, Sketch, estimate
from feature_store.windows.state import (
    APPLIED,
    DUPLICATE,
    LATE,
    NEVER,
    REPLAYED,
    Events,
    OverflowedError,
    States,
    TooManyEventsError,
    WindowStateError,
)

SECOND = 1_000_000
MINUTE = 60 * SECOND
HOUR = 60 * MINUTE
T = 20_000 * 24 * HOUR

N, X, B, KIND = Column("n", "int64"), Column("x", "float64"), Column("b", "bool"), Column("kind", "string")

EVERY = (
    Aggregate("count", None, None, "int64"),
    Aggregate("count", None, B, "int64"),
    Aggregate("sum", N, None, "int64"),
    Aggregate("sum", X, B, "float64"),
    Aggregate("avg", N, B, "float64"),
    Aggregate("avg", X, None, "float64"),
    Aggregate("min", N, B, "int64"),
    Aggregate("max", X, None, "float64"),
    Aggregate("first", N, None, "int64"),
    Aggregate("last", X, B, "float64"),
    Aggregate("max", B, None, "bool"),
    Aggregate("stddev", X, None, "float64"),
    Aggregate("count_distinct", KIND, None, "int64"),
)
COUNT = (Aggregate("count", None, None, "int64"),)


def view(*windows: Window, aggregates: tuple[Aggregate, ...] = EVERY, event_id: bool = True, **changes) -> WindowedView:
    """A definition with one statement per window; its SQL stands for it, since what a definition means goes by the text."""
    statements = tuple(
        Statement(
            w, aggregates, tuple(Output(f"w{i}_{j}", AggregateRef(j, a.type), a.type) for j, a in enumerate(aggregates))
        )
        for i, w in enumerate(windows)
    )
    source = EventSource(
        "events",
        {"n": "int64", "x": "float64", "b": "bool", "kind": "string"},
        changes.pop("retention", 2 * HOUR),
        event_id="id" if event_id else None,
        allowed_lateness_us=changes.pop("lateness", MINUTE),
    )
    arguments = {"name": "v", "entity_key": ("k",), "key_types": ("string",), "ttl": timedelta(days=30)} | changes
    made = WindowedView(source=source, sql=repr(statements), **arguments)
    made.__dict__["statements"] = statements
    return made


@dataclass(frozen=True)
class E:
    """One event of one entity, as a user would tell it. `b` is the filter of half of the aggregates."""

    time: int
    offset: int
    partition: int = 0
    visible: int = T
    watermark: int = NEVER
    n: int | None = 1
    x: float | None = 1.0
    b: bool | None = True
    kind: str | None = "a"
    id: str = ""
    entity: int = 0


def hashed(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode()).digest()[8:], "little") >> 1


def events_of(definition: WindowedView, events: list[E]) -> Events:
    """What `Plan.numbers_sql` computes, by hand."""
    plan = plan_of(definition)
    masks, values = [], [[] for _ in plan.values]
    for e in events:
        cells = {"n": e.n, "x": e.x, "b": e.b, "kind": e.kind}
        mask = 0
        for i, (condition, argument) in enumerate(plan.conditions):
            true = condition is None or cells[condition.name] is True
            mask |= (true and (argument is None or cells[argument.name] is not None)) << i
        masks.append(mask)
        for column, v in zip(values, plan.values):
            cell = cells[v.argument.name]
            column.append(hashed(cell or "") if v.hashed else cell or 0)

    def integers(items) -> np.ndarray:
        return np.array(list(items), np.int64)

    return Events(
        integers(e.entity for e in events),
        integers(e.time for e in events),
        integers(e.partition for e in events),
        integers(e.offset for e in events),
        integers(e.visible for e in events),
        integers(e.watermark for e in events),
        integers(masks),
        integers(hashed(e.id or f"{e.partition}/{e.offset}") if definition.source.event_id else 0 for e in events),
        [np.array(c, np.float64 if v.is_float else np.int64) for c, v in zip(values, plan.values)],
    )


def applied(definition: WindowedView, events: list[E], n: int = 1, sizes=(10**9,)) -> tuple[States, list[int]]:
    """States after the events in batches of the given sizes, each through its blob, and the outcomes."""
    states, outcomes, at, i = States.empty(definition, n), [], 0, 0
    past = sum(e.partition < 0 for e in events)  # come first, and at once
    while at < len(events):
        size = max(sizes[i % len(sizes)], past - at)
        outcomes += states.apply(events_of(definition, events[at : at + size])).tolist()
        states = States.decode(definition, states.encode())
        at, i = at + size, i + 1
    return states, outcomes


# --- brute force ------------------------------------------------------------------------------------------------------


def counted_of(definition: WindowedView, events: list[E]) -> tuple[list[E], list[int]]:
    """The events of one entity that count, and what became of each, in the order of arrival."""
    retention = definition.source.retention_us
    counted, outcomes = [], []
    for e in events:
        oldest = NEVER if e.watermark == NEVER else e.watermark - retention
        if e.partition >= 0 and e.time < oldest:
            outcomes.append(LATE)
        elif definition.source.event_id and e.id and any(c.id == e.id and c.time >= oldest for c in counted):
            outcomes.append(DUPLICATE)
        else:
            outcomes.append(APPLIED)
            counted.append(e)
    return counted, outcomes


def window_events(window: Window, counted: list[E], t: int, watermark: int) -> list[E]:
    def sessions(of: list[E]) -> list[list[E]]:
        out: list[list[E]] = []
        for e in sorted(of, key=lambda e: e.time):
            if out and e.time - out[-1][-1].time <= window.size_us:
                out[-1].append(e)
            else:
                out.append([e])
        return out

    slide = window.slide_us or window.size_us
    if window.on_close:
        if watermark == NEVER:
            return []
        if window.kind == "session":
            closed = [
                s
                for s in sessions([e for e in counted if e.watermark == NEVER or e.time >= e.watermark])
                if watermark > s[-1].time + window.size_us
            ]
            return closed[-1] if closed else []
        end = watermark // slide * slide
        return [
            e for e in counted if end - window.size_us <= e.time < end and (e.watermark == NEVER or end > e.watermark)
        ]
    now = [e for e in counted if e.time <= t]
    if window.kind == "over":
        return [e for e in now if t - window.size_us <= e.time]
    if window.kind == "session":
        live = sessions(now)
        return live[-1] if live and t - live[-1][-1].time <= window.size_us else []
    end = t // slide * slide + slide
    return [e for e in now if end - window.size_us <= e.time < end]


def aggregate_of(a: Aggregate, events: list[E]):
    rows = [e for e in events if a.filter is None or e.b is True]
    if a.argument is None:
        return len(rows)
    rows = sorted(
        (e for e in rows if getattr(e, a.argument.name) is not None), key=lambda e: (e.time, e.partition, e.offset)
    )
    cells = [getattr(e, a.argument.name) for e in rows]
    if a.function == "count_distinct":
        hashes = sorted({hashed(c) for c in cells})
        return len(hashes) if len(hashes) < K else round((K - 1) * 2.0**63 / float(hashes[K - 1]))
    if not cells:
        return None
    match a.function:
        case "sum":
            return sum(cells) if a.type == "int64" else math.fsum(cells)
        case "avg":
            return (sum(cells) if a.argument is N else math.fsum(cells)) / len(cells)
        case "min" | "max":
            return (min if a.function == "min" else max)(cells)
        case "first":
            return cells[0]
        case "last":
            return cells[-1]
        case _:
            mean = math.fsum(cells) / len(cells)
            return None if len(cells) < 2 else math.sqrt(math.fsum((c - mean) ** 2 for c in cells) / (len(cells) - 1))


def expected(definition: WindowedView, counted: list[E], t: int, watermark: int) -> tuple[dict, int | None]:
    seen = max((e.time for e in counted if e.time <= t), default=None)
    out = {}
    for s in definition.statements:
        inside = window_events(s.window, counted, t, watermark)
        for o, a in zip(s.outputs, s.aggregates):
            out[o.name] = None if seen is None else aggregate_of(a, inside)
    return out, seen


def same(a, b) -> bool:
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-6)
    return type(a) is type(b) and a == b


WINDOWS = (
    Window("over", 40 * MINUTE),
    Window("over", 7 * MINUTE),
    Window("tumble", HOUR, HOUR),
    Window("hop", HOUR, 5 * MINUTE),
    Window("hop", 15 * MINUTE, 5 * MINUTE),
    Window("session", 4 * MINUTE),
    Window("tumble", 30 * MINUTE, 30 * MINUTE, on_close=True),
    Window("hop", 30 * MINUTE, 10 * MINUTE, on_close=True),
    Window("hop", 10 * MINUTE, 10 * MINUTE, on_close=True),
    Window("session", 6 * MINUTE, on_close=True),
)


def history(random_: random.Random, size: int, partitions: int = 1, spread: int = 20 * MINUTE) -> list[E]:
    """Events of one entity by arrival: out of order, late, repeated, ahead of the clock, with rows of history before."""
    events: list[E] = []
    now, lateness = T, MINUTE
    tops: dict[int, int] = {}
    for i in range(size):
        now += random_.choice(
            [0, 1, SECOND, MINUTE, random_.randrange(10 * MINUTE), random_.randrange(HOUR) * (i % 9 == 0)]
        )
        time = now - random_.choice(
            [0, 0, 1, -3 * SECOND, random_.randrange(spread), random_.randrange(4 * HOUR) * (i % 5 == 0)]
        )
        time = time // (5 * MINUTE) * 5 * MINUTE if random_.random() < 0.2 else time
        partition = -1 if i < size // 5 else random_.randrange(partitions)
        # Other entities move the watermark too; partitions are apart by less than the retention.
        tops[partition] = max(tops.get(partition, NEVER), now - random_.choice([HOUR, random_.randrange(HOUR)]))
        watermark = NEVER if partition < 0 else tops[partition] - lateness
        if i == size // 5:
            past = [e.time for e in events]
            for p in range(partitions):
                tops[p] = max(past, default=NEVER)
            watermark = tops[partition] - lateness if past else NEVER
        events.append(
            E(
                time,
                i,
                partition,
                now,
                watermark,
                random_.choice([None, 0, -1, 7, 2**40, -(2**55), random_.randrange(100)]),
                random_.choice([None, 0.0, -0.5, 1e9 + random_.random(), random_.random()]),
                random_.choice([True, False, None]),
                random_.choice([None, "", "a", "b", f"k{i}"]),
                random_.choice([f"id{random_.randrange(size)}", f"id{i}"]),
            )
        )
        tops[partition] = max(tops[partition], time)
    return events


@pytest.mark.parametrize("seed", range(12))
def test_every_window_equals_brute_force_whatever_the_batches(seed):
    random_ = random.Random(seed)
    definition = view(*WINDOWS)
    events = history(random_, random_.choice([5, 40, 120]), random_.choice([1, 1, 2]))
    counted, outcomes = counted_of(definition, events)
    whole, found = applied(definition, events)
    assert found == outcomes
    split, found = applied(definition, events, sizes=[random_.randrange(1, 9) for _ in range(7)])
    assert found == outcomes
    visible = int(whole.visible_at[0])
    assert visible == max(e.visible for e in events)
    own = int(whole.watermark[0])
    lateness = definition.source.allowed_lateness_us
    assert own == max((max(e.watermark, e.time - lateness) for e in events if e.partition >= 0), default=NEVER)
    for later in (0, 1, 3 * SECOND, 5 * MINUTE, random_.randrange(HOUR), random_.randrange(5 * HOUR), 48 * HOUR):
        t = visible + later
        top = max(own, t - random_.randrange(HOUR))
        for hash_ in ({}, {0: top}):
            mark = max(own, hash_.get(0, NEVER)) if 0 in whole.offsets_of(0) else own
            wanted, seen = expected(definition, counted, t, mark)
            for states in (whole, split):
                got = states.values(t, hash_)
                assert not got.errors
                assert got.seen == [seen]
                assert got.watermark.tolist() == [mark]
                values = {name: column[0] for name, column in got.columns.items()}
                assert {k: (v, values[k]) for k, v in wanted.items() if not same(v, values[k])} == {}
