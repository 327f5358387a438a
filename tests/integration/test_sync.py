"""The consumer on a real broker and Redis: what is served equals history, whatever goes wrong in between."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner, Result
from stream_support import (
    DAY,
    EVENT_SCHEMA,
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

from feature_store import stream_view
from feature_store.clock import from_micros, to_micros
from feature_store.dead_letters import read_dead_letters
from feature_store.errors import DataError, DefinitionError, NotFoundError, PredictFlowError, UnavailableError
from feature_store.event_decode import Raw, RawBatch
from feature_store.event_log import EventLog
from feature_store.redis_connection import connect
from feature_store.replay_clock import ReplayClock
from feature_store.stream_view import StreamView
from feature_store.sync import Sync, SyncOptions
from feature_store.topic import client_config, commit_group, end_offsets, ensure_topic, partitions_of
from feature_store.window_store import StateLostError, WindowStore
from feature_store.window_write import parse_watermarks
from feature_store.windows.declare import windowed_feature_view
from feature_store.windows.definition import definition_of
from feature_store.windows.state import States
from predictflow.cli import cli

pytestmark = pytest.mark.kafka
HOUR = timedelta(hours=1)
CUSTOMERS = [f"C{i}" for i in range(6)]


@pytest.fixture
def project(tmp_path, postgres_url, redis_url, kafka_bootstrap, topic_prefix, monkeypatch):
    return make_project(
        tmp_path, postgres_url, redis_url, kafka_bootstrap, f"{topic_prefix}customer-events", monkeypatch
    )


def outcomes(consumer: Sync) -> dict[str, int]:
    found = Counter()
    for family in consumer.metrics.events.collect():
        for s in family.samples:
            if s.name.endswith("_total"):
                found[s.labels["outcome"]] += int(s.value)
    return dict(found)


def handled(consumer: Sync) -> int:
    return sum(outcomes(consumer).values())


def log_of(project) -> EventLog:
    return EventLog(project.offline / "customer_events" / "stream", project.topic)


def clock_of(project):
    return from_micros(WindowStore(project.store, project.view).clock.now_us())


def values(project, customers=CUSTOMERS) -> list[dict]:
    return [{f: r["features"][f]["value"] for f in FEATURES} for r in project.served(customers)]


def command(*arguments: str, exit_code: int = 0) -> Result:
    done = CliRunner().invoke(cli, list(arguments))
    assert done.exit_code == exit_code, done.output
    return done


def some_events(n: int, seed: int, first: int = 1000) -> list[dict]:
    """Events of T0 and after, some late, some repeated, in order of `created`."""
    rng = random.Random(seed)
    events, at = [], T0
    for i in range(n):
        at += rng.choice([0, 0, 1, 3]) * HOUR
        happened = at - rng.choice([timedelta(0), timedelta(0), HOUR, 8 * DAY])
        e = event(first + i, rng.choice(CUSTOMERS), happened, at, rng.choice(["ticket", "usage"]), rng.randint(-3, 9))
        events.append(events[-1] if i and rng.random() < 0.05 else e)
    return events


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


def test_bad_messages_become_dead_letters_and_never_stop_the_stream(project):
    key, good = message(event(1, "C1", T0))
    row = json.loads(good)
    bad = [
        (key, b"{not json"),
        (key, None),
        (key, b"\xff\xfe\x00"),
        (key, b"[1, 2]"),
        (b"C2", good),
        (None, good),
        (key, json.dumps({k: v for k, v in row.items() if k != "quantity"}).encode()),
        (key, json.dumps({**row, "quantity": True}).encode()),
        (key, json.dumps({**row, "quantity": 2**63}).encode()),
        (key, json.dumps({**row, "customer_id": 17}).encode()),
        (key, json.dumps({**row, "event_timestamp": "yesterday"}).encode()),
        (key, json.dumps({**row, "event_timestamp": "2024-03-01T00:00:05.000001Z"}).encode()),  # 5 s ahead are allowed
        (key, b"x" * 900_000),
    ]
    pending = json.dumps({**row, "event_id": "p", "event_timestamp": "2024-03-01T00:00:05Z"}).encode()
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [*bad, (key, good), (key, pending)])
        wait_until(lambda: handled(consumer) >= len(bad) + 2)
    assert outcomes(consumer) == {
        "applied": 2,
        "duplicate": 0,
        "replayed": 0,
        "dropped": 0,
        "dead_lettered": len(bad),
        "erased": 0,
    }
    letters = list(read_dead_letters(client_config(project.kafka), project.topic))
    assert [(x.key, x.value) for x in letters] == bad
    assert [x.offset for x in letters] == list(range(len(bad)))
    assert {x.topic for x in letters} == {project.topic}
    assert "quantity" in letters[6].reason
    assert "ahead of the clock" in letters[11].reason
    assert values(project, ["C1"])[0]["events_7d"] == 1  # the pending one does not count yet
    assert project.served(["C1"], T0 + timedelta(seconds=5))[0]["features"]["events_7d"]["value"] == 2
    shown = command("dlq", "list")
    assert f"{len(bad)} dead letter(s)" in shown.output
    (first, *_) = command("dlq", "list", "--json").output.splitlines()
    assert json.loads(first)["value"] == "{not json"


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


def test_a_failure_after_any_step_neither_loses_nor_double_counts(project, monkeypatch):
    """The steps of a batch fail in turn, after they have taken effect; then a new consumer gets the batch again."""
    events = some_events(120, seed=3)
    view = StreamView(project.store, project.view, str(project.offline), "id", "replay")
    view.start_partition(0, 0)
    rng = random.Random(5)
    at = attempts = 0
    while at < len(events):
        size = rng.randint(1, 15)
        batch = RawBatch.of([Raw(0, i, *message(e)) for i, e in enumerate(events[at : at + size], at)])
        broken = rng.choice(["log", "half the states", "states", "clock", None])
        attempts += broken is not None
        with monkeypatch.context() as m:
            break_after(m, broken)
            try:
                result = view.apply(batch, view.online.clock.now_us(), to_micros(T0 + 100 * DAY))
                view.online.clock.advance(result.clock_us)
                view.committed(0, at + len(batch))
                at += len(batch)
            except ConnectionAbortedError:
                view = StreamView(project.store, project.view, str(project.offline), "id", "replay")
                view.start_partition(0, at)
    assert attempts > 10
    log = log_of(project).read()
    assert log["_offset"].to_pylist() == list(range(len(events)))
    times = [to_micros(t) for t in log["_visible_at"].to_pylist()]
    assert times == sorted(set(times))
    counted = {e["event_id"]: e for e in events}.values()
    now = clock_of(project)
    for customer, got in zip(CUSTOMERS, values(project)):
        recent = [e for e in counted if e["customer_id"] == customer and e["event_timestamp"] >= now - 7 * DAY]
        assert got["events_7d"] == len(recent)
        assert got["quantity_7d"] == (sum(e["quantity"] for e in recent) if recent else None)
    assert values(project) == project.history(CUSTOMERS, now)


def break_after(monkeypatch, step: str | None) -> None:
    def failing(function, before=lambda *a: a):
        def call(*args):
            function(*before(*args))
            raise ConnectionAbortedError("as if killed here")

        return call

    if step == "log":
        monkeypatch.setattr(EventLog, "append", failing(EventLog.append))
    elif step == "states":
        monkeypatch.setattr(WindowStore, "write", failing(WindowStore.write))
    elif step == "half the states":

        def every_other(store, keys, states, watermarks=None):
            return store, keys[::2], States.decode(store.definition, states.encode()[::2]), watermarks

        half = failing(WindowStore.write, every_other)
        monkeypatch.setattr(WindowStore, "write", half)
    elif step == "clock":
        monkeypatch.setattr(ReplayClock, "advance", failing(ReplayClock.advance))


def test_killed_consumers_lose_nothing_and_count_nothing_twice(project):
    write_history(project.offline, [event(i, CUSTOMERS[i % 6], T0 - i * HOUR) for i in range(60)])
    project.bootstrap()
    events = some_events(400, seed=11)
    produce(project.kafka, project.topic, [message(e) for e in events[:200]])
    consumer = project.start("sync", "--max-batch", "3")
    wait_until(lambda: len(log_of(project).logged(0, 0)) >= 20)
    consumer.send_signal(signal.SIGKILL)
    consumer.communicate()
    assert len(log_of(project).logged(0, 0)) < 200  # in the middle of the stream
    produce(project.kafka, project.topic, [message(e) for e in events[200:]])
    consumer = project.start("sync", "--max-batch", "50")
    wait_until(lambda: len(log_of(project).logged(0, 0)) == len(events))
    consumer.send_signal(signal.SIGTERM)
    _, errors = consumer.communicate(timeout=240)
    assert consumer.returncode == 0, errors

    log = log_of(project).read()
    repeated = len(events) - len({e["event_id"] for e in events})
    assert log["_offset"].to_pylist() == list(range(len(events)))
    assert log["_dropped"].to_pylist().count("duplicate") == repeated > 0
    assert values(project) == project.history(CUSTOMERS, clock_of(project))
    records = project.served(CUSTOMERS) + project.served(CUSTOMERS, clock_of(project) + 3 * DAY)
    assert project.check(records).different == 0
    committed = client_config(project.kafka)
    from confluent_kafka import Consumer, TopicPartition

    group = Consumer({**committed, "group.id": project.group})
    assert group.committed([TopicPartition(project.topic, 0)], timeout=10)[0].offset == len(events)
    group.close()


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


def test_a_server_that_is_away_is_waited_for(project, monkeypatch):
    """The log's disk is full for the first tries: nothing of the batch may be readable before it is logged."""
    seen = []
    append = EventLog.append

    def full(log, rows):
        seen.append(values(project, ["C1"])[0]["events_7d"])
        if len(seen) < 3:
            raise OSError(28, "No space left on device")
        append(log, rows)

    monkeypatch.setattr(EventLog, "append", full)
    WindowStore(project.store, project.view).clock.set(to_micros(T0))
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(1, "C1", T0))])
        wait_until(lambda: handled(consumer) == 1)
    assert seen == [None, None, None]
    assert values(project, ["C1"])[0]["events_7d"] == 1


