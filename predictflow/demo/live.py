"""The live part of the demo: events go through Kafka, features and predictions are read back over REST while they change."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from feature_store.errors import DataError, UnavailableError

MODEL = "churn-predictor"
VIEW = "customer_behavior"
AHEAD = (timedelta(days=8), timedelta(days=31), timedelta(days=45))
"""How long after the last event values are read again: after the 7 and 30 day windows and the account's ttl have passed."""

POISON = [("poison", b"{not json"), ("poison", b'{"event_id": "x"}')]
"""Two messages that no consumer can apply: they must end in the dead-letter topic and stop nothing."""


@dataclass
class Findings:
    """What the live part measured and saw."""

    poison: int = 0
    reads_ahead: int = 0
    freshness_ms: list[float] = field(default_factory=list)
    online_ms: list[float] = field(default_factory=list)
    predict_ms: list[float] = field(default_factory=list)
    story: list[dict[str, Any]] = field(default_factory=list)
    served: list[str] = field(default_factory=list)
    """Request ids of the reads whose values are checked (the same reads in every run)."""
    sent: list[Mapping[str, Any]] = field(default_factory=list)
    dead_lettered: int = 0


class Rest:
    """A keep-alive connection to the product's REST server."""

    def __init__(self, url: str, run: str) -> None:
        import requests

        self.url = url
        self.run = run
        """Prefix of this run's request ids, by which its reads are found in the served log."""
        self._session = requests.Session()
        self._session.trust_env = False  # a proxy setting of the machine must not catch loopback requests

    def post(self, path: str, body: Mapping[str, Any], request_id: str) -> dict[str, Any]:
        import requests

        try:
            answer = self._session.post(
                f"{self.url}{path}", json=body, headers={"X-Request-Id": f"{self.run}-{request_id}"}, timeout=30
            )
        except requests.RequestException as e:
            raise UnavailableError(
                "the REST server does not answer", value=self.url, next_step="predictflow status"
            ) from e
        if answer.status_code != 200:
            raise DataError(f"{path} answered {answer.status_code}", value=answer.text[:300])
        result: dict[str, Any] = answer.json()
        return result

    def predict(self, customers: Sequence[str], request_id: str, at: datetime | None = None) -> dict[str, Any]:
        return self.post(f"/api/v1/predict/{MODEL}", _body(customers, at), request_id)

    def features(self, customers: Sequence[str], request_id: str, at: datetime | None = None) -> dict[str, Any]:
        body = {"feature_service": "churn_v1", **_body(customers, at)}
        return self.post("/api/v1/features/online", body, request_id)


class EventProducer:
    """Produces events in order and knows where each landed."""

    def __init__(self, bootstrap: str, topic: str) -> None:
        from confluent_kafka import Producer

        self.topic = topic
        self._producer = Producer({"bootstrap.servers": bootstrap, "linger.ms": 0, "enable.idempotence": True})
        self.ends: dict[int, int] = {}

    def send(self, key: str, value: bytes) -> tuple[int, int]:
        """Produce one message and wait for its (partition, offset)."""
        self.send_all([(key, value)])
        return self._last

    def send_all(self, messages: Sequence[tuple[str, bytes]]) -> None:
        """Produce many messages and wait until the broker has them all."""
        failures: list[str] = []

        def landed(error: Any, message: Any) -> None:
            if error is not None:
                failures.append(str(error))
                return
            self._last = (message.partition(), message.offset())
            self.ends[message.partition()] = max(message.offset() + 1, self.ends.get(message.partition(), 0))

        for key, value in messages:
            self._producer.produce(self.topic, key=key.encode(), value=value, on_delivery=landed)
            self._producer.poll(0)
        left = self._producer.flush(30)
        if failures or left:
            raise UnavailableError(
                f"Kafka did not take {len(failures) or left} of {len(messages)} events",
                value=failures[0] if failures else "timed out",
                next_step="predictflow status",
            )


class Applied:
    """Waits until the sync consumer has committed everything up to given offsets."""

    def __init__(self, bootstrap: str, topic: str, group: str) -> None:
        from confluent_kafka import Consumer, TopicPartition

        self._partition = lambda p: TopicPartition(topic, p)
        self._consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False})

    def wait(self, ends: Mapping[int, int], timeout: float = 60.0) -> None:
        deadline = time.monotonic() + timeout
        while True:
            committed = self._consumer.committed([self._partition(p) for p in ends], timeout=10)
            if all(c.offset >= ends[c.partition] for c in committed):
                return
            if time.monotonic() > deadline:
                where = ", ".join(f"partition {c.partition}: {c.offset} of {ends[c.partition]}" for c in committed)
                raise UnavailableError(
                    "the sync consumer did not apply the events in time",
                    value=where,
                    next_step="see .predictflow/logs/sync.log",
                )
            time.sleep(0.02)  # a poll of the broker, not a wait for luck

    def close(self) -> None:
        self._consumer.close()


def live_events(raw: Path, cut: datetime, limit: int) -> list[dict[str, Any]]:
    """The first `limit` events known after `cut`, in the order in which they became known."""
    import duckdb

    with duckdb.connect() as con:
        con.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
        found = con.execute(
            "SELECT * FROM read_parquet(?) WHERE created > ? ORDER BY created, event_id LIMIT ?",
            [str(raw / "events.parquet"), cut, limit],
        )
        names = [column[0] for column in found.description or ()]
        return [dict(zip(names, row, strict=True)) for row in found.fetchall()]


