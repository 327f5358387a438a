"""Columns as people have them, numpy's and pandas' among them, to the Python values that the client sends."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from feature_store.errors import UsageError
from serving.client_values import arrow_stream, python_columns

NOON = datetime(2026, 1, 1, 12, tzinfo=UTC)
NAN = float("nan")


@pytest.mark.parametrize(
    ("given", "want"),
    [
        (np.array([1, 2]), [1, 2]),
        ([np.int8(-1), np.uint64(2**63), np.float32(0.5), np.float64(0.1)], [-1, 2**63, 0.5, 0.1]),
        ([np.bool_(True), np.str_("a"), np.bytes_(b"\xff")], [True, "a", b"\xff"]),
        (np.array(["2026-01-01T12:00", "NaT"], "datetime64[ns]"), [NOON, None]),
        ([np.datetime64("1969-12-31T23:59:59.999999999")], [datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)]),
        (pd.Series([1, None], dtype="Int64"), [1, None]),
        (pd.Series(["a", None], dtype="string"), ["a", None]),
        (pd.Series(["a", NAN]), ["a", None]),
        (pd.Series([True, NAN]), [True, None]),
        (pd.Series(["a", "b"], dtype="category"), ["a", "b"]),
        (pd.Series([NOON, None]), [NOON, None]),
        (pd.date_range(NOON, periods=1), [NOON]),
        ([1.5, NAN, None], [1.5, NAN, None]),
        (np.array([1.5, np.nan, np.inf]), [1.5, NAN, float("inf")]),
        ([np.array([1, 2]), pd.Series([3]), [np.float32(1)]], [[1, 2], [3], [1.0]]),
        ([{"a": np.int64(1)}, {np.int64(1)}, bytearray(b"x")], [{"a": 1}, {1}, b"x"]),
        (pa.array([1, None]), [1, None]),
        ([pa.scalar("a")], ["a"]),
        (range(2), [0, 1]),
        ([uuid.UUID(int=1), Decimal("1.5")], [uuid.UUID(int=1), Decimal("1.5")]),
    ],
)
def test_values_become_pythons_own(given: Any, want: list[object]) -> None:
    got = python_columns({"c": given})["c"]
    assert repr(got) == repr(want) or got == want
    assert [isinstance(v, datetime) or type(v) is type(w) for v, w in zip(got, want, strict=True)] == [True] * len(want)


def test_nan_is_no_join_key() -> None:
    assert python_columns({"id": np.array([1.5, np.nan])}, keys=True) == {"id": [1.5, None]}
    assert python_columns(pd.DataFrame({"id": ["C1", None]}), keys=True) == {"id": ["C1", None]}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("C1", r"column c: not a list of values: 'str'; next: pass a list"),
        (5, r"column c: not a list of values: 'int'"),
        (np.array(5), r"column c: not a list of values: 'numpy.ndarray'"),
        ({"C1"}, r"column c: not a list of values: 'set'"),
        ([date(2026, 1, 1)], r"column c: a value of type datetime.date .*pass a datetime"),
        ([pd.Timedelta(1)], r"column c: a value of type pandas.*Timedelta .*pass a number"),
        ([timedelta(1)], r"column c: a value of type datetime.timedelta .*pass a number"),
        ([np.timedelta64(1, "s")], r"column c: a value of type numpy.timedelta64 .*pass a number"),
        ([np.complex64(1)], r"column c: a value of type numpy.complex64 .*pass numbers, texts"),
        ([pd.Period("2026")], r"column c: a value of type pandas.*Period"),
        ([np.datetime64("20000-01-01")], r"column c: a value of type numpy.datetime64"),
    ],
)
def test_what_cannot_be_sent_is_told_with_its_column_and_type(given: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        python_columns({"c": given})


def test_something_else_than_columns_is_told() -> None:
    with pytest.raises(UsageError, match=r"not columns: 'list'; next: pass {name"):
        python_columns(["C1"])  # type: ignore[arg-type]


def read(entities: Any) -> pa.Table:
    return pa.ipc.open_stream(arrow_stream(entities)).read_all()


def test_historical_rows_are_what_they_are() -> None:
    exact = pd.Timestamp("2026-01-01T12:00:00.000000001Z")
    columns = {
        "id": np.array(["C1", "C2"]),
        "event_timestamp": pd.Series([exact, exact]),
        "n": [np.int64(1), pd.NA],
        "x": [NAN, 1.5],
        "t": [pd.Timestamp(NOON), pd.NaT],
        "kind": pd.Series(["a", None], dtype="category"),
    }
    table = read(columns)
    assert table.schema.field("event_timestamp").type == pa.timestamp("ns", "UTC"), "nanoseconds are not rounded"
    assert table.column("event_timestamp").to_pylist() == [exact, exact]
    assert table.select(["id", "n", "t", "kind"]).to_pylist() == [
        {"id": "C1", "n": 1, "t": NOON, "kind": "a"},
        {"id": "C2", "n": None, "t": None, "kind": None},
    ]
    assert str(table.column("x").to_pylist()) == "[nan, 1.5]"
    assert table.schema.field("kind").type == pa.string()
    framed = read(pd.DataFrame(columns))
    assert framed.schema.field("event_timestamp").type == pa.timestamp("ns", "UTC")
    assert framed.column("n").to_pylist() == [1, None]
    assert read(table.drop_columns("x")) == table.drop_columns("x"), "but for NaN, which equals nothing"


@pytest.mark.parametrize(
    ("entities", "said"),
    [
        ({"a": ["x", 1]}, r"column a: not values of one type: \['int', 'str'\]"),
        ({"a": [1j]}, "column a: a value of type complex"),
        ({"a": [1], "b": [1, 2]}, "equally many rows: {'a': 1, 'b': 2}"),
        (pd.DataFrame({"a": ["x", 1]}), "data frame cannot be sent .*column a"),
        (["C1"], "not entity rows: 'list'"),
    ],
)
def test_historical_rows_that_cannot_be_sent_are_told(entities: Any, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        arrow_stream(entities)