def test_bootstrap_refuses_to_forget_the_stream_unless_told_to_rewind(project):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    events = some_events(40, seed=4)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events])
        wait_until(lambda: handled(consumer) == len(events))
    after = values(project)
    with pytest.raises(DataError, match="known after known_by"):
        project.bootstrap()
    later = clock_of(project)
    (again,) = project.bootstrap(later)  # history and stream together give the state that the stream had
    assert again.starts == {0: len(events)}
    assert values(project) == after

    plan = ["windows", "bootstrap", "--known-by", T0.isoformat(), "--rewind"]
    assert "--dry-run" in command(*plan, exit_code=2).output
    shown = command(*plan, "--dry-run").output
    assert f"{len(events)} log rows in" in shown
    assert f"(offsets of partition 0: 0 to {len(events) - 1})" in shown
    assert values(project) == after
    assert log_of(project).read().num_rows == len(events)

    (rewound,) = project.bootstrap(rewind=True)
    assert (rewound.entities, rewound.forgotten, rewound.starts) == (3, len(events), {0: 0})
    assert clock_of(project) == T0
    assert log_of(project).read() is None
    assert [v["events_7d"] for v in values(project)] == [1, 1, 1, None, None, None]
    with project.syncing() as consumer:  # the topic still holds them
        wait_until(lambda: handled(consumer) == len(events))
    assert values(project) == after
    assert project.check(project.served(CUSTOMERS)).different == 0


