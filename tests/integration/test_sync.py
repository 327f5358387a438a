"""The consumer on a real broker and Redis: what is served equals history, whatever goes wrong in between."""

from __future__ import annotations

import json
import random
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from stream_support import (
    DAY,
    FEATURES,
    SQL,
    T0,
    event,
    make_project,
    message,
    produce,
    wait_until,
    write_history,
)
from sync_support import (
    CUSTOMERS,
    HOUR,
    clock_of,
    command,
    handled,
    in_partitions,
    log_of,
    outcomes,
    some_events,
    values,
)

from feature_store.clock import to_micros
from feature_store.dead_letters import read_dead_letters
from feature_store.errors import DefinitionError, NotFoundError, PredictFlowError, UnavailableError
from feature_store.event_log import EventLog
from feature_store.log_rows import log_schema
from feature_store.sync import Sync, SyncOptions
from feature_store.topic import client_config, ensure_topic
from feature_store.window_store import WindowStore
from feature_store.window_write import parse_watermarks
from feature_store.windows.declare import windowed_feature_view
from feature_store.windows.definition import definition_of

pytestmark = pytest.mark.kafka


def test_served_values_equal_what_is_recomputed_and_a_planted_fault_is_seen(project):
    write_history(
        project.offline,
        [event(i, CUSTOMERS[i % 5], T0 - i * DAY / 2, kind="ticket" if i % 3 == 0 else "usage") for i in range(150)],
    )
    project.bootstrap()
    rng = random.Random(7)
    records = project.served([*CUSTOMERS, "never"])
    with project.syncing() as consumer:
        at = T0
        for n in range(50):
            created = at = at + rng.choice([0, 1, 13]) * HOUR
            happened = created - rng.choice([timedelta(0), timedelta(0), HOUR, 8 * DAY, 45 * DAY])
            e = event(1000 + n - n % 10 // 9, rng.choice(CUSTOMERS), happened, created, "ticket", rng.randint(-3, 9))
            produce(project.kafka, project.topic, [message(e)])
            wait_until(lambda n=n: handled(consumer) > n)
            records += project.served([*CUSTOMERS, "never"])
    assert outcomes(consumer)["duplicate"] >= 1
    assert values(project) == project.history(CUSTOMERS, clock_of(project))
    for days in (6, 7, 25, 31, 59, 61):
        records += project.served([*CUSTOMERS, "never"], at + days * DAY)

    result = project.check(records)
    assert (result.checked, result.different) == (len(records) * len(FEATURES), 0), result.examples
    statuses = {f["status"] for r in records for f in r["features"].values()}
    assert statuses == {"PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"}

    altered = json.loads(json.dumps(records))
    altered[100]["features"]["events_7d"]["value"] = 77
    result = project.check(altered)
    assert result.different == 1
    assert result.examples[0].feature == "events_7d"

    rows = log_of(project).read()
    number = rows["_dropped"].to_pylist().index(None)
    quantities = rows["quantity"].to_pylist()
    quantities[number] += 1_000_000
    rows = rows.set_column(rows.schema.get_field_index("quantity"), "quantity", pa.array(quantities, pa.int64()))
    for file in log_of(project).files():
        pq.write_table(rows.filter(pa.compute.equal(rows["_offset"], file.first)), file.path)
    assert project.check(records).different > 0


@pytest.mark.parametrize("column", ["event_timestamp", "created"])
def test_an_event_of_the_future_cannot_move_the_replay_clock(project, column):
    """The clock never goes back: everything after would look late, and every read would be decades away."""
    key, value = message(event(2, "C1", T0 + HOUR))
    row = json.loads(value)
    if column == "event_timestamp":
        del row["created"]
    ahead = json.dumps({**row, column: "2199-01-01T00:00:00Z"}).encode()
    events = [message(event(1, "C1", T0)), (key, ahead), message(event(3, "C1", T0 + HOUR))]
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, events)
        wait_until(lambda: handled(consumer) == 3)
    assert outcomes(consumer)["dead_lettered"] == 1
    (letter,) = read_dead_letters(client_config(project.kafka), project.topic)
    assert f"{column} 2199-01-01T00:00:00+00:00 is more than 5 s ahead of the machine's clock" in letter.reason
    assert clock_of(project) == T0 + HOUR
    assert values(project, ["C1"])[0]["events_7d"] == 2


