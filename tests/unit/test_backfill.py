"""Backfill: what it writes, in which range, twice; and windowed values over the history it wrote, against an oracle."""

from __future__ import annotations

import hashlib
import json
import random
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from point_in_time_oracle import feast_store

from feature_store.backfill import backfill
from feature_store.errors import DataError, PredictFlowError

T0 = datetime(2024, 1, 30, tzinfo=UTC)
TIME = pa.timestamp("us", "UTC")
EVENT_SQL = "SELECT event_id, customer, kind, event_timestamp, created, quantity FROM events"


def at(days: float) -> datetime:
    return T0 + timedelta(days=days)


def write_accounts(raw: Path, rows: list[tuple[str | None, datetime, datetime, float | None]]) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    names = ["customer", "event_timestamp", "created", "charges"]
    types = [pa.string(), TIME, TIME, pa.float64()]
    columns = {n: pa.array([r[i] for r in rows], t) for i, (n, t) in enumerate(zip(names, types, strict=True))}
    pq.write_table(pa.table(columns), raw / "accounts.parquet")


def write_events(raw: Path, rows: list[dict[str, Any]]) -> None:
    raw.mkdir(parents=True, exist_ok=True)
    types = {"event_id": pa.string(), "customer": pa.string(), "kind": pa.string(), "event_timestamp": TIME,
             "created": TIME, "quantity": pa.int64()}  # fmt: skip
    pq.write_table(pa.table({n: pa.array([r[n] for r in rows], t) for n, t in types.items()}), raw / "events.parquet")


def customer() -> Any:
    from feast import Entity, ValueType

    return Entity(name="customer", join_keys=["customer"], value_type=ValueType.STRING)


def account_view(sql: str | None = "SELECT customer, event_timestamp, created, charges FROM accounts") -> Any:
    from feast import FeatureView, Field, FileSource
    from feast.types import Float64, String

    return FeatureView(
        name="account",
        entities=[customer()],
        ttl=timedelta(0),
        schema=[Field(name="charges", dtype=Float64), Field(name="customer", dtype=String)],
        source=FileSource(
            name="account_source",
            path="account",
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
            tags={"predictflow.sql": sql} if sql else {},
        ),
    )


def behaviour_view() -> Any:
    from feature_store.windows.declare import event_source, windowed_feature_view

    window = "(PARTITION BY customer ORDER BY event_timestamp RANGE INTERVAL '{}' DAYS PRECEDING)"
    return windowed_feature_view(
        name="behaviour",
        entity=customer(),
        source=event_source(topic="events", columns={"kind": "string", "quantity": "int64"}, event_id="event_id"),
        path="events",
        sql=f"""
            SELECT COUNT(*) OVER w7 AS n_7d, SUM(quantity) OVER w7 AS quantity_7d,
                   COUNT(*) FILTER (WHERE kind = 'bad') OVER w2 AS bad_2d
            FROM events WINDOW w7 AS {window.format(7)}, w2 AS {window.format(2)}
        """,
        history_sql=EVENT_SQL,
        ttl=timedelta(days=20),
    )


def contents(directory: Path) -> dict[str, str]:
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file()
    }


def read(directory: Path) -> list[dict[str, Any]]:
    return [row for p in sorted(directory.rglob("*.parquet")) for row in pq.read_table(p).to_pylist()]


def test_rows_are_written_per_month_sorted_by_key_time_and_created(tmp_path: Path) -> None:
    rows = [("b", at(0), at(0), 1.0), ("a", at(3), at(9), 2.0), ("a", at(3), at(4), 3.0), ("a", at(1), at(1), None)]
    write_accounts(tmp_path / "raw", rows)
    seen: list[int] = []
    result = backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", progress=seen.append)
    names = ["2024-01.parquet", "2024-02.parquet", "_layout.json"]
    assert [p.name for p in sorted((tmp_path / "off/account").iterdir())] == names
    assert [(r["customer"], r["charges"]) for r in read(tmp_path / "off")] == [
        ("a", None), ("b", 1.0), ("a", 3.0), ("a", 2.0),
    ]  # fmt: skip
    assert (result.rows, result.files, seen) == (4, 2, [2, 2])
    assert result.bytes == sum(p.stat().st_size for p in (tmp_path / "off").rglob("*.parquet"))
    assert result.inputs == ("accounts.charges", "accounts.created", "accounts.customer", "accounts.event_timestamp")
    assert json.loads(json.dumps(result.to_json()))["rows"] == 4


