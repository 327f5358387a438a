"""What was served, one record per entity row, for the consistency check: values, statuses, times, offsets, prediction.

Writing never blocks or fails a request: a record that cannot be queued or delivered is counted and dropped.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from serving.encoding import dumps, plain

if TYPE_CHECKING:
    from confluent_kafka import KafkaError, Message, Producer

    from feature_store.read_plan import OnlineRows
    from serving.metrics import Metrics
    from serving.plans import ServicePlan

log = logging.getLogger(__name__)


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

    def poll(self) -> None: ...

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


def message_key(entity: Mapping[str, Any]) -> bytes:
    """The value of a single join key as text, or of several as a JSON array in the order of the keys' names."""
    values = [plain(entity[k]) for k in sorted(entity)]
    return str(values[0]).encode() if len(values) == 1 else dumps(values)


class NoServedLog:
    """Keeps nothing."""

    def write(
        self, served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None = None
    ) -> None:
        pass

    def poll(self) -> None:
        pass

    def close(self, timeout: float) -> None:
        pass


class KafkaServedLog:
    """Queues records in librdkafka, which sends them from its own thread."""

    def __init__(self, producer: Producer, topic: str, metrics: Metrics) -> None:
        self._producer = producer
        self._topic = topic
        self._metrics = metrics

    @classmethod
    def connect(cls, bootstrap_servers: str, topic: str, metrics: Metrics) -> KafkaServedLog:
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
        return cls(Producer(config), topic, metrics)

    def write(
        self, served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None = None
    ) -> None:
        """Queues one record per row; safe to call from the event loop. A repeated request is a record of its own."""
        queued = 0
        try:
            for record in records(served, plan, rows, probabilities):
                self._producer.produce(
                    self._topic, dumps(record), message_key(record["entity"]), on_delivery=self._delivered
                )
                queued += 1
            self._producer.poll(0)
        except BufferError:
            self._metrics.log_dropped.labels("queue_full").inc(len(rows.rows) - queued)
        except Exception:  # the request has its answer; losing its record is counted, and the reason logged
            self._metrics.log_dropped.labels("error").inc(len(rows.rows) - queued)
            log.exception("served log: record not queued")

    def poll(self) -> None:
        """Takes delivery reports in; call it now and then when no request does."""
        self._producer.poll(0)

    def close(self, timeout: float) -> None:
        """Waits up to `timeout` seconds for what is queued; counts what is left as dropped. Safe to call twice."""
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