def test_two_consumers_share_the_partitions_and_one_takes_over(project):
    ensure_topic(client_config(project.kafka), project.topic, partitions=3)
    events = some_events(300, seed=2)
    with project.syncing(max_batch=5) as first:
        produce(project.kafka, project.topic, [message(e) for e in events[:100]])
        with project.syncing(max_batch=5) as second:
            for e in events[100:200]:  # slowly: the second one waits for the first to give partitions up
                produce(project.kafka, project.topic, [message(e)])
                time.sleep(0.05)
            wait_until(lambda: handled(second) > 0 and handled(first) > 0)
        produce(project.kafka, project.topic, [message(e) for e in events[200:]])
        wait_until(lambda: log_of(project).read().num_rows == len(events))
        wait_until(lambda: handled(first) + handled(second) >= len(events))
    by_offset = project.check(project.served(CUSTOMERS))
    assert (by_offset.checked, by_offset.different) == (len(CUSTOMERS) * len(FEATURES), 0)
    now = clock_of(project)
    unique = {e["event_id"]: e for e in events}.values()
    for customer, got in zip(CUSTOMERS, values(project)):
        mine = [e for e in unique if e["customer_id"] == customer and e["event_timestamp"] >= now - 7 * DAY]
        assert got["events_7d"] == len(mine)


def test_two_projects_on_one_topic_both_get_every_event(project, tmp_path, monkeypatch):
    """As the demo and a project of `predictflow init` do: one group would give each of them half."""
    other = make_project(
        tmp_path / "other",
        project.environ["POSTGRES_URL"],
        project.environ["REDIS_URL"],
        project.kafka,
        project.topic,
        monkeypatch,
        name="other",
    )
    ensure_topic(client_config(project.kafka), project.topic, partitions=2)
    events = some_events(20, seed=8)
    with project.syncing() as first, other.syncing() as second:
        produce(project.kafka, project.topic, [message(e) for e in events])
        wait_until(lambda: handled(first) == handled(second) == len(events))
    assert (project.group, other.group) == ("predictflow-sync-predictflow", "predictflow-sync-other")
    assert values(project) == values(other)


def test_an_erased_customer_does_not_come_back_with_the_topic(project):
    """Neither from messages that the topic still holds, nor with new ones; others are not touched."""
    write_history(project.offline, [event(i, c, T0 - HOUR) for i, c in enumerate(["C1", "C2"])])
    project.bootstrap()
    events = [event(10 + i, c, T0 + i * HOUR) for i, c in enumerate(["C1", "C2", "C1", "C2"])]
    produce(project.kafka, project.topic, [message(e) for e in events])
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 4)
        command("erase", "customer", "C1", "--online", "--yes")  # beside a running sync
        produce(project.kafka, project.topic, [message(event(20, "C1", T0 + DAY)), message(event(21, "C2", T0 + DAY))])
        wait_until(lambda: handled(consumer) == 6)
    assert outcomes(consumer)["erased"] == 1
    project.bootstrap(rewind=True)
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 6)
    assert outcomes(consumer) == {
        "applied": 3,
        "duplicate": 0,
        "replayed": 0,
        "dropped": 0,
        "dead_lettered": 0,
        "erased": 3,
    }
    assert set(log_of(project).read()["customer_id"].to_pylist()) == {"C2"}
    assert [r["features"]["events_7d"]["status"] for r in project.served(["C1", "C2"])] == ["NOT_FOUND", "PRESENT"]
    assert values(project, ["C2"])[0]["events_7d"] == 4
    assert list(read_dead_letters(client_config(project.kafka), project.topic)) == []

    # A backup of the files brings nothing back either.
    write_history(project.offline, [event(i, c, T0 - HOUR) for i, c in enumerate(["C1", "C2"])])
    assert project.bootstrap(clock_of(project))[0].entities == 1
    assert values(project, ["C1"])[0]["events_7d"] is None


def test_errors_at_the_start_are_one_line(project):
    def start(**changes):
        options = {"bootstrap_servers": project.kafka, "offline_path": str(project.offline), "clock": "replay"}
        Sync(project.store, SyncOptions(**(options | changes))).run()

    with pytest.raises(NotFoundError, match="no feature view reads this topic"):
        start(topic="nonsense")
    with pytest.raises(UnavailableError, match="KAFKA_BOOTSTRAP_SERVERS") as e:
        start(bootstrap_servers="127.0.0.1:1")
    assert isinstance(e.value, PredictFlowError)
    assert "\n" not in e.value.message


