"""Splits: stable, disjoint by customer, and never overlapping in time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import DataError, UsageError
from training.splits import held_out_fraction_of, is_held_out, split_rows

T0 = datetime(2025, 1, 1, tzinfo=UTC)
UNTIL, FUTURE = T0 + timedelta(days=100), T0 + timedelta(days=130)


def table(customers: int = 200, days: range = range(0, 200, 10)) -> pa.Table:
    rows = [(f"C{i}", T0 + timedelta(days=d)) for d in days for i in range(customers)]
    return pa.table(
        {
            "customer_id": [r[0] for r in rows],
            "event_timestamp": pa.array([r[1] for r in rows], pa.timestamp("us", tz="UTC")),
        }
    )


def test_a_customer_is_held_out_by_a_hash_that_never_changes() -> None:
    # Pinned: another hash would let a retrained model be tested on customers that an earlier one was trained on.
    assert [is_held_out(f"C{i:06d}") for i in range(12)] == [
        False,
        True,
        True,
        True,
        True,
        False,
        False,
        False,
        False,
        False,
        True,
        False,
    ]


@given(st.text(max_size=20), st.floats(0.01, 0.98))
@settings(max_examples=200, deadline=None)
def test_growing_the_share_only_adds_customers(key: str, fraction: float) -> None:
    assert 0 <= held_out_fraction_of(key) < 1
    assert not is_held_out(key, fraction) or is_held_out(key, fraction + 0.01)


def test_the_share_is_kept_over_many_customers() -> None:
    held = sum(is_held_out(f"C{i:06d}", 0.25) for i in range(20_000))
    assert 4_700 < held < 5_300  # 4.9 standard deviations


def test_parts_share_no_row_and_train_and_held_out_no_customer() -> None:
    rows = table()
    split = split_rows(rows, UNTIL, FUTURE)
    assert not (split.train & split.held_out).any()
    assert not (split.future & (split.train | split.held_out)).any()
    keys = rows["customer_id"].to_numpy()
    assert not set(keys[split.train]) & set(keys[split.held_out])
    assert set(keys[split.future]) == set(keys)
    assert split.rows() == {k: int(getattr(split, k).sum()) for k in ("train", "held_out", "future")}


def test_both_limits_are_inclusive_and_what_lies_between_belongs_to_no_part() -> None:
    rows = table()
    split = split_rows(rows, UNTIL, FUTURE)
    t = rows["event_timestamp"].to_pandas()
    past = t[split.train | split.held_out]
    assert past.max() == UNTIL
    assert t[split.future].min() == FUTURE
    neither = t[~(split.train | split.held_out | split.future)]
    assert sorted(set(neither)) == [T0 + timedelta(days=110), T0 + timedelta(days=120)]


def test_row_order_does_not_decide_who_is_held_out() -> None:
    rows = table()
    backwards = rows.take(pa.array(range(rows.num_rows - 1, -1, -1)))
    assert (split_rows(backwards, UNTIL, FUTURE).held_out[::-1] == split_rows(rows, UNTIL, FUTURE).held_out).all()


@pytest.mark.parametrize(
    ("until", "future", "fraction"),
    [(FUTURE, UNTIL, 0.25), (UNTIL.replace(tzinfo=None), FUTURE, 0.25), (UNTIL, FUTURE, 0.0), (UNTIL, FUTURE, 1.0)],
)
def test_limits_that_make_no_sense_are_usage_errors(until: datetime, future: datetime, fraction: float) -> None:
    with pytest.raises(UsageError):
        split_rows(table(), until, future, fraction)


def test_a_part_without_rows_is_named() -> None:
    with pytest.raises(DataError, match="'future'"):
        split_rows(table(days=range(0, 100, 10)), UNTIL, FUTURE)