def test_a_running_group_is_left_alone_before_anything_changes(project):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(100, "C1", T0 + HOUR))])
        wait_until(lambda: handled(consumer) == 1)
        after = values(project)
        for options in ({"rewind": True}, {"known_by": T0 + DAY}):
            with pytest.raises(UnavailableError, match="stop `predictflow sync`"):
                project.bootstrap(**options)
        assert values(project) == after
        assert log_of(project).read().num_rows == 1
        assert clock_of(project) == T0 + HOUR


def test_bootstrap_starts_at_the_first_message_that_history_may_lack(project):
    """History and topic overlap, as they do when the producer ran before the first bootstrap."""
    produced = [
        event(0, "C0", T0 - 50 * DAY),
        event(1, "C1", T0 - 2 * DAY),
        event(2, "C2", T0 - 2 * HOUR),
        event(3, "C3", T0 - 3 * DAY, T0 - HOUR),  # the newest of history
        event(4, "C1", T0 - 3 * HOUR, T0 - HOUR / 2),  # late: the first that history lacks, though before known_by
        event(5, "C0", T0 - 40 * DAY),  # of history, but behind newer ones: recognised by its id, or too old to count
        event(6, "C2", T0 - 2 * DAY),
        event(7, "C2", T0 + HOUR),
    ]
    write_history(project.offline, [e for e in produced if e["created"] <= T0 - HOUR])
    bad = (b"C1", b"{not json")
    messages = [message(e) for e in produced]
    produce(project.kafka, project.topic, [messages[0], bad, *messages[1:4], bad, *messages[4:]])
    (done,) = project.bootstrap(start="known_by")
    assert done.starts == {0: 5}
    records = project.served(CUSTOMERS)
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 5)
    assert outcomes(consumer)["dead_lettered"] == 1
    assert [v["events_7d"] for v in values(project)] == [0, 2, 3, 1, None, None]
    for days in (0, 5, 8, 31):
        at = clock_of(project) + days * DAY
        served = project.served(CUSTOMERS, at)
        records += served
        assert [{f: r["features"][f]["value"] for f in FEATURES} for r in served] == project.history(CUSTOMERS, at)
    result = project.check(records)
    assert (result.checked, result.different) == (len(records) * len(FEATURES), 0), result.examples
    (again,) = project.bootstrap(clock_of(project))
    assert again.starts == {0: 10}
    assert values(project) == project.history(CUSTOMERS, clock_of(project))


