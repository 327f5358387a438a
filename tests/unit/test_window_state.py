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
from feature_store.windows.ir import Aggregate, AggregateRef, Call, Column, Constant, Output, Statement, Window
from feature_store.windows.layout import layout_of
from feature_store.windows.plan import SKETCH_SIZE as K
from feature_store.windows.plan import plan_of
from feature_store.windows.sketch import Sketch, estimate
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


@pytest.mark.parametrize("seed", range(4))
def test_entities_of_a_batch_do_not_touch_each_other(seed):
    random_ = random.Random(seed)
    definition = view(*WINDOWS)
    each = [[replace(e, entity=i) for e in history(random_, random_.choice([3, 30, 60]))] for i in (0, 2, 3, 5)]
    left = [list(events) for events in each]
    together = [events.pop(0) for events in left for _ in range(sum(e.partition < 0 for e in events))]
    while some := [events for events in left if events]:
        together.append(random_.choice(some).pop(0))
    past = sum(e.partition < 0 for e in together)
    states, outcomes = applied(definition, together, 7, [past, 25])
    t = max(e.visible for e in together) + random_.randrange(HOUR)
    got = states.values(t)
    blobs = states.encode()
    assert got.seen[1] is got.seen[4] is got.seen[6] is None
    for events in each:
        i = events[0].entity
        counted, wanted = counted_of(definition, events)
        assert [o for o, e in zip(outcomes, together) if e.entity == i] == wanted
        values, seen = expected(definition, counted, t, int(states.watermark[i]))
        assert got.seen[i] == seen
        assert {k: (v, got.columns[k][i]) for k, v in values.items() if not same(v, got.columns[k][i])} == {}
        one = States.decode(definition, [blobs[i]])
        assert one.encode() == [blobs[i]]
        alone = one.values(t).columns
        assert {k: (v, alone[k][0]) for k, v in values.items() if not same(v, alone[k][0])} == {}
    assert States.decode(definition, [blobs[5], None, b"", blobs[0]]).encode()[::3] == [blobs[5], blobs[0]]
    for first in range(0, len(states), 3):
        some = states.slice(first, first + 3)
        assert some.encode() == blobs[first : first + 3]
        wanted = random_.sample(sorted(got.columns), 3)
        found = some.values(t, only=wanted)
        assert found.columns == {name: got.columns[name][first : first + 3] for name in got.columns if name in wanted}
        assert {name for errors in found.errors.values() for name in errors} <= set(wanted)


@pytest.mark.parametrize("size", [3, 60, 300])  # short rows are copied by number, long ones by run
def test_states_gathered_out_of_several_are_those_that_were_there(size):
    random_ = random.Random(size)
    definition = view(*WINDOWS, aggregates=EVERY[:-1])
    parts, blobs = [], {}
    places = random_.sample(range(9), 9)
    for n in (4, 5):
        states, _ = applied(
            definition, [e for i in range(n) for e in (replace(e, entity=i) for e in history(random_, size))], n
        )
        rows = random_.sample(range(n), n)
        mine, places = places[:n], places[n:]
        parts.append((states, np.array(rows), np.array(mine)))
        blobs |= {place: states.encode()[row] for row, place in zip(rows, mine, strict=True)}
    gathered = States.gathered(definition, 9, parts)
    assert gathered.encode() == [blobs[i] for i in range(9)]
    before = [states.encode() for states, _, _ in parts]
    gathered.apply(events_of(definition, [replace(e, entity=3, offset=e.offset + 1000) for e in history(random_, 20)]))
    assert [states.encode() for states, _, _ in parts] == before  # they are kept, and gathered from again


def test_a_replayed_batch_changes_nothing():
    definition = view(*WINDOWS)
    events = history(random.Random(5), 60)
    logged = [e for e in events if e.partition >= 0]
    states, _ = applied(definition, logged)
    before = states.encode()
    assert set(states.apply(events_of(definition, logged)).tolist()) == {REPLAYED}
    assert states.encode() == before


INTEGERS = tuple(a for a in EVERY if a.type == "int64")