def test_range_and_knowledge_bounds(tmp_path: Path) -> None:
    rows = [("a", at(d), at(c), float(d)) for d, c in [(0, 0), (1, 1), (2, 2), (2, 8), (3, 3)]]
    write_accounts(tmp_path / "raw", rows)
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", start=at(1), end=at(3),
             known_by=at(2))  # fmt: skip
    assert [r["charges"] for r in read(tmp_path / "off")] == [1.0, 2.0]


def test_the_same_run_gives_the_same_bytes_and_another_range_keeps_what_is_outside_of_it(tmp_path: Path) -> None:
    rng = random.Random(3)
    rows = [(f"c{rng.randrange(9)}", at(rng.randrange(900) / 10), at(90), rng.random()) for _ in range(500)]
    write_accounts(tmp_path / "raw", rows)
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    once = contents(tmp_path / "off")
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    assert contents(tmp_path / "off") == once
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", start=at(20), end=at(50))
    assert contents(tmp_path / "off") == once
    rng.shuffle(rows)
    write_accounts(tmp_path / "raw", rows)
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "other")
    assert contents(tmp_path / "other") == once
    write_accounts(tmp_path / "raw", [r for r in rows if not at(20) <= r[1] < at(50)])
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", start=at(20), end=at(50))
    kept = [r for r in rows if not at(20) <= r[1] < at(50)]
    assert len(read(tmp_path / "off")) == len(kept)


def test_rows_appended_by_a_write_survive_a_rerun(tmp_path: Path) -> None:
    import pandas as pd

    write_accounts(tmp_path / "raw", [("a", at(0), at(0), 1.0)])
    view = account_view()
    store = feast_store(tmp_path, [customer(), view])
    backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline")
    frame = pd.DataFrame({"customer": ["b"], "event_timestamp": [at(1)], "created": [at(1)], "charges": [2.0]})
    store.write_to_offline_store("account", frame)
    backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline")
    assert {r["customer"] for r in read(tmp_path / "offline")} == {"a", "b"}


