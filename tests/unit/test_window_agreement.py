"""History's SQL and a plain reading of the rules give the same value, whatever the window and whatever happened."""

from __future__ import annotations

import random
from datetime import timedelta

import duckdb
import pytest

from feature_store.windows.ir import Aggregate, AggregateRef, Call, Constant, Output, Statement, Window
from tests.unit.window_support import (
    HOUR,
    IS_A,
    KIND,
    LATENESS,
    NEVER,
    T0,
    Logged,
    N,
    X,
    close,
    distinct,
    expected,
    history_values,
    view,
    watermarks_before,
)

WINDOWS = {
    "over": Window("over", 20),
    "tumble": Window("tumble", 12, 12),
    "hop": Window("hop", 24, 6),
    "session": Window("session", 5),
    "tumble closed": Window("tumble", 12, 12, on_close=True),
    "hop closed": Window("hop", 24, 6, on_close=True),
    "session closed": Window("session", 5, on_close=True),
}
COUNT = Aggregate("count", None, None, "int64")


def a_log(rnd: random.Random, n: int, keys: str = "abc") -> list[Logged]:
    """History and two partitions: late, dropped, repeated and pending events, idle rows, silences."""
    rows: list[Logged] = []
    clock, offsets = T0, {0: 0, 1: 0}
    for _ in range(n):
        clock += rnd.choice([0, 1, 1, 2, 3, 15 if rnd.random() < 0.2 else 1])
        key = rnd.choice(keys)
        values = {
            "n": rnd.choice([None, 1, 5, -3, 7]),
            "x": rnd.choice([None, 1.5, 2.25, -9.0, 100.0]),
            "kind": rnd.choice([None, "a", "b", "c"]),
            "flag": rnd.choice([None, True, False]),
            "at": rnd.choice([None, T0 + 5, T0 - HOUR]),
        }
        chance = rnd.random()
        if chance < 0.25:
            time, visible = clock - rnd.choice([0, 0, 5, 30]), clock + rnd.choice([0, 0, 3, 60])
            dropped = rnd.choice([None] * 9 + ["duplicate"])
            rows.append(Logged(key, time, -1, len(rows), visible, None, dropped, **values))
        elif chance < 0.3:
            p = rnd.choice([0, 1])
            rows.append(Logged(None, None, p, offsets[p], clock, clock + rnd.choice([0, 3]), "idle"))
        else:
            p = {"a": 0, "b": 1}.get(key, rnd.choice([0, 1]))
            time = clock + rnd.choice([0, 0, 0, -1, -2, -4, -12, -40, 3])
            dropped = rnd.choice([None] * 15 + ["late", "duplicate"])
            rows.append(Logged(key, time, p, offsets[p], clock, None, dropped, **values))
            if rnd.random() < 0.05:
                rows.append(rows[-1])  # compaction shows it twice for a while
            offsets[p] += rnd.choice([1, 1, 2])
    return watermarks_before(rows, bootstrap=rnd.choice([NEVER, T0 - 5]))


def agree(got: dict, wanted: dict, where: object) -> None:
    assert got.keys() == wanted.keys()
    wrong = {name: (got[name], wanted[name]) for name in got if not close(got[name], wanted[name])}
    assert not wrong, where


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("seed", range(3))
def test_a_value_by_time_is_that_of_the_rules(kind, seed):
    rnd = random.Random(seed)
    d = view(WINDOWS[kind], ttl=timedelta(microseconds=rnd.choice([0, 40])))
    rows = a_log(rnd, 120)
    span = range(T0 - 5, max(r.visible for r in rows) + 40)
    asked = [(rnd.choice(["a", "b", "c", "nobody", None]), rnd.choice(span)) for _ in range(80)]
    found = history_values(d, rows, asked)
    assert any(f["w0_0"] for f in found)
    for (key, t), got in zip(asked, found, strict=True):
        agree(got, expected(d, rows, key, t), (key, t - T0))


@pytest.mark.parametrize("kind", WINDOWS)
def test_a_value_by_offset_is_that_of_the_rules(kind):
    rnd = random.Random(7)
    d = view(WINDOWS[kind])
    rows = a_log(rnd, 150)
    asked = [(rnd.choice("abc"), rnd.randrange(T0, T0 + 250)) for _ in range(80)]
    offsets = [{p: rnd.randrange(0, 60) for p in rnd.sample([-1, 0, 1], rnd.choice([0, 1, 2]))} for _ in asked]
    watermarks = [rnd.choice([None, t - 3, t - 20]) for _, t in asked]
    found = history_values(d, rows, asked, offsets, [NEVER if w is None else w for w in watermarks])
    assert any(f["w0_0"] for f in found)
    for (key, t), o, w, got in zip(asked, offsets, watermarks, found, strict=True):
        agree(got, expected(d, rows, key, t, o, w), (key, t - T0, o, w))


