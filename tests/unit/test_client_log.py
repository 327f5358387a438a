"""The client's feature log: sampled by key, bounded, and never in a request's way, whatever the broker does."""

from __future__ import annotations

import time
from datetime import UTC, datetime
from typing import Any

import pytest

from feature_store.errors import UsageError
from serving.client_log import KafkaFeatureLog, records
from serving.client_types import FeatureRow, OnlineFeatures, Prediction, Predictions

T = datetime(2026, 1, 1, tzinfo=UTC)


def answer(n: int) -> OnlineFeatures:
    rows = [FeatureRow({"id": f"C{i}"}, {"f": i}, {"f": "PRESENT"}, {"f": T}, {"v": {"0": i}}) for i in range(n)]
    return OnlineFeatures(T, "s", ["f"], rows)


class Broker:
    """Stands for librdkafka's producer: keeps what is produced, or is full."""

    def __init__(self, full: bool = False) -> None:
        self.full = full
        self.keys: list[bytes] = []

    def produce(self, topic: str, value: bytes, key: bytes, on_delivery: Any) -> None:
        if self.full:
            raise BufferError
        self.keys.append(key)
        on_delivery(None, None)

    def poll(self, seconds: float) -> None:
        pass


def test_a_record_holds_values_times_offsets_and_the_prediction() -> None:
    (one,) = records(answer(1), "r", T)
    assert one["features"] == {"f": {"value": 0, "status": "PRESENT", "event_timestamp": T}}
    assert (one["offsets"], one["request_id"], one["t"], one["probability"]) == ({"v": {"0": 0}}, "r", T, None)
    prediction = Prediction({"id": "C"}, {"f": b"\xff"}, {"f": "PRESENT"}, 0.5, {}, {"f": T})
    (two,) = records(Predictions("m", "3", "s", T, [prediction]), None, T)
    assert (two["model"], two["version"], two["probability"]) == ("m", "3", 0.5)
    assert two["features"]["f"] == {"value": "/w==", "status": "PRESENT", "event_timestamp": T}


def test_the_sample_is_the_same_keys_every_time_and_about_the_share() -> None:
    log = KafkaFeatureLog("nowhere:1", "t", sample=0.25)
    first, second = Broker(), Broker()
    for broker in (first, second):
        log._send(broker, answer(4000), None, T)  # type: ignore[arg-type]  # a stand-in
    assert first.keys == second.keys
    assert 800 < len(first.keys) < 1200
    assert log.logged == 2 * len(first.keys)
    none = Broker()
    KafkaFeatureLog("nowhere:1", "t", sample=0.0)._send(none, answer(100), None, T)  # type: ignore[arg-type]  # a stand-in
    assert none.keys == []


def test_a_full_producer_is_counted() -> None:
    log = KafkaFeatureLog("nowhere:1", "t")
    log._send(Broker(full=True), answer(3), None, T)  # type: ignore[arg-type]  # a stand-in
    assert (log.logged, log.dropped) == (0, 3)


def test_without_a_broker_writing_returns_at_once_and_all_is_counted() -> None:
    log = KafkaFeatureLog("127.0.0.1:1", "t", queue_size=5)
    spent = time.thread_time()
    for _ in range(200):
        log.write(answer(2), None)
    assert time.thread_time() - spent < 1
    log.close(20)
    log.close()
    log.write(answer(1), None)
    assert (log.logged, log.dropped) == (0, 401)


def test_a_wrong_share_is_refused() -> None:
    with pytest.raises(UsageError, match="share"):
        KafkaFeatureLog("x", "t", sample=10)