@pytest.mark.parametrize("seed", range(6))
def test_the_order_of_arrival_and_the_batches_do_not_show_in_the_bytes(seed):
    """Whole numbers, no ids, nothing late: the state is a function of the set of events."""
    random_ = random.Random(seed)
    definition = view(*WINDOWS[:6], aggregates=INTEGERS, event_id=False, retention=400 * HOUR)
    events = [replace(e, watermark=NEVER, partition=i) for i, e in enumerate(history(random_, 40, spread=2 * HOUR))]
    wanted, _ = applied(definition, events)
    shuffled = random_.sample(events, len(events))
    other, _ = applied(definition, shuffled, sizes=[random_.randrange(1, 7) for _ in range(5)])
    assert other.encode() == wanted.encode()


def test_pending_events_count_from_their_own_time_on():
    definition = view(Window("tumble", HOUR, HOUR), Window("session", MINUTE), Window("over", HOUR), aggregates=COUNT)
    states, _ = applied(definition, [E(T, 0), E(T + 3 * SECOND, 1, visible=T)])
    assert states.last_seen.tolist() == [T]

    def counts(of: States, t: int) -> list[int]:
        return [c[0] for c in of.values(t).columns.values()]

    assert counts(states, T) == counts(states, T + 3 * SECOND - 1) == [1, 1, 1]
    before = states.encode()
    assert counts(states, T + 3 * SECOND) == [2, 2, 2]
    assert states.values(T + 3 * SECOND).seen == [T + 3 * SECOND]
    assert states.encode() == before
    states.advance(T + MINUTE)
    assert counts(states, T + MINUTE) == [2, 2, 2]
    assert states.last_seen.tolist() == [T + 3 * SECOND]
    only_ahead, _ = applied(definition, [E(T + 1, 0, visible=T)])
    assert only_ahead.values(T).seen == [None]
    assert counts(only_ahead, T) == [None, None, None]


def test_late_and_repeated_events_stay_out_at_exactly_the_retention():
    definition = view(Window("over", 100 * HOUR), aggregates=COUNT, retention=HOUR)
    mark = T - HOUR
    states, outcomes = applied(
        definition,
        [
            E(mark - HOUR, 0, watermark=mark, id="a"),
            E(mark - HOUR - 1, 1, watermark=mark, id="b"),
            E(T, 2, watermark=mark, id="a"),
            E(T, 3, watermark=mark + 1, id="a"),
            E(T, 4, watermark=mark + 1, id="a"),
        ],
    )
    assert outcomes == [APPLIED, LATE, DUPLICATE, APPLIED, DUPLICATE]
    assert states.values(T).columns["w0_0"] == [2]
    assert states.offsets_of(0) == {0: 4}


def test_a_late_event_joins_two_sessions_and_never_a_closed_window():
    gap = 10 * MINUTE
    definition = view(
        Window("session", gap),
        Window("session", gap, on_close=True),
        Window("tumble", HOUR, HOUR, on_close=True),
        aggregates=COUNT,
        lateness=0,
    )
    events = [E(T, 0), E(T + 20 * MINUTE, 1, watermark=T), E(T + 61 * MINUTE, 2, watermark=T + 20 * MINUTE)]
    events = [replace(e, visible=e.time) for e in events]
    late = E(T + 10 * MINUTE, 3, watermark=T + 61 * MINUTE, visible=T + 61 * MINUTE)
    before, _ = applied(definition, events)
    after, _ = applied(definition, [*events, late], sizes=[1])
    assert before.kept(0)["sessions0"] == 3
    assert after.kept(0)["sessions0"] == 2
    closed = {k: v for k, v in before.values(T + 61 * MINUTE).columns.items() if k != "w0_0"}
    assert closed == {"w1_0": [1], "w2_0": [2]}
    assert {k: v for k, v in after.values(T + 61 * MINUTE).columns.items() if k != "w0_0"} == closed
    # The watermark of the partition, as readers know it, closes the next ones.
    later = after.values(T + 130 * MINUTE, {0: T + 121 * MINUTE})
    assert later.columns == {"w0_0": [0], "w1_0": [1], "w2_0": [1]}
    assert after.values(T + 130 * MINUTE, {1: T + 121 * MINUTE}).columns["w2_0"] == [2]  # not this entity's partition