def test_the_log_row_of_an_event_is_complete(project):
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(1, "C1", T0, T0 + HOUR))])
        wait_until(lambda: handled(consumer) == 1)
    (row,) = log_of(project).read().to_pylist()
    assert row.pop("_topic_id")
    assert row == {
        **event(1, "C1", T0, T0 + HOUR),
        "_partition": 0,
        "_offset": 0,
        "_visible_at": T0 + HOUR,
        "_watermark": None,
        "_dropped": None,
    }
    assert log_schema(consumer.views[0].definition).names == log_of(project).read().schema.names


def test_the_commands_bootstrap_explain_and_check(project, tmp_path):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    command("windows", "bootstrap", exit_code=2)  # under replay, --known-by is needed
    command("windows", "bootstrap", "--known-by", "soon", exit_code=2)
    command("windows", "bootstrap", "nonsense", "--known-by", T0.isoformat(), exit_code=2)
    done = command("windows", "bootstrap", "--known-by", T0.isoformat())
    assert "3 entities, 3 events known by 2024-03-01T00:00:00+00:00" in done.output
    assert "problems_30d" in command("windows", "explain", "customer_behavior").output

    served = project.served(CUSTOMERS)
    path = tmp_path / "served.jsonl"
    path.write_text("\n".join(map(json.dumps, served)))
    assert "checked 24, different 0, stale 0" in command("check", "--served-file", str(path)).output
    served[0]["features"]["events_7d"]["value"] = 2
    path.write_text("\n".join(map(json.dumps, served)))
    failed = command("check", "--served-file", str(path), exit_code=1)
    assert "different 1" in failed.output
    assert "customer_id=C0 events_7d" in failed.output
    result = json.loads(command("check", "--served-file", str(path), "--json", exit_code=1).output)
    assert (result["checked"], result["different"]) == (24, 1)
    command("check", "--served-file", str(tmp_path / "none.jsonl"), exit_code=2)
    command("check", "--served-file", str(path), "--since", "yesterday", exit_code=2)


def test_check_leaves_out_what_was_served_before_a_rewind_and_says_how_much(project, tmp_path):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in some_events(40, seed=4)])
        wait_until(lambda: handled(consumer) == 40)
    path = tmp_path / "served.jsonl"
    first = project.served(CUSTOMERS)
    began = first[0]["served_at"]
    path.write_text("\n".join(map(json.dumps, first)))
    assert "checked 24, different 0, stale 0" in command("check", "--served-file", str(path)).output

    command("windows", "bootstrap", "--known-by", T0.isoformat(), "--rewind", "--yes")
    nothing = command("check", "--served-file", str(path), exit_code=1)
    assert "6 older records left out" in nothing.output
    path.write_text("\n".join(map(json.dumps, [*first, *project.served(CUSTOMERS)])))
    done = command("check", "--served-file", str(path))
    assert "checked 24, different 0, stale 0" in done.output
    assert "left out 6 records served before the last `windows bootstrap --rewind`" in done.output
    asked = command("check", "--served-file", str(path), "--since", began, exit_code=1)
    assert "left out" not in asked.output
    assert json.loads(command("check", "--served-file", str(path), "--json").output)["left_out"] == 6


def test_a_changed_definition_stops_the_stream_until_it_is_bootstrapped(project):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    events = some_events(40, seed=9)
    produce(project.kafka, project.topic, [message(e) for e in events])
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 40)
    before = values(project)
    change_sql(project, SQL.replace("INTERVAL '7' DAYS", "INTERVAL '12' HOURS"))
    with pytest.raises(DefinitionError, match="predictflow windows bootstrap customer_behavior"), project.syncing():
        pass
    at = clock_of(project)
    (done,) = project.bootstrap(at)
    assert done.starts == {0: 40}
    assert before != values(project) == project.history(CUSTOMERS, at)
    more = some_events(20, seed=10, first=2000)
    produce(project.kafka, project.topic, [message(e) for e in more])
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 20)
    assert values(project) == project.history(CUSTOMERS, clock_of(project))
    assert project.check(project.served(CUSTOMERS)).different == 0


def change_sql(project, sql: str) -> None:
    from feast import Entity, ValueType

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = definition_of(project.view).source
    view = windowed_feature_view(
        name="customer_behavior",
        entity=customer,
        source=source,
        path="customer_events",
        sql=sql,
        history_sql="SELECT * FROM events",
        ttl=60 * DAY,
    )
    project.store.apply([view])
    project.store.refresh_registry()


