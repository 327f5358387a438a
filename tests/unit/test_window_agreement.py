"""Stream state, DuckDB history and a brute-force reading of the definition give the same value, whatever happened."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

import duckdb
import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.windows import Aggregate, Where, WindowedView
from feature_store.windows.history import LAST_SEEN, history_sql
from feature_store.windows.state import (
    EntityState,
    Event,
    SumOverflowError,
    event_id_hash,
    masks_of,
    summed_columns,
)

US = timedelta(microseconds=1)
DAY = 86_400_000_000
T0 = 20_000 * DAY  # 2024-10-04


def view(**changes) -> WindowedView:
    arguments = {
        "name": "v",
        "entity_key": ("k",),
        "topic": "events",
        "columns": {"kind": "string", "n": "int64", "m": "int64"},
        "aggregates": (
            Aggregate("short_count", "count", window=2 * US),
            Aggregate("week_count", "count", window=timedelta(days=7)),
            Aggregate("week_sum", "sum", "n", window=timedelta(days=7)),
            Aggregate("day_sum_a", "sum", "n", window=timedelta(days=1), where=Where("kind", ("a",))),
            Aggregate("day_count_ab", "count", window=timedelta(days=1), where=Where("kind", ("a", "it's"))),
            Aggregate("day_sum_m", "sum", "m", window=timedelta(days=1), where=Where("kind", ("a", "it's"))),
        ),
        "ttl": timedelta(days=10),
        "event_id": "id",
    }
    return WindowedView(**(arguments | changes))


VIEW = view()
SCHEMA = pa.schema(
    [
        ("k", pa.string()),
        ("kind", pa.string()),
        ("n", pa.int64()),
        ("m", pa.int64()),
        ("event_timestamp", pa.timestamp("us", "UTC")),
        ("_partition", pa.int32()),
        ("_offset", pa.int64()),
        ("_visible_at", pa.timestamp("us", "UTC")),
        ("_dropped", pa.string()),
    ]
)


@dataclass
class Row:
    key: str
    event: Event
    dropped: str | None


def log_table(rows: list[Row]) -> pa.Table:
    return pa.table(
        {
            "k": [r.key for r in rows],
            "kind": [r.event.values["kind"] for r in rows],
            "n": [r.event.values["n"] for r in rows],
            "m": [r.event.values["m"] for r in rows],
            "event_timestamp": [r.event.timestamp for r in rows],
            "_partition": [r.event.partition for r in rows],
            "_offset": [r.event.offset for r in rows],
            "_visible_at": [r.event.visible_at for r in rows],
            "_dropped": [r.dropped for r in rows],
        },
        schema=SCHEMA,
    )


def from_history(rows, reads, known, definition=VIEW) -> dict[int, dict]:
    """reads: (key, t, offsets) -> values by position."""
    con = duckdb.connect(config={"threads": 1})
    con.register("log_table", log_table(rows))
    asked = pa.table(
        {
            "_row": range(len(reads)),
            "k": [k for k, _, _ in reads],
            "_t": [t for _, t, _ in reads],
            "_offsets": [list(o.items()) for _, _, o in reads],
        },
        schema=pa.schema(
            [
                ("_row", pa.int64()),
                ("k", pa.string()),
                ("_t", pa.timestamp("us", "UTC")),
                ("_offsets", pa.map_(pa.int32(), pa.int64())),
            ]
        ),
    )
    con.register("asked_table", asked)
    table = con.sql(history_sql(definition, "asked_table", "log_table", known)).to_arrow_table()
    return {r["_row"]: r for r in table.to_pylist()}


def brute_force(rows, key, t, known, definition=VIEW) -> tuple[dict, int | None]:
    """The definition, word by word. `known` is a predicate over events."""
    seen = [r.event for r in rows if r.key == key and r.dropped is None and known(r.event) and r.event.timestamp <= t]
    nothing = {a.name: None for a in definition.aggregates}
    if not seen or (definition.ttl and t - max(e.timestamp for e in seen) > definition.ttl // US):
        return nothing, None
    out = {}
    for a in definition.aggregates:
        inside = [
            e.values
            for e in seen
            if t - a.window // US <= e.timestamp and (a.where is None or e.values[a.where.column] in a.where.values)
        ]
        numbers = [v[a.column] for v in inside if v[a.column] is not None] if a.column else []
        out[a.name] = len(inside) if a.column is None else (sum(numbers) if numbers else None)
    return out, max(e.timestamp for e in seen)


def online(state: EntityState | None, t: int, definition=VIEW) -> tuple[dict, int | None]:
    """What a reader answers: null where never seen or silent for longer than ttl."""
    last = state.last_seen_at(t) if state else None
    if last is None or (definition.ttl and t - last > definition.ttl // US):
        return {a.name: None for a in definition.aggregates}, None
    return state.finalise(definition, t), last


ages = st.one_of(
    st.sampled_from(
        [0, 1, 2, 3, DAY - 1, DAY, DAY + 1, 7 * DAY - 1, 7 * DAY, 7 * DAY + 1, 8 * DAY, 10 * DAY, 11 * DAY]
    ),
    st.integers(-5_000_000, 12 * DAY),  # negative: dated ahead of the clock
)
numbers = st.one_of(st.none(), st.integers(-5, 5), st.sampled_from([2**60, -(2**60)]))
steps = st.tuples(
    st.sampled_from(["x", "y"]),  # entity
    st.integers(0, 1),  # partition
    st.integers(0, 6),  # event id: few, so that some repeat
    ages,
    st.one_of(st.integers(0, 3), st.sampled_from([DAY, 6 * DAY, 7 * DAY, 20 * DAY])),  # how far the clock moves
    st.sampled_from(["a", "b", "it's", None]),
    numbers,
    numbers,
    st.booleans(),  # a batch ends here
    st.booleans(),  # and is delivered again
)


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, max_size=25), st.lists(st.tuples(st.sampled_from(["x", "y", "z"]), ages), max_size=6))
def test_stream_history_and_brute_force_agree(history, later_reads):
    states: dict[str, EntityState] = {}
    rows: list[Row] = []
    reads: list[tuple[str, int, dict[int, int]]] = []
    answers: list[tuple[dict, int | None]] = []
    clock, offsets, batch = T0, {0: 0, 1: 0}, []

    def read(key: str, t: int) -> None:
        state = states.get(key)
        reads.append((key, t, dict(state.offsets) if state else {}))
        answers.append(online(state, t))

    def apply_batch(again: bool) -> None:
        for _ in range(1 + again):
            for key in {k for k, _ in batch}:
                before = states.get(key, EntityState.empty(VIEW))
                state = EntityState.decode(VIEW, before.encode(VIEW))
                for applied in state.apply(VIEW, [e for k, e in batch if k == key]):
                    if applied.outcome != "replayed":
                        rows.append(Row(key, applied.event, "duplicate" if applied.outcome == "duplicate" else None))
                states[key] = EntityState.decode(VIEW, state.encode(VIEW))
        batch.clear()

    for i, (key, partition, repeat, age, advance, kind, n, m, ends, again) in enumerate(history):
        clock += 1 + advance
        event_id = f"{key}{repeat}" if repeat else f"unique{i}"
        values = {"kind": kind, "n": n, "m": m}
        batch.append((key, Event(clock - age, partition, offsets[partition], clock, values, event_id)))
        offsets[partition] += 1
        if ends:
            apply_batch(again)
            for k in ("x", "y"):
                read(k, clock)
    apply_batch(False)
    for key, age in later_reads:
        read(key, clock + max(age, 0))

    by_offset = from_history(rows, reads, "by_offset")
    by_time = from_history(rows, reads, "by_time")
    for i, ((key, t, included), (values, last)) in enumerate(zip(reads, answers)):
        expected, seen = brute_force(rows, key, t, lambda e, o=included: e.offset <= o.get(e.partition, -1))
        assert values == expected
        assert last == seen
        assert brute_force(rows, key, t, lambda e, t=t: e.visible_at <= t)[0] == expected
        for answer in (by_offset[i], by_time[i]):
            assert {a.name: answer[a.name] for a in VIEW.aggregates} == expected
            at = answer[LAST_SEEN]
            assert (None if at is None else (at - datetime(1970, 1, 1, tzinfo=UTC)) // US) == seen


@settings(max_examples=60, deadline=None)
@given(st.lists(steps, min_size=1, max_size=25), st.randoms(use_true_random=False), st.integers(0, 12 * DAY))
def test_batches_and_order_of_arrival_do_not_matter(history, random, later):
    events = [
        Event(T0 - max(age, 0), 0, 0, T0, {"kind": kind, "n": n, "m": m}, f"id{i}")
        for i, (_, _, _, age, _, kind, n, m, _, _) in enumerate(history)
    ]

    def final(order: list[Event], pieces: int) -> tuple:
        state = EntityState.empty(VIEW)
        order = [Event(e.timestamp, 0, i, e.visible_at, e.values, e.event_id) for i, e in enumerate(order)]
        for part in np.array_split(np.arange(len(order)), pieces):
            state.apply(VIEW, [order[i] for i in part])
        return online(EntityState.decode(VIEW, state.encode(VIEW)), T0 + later)

    shuffled = random.sample(events, len(events))
    bulk = EntityState.of_history(
        VIEW,
        np.array([e.timestamp for e in shuffled]),
        np.array([event_id_hash(e.event_id) for e in shuffled], dtype="<u8"),
        masks_of(VIEW, {c: [e.values[c] for e in shuffled] for c in VIEW.columns}, len(shuffled)),
        [np.array([e.values[c] or 0 for e in shuffled]) for c in summed_columns(VIEW)],
        {-1: len(events) - 1},
        T0,
    )
    expected = final(events, 1)
    assert final(shuffled, 1) == expected
    assert final(events, len(events)) == expected
    assert online(bulk, T0 + later) == expected


def test_history_refuses_a_sum_beyond_int64_as_the_state_does():
    rows = [Row("x", Event(T0, 0, i, T0, {"kind": "a", "n": 2**62, "m": 0}, f"i{i}"), None) for i in range(2)]
    with pytest.raises(duckdb.Error, match=r"v\.week_sum: the sum does not fit"):
        from_history(rows, [("x", T0, {})], "by_time")
    state = EntityState.empty(VIEW)
    state.apply(VIEW, [r.event for r in rows])
    with pytest.raises(SumOverflowError, match=r"v\.week_sum: the sum does not fit"):
        state.finalise(VIEW, T0)


def test_history_counts_a_row_that_two_files_hold_once():
    row = Row("x", Event(T0, 0, 5, T0, {"kind": "a", "n": 2, "m": 0}, "i"), None)
    assert from_history([row, row], [("x", T0, {})], "by_time")[0]["week_sum"] == 2


def test_history_gives_one_row_per_entity_row_also_for_null_and_repeated_keys():
    row = Row("x", Event(T0, 0, 5, T0, {"kind": "a", "n": 2, "m": 0}, "i"), None)
    got = from_history([row], [("x", T0, {}), ("x", T0, {}), (None, T0, {}), ("never", T0, {})], "by_time")
    assert [got[i]["week_count"] for i in range(4)] == [1, 1, None, None]


def test_history_of_an_empty_log_is_null():
    assert from_history([], [("x", T0, {})], "by_time")[0]["week_count"] is None


def test_history_of_an_old_silent_entity_without_ttl_counts_zero():
    forever = view(ttl=timedelta(0))
    row = Row("x", Event(T0, -1, 0, T0, {"kind": "a", "n": 2, "m": 0}, "i"), None)
    got = from_history([row], [("x", T0 + 4000 * DAY, {})], "by_time", forever)[0]
    assert got["week_count"] == 0
    assert got["week_sum"] is None
