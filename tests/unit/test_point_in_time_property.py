"""The store against the brute-force oracle: random histories, ttl, ties, late rows, duplicates, units, files."""

from __future__ import annotations

import itertools
from datetime import timedelta
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from point_in_time_oracle import as_of, time_array, write_rows

from feature_store.point_in_time import fetch as fetch_module
from feature_store.point_in_time import join as join_module
from feature_store.point_in_time import layout as layout_module
from feature_store.point_in_time.engine import EngineSettings, connect
from feature_store.point_in_time.entities import entity_rows
from feature_store.point_in_time.join import Strategy
from feature_store.point_in_time.latest import Pull, pull_latest
from feature_store.point_in_time.layout import Layout, write_chunk
from feature_store.point_in_time.request import Feature, Key, ViewRequest
from feature_store.point_in_time.retrieval import retrieve

BASE = 1_700_000_000_000_000_000
COLUMNS = {"k": pa.int64(), "s": pa.string(), "v": pa.int64()}
KEYS = st.sampled_from([0, 0, 0, 1, 1, None])
TEXTS = st.sampled_from(["a", "a", "a", "b", None])
QUICK = settings(
    max_examples=20,
    deadline=None,
    database=None,
    phases=(Phase.explicit, Phase.generate),  # an example takes long enough that shrinking one would take minutes
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
numbers = itertools.count()


@pytest.fixture
def small_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """Row groups, batches and slices of a few rows, so that every bound lies within a small history."""
    monkeypatch.setattr(layout_module, "ROW_GROUP_ROWS", 5)
    monkeypatch.setattr(fetch_module, "CONVERT_ROWS", 4)
    monkeypatch.setattr(join_module, "BATCH_ROWS", 3)


@st.composite
def histories(draw: st.DrawFn) -> tuple[str, list[dict[str, object]]]:
    """A unit and rows in a narrow time range, so that equal times, late rows and bounds are common."""
    unit = draw(st.sampled_from(["ns", "us"]))
    step = 1 if unit == "ns" else 1000
    rows = draw(
        st.lists(
            st.fixed_dictionaries({"k": KEYS, "s": TEXTS, "event": st.integers(-4, 4), "created": st.integers(0, 3)}),
            min_size=12,
            max_size=40,
        )
    )
    for i, row in enumerate(rows):
        row["v"] = i
        row["event"] = BASE + row["event"] * step
        row["created"] = row["event"] + row["created"] * step
    return unit, rows


entity_lists = st.lists(
    st.tuples(
        KEYS, TEXTS, st.sampled_from([-2000, -1, 0, 1, 2, 3, 999, 1000, 1001, 2000, 3000, 4000]), st.integers(0, 9)
    ),
    min_size=12,
    max_size=30,
)


def _request(place: Path, keys: list[str], ttl_ns: int) -> ViewRequest:
    from feast.types import Int64

    return ViewRequest(
        view="v",
        place=str(place),
        keys=tuple(Key(k, k) for k in keys),
        features=(Feature("v", "v", Int64, "v"),),
        timestamp="event_timestamp",
        created="created",
        ttl=timedelta(microseconds=ttl_ns // 1000) if ttl_ns else None,
        definition=None,
    )


@QUICK
@given(
    history=histories(),
    entities=entity_lists,
    ttl_us=st.sampled_from([0, 1, 2, 3]),
    as_known=st.booleans(),
    keys=st.sampled_from([["k"], ["s"], ["k", "s"], []]),
    files=st.integers(1, 4),
    strategy=st.sampled_from(["range", "slots"]),
    laid_out=st.booleans(),
    by_engine=st.booleans(),
)
def test_every_entity_row_gets_what_the_oracle_gives(
    tmp_path: Path,
    history: tuple[str, list[dict[str, object]]],
    entities: list[tuple[int | None, str | None, int, int]],
    ttl_us: int,
    as_known: bool,
    keys: list[str],
    files: int,
    strategy: Strategy,
    laid_out: bool,
    by_engine: bool,
    small_groups: None,
) -> None:
    unit, rows = history
    place = tmp_path / f"h{next(numbers)}"
    for i in range(files):  # in order, so that the later of two equal rows is the later in the files
        part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
        if part:
            write_rows(place / f"{i}.parquet", part, COLUMNS, unit=unit)
    if laid_out and keys:
        with connect(EngineSettings(threads=1)) as con:
            for i, path in enumerate(sorted(place.glob("*.parquet"))):
                rowed = f"(SELECT * FROM read_parquet('{path}'))"
                write_chunk(con, rowed, place, f"c{i}", Layout(tuple(keys), "event_timestamp", "created", buckets=4))
                path.unlink()
    times = [BASE + t for _, _, t, _ in entities]
    table = pa.table(
        {
            "k": pa.array([e[0] for e in entities], pa.int32()),
            "other": pa.array([e[3] for e in entities], pa.int64()),
            "s": pa.array([e[1] for e in entities], pa.large_string()),
            "event_timestamp": time_array(times, "ns"),
        }
    )
    with connect(EngineSettings(threads=1)) as con, pytest.MonkeyPatch.context() as patch:
        patch.setattr(fetch_module, "BY_ENGINE_ROWS", 1 if by_engine else 2**40)
        request = _request(place, keys, ttl_us * 1000)
        result = retrieve(con, [request], entity_rows(table), as_known, strategy)
    expected = []
    for (k, s, _, _), t in zip(entities, times, strict=True):
        wanted = {"k": k, "s": s}
        found = as_of(rows, {n: wanted[n] for n in keys}, t, ttl_ns=ttl_us * 1000, as_known=as_known)
        expected.append(None if found is None else found["v"])
    given_back = result.column("v").to_pylist()
    if laid_out:  # rows equal in key and both times are one fact told twice: the layout orders them by their values
        given_back, expected = ([_fact(rows, keys, v) for v in values] for values in (given_back, expected))
    assert given_back == expected
    assert result.drop_columns(["v"]).to_pydict() == table.to_pydict()


def _fact(rows: list[dict[str, object]], keys: list[str], v: int | None) -> list[object] | None:
    return None if v is None else [rows[v][c] for c in (*keys, "event", "created")]


@QUICK
@given(history=histories(), start=st.integers(-6, 6), length=st.integers(0, 8), files=st.integers(1, 3))
def test_latest_per_key_is_what_the_oracle_gives(
    tmp_path: Path, history: tuple[str, list[dict[str, object]]], start: int, length: int, files: int
) -> None:
    from feature_store.clock import from_micros

    unit, rows = history
    place = tmp_path / f"h{next(numbers)}"
    for i in range(files):
        part = rows[i * len(rows) // files : (i + 1) * len(rows) // files]
        if part:
            write_rows(place / f"{i}.parquet", part, COLUMNS, unit=unit)
    first, last = BASE + start * 1000, BASE + (start + length) * 1000
    pull = Pull(
        "v", str(place), "x", ("k", "s"), ("v",), "event_timestamp", "created",
        from_micros(first // 1000), from_micros(last // 1000),
    )  # fmt: skip
    with connect(EngineSettings(threads=1)) as con:
        result = pull_latest(con, pull)
    in_range = [r for r in rows if first <= r["event"] <= last]
    keys = {(r["k"], r["s"]) for r in in_range if r["k"] is not None and r["s"] is not None}
    expected = {(k, s): as_of(in_range, {"k": k, "s": s}, last)["v"] for k, s in keys}
    found = {(r["k"], r["s"]): r["v"] for r in result.to_pylist()}
    assert found == expected
    assert result.num_rows == len(expected)


def test_the_oracle_itself_prefers_the_newest_created_of_equal_times() -> None:
    rows = [{"k": 1, "event": 5, "created": 9, "v": "new"}, {"k": 1, "event": 5, "created": 7, "v": "old"}]
    found = as_of(rows, {"k": 1}, 5)
    assert found is not None
    assert found["v"] == "new"
    assert as_of(rows, {"k": 1}, 5, as_known=True) is None
    assert as_of(rows, {"k": 1}, 8, ttl_ns=3, as_known=True) == rows[1]
    with pytest.raises(KeyError):
        as_of(rows, {"absent": 1}, 5)
