"""Rows of protos become the packed rows that protobuf and the layout say, whether they are few or many."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

import pandas as pd
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.errors import DataError
from feature_store.proto_rows import batches_of_rows
from feature_store.redis_layout import encode_pair, encode_timestamp, feature_field, pair_field, timestamp_field
from feature_store.write_layout import FEW_ROWS, Limit, WriteLayout
from tests.unit.row_support import NAMES, layout_of_rows, rows_of

AT = datetime(2026, 3, 1, 12, 0, 0, 5, tzinfo=UTC)
NS = 1_772_366_400_000_005_000
VALUES = st.one_of(
    st.builds(Value),
    st.builds(Value, int32_val=st.one_of(st.integers(-(2**31), 2**31 - 1), st.just(0))),
    st.builds(Value, int64_val=st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**29), st.just(0))),
    st.builds(Value, float_val=st.floats(width=32)),
    st.builds(Value, double_val=st.floats()),
    st.builds(Value, string_val=st.one_of(st.text(max_size=6), st.just("x" * 200))),
    st.builds(Value, bytes_val=st.binary(max_size=6)),
    st.builds(Value, bool_val=st.booleans()),
    st.builds(Value, unix_timestamp_val=st.integers(-(2**40), 2**40)),
)
# Mostly the type that each feature has: then all values of a column are of it, which takes the shorter way.
OF_TYPE = [
    st.builds(Value, int32_val=st.integers(-(2**31), 2**31 - 1)),
    st.builds(Value, int64_val=st.one_of(st.integers(-(2**63), 2**63 - 1), st.integers(0, 2**29))),
    st.builds(Value, float_val=st.floats(width=32)),
    st.builds(Value, double_val=st.floats()),
    st.builds(Value, string_val=st.text(max_size=40)),
    st.builds(Value, bytes_val=st.binary(max_size=6)),
    st.builds(Value, bool_val=st.booleans()),
    st.builds(Value, unix_timestamp_val=st.integers(-(2**40), 2**40)),
]
ROW = st.one_of(st.tuples(*OF_TYPE), st.tuples(*[st.one_of(kind, VALUES) for kind in OF_TYPE]))
TIMES = st.one_of(
    st.datetimes(datetime(1960, 1, 1), datetime(2100, 1, 1)),
    st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC)),
    st.integers(0, 4 * 10**18).map(lambda ns: pd.Timestamp(ns, unit="ns")),
)


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> WriteLayout:
    return layout_of_rows(tmp_path_factory.mktemp("registry"))


def _key(i: int | str) -> EntityKey:
    return EntityKey(join_keys=["customer_id"], entity_values=[Value(string_val=f"C{i}")])


def _ns(time: Any) -> int | None:
    return None if time is None else pd.Timestamp(time).as_unit("ns").value


def _written(layout: WriteLayout, rows: Sequence[Any]) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return [row for batch in batches_of_rows(layout, rows, None)[1] for row in rows_of(batch)]


def _wanted(row: Any) -> tuple[bytes, dict[bytes, bytes]]:
    key, values, event, created = row
    cells = {feature_field("rows", n): v.SerializeToString() for n, v in values.items()}
    times = {
        pair_field("rows"): encode_pair(_ns(event) or 0, _ns(created)),
        timestamp_field("rows"): encode_timestamp(_ns(event) or 0),
    }
    return serialize_entity_key(key, 3) + b"proj", cells | times


@settings(deadline=None)
@given(st.data())
def test_few_rows_and_many_are_what_protobuf_writes(layout: WriteLayout, data: st.DataObject) -> None:
    made = data.draw(st.lists(st.tuples(ROW, TIMES, st.one_of(st.none(), TIMES)), min_size=1, max_size=8))
    rows = [
        (_key(i), dict(zip(NAMES, values, strict=True)), event, created)
        for i, (values, event, created) in enumerate(made)
    ]
    assert _written(layout, rows) == [_wanted(row) for row in rows]
    many = [(_key(i), *rows[i % len(rows)][1:]) for i in range(FEW_ROWS + 1)]
    assert _written(layout, many) == [_wanted(row) for row in many]


def test_rows_with_other_features_begin_a_batch_of_their_own(layout: WriteLayout) -> None:
    one, two = Value(int32_val=1), Value(int64_val=2)
    features = [{"f0": one}, {"f0": one}, {"f1": two}, {"f0": one, "f1": two}, {"f1": two, "f0": one}, {}]
    rows = [(_key(i), values, AT, None) for i, values in enumerate(features)]
    assert _written(layout, rows) == [_wanted(row) for row in rows]
    assert [len(b.keys) for b in batches_of_rows(layout, rows, None)[1]] == [2, 1, 2, 1]


def test_large_texts_of_few_rows_are_cut_at_two_megabytes_and_none_is_lost(layout: WriteLayout) -> None:
    """Many features make parts of a third of the rows; the texts among them cut those again."""
    rows = [(_key(i), {"f4": Value(string_val="x" * size)}, AT, None) for i, size in enumerate([10, 3_000_000, 5] * 9)]
    batches = [b.listed() for b in batches_of_rows(layout, rows, None)[1]]
    assert all(len(b.keys) == 1 or sum(map(len, b.rows[0])) <= 2_001_000 for b in batches)
    assert _written(layout, rows) == [_wanted(row) for row in rows]


@pytest.mark.parametrize("before", [0, 3, FEW_ROWS + 1])
@pytest.mark.parametrize("time", [None, pd.NaT])
def test_a_row_without_an_event_time_is_refused_by_number_and_key(layout: WriteLayout, before: int, time: Any) -> None:
    rows = [(_key(i), {"f0": Value(int32_val=1)}, AT, AT) for i in range(before)]
    with pytest.raises(DataError, match=rf"rows: row {before} \(customer_id: Cbad\) has no event timestamp"):
        batches_of_rows(layout, [*rows, (_key("bad"), {"f0": Value(int32_val=1)}, time, AT)], None)


@pytest.mark.parametrize("before", [0, 3, FEW_ROWS + 1])
def test_a_row_dated_after_the_limit_is_refused_and_one_at_it_is_not(layout: WriteLayout, before: int) -> None:
    limit = Limit(NS, "clock")
    rows = [(_key(i), {"f0": Value(int32_val=1)}, AT, None) for i in range(before + 1)]
    assert len(_batch_keys(layout, rows, limit)) == before + 1
    late = (_key("late"), {"f0": Value(int32_val=1)}, AT + timedelta(microseconds=1), None)
    with pytest.raises(
        DataError, match=rf"row {before + 1} \(customer_id: Clate\) is dated 2026-03-01T12:00:00.000006"
    ):
        batches_of_rows(layout, [*rows, late], limit)


def _batch_keys(layout: WriteLayout, rows: Sequence[Any], limit: Limit) -> list[bytes]:
    return [key for b in batches_of_rows(layout, rows, limit)[1] for key in b.listed().keys]


@pytest.mark.parametrize("before", [0, 3, FEW_ROWS + 1])
@pytest.mark.parametrize("values", [[Value()], [Value(bool_val=True)], [Value(double_val=1.5)]])
def test_a_key_that_the_layout_cannot_hold_is_refused(layout: WriteLayout, before: int, values: list[Value]) -> None:
    rows = [(_key(i), {"f0": Value(int32_val=1)}, AT, None) for i in range(before)]
    bad = (EntityKey(join_keys=["customer_id"], entity_values=values), {"f0": Value(int32_val=1)}, AT, None)
    with pytest.raises(DataError, match="this entity key cannot be kept online"):
        batches_of_rows(layout, [*rows, bad, *rows], None)


def test_no_rows_make_no_batch(layout: WriteLayout) -> None:
    left_out, batches = batches_of_rows(layout, [], None)
    assert (left_out, list(batches)) == (0, [])