def test_bootstrap_at_the_end_skips_what_the_topic_holds(project):
    write_history(project.offline, [event(0, "C0", T0 - HOUR)])
    produce(project.kafka, project.topic, [message(event(n, "C1", T0 + n * HOUR)) for n in range(1, 4)])
    assert project.bootstrap(start="end")[0].starts == {0: 3}
    assert project.bootstrap()[0].starts == {0: 0}


def test_bootstrap_before_the_end_of_history_is_refused(project):
    """Its later events would be in history and not in the states."""
    write_history(project.offline, [event(i, "C1", T0 - i * HOUR) for i in range(3)])
    with pytest.raises(DataError, match="history holds events known after known_by"):
        project.bootstrap(T0 - HOUR)


def test_bootstrap_without_history_says_how_to_get_it(project):
    with pytest.raises(DataError, match="predictflow backfill"):
        project.bootstrap()


def test_offsets_that_the_topic_no_longer_holds_stop_the_stream(project):
    config = client_config(project.kafka)
    ensure_topic(config, project.topic)
    assert end_offsets(config, project.topic) == {0: 0}
    commit_group(config, project.group, project.topic, {0: 1000})
    with pytest.raises(DataError, match="no longer holds"):
        Sync(project.store, SyncOptions(project.kafka, str(project.offline), "replay")).run()


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


def make_again(project) -> None:
    from confluent_kafka.admin import AdminClient

    admin = AdminClient(client_config(project.kafka))
    admin.delete_topics([project.topic])[project.topic].result(30)
    wait_until(lambda: not partitions_of(client_config(project.kafka), project.topic))