def test_a_dry_run_counts_and_writes_nothing(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", [("a", at(d), at(d), 1.0) for d in range(40)])
    result = backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", dry_run=True)
    assert (result.rows, result.files, result.dry_run) == (40, 3, True)
    assert result.bytes > 0
    assert not (tmp_path / "off").exists()


def test_history_of_a_windowed_view_has_the_columns_of_the_event_log(tmp_path: Path) -> None:
    write_events(
        tmp_path / "raw",
        [
            {
                "event_id": "e2",
                "customer": "a",
                "kind": "ok",
                "event_timestamp": at(1),
                "created": at(5),
                "quantity": 2,
            },
            {
                "event_id": "e1",
                "customer": "a",
                "kind": "ok",
                "event_timestamp": at(2),
                "created": at(2),
                "quantity": 1,
            },
            {
                "event_id": "e1",
                "customer": "a",
                "kind": "ok",
                "event_timestamp": at(2),
                "created": at(3),
                "quantity": 1,
            },
        ],
    )
    backfill(behaviour_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", known_by=at(9))
    rows = {r["_offset"]: r for r in read(tmp_path / "off/events/history")}
    assert [rows[i]["_dropped"] for i in range(3)] == [None, "duplicate", None]
    assert [rows[i]["_visible_at"] for i in range(3)] == [at(2), at(3), at(5)]
    schema = pq.read_schema(tmp_path / "off/events/history/2024-01.parquet")
    assert {n: str(schema.field(n).type) for n in schema.names} == {
        "event_id": "string", "customer": "string", "event_timestamp": "timestamp[us, tz=UTC]",
        "created": "timestamp[us, tz=UTC]", "kind": "string", "quantity": "int64", "_topic_id": "string",
        "_partition": "int32", "_offset": "int64", "_visible_at": "timestamp[us, tz=UTC]",
        "_watermark": "timestamp[us, tz=UTC]", "_dropped": "string",
    }  # fmt: skip
    whole = contents(tmp_path / "off")
    backfill(behaviour_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", start=at(2), known_by=at(9))
    assert contents(tmp_path / "off") == whole  # an event keeps its number, whatever the range


def test_states_made_from_history_remember_the_ids_of_its_events(tmp_path: Path) -> None:
    import numpy as np

    from feature_store.bootstrap_states import LoggedStates
    from feature_store.clock import to_micros
    from feature_store.windows.definition import definition_of
    from feature_store.windows.plan import hash_sql
    from feature_store.windows.state import APPLIED, DUPLICATE, NEVER, Events

    event = {"customer": "a", "kind": "ok", "quantity": 1, "event_timestamp": at(1), "created": at(1)}
    write_events(tmp_path / "raw", [{**event, "event_id": "e1"}])
    view = behaviour_view()
    backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    definition = definition_of(view)
    with LoggedStates(definition, tmp_path / "off/events", None) as logged:
        (chunk,) = logged.chunks()
    with duckdb.connect() as con:
        ids = [con.execute(f"SELECT {hash_sql('?')}", [i]).fetchall()[0][0] for i in ("e1", "e2")]

    def both(*values: int) -> np.ndarray[Any, Any]:
        return np.array(values if len(values) == 2 else values * 2, np.int64)

    t = to_micros(at(1))
    again = Events(both(0), both(t), both(0), both(0, 1), both(t + 1), both(NEVER), both(0), both(*ids), [both(1)])
    assert chunk.states.apply(again).tolist() == [DUPLICATE, APPLIED]


def test_an_event_without_its_id_is_refused(tmp_path: Path) -> None:
    """Two of them would count as one."""
    event = {"customer": "a", "kind": "ok", "quantity": 1, "event_timestamp": at(1), "created": at(1)}
    write_events(tmp_path / "raw", [{**event, "event_id": "e1"}, {**event, "event_id": None}])
    with pytest.raises(DataError, match=r"1 row.* have no event_id"):
        backfill(behaviour_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")


def test_an_event_that_is_not_finite_is_marked_told_and_no_first_of_its_id(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    from feature_store.windows.declare import event_source, windowed_feature_view

    view = windowed_feature_view(
        name="spent",
        entity=customer(),
        source=event_source(topic="events", columns={"charges": "float64"}, event_id="event_id"),
        sql="SELECT SUM(charges) AS s FROM events GROUP BY customer, TUMBLE(event_timestamp, INTERVAL '1' DAY)",
        history_sql="SELECT event_id, customer, event_timestamp, created, charges FROM accounts",
        ttl=timedelta(days=20),
    )
    charges = [float("nan"), 1.0, float("-inf"), None, 2.0]
    columns = {
        "event_id": ["e1", "e1", "e2", "e3", "e1"],
        "customer": ["a"] * 5,
        "event_timestamp": pa.array([at(1)] * 5, TIME),
        "created": pa.array([at(i) for i in range(5)], TIME),
        "charges": pa.array(charges, pa.float64()),
    }
    (tmp_path / "raw").mkdir()
    pq.write_table(pa.table(columns), tmp_path / "raw" / "accounts.parquet")
    backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    rows = sorted(read(tmp_path / "off/spent/history"), key=lambda r: r["_offset"])
    assert [r["_dropped"] for r in rows] == ["not_finite", None, "not_finite", None, "duplicate"]
    assert "2 event(s)" in caplog.text


def test_history_may_not_reach_into_what_the_stream_has_logged(tmp_path: Path) -> None:
    """An event in both would count twice."""
    event = {"event_id": "e1", "customer": "a", "kind": "ok", "quantity": 1}
    write_events(tmp_path / "raw", [{**event, "event_timestamp": at(2), "created": at(2)}])
    view = behaviour_view()
    stream = tmp_path / "offline" / view.batch_source.path / "stream"
    stream.mkdir(parents=True)
    created = pa.array([at(2), at(3)], pa.timestamp("us", "UTC"))  # the first is history's, met again in the topic
    pq.write_table(pa.table({"created": created, "_dropped": ["duplicate", None]}), stream / "s.parquet")
    with pytest.raises(DataError, match=r"the stream has logged events since .*count again"):
        backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline", known_by=at(3))
    assert not (stream.parent / "history").exists()
    assert backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline", known_by=at(2.5)).rows == 1


def test_windowed_values_at_any_time_are_what_loops_over_the_events_give(tmp_path: Path) -> None:
    rng = random.Random(11)
    hour = timedelta(hours=1)
    events = []
    for i in range(300):
        happened = T0 + rng.randrange(40 * 24) * hour
        events.append({"event_id": f"e{i}", "customer": rng.choice("abc"), "kind": rng.choice(["ok", "bad"]),
                       "event_timestamp": happened, "created": happened + rng.choice([0, 0, 30]) * hour,
                       "quantity": rng.randrange(-3, 9)})  # fmt: skip
    write_events(tmp_path / "raw", events)
    view = behaviour_view()
    store = feast_store(tmp_path, [customer(), view])
    backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline")
    asked = [(rng.choice(["a", "b", "c", "d", None]), T0 + rng.randrange(-24, 70 * 24) * hour) for _ in range(200)]
    entities = pa.table(
        {"customer": pa.array([a[0] for a in asked]), "event_timestamp": pa.array([a[1] for a in asked], TIME)}
    )
    names = ["n_7d", "quantity_7d", "bad_2d", "window_state"]
    job = store.get_historical_features(entity_df=entities, features=[f"behaviour:{n}" for n in names])
    expected = []
    for who, t in asked:
        seen = [e for e in events if e["customer"] == who and e["event_timestamp"] <= t and e["created"] <= t]
        if not seen or max(e["event_timestamp"] for e in seen) < t - timedelta(days=20):
            expected.append((None, None, None, None))
            continue
        week = [e for e in seen if e["event_timestamp"] >= t - timedelta(days=7)]
        bad = [e for e in seen if e["event_timestamp"] >= t - timedelta(days=2) and e["kind"] == "bad"]
        expected.append((len(week), sum(e["quantity"] for e in week) if week else None, len(bad), None))
    table = job.to_arrow()
    assert list(zip(*(table.column(n).to_pylist() for n in names), strict=True)) == expected
    assert {e[0] for e in expected} > {None, 0}
    assert table.schema.field("window_state").type == pa.binary()


def test_materialising_a_windowed_view_writes_nothing_and_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_events(tmp_path / "raw", [{"event_id": "e", "customer": "a", "kind": "ok", "event_timestamp": at(1),
                                     "created": at(1), "quantity": 1}])  # fmt: skip
    view = behaviour_view()
    store = feast_store(tmp_path, [customer(), view])
    backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline")
    store.materialize(at(0), at(3))  # at the level of Feast's command line
    assert "predictflow windows bootstrap behaviour" in caplog.text
    online = store.get_online_features(features=["behaviour:n_7d"], entity_rows=[{"customer": "a"}])
    assert online.to_dict()["n_7d"] == [None]


def test_a_windowed_view_without_history_names_the_backfill(tmp_path: Path) -> None:
    store = feast_store(tmp_path, [customer(), behaviour_view()])
    entities = pa.table({"customer": ["a"], "event_timestamp": pa.array([at(0)], TIME)})
    job = store.get_historical_features(entity_df=entities, features=["behaviour:n_7d"])
    with pytest.raises(PredictFlowError, match="next: predictflow backfill behaviour"):
        job.to_arrow()


@pytest.mark.parametrize(
    ("sql", "message"),
    [
        (None, "no tag predictflow.sql"),
        ("SELEC 1", "predictflow.sql"),
        ("SELECT * FROM absent", "absent"),
        ("SELECT customer, event_timestamp, created, charges AS c FROM accounts", "gives no column: 'charges'; valid:"),
        (
            "SELECT customer, event_timestamp, created, 'x' AS charges FROM accounts",
            "column charges: stored as VARCHAR",
        ),
        ("SELECT customer, 5 AS event_timestamp, created, charges FROM accounts", "event_timestamp: not a timestamp"),
        ("SELECT customer, event_timestamp, created, nothing AS charges FROM accounts", "nothing"),
        ("SELECT NULL AS customer, event_timestamp, created, charges FROM accounts", "1 row.* no customer"),
    ],
)
def test_a_bad_select_is_one_clear_line_and_writes_nothing(tmp_path: Path, sql: str | None, message: str) -> None:
    write_accounts(tmp_path / "raw", [("a", at(0), at(0), 1.0)])
    with pytest.raises(PredictFlowError, match=message) as caught:
        backfill(account_view(sql), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    assert "\n" not in caught.value.message
    assert not (tmp_path / "off").exists()


def test_a_missing_or_broken_raw_file_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    with pytest.raises(PredictFlowError, match="no raw tables"):
        backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    (tmp_path / "raw/accounts.parquet").write_bytes(b"not parquet at all")
    with pytest.raises(PredictFlowError, match=r"accounts\.parquet"):
        backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "off")
    assert not (tmp_path / "off").exists()