def test_above_the_cap_there_is_an_error_until_no_window_needs_what_was_dropped():
    definition = view(Window("over", HOUR), aggregates=COUNT, max_events_per_entity=3)
    events = [E(T + i, i, visible=T + i) for i in range(5)]
    for sizes in ([5], [1], [4, 1]):
        states, _ = applied(definition, events, sizes=sizes)
        assert states.kept(0)["events"] == 3
        got = states.values(T + 1 + HOUR)
        assert isinstance(got.errors[0]["w0_0"], TooManyEventsError)
        assert got.columns["w0_0"] == [None]
        assert "predictflow windows bootstrap" in got.errors[0]["w0_0"].message
        assert states.values(T + 2 + HOUR).columns["w0_0"] == [3]
    two, _ = applied(definition, [*events, E(T, 9, entity=1)], 2)
    assert two.values(T + HOUR).columns["w0_0"] == [None, 1]


@pytest.mark.parametrize("n", [1, 2])
def test_the_cap_takes_the_values_only_of_windows_that_reach_what_was_dropped(n):
    definition = view(
        Window("over", HOUR),
        Window("over", 2),
        Window("tumble", HOUR, HOUR),
        aggregates=COUNT,
        max_events_per_entity=3,
    )
    states, _ = applied(definition, [E(T + i, i, visible=T + i) for i in range(5)], n)
    for t, expected in ((T + 4, [None, 3, 5]), (T + 3 + HOUR, [2, 0, 0])):
        got = states.values(t)
        assert [c[0] for c in got.columns.values()] == expected
        assert {i: set(e) for i, e in got.errors.items()} == ({0: {"w0_0"}} if expected[0] is None else {})


@pytest.mark.parametrize("n", [1, 2])
def test_an_aggregate_that_does_not_fit_takes_the_outputs_made_of_it(n):
    definition = view(Window("over", HOUR), aggregates=(EVERY[2], EVERY[0]))
    (statement,) = definition.statements
    total, count = (AggregateRef(i, "int64") for i in range(2))
    outputs = (
        Output("direct", total, "int64"),
        Output("made_of_it", Call("case", (Call("is_null", (total,), "bool"), total, count), "int64"), "int64"),
        Output("own", Call("*", (Call("*", (count, Constant(2**61, "int64")), "int64"), count), "int64"), "int64"),
        Output("count", count, "int64"),
    )
    definition.__dict__["statements"] = (replace(statement, outputs=outputs),)
    layout_of.cache_clear()
    got = applied(definition, [E(T, i, n=2**62) for i in range(2)], n)[0].values(T)
    assert got.errors[0].keys() == {"direct", "made_of_it", "own"}
    assert {k: c[0] for k, c in got.columns.items()} == {"direct": None, "made_of_it": None, "own": None, "count": 2}


@pytest.mark.parametrize("n", [1, 2])
def test_what_does_not_fit_is_an_error_and_not_a_value(n):
    definition = view(Window("over", HOUR), aggregates=(EVERY[2], Aggregate("sum", X, None, "float64")))
    events = [E(T, i, n=2**62, x=1e308) for i in range(2)]
    for wrong, name, other in (
        ([replace(e, x=0.0) for e in events], "w0_0", "w0_1"),
        ([replace(e, n=0) for e in events], "w0_1", "w0_0"),
    ):
        states, _ = applied(definition, wrong, n)
        got = states.values(T)
        assert got.errors.keys() == {0}
        assert got.errors[0].keys() == {name}
        assert isinstance(got.errors[0][name], OverflowedError)
        assert f"v.{name}" in got.errors[0][name].message
        assert got.columns == {name: [None] * n, other: [0] + [None] * (n - 1)}
    exact, _ = applied(definition, [E(T, 0, n=2**62), E(T, 1, n=2**62 - 1), E(T, 2, n=-(2**63)), E(T, 3, n=1)], n)
    assert exact.values(T).columns["w0_0"][0] == 0
    negative, _ = applied(definition, [E(T, 0, n=-(2**62)), E(T, 1, n=-(2**62))], n)
    assert negative.values(T).columns["w0_0"][0] == -(2**63)


def test_a_read_before_the_newest_event_was_known_is_an_error():
    states, _ = applied(view(Window("over", HOUR), aggregates=COUNT), [E(T, 0, visible=T + 5)])
    got = states.values(T + 4)
    assert "before the state's newest event was known" in got.errors[0]["w0_0"].message
    assert states.values(T + 5).columns["w0_0"] == [1]