def test_a_topic_that_was_made_again_stops_the_stream_until_it_is_started_over(project):
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(1, "C1", T0))])
        wait_until(lambda: handled(consumer) == 1)
    make_again(project)
    with pytest.raises(DataError, match="deleted and made again"), project.syncing():
        pass
    write_history(project.offline, [event(1, "C1", T0)])  # what the old topic held comes by backfill
    with pytest.raises(DataError, match="deleted and made again"):
        project.bootstrap()
    shown = command("windows", "bootstrap", "--known-by", T0.isoformat(), "--rewind", "--dry-run").output
    assert "1 log rows in 1 files" in shown
    assert "1 of them are no longer in the topic" in shown
    project.bootstrap(rewind=True)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(2, "C1", T0 + HOUR))])
        wait_until(lambda: handled(consumer) == 1)
    assert values(project, ["C1"])[0]["events_7d"] == 2


def test_a_topic_made_again_is_noticed_also_where_nothing_was_logged(project):
    """The states came from history, and the group's offsets are of the old topic."""
    write_history(project.offline, [event(1, "C1", T0)])
    project.bootstrap()
    make_again(project)
    with pytest.raises(DataError, match="deleted and made again"), project.syncing():
        pass


def test_a_topic_that_got_partitions_stops_the_stream_until_states_are_rebuilt(project):
    """Keys move to other partitions: two consumers could write one entity's state at once."""
    from confluent_kafka.admin import AdminClient, NewPartitions

    write_history(project.offline, [event(i, c, T0 - HOUR) for i, c in enumerate(CUSTOMERS)])
    project.bootstrap()
    events = some_events(30, seed=6)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events[:15]])
        wait_until(lambda: handled(consumer) == 15)
    admin = AdminClient(client_config(project.kafka))
    admin.create_partitions([NewPartitions(project.topic, 3)])[project.topic].result(30)
    wait_until(lambda: len(partitions_of(client_config(project.kafka), project.topic)) == 3)
    produce(project.kafka, project.topic, [message(e) for e in events[15:]])
    with pytest.raises(DataError, match="another number of partitions") as e, project.syncing():
        pass
    assert "predictflow windows bootstrap customer_behavior" in e.value.message
    assert log_of(project).read().num_rows == 15

    project.bootstrap(clock_of(project))
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 15)
    assert values(project) == project.history(CUSTOMERS, clock_of(project))
    assert project.check(project.served(CUSTOMERS)).different == 0
    assert sum(v["events_7d"] for v in values(project)) > 0


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
    assert stream_view.log_schema(consumer.views[0].definition).names == log_of(project).read().schema.names


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


def test_a_value_that_cannot_be_computed_is_its_message_s_fault_alone(project, monkeypatch):
    """An overflow within a row's expression: found by halving the batch."""
    from feature_store.event_numbers import EventNumbers

    sql = SQL.replace("SUM(quantity) OVER w7", "SUM(quantity * 9000000000000000) OVER w7")
    definition = replace(definition_of(project.view), sql=sql)
    numbers = EventNumbers(definition)
    rows = [event(i, "C1", T0) | {"quantity": 5000 if i in (3, 8) else 1} for i in range(10)]
    found, refused = numbers.of(pa.Table.from_pylist(rows, EVENT_SCHEMA))
    assert [i for i, _ in refused] == [3, 8]
    assert "cannot be computed" in refused[0][1]
    assert found["_v0"].tolist() == [0 if i in (3, 8) else 9_000_000_000_000_000 for i in range(10)]


def test_a_dead_letter_is_sent_again_once(project):
    key, good = message(event(1, "C1", T0))
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [(key, b"{not json"), (b"C2", good), (key, good)])
        wait_until(lambda: handled(consumer) == 3)
        assert "would be sent" in command("dlq", "replay", "--dry-run").output
        assert handled(consumer) == 3
        command("dlq", "replay", exit_code=2)
        assert "1 message(s) sent again" in command("dlq", "replay", "--yes", "--key", "C2").output
        wait_until(lambda: handled(consumer) == 4)  # refused again, and so a new letter
        assert "0 message(s) sent again, 1 were before" in command("dlq", "replay", "--yes", "--offset", "1").output
        assert (
            "2 message(s) sent again"
            in command("dlq", "replay", "--yes", "--again", "--offset", "0", "--offset", "1").output
        )
        wait_until(lambda: handled(consumer) == 6)
        # What was refused again is the same message: without a filter nothing goes a second time.
        assert "0 message(s) sent again, 2 were before" in command("dlq", "replay", "--yes").output
        assert handled(consumer) == 6
    letters = read_dead_letters(client_config(project.kafka), project.topic)
    assert len(letters) == 5
    assert len({x.identity for x in letters}) == 2
    assert [(x.offset, x.replayed) for x in letters[:2]] == [(0, True), (1, True)]
    assert all(x.value in (b"{not json", good) for x in letters)
    assert "(replayed)" in command("dlq", "list", "--reason", "not JSON").output
    assert "\\x00" in command("dlq", "list").output or "{not json" in command("dlq", "list").output
    assert "0 dead letter(s)" in command("dlq", "list", "--view", "nonsense").output


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