def test_an_ordinary_view_takes_its_rows_from_a_topic(project):
    """In the same process, from the same messages: newest wins, bad rows become dead letters."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int32, String

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = FileSource(
        name="latest_source", path="latest", timestamp_field="event_timestamp", created_timestamp_column="created"
    )
    schema = [
        Field(name="event_type", dtype=String),
        Field(name="quantity", dtype=Int32),
        Field(name="amount_cents", dtype=Float64),
    ]
    view = FeatureView(
        name="latest",
        entities=[customer],
        schema=schema,
        source=source,
        ttl=60 * DAY,
        tags={"predictflow.topic": project.topic},
    )
    project.store.apply([view])
    key, big = message(event(3, "C1", T0 + 3 * HOUR, quantity=2**40))
    events = [
        event(1, "C1", T0 + HOUR, kind="newer"),
        event(2, "C1", T0, T0 + HOUR, kind="older"),
        event(4, "C2", T0 + HOUR),
    ]
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [*(message(e) for e in events), (key, big)])
        wait_until(lambda: handled(consumer) == 8)
    read = project.store.get_online_features(
        ["latest:event_type", "latest:quantity"], [{"customer_id": c} for c in ("C1", "C2", "C3")]
    ).to_dict()
    assert read["event_type"] == ["newer", "usage", None]
    assert read["quantity"] == [1, 1, None]
    letters = read_dead_letters(client_config(project.kafka), project.topic)
    assert [(x.view, x.offset) for x in letters] == [("latest", 3)]
    assert values(project, ["C1"])[0]["events_7d"] == 3


def test_closed_windows_move_on_while_a_partition_is_silent(project):
    """Under the wall clock, by rows of the log that stand beside the last event."""
    from feast import Entity, ValueType

    from feature_store.windows.declare import event_source, windowed_feature_view

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = event_source(
        topic=f"{project.topic}-2",
        columns={"quantity": "int64"},
        idle_timeout=timedelta(milliseconds=300),
        retention=HOUR,
    )
    sql = """SELECT customer_id, COUNT(*) AS closed FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' SECOND))
             GROUP BY customer_id, window_start, window_end EMIT ON WINDOW CLOSE"""
    view = windowed_feature_view(name="closing", entity=customer, source=source, sql=sql, ttl=DAY)
    project.store.apply([view])
    log = EventLog(project.offline / "closing" / "stream", f"{project.topic}-2")
    options = SyncOptions(project.kafka, str(project.offline), "wall", topic=f"{project.topic}-2")
    consumer = Sync(project.store, options)
    with ThreadPoolExecutor(1) as pool:
        done = pool.submit(consumer.run)
        try:
            wait_until(consumer.assigned.is_set)
            first = datetime.now(UTC)
            produce(
                project.kafka, f"{project.topic}-2", [message(event(1, "C1", first)), message(event(2, "C1", first))]
            )
            wait_until(lambda: handled(consumer) == 2)
            wait_until(lambda: len(log.idle(0)) >= 2)
            produce(project.kafka, f"{project.topic}-2", [message(event(3, "C1", datetime.now(UTC)))])
            wait_until(lambda: handled(consumer) == 3)
        finally:
            consumer.stop()
            done.result()
    idle = log.idle(0)
    assert {o for o, _ in idle} <= {1, 2}
    rows = log.read()
    events = rows.filter(pa.compute.is_null(rows["_dropped"]))
    assert events["_offset"].to_pylist() == [0, 1, 2]
    marks = [None if t is None else to_micros(t) for t in events["_watermark"].to_pylist()]
    assert marks[:2] == [None, to_micros(first)]
    assert marks[2] == max(w for o, w in idle if o == 1)
    store = WindowStore(project.store, project.store.get_feature_view("closing"))
    known, _ = parse_watermarks(store._redis.hgetall(store._marks_key))
    assert known[0] >= marks[2]


def test_an_entity_in_two_partitions_is_told(project, caplog):
    ensure_topic(client_config(project.kafka), project.topic, 2)
    with project.syncing() as consumer:
        in_partitions(project, *((0, message(event(n, f"C{n}", T0))) for n in range(3)))
        wait_until(lambda: handled(consumer) == 3)
        assert "in partitions" not in caplog.text
        in_partitions(project, *((1, message(event(10 + n, f"C{n}", T0 + HOUR))) for n in range(2)))
        wait_until(lambda: handled(consumer) == 5)
        in_partitions(project, (1, message(event(20, "C0", T0 + 2 * HOUR))), (1, message(event(21, "C7", T0))))
        wait_until(lambda: handled(consumer) == 7)
    assert caplog.text.count("are in partitions [0, 1]") == 1
    assert consumer.metrics.moved.labels("customer_behavior")._value.get() == 2
    assert [v["events_7d"] for v in values(project)][:3] == [3, 2, 1]
