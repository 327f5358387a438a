"""When events become visible: at once for a batch as one by one."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from feature_store.visibility import _one_by_one, visible_times

SECOND = 1_000_000
moments = st.integers(0, 20).map(lambda n: n * SECOND)
events = st.lists(
    st.tuples(moments, moments, st.booleans(), moments), max_size=20
)  # time, known, logged, first visible


def columns(rows):
    return (
        [np.array(c) for c in zip(*rows)]
        if rows
        else [np.empty(0, np.int64)] * 2 + [np.empty(0, bool), np.empty(0, np.int64)]
    )


@given(events, moments)
def test_under_replay_the_running_maximum_says_what_the_rule_says(rows, floor):
    times, known, logged, first = columns(rows)
    visible, refused = visible_times(times, known, logged, first, floor, "replay")
    by_rule, refused_by_rule = _one_by_one(times, known, logged, first, floor)
    assert refused.tolist() == refused_by_rule.tolist()
    assert visible[~refused].tolist() == by_rule[~refused].tolist()
    times = np.minimum(times, known)  # nobody ahead of what the source said: the quick way
    assert (
        visible_times(times, known, logged, first, floor, "replay")[0].tolist()
        == _one_by_one(times, known, logged, first, floor)[0].tolist()
    )


@given(events, moments)
def test_under_wall_a_batch_becomes_visible_at_once(rows, floor):
    times, known, logged, first = columns(rows)
    visible, refused = visible_times(times, known, logged, first, floor, "wall")
    assert set(visible[~logged].tolist()) <= {floor + 1}
    assert visible[logged].tolist() == first[logged].tolist()
    assert refused.tolist() == [
        not was and t > floor + 1 + 5 * SECOND for t, was in zip(times.tolist(), logged.tolist())
    ]
