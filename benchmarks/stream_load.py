"""The load beside `benchmarks.stream`'s probes: events at a steady rate until it is ended. One process of its own."""

from __future__ import annotations

import random
import sys
import time
from datetime import UTC, datetime

from benchmarks.stream import event
from feature_store.topic import client_config


def main(bootstrap: str, topic: str, rate: float, entities: int) -> None:
    """Sends `rate` events per second in steps of 10 ms; values are prepared, only their time is new."""
    from confluent_kafka import Producer

    rng = random.Random(3)
    mark = datetime(2000, 1, 1, tzinfo=UTC)
    stamp = mark.strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
    prepared = []
    for _ in range(20_000):
        customer = f"C{int(entities * rng.random() ** 2)}"
        prepared.append((customer.encode(), event(customer, mark, rng, 0).split(stamp)))
    producer = Producer({**client_config(bootstrap), "linger.ms": 5, "queue.buffering.max.messages": 1_000_000})
    began, sent = time.monotonic(), 0
    while True:
        due = int((time.monotonic() - began) * rate)
        now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ").encode()
        for i in range(sent, due):
            key, (before, after) = prepared[i % len(prepared)]
            producer.produce(topic, key=key, value=before + now + after)
        sent = max(sent, due)
        producer.poll(0)
        time.sleep(0.01)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4]))
