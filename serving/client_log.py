"""Feature logging from the client: what a model was given, sampled by key, to a Kafka topic, in the background.

It never blocks or fails a request: what cannot be queued or delivered is counted and dropped.
"""

from __future__ import annotations

import logging
import queue
import threading
from collections.abc import Callable, Collection
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from feature_store.errors import UsageError
from serving.client_types import OnlineFeatures, Prediction, Predictions
from serving.encoding import dumps, plain
from serving.log_keys import Sample, message_key

if TYPE_CHECKING:
    from confluent_kafka import Producer

log = logging.getLogger(__name__)


class FeatureLog(Protocol):
    """Where answers go that a client was given."""

    def write(self, answer: Any, request_id: str | None) -> None: ...


class KafkaFeatureLog:
    """One JSON record per sampled entity row, message key = entity key, as in the server's served log.

    `sample`: the share of keys that are logged, always the same ones, and the same as in the server's log of that share.
    `inputs`: names among the entities that are no join keys, but what on-demand views take from the request. `queue_size`: answers held in memory; more are dropped. Counters: `logged` (acknowledged by Kafka), `dropped`.
    """

    def __init__(
        self,
        bootstrap_servers: str,
        topic: str,
        *,
        sample: float = 1.0,
        queue_size: int = 1000,
        inputs: Collection[str] = (),
        wall: Callable[[], datetime] = lambda: datetime.now(UTC),
    ) -> None:
        if not 0 <= sample <= 1:
            raise UsageError("sample is a share of the keys", value=sample, valid=["0.0 to 1.0"])
        self._bootstrap = bootstrap_servers
        self._topic = topic
        self._sample = Sample(sample)
        self._inputs = frozenset(inputs)
        self._wall = wall
        self._queue: queue.Queue[tuple[Any, str | None, datetime] | None] = queue.Queue(queue_size)
        self._thread: threading.Thread | None = None
        self._lock = threading.Lock()
        self._closed = False
        self.logged = 0
        self.dropped = 0

    def write(self, answer: Any, request_id: str | None) -> None:
        """Queues an `OnlineFeatures` or `Predictions`; returns at once."""
        if self._thread is None:
            self._start()
        try:
            if self._closed:
                raise queue.Full
            self._queue.put_nowait((answer, request_id, self._wall()))
        except queue.Full:
            self._drop(len(_rows(answer)))

    def close(self, timeout: float = 5.0) -> None:
        """Waits up to `timeout` seconds for what is queued; the rest is dropped. Safe to call twice."""
        self._closed = True
        if self._thread is None:
            return
        try:
            self._queue.put(None, timeout=timeout)
        except queue.Full:
            log.warning("feature log: the queue did not empty in time")
        self._thread.join(timeout)
        self._thread = None

    def _start(self) -> None:
        with self._lock:
            if self._thread is None and not self._closed:
                self._thread = threading.Thread(target=self._work, name="feature-log", daemon=True)
                self._thread.start()

    def _work(self) -> None:
        from confluent_kafka import Producer

        config: dict[str, Any] = {
            "bootstrap.servers": self._bootstrap,
            "client.id": "predictflow-client",
            "linger.ms": 50,
            "compression.type": "lz4",
            "message.timeout.ms": 30_000,
            "queue.buffering.max.messages": 10_000,
            "queue.buffering.max.kbytes": 32_768,
            "log_level": 2,  # an unreachable broker is told by `dropped`, not by a line per attempt
        }
        producer = Producer(config)
        while True:
            try:
                item = self._queue.get(timeout=0.5)
            except queue.Empty:
                producer.poll(0)
                continue
            if item is None:
                break
            self._send(producer, *item)
        self._drop(producer.flush(5.0))

    def _send(self, producer: Producer, answer: Any, request_id: str | None, logged_at: datetime) -> None:
        from confluent_kafka import KafkaException

        for record in records(answer, request_id, logged_at):
            try:
                key = message_key(record["entity"], self._inputs)
                if key in self._sample:
                    producer.produce(self._topic, dumps(record), key, on_delivery=self._delivered)
            except (BufferError, ValueError, TypeError, KafkaException) as e:  # full, or not to be written as JSON
                self._drop(1)
                log.debug("feature log: record not queued: %s", e)
        producer.poll(0)

    def _delivered(self, error: Any, _: Any) -> None:
        if error is None:
            with self._lock:
                self.logged += 1
        else:
            self._drop(1)

    def _drop(self, rows: int) -> None:
        with self._lock:
            self.dropped += rows


def _rows(answer: Any) -> list[Any]:
    return answer.predictions if isinstance(answer, Predictions) else answer.rows


def records(answer: OnlineFeatures | Predictions, request_id: str | None, logged_at: datetime) -> list[dict[str, Any]]:
    """One JSON-able record per row: values, statuses, event times, offsets, and the prediction where there is one."""
    predicted = answer if isinstance(answer, Predictions) else None
    out = []
    for row in _rows(answer):
        out.append(
            {
                "request_id": request_id,
                "logged_at": logged_at,
                "t": answer.t,
                "feature_service": answer.feature_service,
                "entity": plain(row.entity),
                "features": {
                    n: {"value": plain(v), "status": row.statuses[n], "event_timestamp": row.event_timestamps.get(n)}
                    for n, v in row.values.items()
                },
                "offsets": row.offsets,
                "model": None if predicted is None else predicted.model,
                "version": None if predicted is None else predicted.version,
                "probability": row.probability if isinstance(row, Prediction) else None,
            }
        )
    return out
