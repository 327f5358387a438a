"""What was served, one record per entity row, for the consistency check: values, statuses, times, offsets, prediction.

Writing never blocks or fails a request: a record that cannot be queued or delivered is counted and dropped.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from typing import TYPE_CHECKING, Any, Protocol

from serving.encoding import dumps, plain
from serving.log_keys import Sample, message_key

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message, Producer

    from feature_store.read_plan import OnlineRows
    from serving.json_plan import Answered
    from serving.metrics import Metrics
    from serving.plans import ServicePlan

log = logging.getLogger(__name__)

MAX_WAITING = 20_000
"""Rows that may wait to be made into records."""
FLUSH_SECONDS = 0.005
FLUSH_ROWS = 64
"""So many records are made in one go, well under a millisecond, before requests have their turn again."""


@dataclass(frozen=True)
class Served:
    """What all rows of one request have in common; model and version are None for feature reads."""

    request_id: str
    served_at: datetime
    project: str
    model: str | None = None
    version: str | None = None


class ServedLog(Protocol):
    """Where records of served rows go."""

    def write(
        self, served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None = None
    ) -> None: ...

    def write_read(self, served: Served, read: Answered) -> None: ...

    def poll(self) -> None: ...

    def drain(self) -> None: ...

    def close(self, timeout: float) -> None: ...


def records(
    served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None
) -> list[dict[str, Any]]:
    """One JSON-able record per row, with the fields of docs/reference/rest.md; times are UTC datetimes."""
    out = []
    for i, row in enumerate(rows.rows):
        features = {
            c.name: {
                "view": c.view,
                "feature": c.feature,
                "value": plain(row.values[c.name]),
                "status": row.statuses[c.name],
                "event_timestamp": row.event_timestamps.get(c.name),
            }
            for c in plan.columns
        }
        views = {
            name: {
                "event_timestamp": v.event_timestamp,
                "created": v.created,
                "offsets": None if v.offsets is None else {str(p): o for p, o in v.offsets.items()},
                "visible_at": v.visible_at,
                "watermark": v.watermark,
            }
            for name, v in row.views.items()
        }
        out.append(
            {
                "request_id": served.request_id,
                "served_at": served.served_at,
                "t": rows.t,
                "project": served.project,
                "feature_service": plan.name,
                "entity": plain(row.entity),
                "features": features,
                "views": views,
                "model": served.model,
                "version": served.version,
                "probability": None if probabilities is None else float(probabilities[i]),
            }
        )
    return out


class NoServedLog:
    """Keeps nothing."""

    def write(
        self, served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None = None
    ) -> None:
        pass

    def write_read(self, served: Served, read: Answered) -> None:
        pass

    def poll(self) -> None:
        pass

    def drain(self) -> None:
        pass

    def close(self, timeout: float) -> None:
        pass


@dataclass(slots=True)
class _Batch:
    """The records of one request, made as they are taken; `left` are not yet."""

    records: Iterator[tuple[bytes, bytes]]
    left: int


class KafkaServedLog:
    """Queues records in librdkafka, which sends them from its own thread.

    On an event loop, what features were read (`write_read`) is kept as read and made into records a few at a time after
    the requests have their answers: on the loop itself, since a thread would hold the interpreter for as long. At most
    `MAX_WAITING` rows wait; more are dropped and counted. `sample`: which part of all entities is logged, 0 to 1.
    """

    def __init__(self, producer: Producer, topic: str, metrics: Metrics, sample: float = 1.0) -> None:
        self._producer = producer
        self._topic = topic
        self._metrics = metrics
        self._sample = Sample(sample)
        self._waiting: deque[_Batch] = deque()
        self._rows = 0
        self._scheduled = False
        self._closed = False

    @classmethod
    def connect(cls, bootstrap_servers: str, topic: str, metrics: Metrics, sample: float = 1.0) -> KafkaServedLog:
        """A log on a Kafka topic; connects in the background, and again whenever the broker comes back."""
        from confluent_kafka import Producer

        config: dict[str, Any] = {
            "bootstrap.servers": bootstrap_servers,
            "client.id": "predictflow-serve",
            "linger.ms": 5,
            "compression.type": "lz4",
            "message.timeout.ms": 30_000,
            "queue.buffering.max.messages": 100_000,
            "queue.buffering.max.kbytes": 131_072,
            "log_level": 2,  # an unreachable broker is told by the dropped counter, not by a line per attempt
        }
        return cls(Producer(config), topic, metrics, sample)

    def write(
        self, served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None = None
    ) -> None:
        """Queues one record per row; safe to call from the event loop. A repeated request is a record of its own."""
        done = 0
        try:
            for record in records(served, plan, rows, probabilities):
                key = message_key(record["entity"], plan.inputs)
                if key in self._sample:
                    self._produce(key, dumps(record))
                done += 1
            self._producer.poll(0)
        except BufferError:
            self._metrics.log_dropped.labels("queue_full").inc(len(rows.rows) - done)
        except Exception:  # the request has its answer; losing its record is counted, and the reason logged
            self._metrics.log_dropped.labels("error").inc(len(rows.rows) - done)
            log.exception("served log: record not queued")

    def write_read(self, served: Served, read: Answered) -> None:
        """As `write` for features that were read, later."""
        rows = len(read)
        if self._rows + rows > MAX_WAITING or self._closed:
            self._metrics.log_dropped.labels("shutdown" if self._closed else "queue_full").inc(rows)
            return
        self._waiting.append(_Batch(read.plan.records(served, read), rows))
        self._rows += rows
        if not self._scheduled:
            self._scheduled = True
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self._flush_some)

    def _flush_some(self) -> None:
        if self._closed:
            return
        self._flush(FLUSH_ROWS)
        self._scheduled = bool(self._waiting)
        if self._scheduled:
            asyncio.get_running_loop().call_soon(self._flush_some)

    def _flush(self, limit: int) -> None:
        """Makes and queues records of at most `limit` of the rows that wait, oldest first."""
        while self._waiting and limit > 0:
            batch = self._waiting[0]
            reason = None
            try:
                for key, record in islice(batch.records, limit):
                    if key in self._sample:
                        self._produce(key, record)
                    batch.left -= 1
                    self._rows -= 1
                    limit -= 1
            except BufferError:
                reason = "queue_full"
            except Exception:  # the request has its answer; losing its record is counted, and the reason logged
                reason = "error"
                log.exception("served log: record not queued")
            if reason is not None:
                self._metrics.log_dropped.labels(reason).inc(batch.left)
                self._rows -= batch.left
                batch.left = 0
            if not batch.left:
                self._waiting.popleft()
        self._producer.poll(0)

    def _produce(self, key: bytes, record: bytes) -> None:
        self._producer.produce(self._topic, record, key, on_delivery=self._delivered)

    def poll(self) -> None:
        """Takes delivery reports in; call it now and then when no request does."""
        self._producer.poll(0)

    def drain(self) -> None:
        """Makes and queues the records that wait, and takes no more reads: on the event loop that wrote them. Safe to
        call twice."""
        self._closed = True
        self._flush(MAX_WAITING)

    def close(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for what is queued; counts what is left as dropped. Safe to call twice, and from
        another thread once the log is drained; drains it otherwise."""
        if not self._closed:
            self.drain()
        left = self._producer.flush(timeout)
        if left:
            self._metrics.log_dropped.labels("shutdown").inc(left)
            log.warning("served log: %d records were not delivered before the server stopped", left)

    def _delivered(self, error: KafkaError | None, _: Message) -> None:
        if error is None:
            self._metrics.log_records.inc()
        else:
            self._metrics.log_dropped.labels("delivery").inc()
            log.debug("served log: not delivered: %s", error)
