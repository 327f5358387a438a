"""What was written last comes back as it stands in memory, until there is too much of it."""

from __future__ import annotations

from datetime import timedelta

import numpy as np
import pytest

from feature_store.recent_states import RecentStates
from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.state import NEVER, Events, States

SECOND = 1_000_000
T = 1_700_000_000 * SECOND
COUNT = "SELECT k, COUNT(*) AS c FROM events GROUP BY k, TUMBLE(ts, INTERVAL '1' MINUTE)"
KINDS = "SELECT k, COUNT(DISTINCT x) AS c FROM events GROUP BY k, TUMBLE(ts, INTERVAL '1' MINUTE)"


def definition(sql: str = COUNT) -> WindowedView:
    source = EventSource("t", {"x": "string"}, 60 * SECOND, timestamp="ts")
    return WindowedView("v", ("k",), ("string",), source, sql, timedelta(0))


def written(events: list[int], sql: str = COUNT) -> States:
    """States of one entity each, with so many events."""
    states = States.empty(definition(sql), len(events))
    n = sum(events)
    zeros = np.zeros(n, np.int64)
    entity = np.repeat(np.arange(len(events)), events)
    offset = np.arange(n)
    states.apply(
        Events(entity, zeros + T, zeros, offset, zeros + T, zeros + NEVER, zeros - 1, zeros, [zeros] * (sql == KINDS))
    )
    return states


def found(recent: RecentStates, *names: str) -> dict[str, int]:
    """The counts of the entities that are kept."""
    out = {}
    for states, rows, places in recent.of([(n,) for n in names]):
        counts = states.values(T).columns["c"]
        out |= {names[p]: counts[r] for r, p in zip(rows.tolist(), places.tolist(), strict=True)}
    return out


def test_the_newest_write_of_an_entity_counts():
    recent = RecentStates(1_000_000)
    recent.put([("a",), ("b",)], written([1, 2]))
    recent.put([("c",), ("a",)], written([3, 4]))
    assert found(recent, "b", "a", "x", "c") == {"a": 4, "b": 2, "c": 3}
    recent.put([], States.empty(definition(), 0))
    assert found(recent, "a") == {"a": 4}
    recent.forget()
    assert recent.of([("a",)]) == []


def test_the_oldest_write_goes_first_and_its_names_too():
    size = written([1, 1]).nbytes
    recent = RecentStates(2 * size)
    for i in range(20):
        recent.put([(f"a{i}",), (f"b{i}",)], written([1, 1]))
    assert set(found(recent, *(f"a{i}" for i in range(20)))) == {"a18", "a19"}
    assert len(recent._numbers) <= 10


@pytest.mark.parametrize("sql", [COUNT, KINDS])
def test_after_states_that_cannot_be_kept_no_older_ones_come_back(sql):
    recent = RecentStates(written([1]).nbytes + 8)
    recent.put([("a",)], written([1]))
    assert found(recent, "a") == {"a": 1}
    recent.put([("a",), ("b",), ("c",)] if sql == COUNT else [("a",)], written([2, 2, 2] if sql == COUNT else [2], sql))
    assert recent.of([("a",)]) == []