def test_a_sketch_is_exact_below_k_and_close_above_it_however_it_was_merged():
    definition = view(Window("hop", HOUR, 5 * MINUTE), aggregates=(EVERY[12],), event_id=False)
    events = [E(T - (i * 977) % HOUR, i, kind=f"k{i % 3000}") for i in range(6000)]
    few, _ = applied(definition, events[: K - 1])
    assert few.values(T).columns["w0_0"] == [len({e.kind for e in events[: K - 1] if e.time >= T - 55 * MINUTE})]
    whole, _ = applied(definition, events)
    split, _ = applied(definition, events[::-1][:0] + events, sizes=[700, 1, 1300])
    assert whole.encode() == split.encode()
    inside = {e.kind for e in events if e.time >= T - 55 * MINUTE}
    hashes = sorted(hashed(k) for k in inside)
    assert whole.values(T).columns["w0_0"] == [round((K - 1) * 2.0**63 / float(hashes[K - 1]))]
    assert abs(whole.values(T).columns["w0_0"][0] / len(inside) - 1) < 0.12
    assert estimate(2**62) == 2 * (K - 1)
    assert len(Sketch.of(np.zeros(K + 5, np.int64), np.arange(K + 5))) == K


def test_values_are_typed_as_their_outputs():
    definition = view(Window("over", HOUR))
    columns = applied(definition, [E(T, 0), E(T, 1)])[0].values(T).columns
    assert [type(c[0]) for c in columns.values()] == [
        {"int64": int, "float64": float, "bool": bool}[o.type] for o in definition.outputs
    ]


def test_a_state_holds_nothing_that_no_read_can_need():
    definition = view(*WINDOWS, aggregates=COUNT, retention=HOUR)
    states, _ = applied(definition, [E(T, i, watermark=NEVER, id=f"{i}") for i in range(3)])
    later = E(T + 50 * HOUR, 9, visible=T + 50 * HOUR, watermark=T + 49 * HOUR)
    states.apply(events_of(definition, [later]))
    kept = states.kept(0)
    # On close, the newest closed session is an answer until the next one closes.
    assert {k: n for k, n in kept.items() if n != 1} == {"pending": 0, "sessions5": 2}


def test_above_the_cap_the_ids_of_the_oldest_events_are_forgotten_and_counted():
    definition = view(Window("tumble", HOUR, HOUR), aggregates=COUNT, max_events_per_entity=5)
    states, outcome = applied(definition, [E(T + i, i, id=f"{i}") for i in range(5)] + [E(T, 5, id="x", entity=1)], n=2)
    assert (states.kept(0)["ids"], states.ids_forgotten) == (5, 0)
    # The oldest go by event time, not by arrival; the other entity keeps its own.
    states.apply(events_of(definition, [E(T - 1, 6, id="early"), E(T + 9, 7, id="9"), E(T + 10, 8, id="10")]))
    assert (states.kept(0)["ids"], states.kept(1)["ids"], states.ids_forgotten) == (5, 1, 3)
    states = States.decode(definition, states.encode())
    again = [E(T + i, 10 + i, id=f"{i}") for i in range(5)] + [E(T + 9, 20, id="9"), E(T, 21, id="x", entity=1)]
    outcome = states.apply(events_of(definition, again))
    assert outcome.tolist() == [APPLIED] * 2 + [DUPLICATE] * 5


def test_damaged_blobs_and_those_of_another_definition_are_refused():
    definition = view(*WINDOWS)
    states, _ = applied(definition, history(random.Random(1), 30))
    blob = states.encode()[0]
    for bad in (blob[:-8], blob[:-1], blob[:40], blob[:8], b"x" * 80, blob + b"\0" * 8):
        for blobs in ([bad], [blob, bad]):
            with pytest.raises(WindowStateError, match="windows bootstrap v"):
                States.decode(definition, blobs)
    for at in range(24, len(blob), 37):
        damaged = bytearray(blob)
        damaged[at] ^= 4
        with pytest.raises(WindowStateError, match="damaged"):
            States.decode(definition, [bytes(damaged)])
    with pytest.raises(DefinitionError, match="another definition"):
        States.decode(view(*WINDOWS, name="w"), [blob])
    other_format = bytearray(blob)
    other_format[5] = 1
    with pytest.raises(DefinitionError, match="another format"):
        States.decode(definition, [bytes(other_format)])
    # The script that writes states compares these bytes.
    assert (
        int.from_bytes(blob[16:24], "big") == int(states.fences[0]) == sum(o + 1 for o in states.offsets_of(0).values())
    )