@pytest.mark.parametrize("lag", [lambda r: 0, lambda r: r.choice([0, 1, 3]), lambda r: r.choice([0] * 50 + [900])])
def test_long_windows_over_a_busy_key_are_put_together_from_blocks(lag):
    rnd = random.Random(3)
    d = view(Window("over", 1_500), Window("hop", 1_200, 300), Window("session", 4), Window("hop", 1_200, 300, True))
    rows = []
    time = T0
    for i in range(1_300):
        time += rnd.choice([0, 1, 1, 2, 5])
        rows.append((time, time + lag(rnd), i))
    rows.sort(key=lambda r: r[1])
    log = [
        Logged("a", t, 0, i, v, n=rnd.randrange(-50, 50), x=rnd.gauss(1e6, 1), kind=f"p{rnd.randrange(40)}")
        for i, (t, v, _) in enumerate(rows)
    ]
    log = watermarks_before(log)
    asked = [("a", rnd.randrange(T0, time + 300)) for _ in range(40)]
    for (key, t), got in zip(asked, history_values(d, log, asked), strict=True):
        agree(got, expected(d, log, key, t), t - T0)


def test_windows_of_several_statements_do_not_mix():
    d = view(Window("over", 10), Window("over", 1), Window("tumble", 60, 60), aggregates=[COUNT])
    rows = [Logged("a", T0 + i, 0, i, T0 + i) for i in range(8)]
    (got,) = history_values(d, rows, [("a", T0 + 9)])
    assert (got["w0_0"], got["w1_0"]) == (8, 0)
    start = (T0 + 9) // 60 * 60
    assert got["w2_0"] == sum(r.time >= start for r in rows)


def test_times_before_1970_are_aligned_downwards():
    d = view(Window("tumble", 10, 10), Window("hop", 20, 10), aggregates=[COUNT])
    rows = [Logged("a", t, 0, i, t) for i, t in enumerate([-31, -30, -25, -21, -20])]
    (got,) = history_values(d, rows, [("a", -21)])
    assert (got["w0_0"], got["w1_0"]) == (3, 4)


def test_a_sum_beyond_64_bits_on_the_way_is_exact_and_at_the_end_an_error():
    d = view(
        Window("over", HOUR), aggregates=[Aggregate("sum", N, None, "int64"), Aggregate("avg", N, None, "float64")]
    )
    big = 2**63 - 1
    rows = [Logged("a", T0 + i, 0, i, T0 + i, n=n) for i, n in enumerate([big, big, -big])]
    (got,) = history_values(d, rows, [("a", T0 + 2)])
    assert got["w0_0"] == big
    assert got["w0_1"] == pytest.approx(big / 3)
    with pytest.raises(duckdb.Error, match=r"v\.?.*int64"):
        history_values(d, rows, [("a", T0 + 1)])
    # No value, no error: never asked for it.
    assert history_values(d, rows, [("a", T0 - 1), ("b", T0 + 2)])[0]["w0_0"] is None


def test_a_double_that_is_not_finite_is_an_error():
    d = view(Window("over", HOUR), aggregates=[Aggregate("sum", X, None, "float64")])
    rows = [Logged("a", T0, 0, 0, T0, x=1.7e308), Logged("a", T0, 0, 1, T0, x=1.7e308)]
    with pytest.raises(duckdb.Error, match="float64"):
        history_values(d, rows, [("a", T0)])


def test_outputs_are_expressions_over_aggregates():
    d = view(Window("over", HOUR), aggregates=[COUNT])
    n, total = AggregateRef(0, "int64"), AggregateRef(1, "int64")
    per_event = Output("per_event", Call("/", (total, n), "float64"), "float64")
    many = Output("many", Call(">", (n, Constant(1, "int64")), "bool"), "bool")
    d.__dict__["statements"] = (
        Statement(Window("over", HOUR), (COUNT, Aggregate("sum", N, None, "int64")), (per_event, many)),
    )
    rows = [Logged("a", T0, 0, 0, T0, n=3), Logged("a", T0, 0, 1, T0, n=4)]
    seen, empty, never = history_values(d, rows, [("a", T0), ("a", T0 + 2 * HOUR), ("b", T0)])
    assert (seen["per_event"], seen["many"]) == (3.5, True)
    assert (empty["per_event"], empty["many"]) == (None, False)
    assert (never["per_event"], never["many"]) == (None, None)


