"""What the tests of the consumer share: a project on a topic of its own, events, and what came of them.

The fixture is known to every integration test through conftest.py.
"""

from __future__ import annotations

import random
from collections import Counter
from datetime import timedelta

import pytest
from click.testing import CliRunner, Result
from stream_support import (
    DAY,
    FEATURES,
    T0,
    event,
    make_project,
)

from feature_store.clock import from_micros
from feature_store.event_log import EventLog
from feature_store.sync import Sync
from feature_store.window_store import WindowStore
from predictflow.cli import cli

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


def in_partitions(project, *messages: tuple[int, tuple[bytes, bytes]]) -> None:
    """Produces each message to a partition of the test's choice, as a producer with another partitioner would."""
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": project.kafka, "linger.ms": 0})
    for partition, (key, value) in messages:
        producer.produce(project.topic, value, key, partition)
    assert producer.flush(30) == 0
