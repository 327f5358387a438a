"""JSON of values, and a served log whose Kafka is slow, full or gone."""

from __future__ import annotations

import asyncio
import base64
import json
import math
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.read_plan import OnlineRow, OnlineRows, ViewRead
from serving.client_log import KafkaFeatureLog
from serving.client_types import FeatureRow, OnlineFeatures
from serving.encoding import dumps, plain
from serving.log_keys import message_key
from serving.metrics import Metrics
from serving.plans import Column, ServicePlan
from serving.served_log import KafkaServedLog, Served

T = datetime(2026, 1, 1, tzinfo=UTC)
PLAN = ServicePlan("s", (Column("f", "v", "f", True),), ("id",), None)  # type: ignore[arg-type]  # nothing is read
SERVED = Served("r", T, "p")


class FakeProducer:
    """Takes `room` messages, then says that its queue is full; `deliver` reports on those it took."""

    def __init__(self, room: int) -> None:
        self.room = room
        self.taken: list[tuple[bytes, bytes, Callable[..., None]]] = []

    def produce(self, topic: str, value: bytes, key: bytes, on_delivery: Callable[..., None]) -> None:
        if len(self.taken) >= self.room:
            raise BufferError("Local: Queue full")
        self.taken.append((key, value, on_delivery))

    def poll(self, timeout: float) -> int:
        return 0

    def flush(self, timeout: float) -> int:
        return len(self.taken)

    def deliver(self, error: object) -> None:
        for _, _, report in self.taken:
            report(error, None)


def rows(*ids: str, value: object = 1.5) -> OnlineRows:
    return OnlineRows(
        T,
        [
            OnlineRow({"id": i}, {"f": value}, {"f": "PRESENT"}, {"f": T}, {"v": ViewRead(T, T, None, None)})
            for i in ids
        ],
    )


def counted(metrics: Metrics, name: str, **labels: str) -> float:
    return metrics.registry.get_sample_value(name, labels) or 0.0


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_floats_round_trip_exactly(value: float) -> None:
    back = json.loads(dumps(plain(value)))
    assert back == value
    assert math.copysign(1, back) == math.copysign(1, value)


@given(st.integers(min_value=-(2**63), max_value=2**63 - 1))
def test_int64_round_trips_exactly(value: int) -> None:
    assert json.loads(dumps(plain(value))) == value


@given(st.binary(max_size=50))
def test_bytes_are_standard_base64_also_in_lists_and_maps(value: bytes) -> None:
    text = base64.b64encode(value).decode()
    assert json.loads(dumps(plain({"k": [value]}))) == {"k": [text]}


def test_not_a_number_and_infinities_are_strings_and_times_keep_microseconds() -> None:
    value = [math.nan, math.inf, -math.inf, datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)]
    assert json.loads(dumps(plain(value))) == ["NaN", "Infinity", "-Infinity", "2026-01-01T00:00:00.000001Z"]


def test_each_row_is_one_message_keyed_by_its_entity() -> None:
    producer = FakeProducer(10)
    KafkaServedLog(producer, "t", Metrics()).write(SERVED, PLAN, rows("a", "b"))  # type: ignore[arg-type]

    assert [key for key, _, _ in producer.taken] == [b"a", b"b"]
    record: dict[str, Any] = json.loads(producer.taken[0][1])
    assert record["features"]["f"] == {
        "view": "v",
        "feature": "f",
        "value": 1.5,
        "status": "PRESENT",
        "event_timestamp": "2026-01-01T00:00:00Z",
    }


def test_a_composite_key_is_a_json_array_in_the_order_of_its_names() -> None:
    assert message_key({"b": 2, "a": "x"}) == b'["x",2]'
    assert message_key({"a": 7}) == b"7"


