"""Who is held out and which rows count as the future: pure functions, the same answer on every run and machine."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING

from feature_store.errors import DataError, UsageError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

HELD_OUT = 0.25
"""Share of the customers that no model sees in training."""


@dataclass(frozen=True)
class Split:
    """Row masks (numpy bool, one entry per row of the table) of the three parts of a training set.

    `train` and `held_out` hold rows at t <= train_until and share no customer; `future` holds every customer's rows at
    t >= future_from, as a model in production meets them. Rows in between belong to no part: their labels overlap
    with the training rows' label horizon.
    """

    train: np.ndarray
    held_out: np.ndarray
    future: np.ndarray

    def rows(self) -> dict[str, int]:
        """Rows per part."""
        return {name: int(getattr(self, name).sum()) for name in ("train", "held_out", "future")}


def held_out_fraction_of(key: str) -> float:
    """A stable number in [0, 1) for an entity key: its place in the order in which customers are held out."""
    return int.from_bytes(hashlib.blake2b(key.encode(), digest_size=8).digest(), "big") / 2**64


def is_held_out(key: str, fraction: float = HELD_OUT) -> bool:
    """Whether the customer is held out; growing the fraction only adds customers."""
    return held_out_fraction_of(key) < fraction


def split_rows(
    table: pa.Table, train_until: datetime, future_from: datetime, fraction: float = HELD_OUT, key: str = "customer_id"
) -> Split:
    """Split `table` (columns `key` string and event_timestamp) by customer and time, both limits inclusive.

    UsageError when the limits overlap or are naive, or the fraction is not between 0 and 1; DataError when a part has
    no row.
    """
    import numpy as np

    check_limits(train_until, future_from, fraction)
    keys = table.column(key).to_pylist()
    held = np.fromiter(_held(keys, fraction), dtype=bool, count=len(keys))
    t = table.column("event_timestamp").to_pandas()
    past = (t <= train_until).to_numpy()
    split = Split(train=past & ~held, held_out=past & held, future=(t >= future_from).to_numpy())
    for name, rows in split.rows().items():
        if rows == 0:
            raise DataError(
                f"no row left for the part {name!r} (train_until {train_until.isoformat()}, "
                f"future_from {future_from.isoformat()}, held out {fraction:g} of {len(set(keys))} customers)",
                next_step="use more customers or days: predictflow data --help",
            )
    return split


def check_limits(train_until: datetime, future_from: datetime, fraction: float) -> None:
    """UsageError unless train_until < future_from, both with a time zone, and 0 < fraction < 1."""
    for name, limit in (("train_until", train_until), ("future_from", future_from)):
        if limit.tzinfo is None:
            raise UsageError(f"{name} has no time zone", value=limit.isoformat(), next_step="write it with Z: UTC")
    if train_until >= future_from:
        raise UsageError("future_from must be after train_until", value=future_from.isoformat())
    if not 0 < fraction < 1:
        raise UsageError("the held-out share must be between 0 and 1", value=fraction)


def _held(keys: Iterable[str], fraction: float) -> Iterable[bool]:
    known: dict[str, bool] = {}  # a customer has many rows; hash it once
    for key in keys:
        if key not in known:
            known[key] = is_held_out(key, fraction)
        yield known[key]
