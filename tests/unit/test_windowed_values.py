"""Windowed values out of files: training sets, past values, the check of what was served, states from the log."""

from __future__ import annotations

import random
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.clock import from_micros
from feature_store.consistency.result import Consistency
from feature_store.consistency.served_log import values_of
from feature_store.consistency.windowed import check_windowed
from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.point_in_time.request import Feature, Key, ViewRequest
from feature_store.point_in_time.windowed import window_values
from feature_store.windows.definition import WINDOW_TAG, WindowedView
from feature_store.windows.ir import Aggregate, Column, Window
from tests.unit.test_window_agreement import WINDOWS, a_log
from tests.unit.window_support import (
    LATENESS,
    NEVER,
    T0,
    Logged,
    close,
    expected,
    table_of,
    view,
    watermarks_before,
)


def write_log(place: Path, rows: list[Logged]) -> None:
    table = table_of(rows)
    for part, mask in (
        ("history", pc.less(table["_partition"], 0)),
        ("stream", pc.greater_equal(table["_partition"], 0)),
    ):
        (place / part).mkdir(parents=True)
        pq.write_table(table.filter(mask), place / part / "some.parquet")


def feature_view(d: WindowedView, monkeypatch: pytest.MonkeyPatch):
    """A Feast view that carries the definition. Its SQL is a stand-in: what it means is set, not read."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Bool, Float64, Int64, String, UnixTimestamp

    from feature_store.windows import definition

    types = {"int64": Int64, "float64": Float64, "bool": Bool, "timestamp": UnixTimestamp}
    source = FileSource(name="s", path="events", timestamp_field="event_timestamp", tags={WINDOW_TAG: d.to_json()})
    schema = [Field(name=o.name, dtype=types[o.type]) for o in d.outputs]
    found = FeatureView(
        name="v",
        entities=[Entity(name="k", join_keys=["k"], value_type=ValueType.STRING)],
        ttl=d.ttl,
        schema=schema,
        source=source,
    )
    found.entity_columns = [Field(name="k", dtype=String)]
    monkeypatch.setattr(definition, "_from_json", lambda text: d)
    return found


def test_a_training_set_has_each_row_once_in_order_in_the_declared_types(tmp_path):
    from feast.types import Bool, Float64, Int64, UnixTimestamp

    d = view(Window("over", 20))
    rows = a_log(random.Random(1), 100)
    write_log(tmp_path, rows)
    wanted = {"w0_2": Int64, "w0_4": Float64, "w0_8": Bool, "w0_6": UnixTimestamp}
    features = tuple(Feature(n, n, t, f"v__{n}") for n, t in wanted.items())
    request = ViewRequest("v", str(tmp_path), (Key("k", "customer"),), features, "event_timestamp", None, None, d)
    asked = [("b", T0 + 60), (None, T0 + 60), ("a", T0 + 90), ("b", T0 + 60), ("nobody", T0 + 60)]
    entities = pa.table({"customer": pa.array([k for k, _ in asked], pa.string())})
    t_ns = pa.array([t * 1000 + 999 for _, t in asked], pa.int64())
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        found = window_values(con, request, entities, t_ns)
    assert found.schema.types == [pa.int64(), pa.float64(), pa.bool_(), pa.timestamp("us", "UTC")]
    for (key, t), got in zip(asked, found.to_pylist(), strict=True):
        right = expected(d, rows, key, t)
        assert got["v__w0_2"] == right["w0_2"]
        assert close(got["v__w0_4"], right["w0_4"])
        assert got["v__w0_8"] == right["w0_8"]
        at = right["w0_6"]
        assert got["v__w0_6"] == (None if at is None else from_micros(at // 1_000_000 * 1_000_000))


def test_a_log_without_a_column_of_the_definition_is_an_error_that_names_it(tmp_path):
    from feast.types import Int64

    d = view(Window("over", 20))
    (tmp_path / "history").mkdir()
    pq.write_table(table_of([Logged("a", T0, -1, 0, T0)]).drop_columns(["kind"]), tmp_path / "history" / "x.parquet")
    request = ViewRequest(
        "v",
        str(tmp_path),
        (Key("k", "k"),),
        (Feature("w0_0", "w0_0", Int64, "w0_0"),),
        "event_timestamp",
        None,
        None,
        d,
    )
    with duckdb.connect() as con, pytest.raises(DataError, match="kind"):
        window_values(con, request, pa.table({"k": ["a"]}), pa.array([T0 * 1000]))


# What was served


def served(d: WindowedView, rows: list[Logged], asked: list[tuple[str, int]], offsets: dict[int, int], watermark=None):
    """Records of the served log with the values of the rules, for the state that has applied these offsets."""
    for key, t in asked:
        right = expected(d, rows, key, t, offsets, watermark)
        seen = right.pop("_last_seen")
        features = {}
        for name, value in right.items():
            status = "NOT_FOUND" if seen is None else "NULL_VALUE" if value is None else "PRESENT"
            shown = from_micros(value).isoformat() if name == "w0_6" and value is not None else value
            features[name] = {"view": "v", "feature": name, "value": shown, "status": status}
        read = {
            "event_timestamp": None,
            "created": None,
            "offsets": {str(p): o for p, o in offsets.items()},
            "visible_at": None,
            "watermark": None if watermark is None else from_micros(watermark).isoformat(),
        }
        yield {"t": from_micros(t).isoformat(), "entity": {"k": key}, "features": features, "views": {"v": read}}


def checked(view_, d: WindowedView, records, place: Path) -> Consistency:
    found: dict[str, list] = {}
    for i, record in enumerate(records):
        for _, s in values_of(i, record):
            found.setdefault(s.feature, []).append(s)
    result = Consistency()
    check_windowed(view_, d, found, str(place), result)
    return result


@pytest.mark.parametrize("kind", WINDOWS)
def test_what_was_served_is_recomputed_from_offsets_and_watermark(kind, tmp_path, monkeypatch):
    d = view(WINDOWS[kind])
    rows = as_streamed(a_log(random.Random(5), 100))
    newest = max(r.visible for r in rows if r.partition < 0)  # a reader has all of history
    write_log(tmp_path / "events", rows)
    records = []
    for t in range(newest, newest + 60, 7):
        offsets = {p: max(r.offset for r in rows if r.partition == p and r.visible <= t) for p in (0, 1)}
        records += served(d, rows, [(k, t) for k in ("a", "b", "nobody")], offsets, t - 10)
    v = feature_view(d, monkeypatch)
    result = checked(v, d, records, tmp_path)
    assert (result.checked, result.different, result.not_checked) == (len(records) * len(d.outputs), 0, 0)
    assert result.stale == 0

    wrong = records[3]["features"]["w0_0"]
    wrong["value"] = (wrong["value"] or 0) + 1
    result = checked(v, d, records, tmp_path)
    assert result.different == 1
    assert result.examples[0].feature == "w0_0"


def test_more_known_by_t_than_was_served_is_stale_and_less_is_a_leak(tmp_path, monkeypatch):
    d = view(Window("over", 100))
    rows = [Logged("a", T0 + i, 0, i, T0 + i, n=1) for i in range(5)]
    write_log(tmp_path / "events", rows)
    v = feature_view(d, monkeypatch)
    at = [("a", T0 + 2)]
    assert checked(v, d, served(d, rows, at, {0: 2}), tmp_path).stale == 0
    behind = checked(v, d, served(d, rows, at, {0: 1}), tmp_path)
    assert (behind.stale, behind.different) == (len(d.outputs), 0)
    ahead = checked(v, d, served(d, rows, at, {0: 3}), tmp_path)
    assert ahead.different == len(d.outputs)
    assert "is after t" in ahead.examples[0].reason


def test_a_record_without_the_watermark_of_closed_windows_cannot_be_checked(tmp_path, monkeypatch):
    d = view(WINDOWS["tumble closed"])
    rows = [Logged("a", T0, 0, 0, T0)]
    write_log(tmp_path / "events", rows)
    records = list(served(d, rows, [("a", T0)], {0: 0}))
    del records[0]["views"]["v"]["watermark"]
    result = checked(feature_view(d, monkeypatch), d, records, tmp_path)
    assert (result.checked, result.not_checked) == (0, len(d.outputs))


def test_doubles_may_differ_by_the_order_of_adding(tmp_path, monkeypatch):
    d = view(Window("over", 100))
    rows = [Logged("a", T0 + i, 0, i, T0 + i, x=x, kind="a") for i, x in enumerate([1e8, 0.1, -1e8])]
    write_log(tmp_path / "events", rows)
    records = list(served(d, rows, [("a", T0 + 2)], {0: 2}))
    total = records[0]["features"]["w0_3"]
    for by, different in ((0.1, 0), (1.0, 1)):
        total["value"] = 0.1 + by
        assert checked(feature_view(d, monkeypatch), d, records, tmp_path).different == different


# Past values


def at(us: int) -> datetime:
    return from_micros(us).astimezone(UTC)


def test_past_values_are_those_of_the_rules_and_a_repeated_call_goes_on(tmp_path, monkeypatch):
    from feature_store.window_backfill import past_values

    d = view(Window("hop", 24, 6), Window("tumble", 12, 12, on_close=True))
    rows = a_log(random.Random(2), 100)
    write_log(tmp_path / "events", rows)
    v = feature_view(d, monkeypatch)
    out = tmp_path / "out"
    span = (at(T0), at(T0 + 100), timedelta(microseconds=9))

    plan = past_values(v, str(tmp_path), out, *span, dry_run=True, rows_per_file=10)
    assert (plan.entities, plan.steps, plan.rows, plan.files) == (3, 12, 36, 4)
    assert not out.exists()

    done = past_values(v, str(tmp_path), out, *span, rows_per_file=10)
    files = sorted(out.glob("*.parquet"))
    assert len(files) == done.files == 4
    found = {(r["k"], r["event_timestamp"]): r for f in files for r in pq.read_table(f).to_pylist()}
    assert done.rows == len(found)
    for key in "abc":
        for t in range(T0, T0 + 100, 9):
            right = expected(d, rows, key, t)
            got = found.get((key, at(t)))
            assert (got is None) == (right["_last_seen"] is None)
            if got is not None:
                assert got["last_event_timestamp"] == at(right["_last_seen"])
                assert all(close(got[n], right[n]) for n in ("w0_0", "w0_2", "w0_4", "w1_0", "w1_7"))

    before = files[0].read_bytes()
    files[0].unlink()
    again = past_values(v, str(tmp_path), out, *span, rows_per_file=10)
    assert again.skipped == 3
    assert files[0].read_bytes() == before

    with pytest.raises(UsageError, match="end"):
        past_values(v, str(tmp_path), out, span[0], at(T0 + 50), span[2], rows_per_file=10)
    with pytest.raises(UsageError, match="no step"):
        past_values(v, str(tmp_path), out, span[0], span[0], span[2])


def test_past_values_without_events_name_the_backfill(tmp_path, monkeypatch):
    from feature_store.window_backfill import past_values

    v = feature_view(view(Window("over", 20)), monkeypatch)
    with pytest.raises(NotFoundError, match="backfill"):
        past_values(v, str(tmp_path), tmp_path / "out", at(T0), at(T0 + 9), timedelta(seconds=1))


def test_lengths_of_the_command_line():
    from predictflow.cli_window_values import parse_length

    assert [parse_length("--every", t) for t in ("15m", "1d")] == [timedelta(minutes=15), timedelta(days=1)]
    for wrong in ("1", "0h", "1.5h", "h", "1y"):
        with pytest.raises(UsageError, match="every"):
            parse_length("--every", wrong)


# States from the log


def as_streamed(rows: list[Logged]) -> list[Logged]:
    """Only what a stream could have logged: nothing dropped, each partition in the order of being visible."""
    newest: dict[int, int] = {}
    out = []
    for r in sorted(rows, key=lambda r: (r.partition, r.offset)):
        if r.dropped not in (None, "idle"):
            continue
        if r.partition >= 0:
            newest[r.partition] = max(newest.get(r.partition, 0), r.visible)
            r = replace(r, visible=newest[r.partition])
        out.append(r)
    start = max((r.time - LATENESS for r in out if r.partition < 0 and r.time is not None), default=NEVER)
    return watermarks_before(out, bootstrap=start)


@pytest.mark.parametrize("kind", WINDOWS)
@pytest.mark.parametrize("events", [7, 1_000])
def test_states_made_from_the_log_give_what_history_gives(kind, events, tmp_path):
    from feature_store.bootstrap_states import LoggedStates

    d = view(WINDOWS[kind])
    rows = as_streamed(a_log(random.Random(4), 120))
    write_log(tmp_path, rows)
    known_by = max(r.visible for r in rows) - 30
    known = [r for r in rows if r.visible <= known_by]
    found = set()
    with LoggedStates(d, tmp_path, known_by) as logged:
        summary = logged.summary
        assert summary.visible_us == max(r.visible for r in known)
        past = [r.time for r in known if r.partition < 0]
        assert summary.history_watermark_us == max(past) - LATENESS
        marks = {p: w for p, (w, _) in summary.watermarks.items()}
        for chunk in logged.chunks(events=events, entities=2):
            finals = chunk.states.values(known_by, marks)
            assert not finals.errors
            for i, (key,) in enumerate(chunk.keys):
                found.add(key)
                right = expected(d, known, key, known_by)
                assert finals.seen[i] == right["_last_seen"]
                for o in d.outputs:
                    got = finals.columns[o.name][i]
                    if isinstance(got, datetime):
                        got = (got - from_micros(0)) // timedelta(microseconds=1)
                    assert close(got, right[o.name]), (key, o.name)
    assert found == {r.key for r in known if r.key is not None}
    assert summary.entities == len(found)
    assert summary.events == sum(r.dropped is None for r in {(r.partition, r.offset, r.key): r for r in known}.values())


def test_events_that_are_not_finite_count_neither_in_history_nor_in_states_made_of_it(tmp_path):
    """In the stream they are dead letters; files of before backfill marked them hold them yet."""
    from feast.types import Float64, Int64

    from feature_store.bootstrap_states import LoggedStates

    x = Column("x", "float64")
    numbers = [Aggregate(f, x, None, "float64") for f in ("min", "max")]
    d = view(Window("over", 20), aggregates=[Aggregate("count", None, None, "int64"), *numbers])
    events = [
        Logged("a", T0 + i, -1, i, T0 + i, x=x) for i, x in enumerate([1.0, float("nan"), float("inf"), None, 2.0])
    ]
    write_log(tmp_path, events)
    names = ["w0_0", "w0_1", "w0_2"]
    features = tuple(Feature(n, n, Int64 if n == "w0_0" else Float64, n) for n in names)
    request = ViewRequest("v", str(tmp_path), (Key("k", "k"),), features, "event_timestamp", None, None, d)
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        found = window_values(con, request, pa.table({"k": ["a"]}), pa.array([(T0 + 9) * 1000]))
    with LoggedStates(d, tmp_path, None) as logged:
        (chunk,) = logged.chunks()
        columns = chunk.states.values(T0 + 9).columns
        assert logged.summary.events == 3
    assert found.to_pylist() == [{n: columns[n][0] for n in names}] == [dict(zip(names, (3, 1.0, 2.0), strict=True))]


def test_states_leave_out_erased_entities(tmp_path):
    from feature_store.bootstrap_states import LoggedStates

    write_log(tmp_path, [Logged("a", T0, -1, 0, T0), Logged("b", T0, 0, 0, T0)])
    with LoggedStates(view(Window("over", 20)), tmp_path, None, ["k <> 'a'"]) as logged:
        assert [c.keys for c in logged.chunks()] == [[("b",)]]