def test_lost_states_stop_the_stream_and_come_back_from_the_log(project):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    events = some_events(60, seed=12)
    redis = connect(project.environ["REDIS_URL"])
    before = []

    def loses_its_states() -> None:
        with project.syncing() as consumer:
            produce(project.kafka, project.topic, [message(e) for e in events[:30]])
            wait_until(lambda: handled(consumer) == 30)
            before.extend(values(project))
            redis.flushdb()
            produce(project.kafka, project.topic, [message(e) for e in events[30:]])
            wait_until(consumer.finished.is_set, 25)

    with pytest.raises((StateLostError, DataError), match="--from-log"):
        loses_its_states()
    with pytest.raises((StateLostError, DataError), match="--from-log"), project.syncing():
        pass
    again = project.start("sync", "--from-log")
    wait_until(lambda: again.poll() is not None or log_of(project).read().num_rows == 60, seconds=180)
    again.send_signal(signal.SIGTERM)
    _, errors = again.communicate(timeout=240)
    assert again.returncode == 0, errors
    assert before != values(project) == project.history(CUSTOMERS, clock_of(project))
    assert project.check(project.served(CUSTOMERS)).different == 0


def test_writes_that_a_failing_over_redis_lost_are_read_again(project):
    """A replica that lags takes over: older states, and an older note of how far they go."""
    redis = connect(project.environ["REDIS_URL"])
    events = some_events(90, seed=13)
    with project.syncing(commit_delay=3600, max_batch=10) as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events[:30]])
        wait_until(lambda: handled(consumer) == 30)
        replica = {k: redis.dump(k) for k in redis.scan_iter()}
        produce(project.kafka, project.topic, [message(e) for e in events[30:60]])
        wait_until(lambda: handled(consumer) == 60)
        with redis.pipeline(transaction=True) as switch:
            switch.flushdb()
            for k, data in replica.items():
                switch.restore(k, 0, data)
            switch.execute()
        produce(project.kafka, project.topic, [message(e) for e in events[60:]])
        wait_until(
            lambda: (
                log_of(project).read().num_rows == 90
                and values(project) == project.history(CUSTOMERS, clock_of(project))
            )
        )
    assert outcomes(consumer)["replayed"] >= 30
    log = log_of(project).read()
    assert log["_offset"].to_pylist() == list(range(90))
    assert project.check(project.served(CUSTOMERS)).different == 0


def test_what_redis_lost_while_no_consumer_ran_stops_the_next_one(project):
    """Also where no message comes: what is served would lack what the snapshot lacks."""
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    redis = connect(project.environ["REDIS_URL"])
    events = some_events(60, seed=14)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events[:30]])
        wait_until(lambda: handled(consumer) == 30)
    snapshot = {k: redis.dump(k) for k in redis.scan_iter()}
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events[30:]])
        wait_until(lambda: handled(consumer) == 30)
    for k, data in snapshot.items():
        redis.restore(k, 0, data, replace=True)
    with pytest.raises(DataError, match="--from-log"), project.syncing() as consumer:
        wait_until(consumer.finished.is_set, 25)
    produce(project.kafka, project.topic, [message(event(9, "C1", T0 + 90 * DAY))])
    again = project.start("sync", "--from-log")
    wait_until(lambda: again.poll() is not None or log_of(project).read().num_rows == 61, seconds=180)
    again.send_signal(signal.SIGTERM)
    _, errors = again.communicate(timeout=60)
    assert again.returncode == 0, errors
    assert values(project) == project.history(CUSTOMERS, clock_of(project))


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