def test_what_on_demand_views_take_from_the_request_is_no_part_of_the_key() -> None:
    producer = FakeProducer(10)
    plan = replace(PLAN, join_keys=("id", "factor"), inputs=frozenset({"factor"}))
    read = rows("a", "a")
    for factor, row in enumerate(read.rows):
        row.entity["factor"] = factor
    KafkaServedLog(producer, "t", Metrics()).write(SERVED, plan, read)  # type: ignore[arg-type]
    assert [key for key, _, _ in producer.taken] == [b"a", b"a"]
    assert json.loads(producer.taken[1][1])["entity"] == {"id": "a", "factor": 1}
    assert message_key({"factor": 1}, {"factor"}) == b"1"  # a service that reads nothing stored


def test_the_clients_log_samples_the_same_keys() -> None:
    ids = [f"C{i}" for i in range(2000)]
    server, client = FakeProducer(2000), FakeProducer(2000)
    KafkaServedLog(server, "t", Metrics(), 0.25).write(SERVED, PLAN, rows(*ids))  # type: ignore[arg-type]
    given = [FeatureRow({"id": i, "factor": n}, {}, {}, {}) for n, i in enumerate(ids)]
    log = KafkaFeatureLog("nowhere:1", "t", sample=0.25, inputs=["factor"])
    log._send(client, OnlineFeatures(T, "s", [], given), None, T)  # type: ignore[arg-type]
    assert [key for key, _, _ in client.taken] == [key for key, _, _ in server.taken]
    assert 400 < len(client.taken) < 600


def test_a_full_queue_drops_and_counts_the_rest_of_a_request() -> None:
    metrics = Metrics()
    log = KafkaServedLog(FakeProducer(1), "t", metrics)  # type: ignore[arg-type]

    log.write(SERVED, PLAN, rows("a", "b", "c"))

    assert counted(metrics, "predictflow_served_log_dropped_total", reason="queue_full") == 2


def test_a_record_that_cannot_be_written_is_counted_and_told(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    log = KafkaServedLog(FakeProducer(9), "t", metrics)  # type: ignore[arg-type]

    log.write(SERVED, PLAN, rows("a", value=object()))

    assert counted(metrics, "predictflow_served_log_dropped_total", reason="error") == 1
    assert "not queued" in caplog.text


@pytest.mark.parametrize(
    ("error", "name", "labels"),
    [
        (None, "predictflow_served_log_records_total", {}),
        ("timed out", "predictflow_served_log_dropped_total", {"reason": "delivery"}),
    ],
)
def test_delivery_reports_are_counted(error: object, name: str, labels: dict[str, str]) -> None:
    metrics = Metrics()
    producer = FakeProducer(9)
    KafkaServedLog(producer, "t", metrics).write(SERVED, PLAN, rows("a", "b"))  # type: ignore[arg-type]

    producer.deliver(error)

    assert counted(metrics, name, **labels) == 2


def test_what_is_left_at_the_end_is_counted() -> None:
    metrics = Metrics()
    log = KafkaServedLog(FakeProducer(9), "t", metrics)  # type: ignore[arg-type]
    log.write(SERVED, PLAN, rows("a"))

    log.close(0.1)

    assert counted(metrics, "predictflow_served_log_dropped_total", reason="shutdown") == 1


def test_reads_that_wait_are_queued_by_the_drain_and_later_ones_counted() -> None:
    class Read:
        plan: Any = None

        def __len__(self) -> int:
            return 2

        def records(self, served: Served, read: Any) -> Any:
            return iter([(b"a", b"1"), (b"b", b"2")])

    read: Any = Read()
    read.plan = read
    metrics, producer = Metrics(), FakeProducer(9)

    async def run() -> None:
        log = KafkaServedLog(producer, "t", metrics)  # type: ignore[arg-type]
        log.write_read(SERVED, read)
        assert not producer.taken
        log.drain()
        assert [key for key, _, _ in producer.taken] == [b"a", b"b"]
        log.write_read(SERVED, read)
        await asyncio.to_thread(log.close, 0.1)
        assert len(producer.taken) == 2

    asyncio.run(run())
    assert counted(metrics, "predictflow_served_log_dropped_total", reason="shutdown") == 2 + 2