def test_distinct_counts_are_exact_below_1024_and_from_the_smallest_hashes_beyond():
    d = view(
        Window("over", 10_000),
        Window("hop", 6_000, 2_000),
        aggregates=[Aggregate("count_distinct", KIND, None, "int64")],
    )
    rows = [Logged("a", T0 + i, 0, i, T0 + i, kind=f"p{i % 5_000}") for i in range(6_000)]
    asked = [("a", T0 + t) for t in (500, 1_022, 1_023, 1_024, 3_000, 5_999, 11_000)]
    for (_, t), got in zip(asked, history_values(d, rows, asked), strict=True):
        held = [r.kind for r in rows if t - 10_000 <= r.time <= t]
        assert got["w0_0"] == distinct(held)
        assert got["w0_0"] == pytest.approx(len(set(held)), rel=0.1)
        start = t // 2_000 * 2_000 - 4_000
        assert got["w1_0"] == distinct([r.kind for r in rows if start <= r.time <= t])


def test_a_deviation_of_numbers_that_are_large_beside_it_keeps_its_digits():
    d = view(Window("over", HOUR), aggregates=[Aggregate("stddev", X, None, "float64")])
    rows = [Logged("a", T0 + i, 0, i, T0 + i, x=1e9 + (i % 2)) for i in range(1_000)]
    (got,) = history_values(d, rows, [("a", T0 + 999)])
    assert got["w0_0"] == pytest.approx(0.50025018764, rel=1e-9)


def test_first_and_last_go_by_time_then_partition_then_offset():
    aggregates = [Aggregate("first", N, IS_A, "int64"), Aggregate("last", N, IS_A, "int64")]
    d = view(Window("tumble", HOUR, HOUR), aggregates=aggregates)
    rows = [
        Logged("a", T0, 1, 0, T0 + 1, n=1, kind="a"),
        Logged("a", T0, 0, 9, T0 + 2, n=2, kind="a"),
        Logged("a", T0, 0, 3, T0 + 3, n=3, kind="a"),
        Logged("a", T0, -1, 5, T0, n=4, kind="a"),
        Logged("a", T0, -1, 4, T0, n=None, kind="a"),
        Logged("a", T0, 1, 7, T0, n=5, kind="b"),
    ]
    (got,) = history_values(d, rows, [("a", T0 + 5)])
    assert (got["w0_0"], got["w0_1"]) == (4, 1)


def test_a_late_event_merges_two_sessions_from_when_it_was_known():
    d = view(Window("session", 10), aggregates=[COUNT])
    rows = [Logged("a", T0, 0, 0, T0), Logged("a", T0 + 20, 0, 1, T0 + 20), Logged("a", T0 + 10, 0, 2, T0 + 25)]
    asked = [("a", T0 + t) for t in (10, 11, 20, 24, 25, 30, 31)]
    assert [r["w0_0"] for r in history_values(d, rows, asked)] == [1, 0, 1, 1, 3, 3, 0]


def test_a_closed_window_does_not_change_when_late_events_come():
    d = view(Window("tumble", 10, 10, on_close=True), Window("tumble", 10, 10), aggregates=[COUNT])
    t0 = T0 // 10 * 10
    rows = [
        Logged("a", t0 + 1, 0, 0, t0 + 1),
        Logged("a", t0 + 10 + LATENESS, 0, 1, t0 + 18),  # its watermark is t0 + 10: the window is closed
        Logged("a", t0 + 2, 0, 2, t0 + 18),
    ]
    (got,) = history_values(d, watermarks_before(rows), [("a", t0 + 18)])
    assert (got["w0_0"], got["w1_0"]) == (1, 1)


def test_an_idle_row_moves_the_watermark_of_the_entitys_partition():
    d = view(Window("tumble", 10, 10, on_close=True), aggregates=[COUNT])
    t0 = T0 // 10 * 10
    rows = [Logged("a", t0 + 1, 0, 0, t0 + 1), Logged(None, None, 0, 0, t0 + 30, t0 + 10, "idle")]
    rows += [Logged(None, None, 1, 0, t0 + 5, t0 + 10, "idle")]  # of a partition in which the entity has nothing
    found = history_values(d, watermarks_before(rows), [("a", t0 + t) for t in (5, 29, 30)])
    assert [f["w0_0"] for f in found] == [0, 0, 1]


def test_the_callers_relations_may_have_any_name():
    from feature_store.windows.history import history_sql
    from tests.unit.window_support import table_of

    d = view(WINDOWS["tumble closed"], WINDOWS["session"], aggregates=[COUNT])
    with duckdb.connect() as con:
        con.register(
            "asked", con.sql(f"SELECT 0::BIGINT AS _row, 'a' AS k, make_timestamptz({T0}) AS _t").to_arrow_table()
        )
        con.register("log", table_of([Logged("a", T0, 0, 0, T0)]))
        found = con.sql(history_sql(d, "asked", "log")).fetchall()
    assert [row[:3] for row in found] == [(0, 0, 1)]