def in_partitions(project, *messages: tuple[int, tuple[bytes, bytes]]) -> None:
    """Produces each message to a partition of the test's choice, as a producer with another partitioner would."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": project.kafka, "linger.ms": 0})
    for partition, (key, value) in messages:
        producer.produce(project.topic, value, key, partition)
    assert producer.flush(30) == 0


def test_a_dead_letter_is_sent_again_to_the_partition_it_came_in(project):
    """Whatever our client would choose for its key: else its entity's events would stand in two partitions."""
    ensure_topic(client_config(project.kafka), project.topic, 3)
    with project.syncing() as consumer:
        in_partitions(project, *((p, (b"C1", b"{not json")) for p in range(3)))
        wait_until(lambda: handled(consumer) == 3)
        assert "3 message(s) sent again" in command("dlq", "replay", "--yes").output
        wait_until(lambda: handled(consumer) == 6)
    assert end_offsets(client_config(project.kafka), project.topic) == {0: 3, 1: 3, 2: 3}  # a transaction's mark counts
    letters = read_dead_letters(client_config(project.kafka), project.topic)
    assert Counter(x.partition for x in letters) == {0: 2, 1: 2, 2: 2}


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


def test_a_topic_that_is_made_again_while_it_is_read_stops_the_stream(project):
    """Also where its offsets reach beyond what was read, so that reading on looks like more of the same."""
    write_history(project.offline, [event(0, "C1", T0 - HOUR)])
    project.bootstrap()

    def read_both() -> None:
        with project.syncing() as consumer:
            produce(project.kafka, project.topic, [message(event(n, "C1", T0 + HOUR)) for n in range(1, 4)])
            wait_until(lambda: handled(consumer) == 3)
            make_again(project)
            ensure_topic(client_config(project.kafka), project.topic)
            produce(project.kafka, project.topic, [message(event(10 + n, "C1", T0 + 2 * HOUR)) for n in range(20)])
            wait_until(consumer.finished.is_set)

    with pytest.raises(DataError, match="deleted and made again"):
        read_both()
    project.bootstrap(rewind=True)  # with what was read of the new topic before that was noticed
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 20)
    assert log_of(project).read()["_offset"].to_pylist() == list(range(20))
    assert values(project, ["C1"])[0]["events_7d"] == 21


def test_lag_and_delay_are_told_on_a_silent_topic_and_while_the_disk_is_full(project, monkeypatch):
    monkeypatch.setitem(project.environ, "PREDICTFLOW_CLOCK", "wall")
    full, append = [], EventLog.append

    def append_unless_full(log, rows):
        if full:
            raise OSError(28, "No space left on device")
        append(log, rows)

    monkeypatch.setattr(EventLog, "append", append_unless_full)

    def gauge(name: str, **labels: str) -> float | None:
        return consumer.metrics.registry.get_sample_value(f"predictflow_sync_{name}", {"partition": "0"} | labels)

    def delay() -> float:
        return gauge("watermark_delay_seconds", view="customer_behavior") or 0.0

    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(1, "C1", datetime.now(UTC)))])
        wait_until(lambda: handled(consumer) == 1)
        wait_until(lambda: gauge("lag") == 0)  # counted a moment after the outcome
        silent = delay()
        wait_until(lambda: delay() > silent + 2)
        full.append(True)
        for n in range(2, 7):
            produce(project.kafka, project.topic, [message(event(n, "C1", datetime.now(UTC)))])
            wait_until(lambda left=n - 1: gauge("lag") == left)
        held = delay()
        wait_until(lambda: delay() > held + 2)
        full.clear()
        wait_until(lambda: handled(consumer) == 6)
        wait_until(lambda: gauge("lag") == 0 and delay() < held)
