"""The bucketed layout: sorted, cut at buckets, deterministic, published whole, stable bucket numbers."""

from __future__ import annotations

from pathlib import Path

import duckdb
import pyarrow.parquet as pq
import pytest

from feature_store.errors import DataError, UsageError
from feature_store.point_in_time import layout as layout_module
from feature_store.point_in_time.engine import EngineSettings, connect
from feature_store.point_in_time.layout import (
    FILE,
    Layout,
    bucket_sql,
    create_layout,
    read_layout,
    row_group_buckets,
    write_chunk,
)

LAYOUT = Layout(("k",), "event_timestamp", "created", buckets=8)
ROWS = """(SELECT (i * 7919 % 50)::INTEGER AS k, 'S' || (i % 11) AS s, i * 1.5 AS v,
  make_timestamp(1700000000000000 + (i * 31 % 97) * 1000000) AT TIME ZONE 'UTC' AS event_timestamp,
  make_timestamp(1700000000000000 + (i * 17 % 97) * 1000000) AT TIME ZONE 'UTC' AS created
  FROM range(1000) t(i) {order})"""


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout_module, "ROW_GROUP_ROWS", 100)


def test_rows_lie_sorted_in_row_groups_of_one_bucket_each(tmp_path: Path, small_groups: None) -> None:
    with connect(EngineSettings(threads=1)) as con:
        path, rows, size = write_chunk(con, ROWS.format(order=""), tmp_path / "t", "2025-03", LAYOUT)
        assert (rows, size) == (1000, path.stat().st_size)
        file = pq.ParquetFile(path)
        found = row_group_buckets(file.metadata, ["k"])
        assert found is not None
        buckets, per_group = found
        assert buckets == 8
        assert sorted(per_group) == per_group
        assert set(per_group) <= set(range(8))
        previous = None
        for i, bucket in enumerate(per_group):
            group = file.read_row_group(i)
            assert group.num_rows <= 100
            con.register("g", group)
            assert con.sql(f"SELECT DISTINCT {bucket_sql({'k': 'INTEGER'}, buckets)} FROM g").fetchall() == [(bucket,)]
            order = [(bucket, *r) for r in zip(*(group.column(c).to_pylist() for c in LAYOUT.order), strict=True)]
            assert order == sorted(order)
            assert previous is None or previous <= order[0]
            previous = order[-1]
    assert read_layout(tmp_path / "t") == LAYOUT


def test_the_same_rows_give_the_same_bytes_in_any_order_and_on_any_number_of_threads(
    tmp_path: Path, small_groups: None
) -> None:
    files = []
    for i, (order, threads) in enumerate([("", 1), ("ORDER BY v DESC", 2), ("ORDER BY hash(i)", 4)]):
        with connect(EngineSettings(threads=threads)) as con:
            files.append(write_chunk(con, ROWS.format(order=order), tmp_path / str(i), "c", LAYOUT)[0].read_bytes())
    assert files[0] == files[1] == files[2]


def test_a_bucket_does_not_depend_on_the_width_of_the_key_and_never_changes() -> None:
    con = duckdb.connect()
    for value in (0, 1, -1, 127, 2**31 - 1):
        answers = {
            con.sql(f"SELECT {bucket_sql({'x': t}, 256)} FROM (SELECT CAST({value} AS {t}) AS x)").fetchall()[0][0]
            for t in ("INTEGER", "BIGINT", "HUGEINT")
        }
        assert len(answers) == 1
    known = con.sql(
        f"SELECT {bucket_sql({'12345': 'INTEGER'}, 256)}, {bucket_sql({'-7': 'BIGINT'}, 256)}, "
        + bucket_sql({"'C42'": "VARCHAR"}, 256) + ", " + bucket_sql({"'C42'": "VARCHAR", "5": "TINYINT"}, 256)
    ).fetchall()  # fmt: skip
    assert known == [KNOWN]
    us, ns = (
        con.sql(f"SELECT {bucket_sql({'t': t}, 256)} FROM (SELECT CAST(TIMESTAMP '1969-03-01 10:00:00.123456' AS {t}) AS t)")
        for t in ("TIMESTAMP", "TIMESTAMP_NS")
    )  # fmt: skip
    assert us.fetchall() == ns.fetchall()


def test_keys_spread_evenly_over_the_buckets() -> None:
    con = duckdb.connect()
    for key, sql_type in (("i", "BIGINT"), ("i * 64", "BIGINT"), ("'C' || i", "VARCHAR")):
        counts = con.sql(
            f"SELECT count(*) FROM range(64000) t(i) GROUP BY {bucket_sql({'(' + key + ')': sql_type}, 64)}"
        )
        sizes = [n for (n,) in counts.fetchall()]
        assert len(sizes) == 64
        assert max(sizes) < 2 * 1000


def test_a_key_that_cannot_be_bucketed_is_refused() -> None:
    with pytest.raises(UsageError, match="cannot be a bucketed key"):
        bucket_sql({"x": "DOUBLE"}, 8)


def test_a_failed_write_leaves_nothing_and_keeps_the_chunk_that_was_there(tmp_path: Path) -> None:
    with connect(EngineSettings(threads=1)) as con:
        path, _, _ = write_chunk(con, ROWS.format(order=""), tmp_path, "c", LAYOUT)
        before = path.read_bytes()
        bad = "(SELECT *, CASE WHEN v > 900 THEN error('broken input') END AS e FROM " + ROWS.format(order="") + ")"
        with pytest.raises(DataError, match="broken input"):
            write_chunk(con, bad, tmp_path, "c", LAYOUT)
        assert path.read_bytes() == before
        assert sorted(p.name for p in tmp_path.iterdir()) == [FILE, "c.parquet"]
        with pytest.raises(DataError, match="lacks a column of its layout"):
            write_chunk(con, "(SELECT 1 AS k)", tmp_path, "c", LAYOUT)
        with pytest.raises(UsageError, match="not a chunk name"):
            write_chunk(con, ROWS.format(order=""), tmp_path, "../c", LAYOUT)
        assert write_chunk(con, ROWS.format(order="LIMIT 0"), tmp_path, "c", LAYOUT)[1] == 0
        assert not path.exists()


def test_a_table_keeps_its_first_layout(tmp_path: Path) -> None:
    create_layout(tmp_path, LAYOUT)
    assert create_layout(tmp_path, Layout(("k",), "event_timestamp", "created", buckets=16)) == LAYOUT
    with pytest.raises(DataError, match="other columns"):
        create_layout(tmp_path, Layout(("j",), "event_timestamp", "created"))
    (tmp_path / FILE).write_text("{")
    with pytest.raises(DataError, match="cannot be read"):
        read_layout(tmp_path)
    assert read_layout(tmp_path / "absent") is None


KNOWN = (43, 111, 15, 230)
