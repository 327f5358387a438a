"""Schema evolution and bad input: one clear line that names file, column and row group; nothing half-written stays."""

from __future__ import annotations

import shutil
import subprocess
import sys
from datetime import UTC, datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.errors import DataError, NotFoundError
from feature_store.point_in_time import fetch, join, latest, retrieval, source
from feature_store.point_in_time.engine import EngineSettings, connect, give_back, memory_limit
from feature_store.point_in_time.entities import entity_rows, from_pandas
from feature_store.point_in_time.latest import Pull, pull_all, pull_latest
from feature_store.point_in_time.layout import Layout, write_chunk
from feature_store.point_in_time.request import Feature, Key, ViewRequest
from feature_store.point_in_time.retrieval import known_keys, retrieve, retrieve_slices

T0 = datetime(2025, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", "UTC")


def _file(path: Path, keys: pa.Array, v: pa.Array | None, times: pa.Array | None = None, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    at = times if times is not None else pa.array([T0 + timedelta(hours=i) for i in range(len(keys))], TIME)
    columns = {"k": keys, "event_timestamp": at, "created": at, **({"v": v} if v is not None else {})}
    pq.write_table(pa.table(columns), path, **options)
    return path


def _request(place: Path, dtype: Any = None) -> ViewRequest:
    from feast.types import Int64

    feature = Feature("v", "v", dtype or Int64, "v")
    return ViewRequest("view", str(place), (Key("k", "k"),), (feature,), "event_timestamp", "created", None, None)


def _values(place: Path, keys: pa.Array, dtype: Any = None) -> list[Any]:
    times = pa.array([T0 + timedelta(days=9)] * len(keys), TIME)
    entities = entity_rows(pa.table({"k": keys, "event_timestamp": times}))
    with connect(EngineSettings(threads=1)) as con:
        return retrieve(con, [_request(place, dtype)], entities, False).column("v").to_pylist()


def _latest(place: Path) -> list[Any]:
    pull = Pull("s", str(place), "x", ("k",), ("v",), "event_timestamp", "created", None, None)
    with connect(EngineSettings(threads=1)) as con:
        return sorted(pull_latest(con, pull).to_pylist(), key=lambda r: r["k"])


def _ints(*values: int | None) -> pa.Array:
    return pa.array(values, pa.int64())


BOTH_READERS = pytest.mark.usefixtures("_reader")


@pytest.fixture(params=["read by Arrow", "read by the engine"])
def _reader(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Wide columns have two readers; which one is taken depends on the number of rows."""
    monkeypatch.setattr(fetch, "BY_ENGINE_ROWS", 1 if request.param == "read by the engine" else 2**40)


@BOTH_READERS
def test_a_feature_added_later_is_null_in_old_files(tmp_path: Path) -> None:
    _file(tmp_path / "a.parquet", _ints(1, 2), None)
    _file(tmp_path / "b.parquet", _ints(3), _ints(30))
    assert _values(tmp_path, _ints(1, 2, 3)) == [None, None, 30]
    assert [r["v"] for r in _latest(tmp_path)] == [None, None, 30]


@BOTH_READERS
def test_wider_types_in_newer_files_keep_every_digit(tmp_path: Path) -> None:
    big = 2**53 + 1
    _file(tmp_path / "a.parquet", pa.array([1], pa.int32()), pa.array([7], pa.int32()))
    _file(tmp_path / "b.parquet", _ints(2), _ints(big))
    _file(tmp_path / "c.parquet", _ints(3), pa.array([3.0]))  # pandas writes integers with nulls so
    assert _values(tmp_path, _ints(1, 2, 3)) == [7, big, 3]


@BOTH_READERS
def test_a_type_change_that_loses_values_is_refused_with_file_and_column(tmp_path: Path) -> None:
    from feast.types import Float64, Int32

    _file(tmp_path / "a.parquet", _ints(1), pa.array([1.5]))
    _file(tmp_path / "b.parquet", _ints(2), _ints(2**53 + 1))
    with pytest.raises(DataError, match=rf"b\.parquet: feature v: DOUBLE would lose digits of {2**53 + 1}"):
        _values(tmp_path, _ints(1, 2), Float64)
    with pytest.raises(DataError, match=r"a\.parquet: feature v: not a whole number: 1\.5"):
        _values(tmp_path, _ints(1))
    with pytest.raises(DataError, match=r"b\.parquet: column v: .*out of range"):
        _values(tmp_path, _ints(2), Int32)
    with pytest.raises(DataError, match=r"b\.parquet: column v: DOUBLE would lose digits"):
        _latest(tmp_path)
    _file(tmp_path / "c.parquet", _ints(3), pa.array(["x"]))
    with pytest.raises(DataError, match=r"c\.parquet: feature v: stored as VARCHAR"):
        _values(tmp_path, _ints(3))


def test_a_key_that_changes_its_kind_is_refused_with_both_files(tmp_path: Path) -> None:
    _file(tmp_path / "a.parquet", _ints(1), _ints(1))
    _file(tmp_path / "b.parquet", pa.array(["1"]), _ints(1))
    with pytest.raises(DataError, match=r"column k is string in .*b\.parquet, but integer in .*a\.parquet"):
        _values(tmp_path, _ints(1))


@BOTH_READERS
def test_naive_and_zoned_times_and_units_mix_between_files(tmp_path: Path) -> None:
    zoned = pa.array([T0], pa.timestamp("ns", "America/New_York"))
    naive = pa.array([T0.replace(tzinfo=None) + timedelta(hours=1)], pa.timestamp("ms"))
    _file(tmp_path / "a.parquet", _ints(1), _ints(1), zoned)
    _file(tmp_path / "b.parquet", _ints(1), _ints(2), naive)
    with connect(EngineSettings(threads=1)) as con:
        times = pa.array([T0, T0 + timedelta(hours=1)], TIME)
        rows = entity_rows(pa.table({"k": _ints(1, 1), "event_timestamp": times}))
        assert retrieve(con, [_request(tmp_path)], rows, True).column("v").to_pylist() == [1, 2]


def test_entity_times_of_several_zones_are_one_instant_each_or_refused() -> None:
    zones = [UTC, timezone(timedelta(hours=5))]
    frame = pd.DataFrame({"k": [1, 2], "event_timestamp": [T0.astimezone(z) for z in zones]})
    rows = entity_rows(from_pandas(frame))
    assert rows.t_ns.to_pylist() == [int(T0.timestamp()) * 10**9] * 2


def test_a_row_without_event_timestamp_is_named(tmp_path: Path) -> None:
    times = pa.array([T0, None], TIME)
    _file(tmp_path / "a.parquet", _ints(1, 1), _ints(1, 2), times)
    with pytest.raises(DataError, match=r"a row without event timestamp, row 1 of: .*a\.parquet"):
        _values(tmp_path, _ints(1))


KEPT = """
from pathlib import Path
from feature_store.point_in_time.engine import EngineSettings, connect, give_back
def mb():
    return next(int(l.split()[1]) // 1024 for l in Path("/proc/self/status").read_text().splitlines() if "RssAnon" in l)
with connect(EngineSettings(threads=2)) as con:
    con.execute("SELECT 1")
    before = mb()
    con.execute("SELECT max(n) FROM (SELECT hash(i) % 2000000 AS k, count(*) AS n FROM range(4000000) t(i) GROUP BY k)")
    con.fetchall()
    give_back(con)
    print(mb() - before)
"""


def test_memory_that_the_engine_freed_is_given_back() -> None:
    done = subprocess.run([sys.executable, "-c", KEPT], capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 40  # MB; the engine keeps about 100 of its own accord


def test_the_memory_limit_stays_when_freed_memory_is_given_back() -> None:
    for limit in ("3GB", "999MB", "1234567891B"):
        with connect(EngineSettings(memory_limit=limit, threads=1)) as con:
            before = memory_limit(con)
            for _ in range(20):
                give_back(con)
            assert memory_limit(con) == before


def test_times_of_the_far_past_and_future_are_compared_not_wrapped(tmp_path: Path) -> None:
    times = pa.array([datetime(1, 1, 1, tzinfo=UTC), T0, datetime(9999, 1, 1, tzinfo=UTC)], TIME)
    _file(tmp_path / "a.parquet", _ints(1, 2, 2), _ints(1, 2, 3), times)
    assert _values(tmp_path, _ints(1, 2)) == [1, 2]


def test_a_stored_time_out_of_range_names_file_row_group_and_column(tmp_path: Path) -> None:
    times = pa.array([0, 0, 2**60], pa.timestamp("ms"))
    _file(tmp_path / "a.parquet", _ints(1, 1, 1), _ints(1, 2, 3), times, row_group_size=2)
    for read in (lambda: _values(tmp_path, _ints(1)), lambda: _latest(tmp_path), lambda: _known_keys(tmp_path)):
        with pytest.raises(DataError, match=r"a\.parquet \(row group 1, column event_timestamp\): a time out of range"):
            read()


@BOTH_READERS
def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.parquet", _ints(*range(1000)), _ints(*range(1000)))
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"a\.parquet"):
        _values(tmp_path, _ints(1))


@pytest.mark.parametrize("column", ["k", "v"])
def test_damage_inside_a_file_is_found_by_file_and_row_group(tmp_path: Path, column: str) -> None:
    place = tmp_path / "t"
    with connect(EngineSettings(threads=1)) as con:
        rows = (
            "(SELECT i AS k, hash(i)::DOUBLE AS v, TIMESTAMPTZ '2025-01-01' + to_seconds(i) AS event_timestamp, "
            "event_timestamp AS created FROM range(5000) t(i))"
        )
        path, _, _ = write_chunk(con, rows, place, "c", Layout(("k",), "event_timestamp", "created"))
    group = pq.read_metadata(path).row_group(0)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == column)
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data = bytearray(path.read_bytes())
    middle = start + chunk.total_compressed_size // 2
    data[middle : middle + 64] = bytes(b ^ 0xFF for b in data[middle : middle + 64])
    path.write_bytes(data)
    from feast.types import Float64

    expected = r"c\.parquet \(row group 0" + (", column k" if column == "k" else "")
    with pytest.raises(DataError, match=expected):
        _values(place, _ints(*range(5000)), Float64)


@BOTH_READERS
def test_damage_in_a_file_of_other_tools_is_found_by_file_and_row_group(tmp_path: Path) -> None:
    path = _file(tmp_path / "a.parquet", _ints(*range(5000)), _ints(*(i * 7919 % 5003 for i in range(5000))))
    group = pq.read_metadata(path).row_group(0)
    chunk = next(group.column(i) for i in range(group.num_columns) if group.column(i).path_in_schema == "v")
    data = bytearray(path.read_bytes())
    data[chunk.data_page_offset : chunk.data_page_offset + 64] = bytes([0xFF] * 64)  # the page's header
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"a\.parquet \(row group 0"):
        _values(tmp_path, _ints(*range(5000)))


def _known_keys(place: Path) -> list[Any]:
    with connect(EngineSettings(threads=1)) as con:
        keys = known_keys(con, [_request(place)], T0 - timedelta(days=1), T0 + timedelta(days=99), False)
    return keys.column("k").to_pylist()


def _all(place: Path) -> list[Any]:
    pull = Pull("s", str(place), "x", ("k",), ("v",), "event_timestamp", "created", None, None)
    with connect(EngineSettings(threads=1)) as con:
        return sorted(pull_all(con, pull).column("v").to_pylist())


@pytest.mark.parametrize("column", ["k", "event_timestamp"])
def test_damage_is_found_by_file_row_group_and_column_without_entity_rows_too(tmp_path: Path, column: str) -> None:
    path = _file(tmp_path / "a.parquet", _ints(*range(5000)), _ints(*range(5000)), compression="none")
    names = pq.ParquetFile(path).schema_arrow.names
    chunk = pq.read_metadata(path).row_group(0).column(names.index(column))
    data = bytearray(path.read_bytes())
    start = chunk.dictionary_page_offset or chunk.data_page_offset
    data[start : start + 64] = bytes([0xFF] * 64)  # the page's header
    path.write_bytes(data)
    with pytest.raises(DataError, match=rf"a\.parquet \(row group 0, column {column}\) is damaged"):
        _known_keys(tmp_path)


def _partitions(place: Path) -> Path:
    """Three months of a hive-partitioned directory: keys 10, 20 and 30 with the values 100, 200 and 300."""
    for month in (1, 2, 3):
        _file(place / f"month=2025-0{month}" / "part.parquet", _ints(10 * month), _ints(100 * month))
    return place


@BOTH_READERS
@pytest.mark.parametrize("left", ["no directory", "an empty directory", "a file of no rows"])
def test_an_absent_or_empty_partition_leaves_the_rows_of_the_others(tmp_path: Path, left: str) -> None:
    february = _partitions(tmp_path / "t") / "month=2025-02"
    assert _values(tmp_path / "t", _ints(10, 20, 30)) == [100, 200, 300]
    (february / "part.parquet").unlink()
    if left == "no directory":
        february.rmdir()
    elif left == "a file of no rows":
        _file(february / "part.parquet", _ints(), _ints())
    assert _values(tmp_path / "t", _ints(10, 20, 30)) == [100, None, 300]
    assert [(r["k"], r["v"]) for r in _latest(tmp_path / "t")] == [(10, 100), (30, 300)]
    assert _all(tmp_path / "t") == [100, 300]
    assert _known_keys(tmp_path / "t") == [10, 30]


@pytest.mark.parametrize("place", ["month=2025-07", "month=2025-07/*.parquet", "month=2024-*"])
def test_a_source_that_names_a_missing_partition_says_where_and_what_to_do(tmp_path: Path, place: str) -> None:
    missing = _partitions(tmp_path) / place
    for read in (lambda: _values(missing, _ints(10)), lambda: _known_keys(missing), lambda: _latest(missing)):
        with pytest.raises(NotFoundError, match="no Parquet files") as caught:
            read()
        assert caught.value.value == str(missing)
        assert caught.value.next_step


GOING = [  # what is read, and the call after which ("+") or before which ("-") the partition goes
    ("training set", source, "+read_files"),
    ("training set", join, "+require_same_kind"),
    ("training set", retrieval, "-fetch"),
    ("training set", fetch, "+open_parquet"),
    ("latest", source, "+read_files"),
    ("latest", latest, "+require_same_kind"),
    ("latest", latest, "-fetch"),
    ("latest", fetch, "+open_parquet"),
    ("all", source, "+read_files"),
    ("all", latest, "+open_source"),
    ("known keys", source, "+read_files"),
    ("known keys", retrieval, "+open_source"),
]


@BOTH_READERS
@pytest.mark.parametrize(("what", "module", "call"), GOING)
def test_a_partition_that_goes_while_it_is_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, module: Any, call: str
) -> None:
    place = _partitions(tmp_path / "t")
    reads = {
        "training set": lambda: _values(place, _ints(10, 20, 30)),
        "latest": lambda: _latest(place),
        "all": lambda: _all(place),
        "known keys": lambda: _known_keys(place),
    }
    gone = place / "month=2025-02"
    real = getattr(module, call[1:])

    def goes(*args: Any, **kwargs: Any) -> Any:
        if call[0] == "-":
            shutil.rmtree(gone)
        result = real(*args, **kwargs)
        if call[0] == "+" and (call != "+open_parquet" or args[0] == str(gone / "part.parquet")):
            shutil.rmtree(gone, ignore_errors=True)
        return result

    monkeypatch.setattr(module, call[1:], goes)
    with pytest.raises(
        DataError, match=r"a file went missing while it was read: '.*month=2025-02/part\.parquet"
    ) as caught:
        reads[what]()
    assert caught.value.next_step == "run it again"


@BOTH_READERS
def test_a_value_too_large_for_its_declared_type_names_file_and_column(tmp_path: Path) -> None:
    from feast.types import Int32

    _file(tmp_path / "a.parquet", _ints(1, 2), _ints(1, 2**40))
    with pytest.raises(DataError, match=r"a\.parquet.*column v"):
        _values(tmp_path, _ints(1, 2), Int32)


def test_an_unknown_column_names_the_known_ones(tmp_path: Path) -> None:
    _file(tmp_path / "a.parquet", _ints(1), None)
    with pytest.raises(
        DataError, match="no file holds the column of feature v: 'v'; valid: created, event_timestamp, k"
    ):
        _values(tmp_path, _ints(1))


@BOTH_READERS
def test_a_streamed_result_is_what_the_whole_one_is(tmp_path: Path) -> None:
    _file(tmp_path / "a.parquet", _ints(*(i % 13 for i in range(200))), _ints(*range(200)), row_group_size=11)
    times = pa.array([T0 + timedelta(hours=i % 190) for i in range(500)], TIME)
    rows = entity_rows(pa.table({"k": _ints(*(i % 17 for i in range(500))), "event_timestamp": times}))
    with connect(EngineSettings(threads=1)) as con:
        whole = retrieve(con, [_request(tmp_path)], rows, False)
        slices = list(retrieve_slices(con, [_request(tmp_path)], rows, False, 37))
    assert [s.num_rows for s in slices] == [*([37] * 13), 500 - 13 * 37]
    assert pa.concat_tables(slices).equals(whole)


FULL_DISK = """
import resource, signal, sys
import feast.errors
from pathlib import Path
import pyarrow as pa
from feature_store.errors import DataError
from feature_store.point_in_time.append import write_new
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # a write beyond the limit then fails like one to a full disk
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
place = Path(sys.argv[1])
try:
    write_new(lambda: (pa.table({"v": pa.array(range(i, i + 50_000))}) for i in (0, 9)), place, False)
except DataError as e:
    print(e.message)
print(sorted(str(p) for p in place.parent.rglob("*")))
"""


@pytest.mark.parametrize("name", ["out.parquet", "out"])
def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path: Path, name: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path / name)], capture_output=True, text=True, timeout=60
    )  # fmt: skip
    message, left = done.stdout.strip().splitlines()
    assert "cannot be written" in message
    assert "next: free some space" in message
    assert left == "[]", done.stderr
