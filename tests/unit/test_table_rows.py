"""Few rows of a table become the same packed rows as many: plain Python and columns agree, and so does what they refuse."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store import table_rows
from feature_store.errors import DataError
from feature_store.table_rows import batches_of_table
from feature_store.write_layout import CHUNK_BYTES, FEW_ROWS, Limit, WriteLayout
from tests.unit.row_support import layout_of_rows, rows_of

INT64 = st.integers(-(2**63), 2**63 - 1)
EDGES = st.sampled_from([2**n + d for n in (7, 14, 21, 28, 35) for d in (-1, 0)])
NS = st.integers(0, 4 * 10**18)
DRAWN: dict[str, tuple[st.SearchStrategy[Any], pa.DataType]] = {
    "f0": (st.integers(-(2**31), 2**31 - 1), pa.int32()),
    "f1": (st.one_of(INT64, EDGES), pa.int64()),
    "f2": (st.floats(width=32), pa.float32()),
    "f3": (st.floats(), pa.float64()),
    "f4": (st.one_of(st.text(max_size=40), st.integers(125, 130).map(lambda n: "x" * n)), pa.string()),
    "f5": (st.binary(max_size=140), pa.binary()),
    "f6": (st.booleans(), pa.bool_()),
    "f7": (st.datetimes(datetime(1960, 1, 1), datetime(2100, 1, 1)), pa.timestamp("us", "UTC")),
}


@pytest.fixture(scope="module")
def layout(tmp_path_factory: pytest.TempPathFactory) -> WriteLayout:
    return layout_of_rows(tmp_path_factory.mktemp("registry"))


def _written(layout: WriteLayout, table: pa.Table) -> list[tuple[bytes, dict[bytes, bytes]]]:
    return [row for batch in batches_of_table(layout, table, None)[1] for row in rows_of(batch)]


def _by_column(layout: WriteLayout, table: pa.Table) -> list[tuple[bytes, dict[bytes, bytes]]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(table_rows, "FEW_ROWS", 0)
        return _written(layout, table)


@st.composite
def tables(draw: st.DrawFn) -> pa.Table:
    rows = draw(st.integers(1, 20))
    nulls = draw(st.booleans())
    columns: dict[str, pa.Array] = {"customer_id": pa.array([f"C{i}" for i in range(rows)])}
    for name, (strategy, kind) in DRAWN.items():
        values = st.none() | strategy if nulls else strategy
        columns[name] = pa.array(draw(st.lists(values, min_size=rows, max_size=rows)), kind)
    unit = draw(st.sampled_from(["s", "ms", "us", "ns"]))
    scale = {"s": 10**9, "ms": 10**6, "us": 10**3, "ns": 1}[unit]
    times = draw(st.lists(NS, min_size=rows, max_size=rows))
    columns["at"] = pa.array([t // scale for t in times], pa.timestamp(unit, draw(st.sampled_from(["UTC", None]))))
    if draw(st.booleans()):
        known = draw(st.lists(st.none() | NS, min_size=rows, max_size=rows))
        columns["known"] = pa.array(known, pa.timestamp("ns", "UTC"))
    return pa.table(columns)


@settings(deadline=None)
@given(tables())
def test_few_rows_are_packed_as_columns_are(layout: WriteLayout, table: pa.Table) -> None:
    few = _written(layout, table)
    assert few == _by_column(layout, table)
    assert len(few) == table.num_rows


def _table(rows: int, **columns: Any) -> pa.Table:
    at = pa.array([datetime(2026, 1, 1, tzinfo=UTC)] * rows, pa.timestamp("us", "UTC"))
    made = {"customer_id": [f"C{i}" for i in range(rows)], "at": at}
    made |= {name: pa.nulls(rows, kind) for name, (_, kind) in DRAWN.items()}
    return pa.table({**made, **columns})


def test_few_rows_too_large_for_one_batch_are_cut_and_none_is_lost(layout: WriteLayout) -> None:
    table = _table(9, f4=["x" * size for size in [10, 900_000, 5] * 3])
    batches = list(batches_of_table(layout, table, None)[1])
    assert len(batches) > 1
    assert all(sum(map(len, b.listed().rows[0])) <= CHUNK_BYTES + 1_000 for b in batches)
    assert _written(layout, table) == _by_column(layout, table)


def test_of_a_key_that_comes_twice_the_newest_row_is_written(layout: WriteLayout) -> None:
    table = _table(3, customer_id=["A", "B", "A"], f0=pa.array([1, 2, 3], pa.int32()))
    assert _written(layout, table) == _by_column(layout, table)
    assert len(_written(layout, table)) == 2


@pytest.mark.parametrize("rows", [1, 3, FEW_ROWS, FEW_ROWS + 1])
@pytest.mark.parametrize(
    ("column", "value", "message"),
    [
        ("f0", pa.scalar(2**31), "feature f0 must be INT32"),
        ("f1", pa.scalar(1.5), "feature f1 must be INT64"),
        ("at", pa.scalar(None, pa.timestamp("us", "UTC")), r"row 0 \(customer_id='C0'\) has no at"),
        ("at", pa.scalar("yesterday"), "column at holds no times"),
        ("at", pa.scalar(datetime(2030, 1, 1, tzinfo=UTC)), r"row 0 \(customer_id='C0'\) is dated 2030"),
        ("customer_id", pa.scalar(None, pa.string()), "row 0 has no join key customer_id"),
        ("customer_id", pa.scalar(7), "join key customer_id must be STRING"),
    ],
)
def test_a_row_that_cannot_be_kept_is_refused_before_the_first_batch(
    layout: WriteLayout, rows: int, column: str, value: pa.Scalar, message: str
) -> None:
    table = _table(rows)
    table = table.set_column(table.column_names.index(column), column, pa.array([value] * rows, value.type))
    limit = Limit(1_800_000_000 * 10**9, "clock")
    with pytest.raises(DataError, match=message):
        batches_of_table(layout, table, limit)