def message(event: Mapping[str, Any]) -> tuple[str, bytes]:
    """Key and JSON value of an event, as a producing application would write them."""
    body = {k: iso(v) if isinstance(v, datetime) else v for k, v in event.items()}
    return str(event["customer_id"]), json.dumps(body).encode()


def run_live(
    rest: Rest,
    producer: EventProducer,
    applied: Applied,
    events: Sequence[Mapping[str, Any]],
    *,
    probes: int = 60,
    steps: int = 20,
    watched: int = 30,
    timed: int = 300,
) -> Findings:
    """Stream `events`, reading between them, at moments without events, and after the windows have emptied.

    `probes` events at the end are sent one by one and timed until REST shows them; `watched` customers are read after
    each of `steps` batches; `timed` single reads measure latency.
    """
    found = Findings()
    batches = list(_batches(events[:-probes], steps))
    people = _watched(events, watched)
    hero = people[0]
    found.story.append(_read_story(rest, hero, "story-before", None, live=True))
    producer.send_all(POISON)
    found.poison = len(POISON)
    for i, batch in enumerate(batches):
        producer.send_all([message(e) for e in batch])
        applied.wait(producer.ends)
        found.sent += batch
        now = _read(rest, found, people, f"live-{i}", None)
        upcoming = batches[i + 1][0] if i + 1 < len(batches) else events[-probes]
        # Half-way to the next event, where there is a moment in between: real sources date events to the minute.
        _read(rest, found, people, f"between-{i}", now + max(upcoming["created"] - now, timedelta(0)) / 2)
        found.story.append(_read_story(rest, hero, f"story-{i}", None, live=True))
    for i, event in enumerate(events[-probes:]):
        found.freshness_ms.append(_probe(rest, producer, event, i))
        found.sent.append(event)
    applied.wait(producer.ends)
    _read(rest, found, people, "after", None)
    end = events[-1]["created"]
    for ahead in AHEAD:
        _read(rest, found, people, f"ahead-{ahead.days}", end + ahead)
        found.reads_ahead += 2 * len(people)
    for day in range(1, 46):
        found.story.append(_read_story(rest, hero, f"story-ahead-{day}", end + timedelta(days=day), live=False))
    for i in range(timed):
        who = [people[i % len(people)]]
        found.online_ms.append(_timed(lambda who=who, i=i: rest.features(who, f"timed-{i}")))
        found.predict_ms.append(_timed(lambda who=who, i=i: rest.predict(who, f"timed-predict-{i}")))
    return found


def _read(rest: Rest, found: Findings, people: Sequence[str], name: str, at: datetime | None) -> datetime:
    """One prediction and one feature read of the watched customers, both checked later; returns their time."""
    rest.predict(people, f"{name}-predict", at)
    answer = rest.features(people, f"{name}-features", at)
    found.served += [f"{rest.run}-{name}-predict", f"{rest.run}-{name}-features"]
    return datetime.fromisoformat(answer["t"])


def _read_story(rest: Rest, customer: str, name: str, at: datetime | None, *, live: bool) -> dict[str, Any]:
    answer = rest.predict([customer], name, at)
    row = answer["predictions"][0]
    return {
        "customer": customer,
        "t": answer["t"],
        "values": row["values"],
        "statuses": row["statuses"],
        "probability": row["probability"],
        "live": live,
    }


def _probe(rest: Rest, producer: EventProducer, event: Mapping[str, Any], number: int) -> float:
    """Milliseconds from handing one event to the producer until a REST read includes its offset."""
    key, value = message(event)
    start = time.perf_counter()
    partition, offset = producer.send(key, value)
    while True:
        row = rest.features([key], f"probe-{number}")["rows"][0]
        if (row["offsets"].get(VIEW) or {}).get(str(partition), -1) >= offset:
            return (time.perf_counter() - start) * 1000
        if time.perf_counter() - start > 30:
            raise UnavailableError(
                "an event did not become readable within 30 s", value=key, next_step="see .predictflow/logs/sync.log"
            )


def _timed(call: Any) -> float:
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1000


def _watched(events: Sequence[Mapping[str, Any]], count: int) -> list[str]:
    """The customers with the most live events first, then ever quieter ones; ties by id."""
    seen: dict[str, int] = {}
    for e in events:
        seen[e["customer_id"]] = seen.get(e["customer_id"], 0) + 1
    ranked = sorted(seen, key=lambda c: (-seen[c], c))
    every = max(len(ranked) // count, 1)
    return [ranked[0], *[c for c in ranked[every::every] if c != ranked[0]]][:count]


def _batches(events: Sequence[Mapping[str, Any]], steps: int) -> Iterator[Sequence[Mapping[str, Any]]]:
    size = max(-(-len(events) // steps), 1)
    for i in range(0, len(events), size):
        yield events[i : i + size]


def _body(customers: Sequence[str], at: datetime | None) -> dict[str, Any]:
    body: dict[str, Any] = {"entities": {"customer_id": list(customers)}}
    return body if at is None else {**body, "at": iso(at)}


def iso(t: datetime) -> str:
    """ISO 8601 in UTC with `Z` and microseconds."""
    return t.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
