"""Whatever fails under a consumer, Redis, disk, process or what it wrote: nothing is lost and nothing counted twice."""

from __future__ import annotations

import random
import signal
from datetime import UTC, datetime

import pytest
from stream_support import (
    DAY,
    T0,
    event,
    message,
    produce,
    wait_until,
    write_history,
)
from sync_support import (
    CUSTOMERS,
    HOUR,
    clock_of,
    handled,
    log_of,
    outcomes,
    some_events,
    values,
)

from feature_store.clock import to_micros
from feature_store.errors import DataError
from feature_store.event_decode import Raw, RawBatch
from feature_store.event_log import EventLog
from feature_store.redis_connection import connect
from feature_store.replay_clock import ReplayClock
from feature_store.stream_view import StreamView
from feature_store.topic import client_config
from feature_store.window_store import StateLostError, WindowStore
from feature_store.windows.state import States

pytestmark = pytest.mark.kafka


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
