"""When predictions are made: regular times, split into training and future so that every label is known at the cut."""

from __future__ import annotations

import math
from dataclasses import dataclass
from datetime import datetime, timedelta

from feature_store.errors import DataError

WEEK = timedelta(days=7)
WARM_UP = timedelta(days=28)
"""Nobody predicts in the first weeks: the windows of the features are not filled yet."""


@dataclass(frozen=True)
class Schedule:
    """Prediction times in order: those <= train_until are for training, those >= future_from the future."""

    times: tuple[datetime, ...]
    train_until: datetime
    future_from: datetime


def schedule(start: datetime, cut: datetime, horizon: timedelta, every: timedelta = WEEK) -> Schedule:
    """Times t in `start + 28 days <= t <= cut - horizon`, a step of `every` apart, the last sixth of them the future.

    `future_from >= train_until + horizon`, so no training label looks into the future's time; the times between the two
    serve neither and are left out. DataError when the period is too short to hold both; it says how many days it takes.
    """
    first, last = start + WARM_UP, cut - horizon
    times = [first + every * i for i in range((last - first) // every + 1)] if last >= first else []
    future = times[-max(1, len(times) // 6) :]
    train = [t for t in times if t <= future[0] - horizon]
    if not train:
        needed = WARM_UP + horizon + every * math.ceil(horizon / every)
        raise DataError(
            f"history is too short to train on: {max((cut - start).days, 0)} days before the cut, needed {needed.days}",
            next_step="give more days of data",
        )
    return Schedule((*train, *future), train[-1], future[0])
