"""The client's feature log on a real broker."""

from __future__ import annotations

import json
from datetime import UTC, datetime

from serving.client_log import KafkaFeatureLog
from serving.client_types import FeatureRow, OnlineFeatures

T = datetime(2026, 1, 1, tzinfo=UTC)


def test_answers_arrive_with_their_keys(kafka_bootstrap: str, topic_prefix: str) -> None:
    from confluent_kafka import Consumer

    topic = f"{topic_prefix}features"
    log = KafkaFeatureLog(kafka_bootstrap, topic)
    for i in range(3):
        row = FeatureRow({"id": f"C{i}"}, {"f": 2**53 + 1}, {"f": "PRESENT"}, {"f": T})
        log.write(OnlineFeatures(T, "s", ["f"], [row]), f"r{i}")
    log.close(30)
    assert (log.logged, log.dropped) == (3, 0)
    consumer = Consumer({"bootstrap.servers": kafka_bootstrap, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    got = {}
    try:
        for message in consumer.consume(3, 30):
            assert message.error() is None
            got[message.key()] = json.loads(message.value())
    finally:
        consumer.close()
    assert sorted(got) == [b"C0", b"C1", b"C2"]
    assert got[b"C1"]["features"]["f"] == {
        "value": 2**53 + 1, "status": "PRESENT", "event_timestamp": "2026-01-01T00:00:00Z",
    }  # fmt: skip
    assert got[b"C1"]["request_id"] == "r1"
