"""The state of one entity: exact bounds, duplicates, replays, caps, and refusals instead of wrong values."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from feature_store.errors import DefinitionError
from feature_store.windows import Aggregate, Where, WindowedView
from feature_store.windows.state import (
    RETENTION_SLACK,
    EntityState,
    Event,
    SumOverflowError,
    TooManyEventsError,
    WindowStateError,
    masks_of,
    summed_columns,
)

DAY = 86_400_000_000
HOUR = DAY // 24
T = 20_000 * DAY
SLACK = RETENTION_SLACK // timedelta(microseconds=1)


def view(**changes) -> WindowedView:
    arguments = {
        "name": "v",
        "entity_key": ("k",),
        "topic": "events",
        "columns": {"kind": "string", "n": "int64"},
        "aggregates": (
            Aggregate("day", "count", window=timedelta(days=1)),
            Aggregate("tickets", "count", window=timedelta(days=1), where=Where("kind", ("ticket",))),
            Aggregate("total", "sum", "n", window=timedelta(days=7)),
        ),
        "ttl": timedelta(days=30),
        "event_id": "id",
    }
    return WindowedView(**(arguments | changes))


VIEW = view()


def event(offset: int, at: int, n: int | None = 1, kind: str | None = "usage", visible: int = T, **changes) -> Event:
    arguments = {"partition": 0, "event_id": f"e{offset}"} | changes
    return Event(at, arguments["partition"], offset, visible, {"kind": kind, "n": n}, arguments["event_id"])


def state_of(*events: Event, definition: WindowedView = VIEW) -> EntityState:
    state = EntityState.empty(definition)
    state.apply(definition, list(events))
    return EntityState.decode(definition, state.encode(definition))


@pytest.mark.parametrize(("age", "counted"), [(0, 1), (1, 1), (DAY - 1, 1), (DAY, 1), (DAY + 1, 0), (-1, 0)], ids=str)
def test_both_ends_of_a_window_are_inclusive_to_the_microsecond(age, counted):
    assert state_of(event(0, T - age)).finalise(VIEW, T)["day"] == counted


def test_nothing_in_the_window_is_count_zero_and_sum_null():
    assert state_of(event(0, T)).finalise(VIEW, T + 8 * DAY) == {"day": 0, "tickets": 0, "total": None}


def test_a_null_number_is_counted_but_not_summed():
    assert state_of(event(0, T, n=None)).finalise(VIEW, T) == {"day": 1, "tickets": 0, "total": None}
    assert state_of(event(0, T, n=None), event(1, T, n=0)).finalise(VIEW, T)["total"] == 0


def test_a_filter_takes_its_values_and_neither_others_nor_null():
    kinds = ["ticket", "usage", None, "Ticket", "ticket"]
    assert state_of(*(event(i, T, kind=k) for i, k in enumerate(kinds))).finalise(VIEW, T)["tickets"] == 2


def test_an_event_ahead_of_the_clock_waits_for_its_time():
    state = state_of(event(0, T + HOUR))
    assert state.last_seen == T + HOUR
    assert state.last_seen_at(T) is None
    assert state.finalise(VIEW, T)["day"] == 0
    assert state.last_seen_at(T + HOUR) == T + HOUR
    assert state.finalise(VIEW, T + HOUR)["day"] == 1


def test_a_repeated_id_is_a_duplicate_and_a_repeated_offset_a_replay():
    state = EntityState.empty(VIEW)
    first = [event(0, T), event(1, T, event_id="e0"), event(2, T)]
    assert [a.outcome for a in state.apply(VIEW, first)] == ["applied", "duplicate", "applied"]
    before = state.encode(VIEW)
    assert [a.outcome for a in state.apply(VIEW, first)] == ["replayed"] * 3
    assert state.encode(VIEW) == before
    assert [a.outcome for a in state.apply(VIEW, [event(3, T, event_id="e2")])] == ["duplicate"]
    assert state.offsets == {0: 3}
    assert state.finalise(VIEW, T)["day"] == 2


def test_without_an_event_id_two_offsets_are_two_facts():
    plain = view(event_id=None)
    state = state_of(event(0, T, event_id=None), event(1, T, event_id=None), definition=plain)
    assert state.finalise(plain, T)["day"] == 2


def test_partitions_keep_offsets_of_their_own():
    state = state_of(event(7, T), event(3, T, partition=1))
    assert state.offsets == {0: 7, 1: 3}
    assert [a.outcome for a in state.apply(VIEW, [event(3, T, partition=0, event_id="x")])] == ["replayed"]


def test_events_live_as_long_as_a_read_may_need_them():
    state = state_of(event(0, T, visible=T))
    keep = T + 7 * DAY + SLACK
    state.apply(VIEW, [event(1, keep, visible=keep)])
    assert len(state.times) == 2
    state.apply(VIEW, [event(2, keep, visible=keep + 1)])
    assert len(state.times) == 2
    assert state.evicted_last == T


def test_a_very_late_event_of_a_new_entity_says_only_that_it_was_seen():
    state = state_of(event(0, T - 100 * DAY))
    assert len(state.times) == 0
    assert state.last_seen_at(T) == T - 100 * DAY
    assert state.finalise(VIEW, T) == {"day": 0, "tickets": 0, "total": None}


def test_a_read_before_the_newest_event_was_known_is_refused():
    with pytest.raises(WindowStateError, match="before the state's newest event"):
        state_of(event(0, T)).finalise(VIEW, T - 1)


def test_a_sum_beyond_int64_is_an_error_and_one_at_its_edge_is_exact():
    edge = state_of(event(0, T, 2**63 - 1), event(1, T, 1), event(2, T, -1))
    assert edge.finalise(VIEW, T)["total"] == 2**63 - 1
    assert state_of(event(0, T, -(2**63))).finalise(VIEW, T)["total"] == -(2**63)
    with pytest.raises(SumOverflowError, match=r"v\.total"):
        state_of(event(0, T, 2**63 - 1), event(1, T, 1)).finalise(VIEW, T)


def test_above_the_cap_there_is_an_error_until_the_lost_events_leave_the_window():
    small = view(max_events_per_entity=3)
    state = state_of(*(event(i, T - 5 + i) for i in range(5)), definition=small)
    assert len(state.times) == 3
    with pytest.raises(TooManyEventsError, match="max_events_per_entity"):
        state.finalise(small, T)
    last_lost = T - 4
    with pytest.raises(TooManyEventsError):
        state.finalise(small, last_lost + 7 * DAY)
    assert state.finalise(small, last_lost + 7 * DAY + 1)["total"] == 3


def test_state_under_another_definition_is_refused():
    data = state_of(event(0, T)).encode(VIEW)
    with pytest.raises(DefinitionError, match="another definition"):
        EntityState.decode(view(ttl=timedelta(days=31)), data)


@pytest.mark.parametrize("data", [b"", b"\x01", b"\x02" + bytes(80)])
def test_bytes_that_are_no_state_are_refused(data):
    with pytest.raises(WindowStateError):
        EntityState.decode(VIEW, data)


def test_a_truncated_state_is_refused():
    data = state_of(event(0, T), event(1, T)).encode(VIEW)
    for length in (len(data) - 1, len(data) - 8, 60):
        with pytest.raises(WindowStateError):
            EntityState.decode(VIEW, data[:length])


def test_finalising_and_encoding_change_nothing():
    state = state_of(event(0, T), event(1, T - DAY))
    before = state.encode(VIEW)
    state.finalise(VIEW, T + 3 * DAY)
    assert state.encode(VIEW) == before


def test_bulk_history_knows_that_an_entity_was_seen_long_ago():
    none: np.ndarray = np.empty(0, dtype=np.int64)
    masks = masks_of(VIEW, {"kind": [], "n": []}, 0)
    columns = [none for _ in summed_columns(VIEW)]
    state = EntityState.of_history(VIEW, none, none, masks, columns, {-1: 4}, T, T - 50 * DAY)
    assert state.last_seen_at(T) == state.last_seen == T - 50 * DAY
    state.apply(VIEW, [event(0, T + HOUR)])
    assert state.last_seen_at(T) == T - 50 * DAY


def test_the_hash_is_the_same_whatever_the_order_of_columns():
    assert view(columns={"n": "int64", "kind": "string"}).hash == VIEW.hash
    assert view(max_events_per_entity=5).hash != VIEW.hash
