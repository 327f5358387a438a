"""When each event of a batch becomes visible, and which are dated too far ahead for that.

Under `wall` a batch becomes visible at once, after everything that a reader may have been told. Under `replay` an event
becomes visible when its source knew it, or just after the clock where that is later, and the clock follows.
"""

from __future__ import annotations

import numpy as np

from feature_store.clock import MAX_SKEW, MICROSECOND, ClockMode, from_micros
from feature_store.logged import Bools, Ints

_SKEW_US = MAX_SKEW // MICROSECOND


def too_far_ahead(times: Ints, limit: int) -> Bools:
    """Which times are beyond a clock by more than is allowed."""
    return times > limit + _SKEW_US


def ahead(name: str, time: int, clock: str, limit: int) -> str:
    """The reason why an event is refused. One from the future would move the replay clock there, and it never goes back."""
    return (
        f"{name} {from_micros(time).isoformat()} is more than {MAX_SKEW.total_seconds():g} s ahead of "
        f"{clock}, {from_micros(limit).isoformat()}"
    )


def visible_times(
    times: Ints, known: Ints, logged: Bools, first_visible: Ints, floor: int, clock: ClockMode
) -> tuple[Ints, Bools]:
    """`_visible_at` of each event, and which of them are dated too far ahead of it (those move nothing).

    `known`: when the source knew it. `logged`: whether it was visible before, then at `first_visible`. `floor`: what was
    visible until now.
    """
    if clock == "wall":
        visible = np.where(logged, first_visible, floor + 1)
        return visible, ~logged & too_far_ahead_of(times, visible)
    # A new event is visible at max(before + 1, known). Less the number of new events so far, that is a running maximum.
    new = np.cumsum(~logged)
    held = np.where(logged, first_visible, known) - new
    visible = np.where(logged, first_visible, np.maximum.accumulate(np.maximum(held, floor)) + new)
    # `visible` is at least `known`, so nobody is ahead of it who is not ahead of what its own source said.
    suspects = ~logged & too_far_ahead_of(times, known)
    return (visible, suspects) if not suspects.any() else _one_by_one(times, known, logged, first_visible, floor)


def too_far_ahead_of(times: Ints, limits: Ints) -> Bools:
    """`too_far_ahead` with a limit for each."""
    return times > limits + _SKEW_US


def _one_by_one(times: Ints, known: Ints, logged: Bools, first_visible: Ints, floor: int) -> tuple[Ints, Bools]:
    """As the rule says it: what is refused must not move the clock for those behind it."""
    visible, refused = np.empty(len(times), np.int64), np.zeros(len(times), bool)
    rows = zip(times.tolist(), known.tolist(), logged.tolist(), first_visible.tolist(), strict=True)
    for i, (time, known_at, was, first) in enumerate(rows):
        at = first if was else max(floor + 1, known_at)
        visible[i] = at
        if not was and time > at + _SKEW_US:
            refused[i] = True
        else:
            floor = max(floor, at)
    return visible, refused
