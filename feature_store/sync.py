"""The Kafka consumer that keeps windowed views current: effectively once, whatever stops it.

Per micro-batch: check messages (bad ones to the dead-letter topic) → load states → log the events → write states and
values → advance the replay clock → commit offsets. Offsets are committed last; whatever is delivered again is recognised
by the offsets within each state and by the log, so that a kill anywhere neither loses nor double-counts.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_store.clock import Clock, ClockMode, WallClock, to_micros
from feature_store.dead_letters import DeadLetter, DeadLetterWriter, dead_letter_topic
from feature_store.errors import DataError, NotFoundError, UnavailableError
from feature_store.redis_settings import warn_of_settings
from feature_store.stream_metrics import StreamMetrics
from feature_store.stream_view import BatchResult, Raw, StreamView
from feature_store.topic import client_config, default_group, ensure_topic, topic_id
from feature_store.topic_record import (
    TopicRecord,
    read_record,
    refuse_other_partitions,
    refuse_other_topic,
    write_record,
)
from feature_store.window_store import windowed_views

if TYPE_CHECKING:
    from feast import FeatureStore

    from feature_store.registry import FeatureRegistry

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_LONGEST_BACKOFF = 5.0
_COMPACT_EVERY = 256  # batches
_COMMITTED_SECONDS = 120.0


@dataclass(frozen=True)
class SyncOptions:
    """How one consumer runs. `group` None: the project's; `topic` None: the one topic of the registry's windowed views."""

    bootstrap_servers: str
    offline_path: str
    clock: ClockMode
    group: str | None = None
    topic: str | None = None
    max_batch: int = 500
    report_seconds: float = 10.0


class Sync:
    """One consumer of a group. `run` blocks until `stop`, which any thread or signal handler may call."""

    def __init__(
        self,
        store: FeatureStore,
        options: SyncOptions,
        *,
        registry: FeatureRegistry | None = None,
        metrics: StreamMetrics | None = None,
        wall: Clock | None = None,
    ) -> None:
        self.metrics = metrics or StreamMetrics()
        self.assigned = threading.Event()
        self._store = store
        self._options = options
        self._group = options.group or default_group(store.project)
        self._registry = registry
        self._wall = wall or WallClock()
        self._stop = threading.Event()
        self._config = client_config(options.bootstrap_servers)
        self._owned: dict[int, int] = {}  # partition -> next offset to commit
        self._batches = 0
        self._recommit = False
        self._buffer: list[Any] = []

    def stop(self) -> None:
        """Ends `run` after the batch in hand."""
        self._stop.set()

    def run(self) -> None:
        """Consumes until stopped. Safe to start again after any end, and several times in one group.

        NotFoundError: no such topic or view; DataError: the topic was made anew or got partitions, or offsets are gone,
        since the states were written; UnavailableError: no broker at the start. Later a missing server is waited for, and logged.
        """
        topic, views = self._views_of_topic()
        self._partitions = len(ensure_topic(self._config, topic))
        ensure_topic(self._config, dead_letter_topic(topic))
        self._open_views(topic, views)
        warn_of_settings(self._store)
        self._record_lineage(topic)
        self._letters = DeadLetterWriter(self._config, topic)
        self._topic = topic
        consumer = self._consumer()
        try:
            consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)
            log.info("group %s reads topic %s into %s", self._group, topic, ", ".join(v.name for v in self.views))
            self._consume(consumer)
        finally:
            consumer.close()
            log.info("stopped: %s", self.metrics.line())

    # Start

    def _views_of_topic(self) -> tuple[str, list[Any]]:
        found = windowed_views(self._store)
        topics = sorted({d.topic for _, d in found})
        topic = self._options.topic or topics[0]
        if topic not in topics:
            raise NotFoundError("no windowed feature view reads this topic", value=topic, valid=topics)
        if self._options.topic is None and len(topics) > 1:
            raise NotFoundError("several topics have windowed feature views", valid=topics, next_step="pass --topic")
        return topic, [v for v, d in found if d.topic == topic]

    def _open_views(self, topic: str, views: Sequence[Any]) -> None:
        o = self._options
        now = topic_id(self._config, topic)
        self.views = [StreamView(self._store, v, o.offline_path, now, o.clock) for v in views]
        paths = [v.log.directory for v in self.views]
        for view in self.views:
            if paths.count(view.log.directory) > 1:
                raise DataError("two windowed views share one source path", value=str(view.log.directory))
            refuse_other_topic(view.name, view.log, now)
            record = read_record(view.log)
            if record is None:
                write_record(view.log, TopicRecord(topic, now, self._partitions))
            else:
                refuse_other_partitions(view.name, record, self._partitions)

    def _record_lineage(self, topic: str) -> None:
        if self._registry is not None:
            edges = [
                (("topic", topic), ("feature_view", v.name), "windows", v.definition.to_json()) for v in self.views
            ]
            self._registry.record_lineage(edges, at=self._wall.now(), run_id=f"sync-{self._group}")

    def _consumer(self) -> Any:
        from confluent_kafka import Consumer

        return Consumer(
            {
                **self._config,
                "group.id": self._group,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",  # offsets that are gone are lost events: say so
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": 6000,  # how long a killed consumer's partitions wait
                "heartbeat.interval.ms": 2000,
                "on_commit": self._on_commit,
                "error_cb": lambda e: log.warning("Kafka: %s", e.str()),
            }
        )

    # Rebalance: called from within poll, so never while a batch is being applied

    def _on_assign(self, consumer: Any, partitions: list[Any]) -> None:
        from confluent_kafka import OFFSET_BEGINNING

        grown = max((p.partition + 1 for p in partitions), default=0)
        if grown > self._partitions:  # while we ran
            for view in self.views:
                refuse_other_partitions(view.name, TopicRecord(self._topic, "", self._partitions), grown)
        for p in self._committed(consumer, partitions):
            if p.error is not None:
                raise UnavailableError(f"no committed offset of partition {p.partition} ({p.error.str()})")
            start = max(p.offset, 0)
            for view in self.views:
                view.start_partition(p.partition, start)
            self._owned[p.partition] = start
            for given in partitions:
                if given.partition == p.partition:
                    given.offset = p.offset if p.offset >= 0 else OFFSET_BEGINNING
        consumer.incremental_assign(partitions)
        log.info("assigned %s", {p.partition: self._owned[p.partition] for p in partitions})
        self.assigned.set()

    def _committed(self, consumer: Any, partitions: list[Any]) -> list[Any]:
        """The group's place in partitions; a broker that is away is waited for."""
        from confluent_kafka import KafkaException

        until = time.monotonic() + _COMMITTED_SECONDS
        while partitions:
            try:
                return list(consumer.committed(partitions, timeout=10))
            except KafkaException as e:
                if self._stop.is_set() or time.monotonic() > until:
                    raise UnavailableError(
                        f"no committed offsets of group {self._group} ({e.args[0].str()})", next_step="start sync again"
                    ) from e
                log.warning("committed offsets not read, trying again: %s", e.args[0].str())
                time.sleep(1)  # within a rebalance: the client's own thread keeps our place in the group
        return []

    def _on_revoke(self, consumer: Any, partitions: list[Any]) -> None:
        self._commit(consumer, [p.partition for p in partitions], wait=True)
        self._on_lost(consumer, partitions)

    def _on_lost(self, _consumer: Any, partitions: list[Any]) -> None:
        for p in partitions:
            self._owned.pop(p.partition, None)
            self.metrics.lag.labels(str(p.partition)).set(0)
            for view in self.views:
                view.stop_partition(p.partition)
        log.info("gave up %s", sorted(p.partition for p in partitions))

    # Stream

    def _consume(self, consumer: Any) -> None:
        reported = time.monotonic()
        while not self._stop.is_set():
            messages, self._buffer = self._buffer, []
            if not messages:
                first = consumer.poll(_POLL_SECONDS)
                messages = [first] if first is not None else []
                if first is None and self._recommit:
                    self._recommit = False
                    self._commit(consumer, list(self._owned), wait=False)
                if messages and self._options.max_batch > 1:
                    messages += consumer.consume(self._options.max_batch - 1, timeout=0)
            good = [m for m in messages if self._is_event(m)]
            if good and self._apply(consumer, good):
                self._done(consumer, good)
            if time.monotonic() - reported >= self._options.report_seconds:
                reported = time.monotonic()
                log.info(self.metrics.line())
        self._commit(consumer, list(self._owned), wait=True)

    def _is_event(self, message: Any) -> bool:
        from confluent_kafka import KafkaError

        error = message.error()
        if error is None:
            return message.partition() in self._owned
        if error.code() == KafkaError._AUTO_OFFSET_RESET:
            raise DataError(
                f"topic {self._topic} no longer holds the next event of a partition ({error.str()})",
                next_step="`predictflow windows bootstrap --rewind --known-by TIME --yes` to forget the stream's log, backfill the history "
                "up to now, then `predictflow windows bootstrap`",
            )
        if error.code() in (KafkaError.UNKNOWN_TOPIC_OR_PART, KafkaError.TOPIC_AUTHORIZATION_FAILED):
            raise NotFoundError(f"topic cannot be read ({error.str()})", value=self._topic)
        if error.fatal():
            raise UnavailableError(f"Kafka: {error.str()}", next_step="start sync again")
        log.warning("Kafka: %s", error.str())
        return False

    def _apply(self, consumer: Any, messages: Sequence[Any]) -> bool:
        """Applies a batch, again and again while a server is away; False when stopped, or all partitions lost, before."""
        raws = [Raw(m.partition(), m.offset(), m.key(), m.value()) for m in messages]
        backoff, paused = 0.1, False
        try:
            while raws and not self._stop.is_set():
                try:
                    with self.metrics.batch_seconds.time():
                        self._apply_once(raws)
                    return True
                except (UnavailableError, OSError) as e:
                    log.warning("batch not applied, next try in %.1f s: %s", backoff, e)
                    self.metrics.retries.inc()
                    # Polling keeps our place in the group; what it returns, of partitions just assigned, comes later.
                    consumer.pause(consumer.assignment())
                    paused = True
                    message = consumer.poll(backoff)
                    if message is not None:
                        self._buffer.append(message)
                    backoff = min(2 * backoff, _LONGEST_BACKOFF)
                    raws = [r for r in raws if r.partition in self._owned]
            return False
        finally:
            if paused:
                consumer.resume(consumer.assignment())

    def _apply_once(self, raws: Sequence[Raw]) -> None:
        newest = 0
        for view in self.views:
            wall_us = to_micros(self._wall.now())
            now_us = wall_us if self._options.clock == "wall" else view.online.clock_us() or 0
            result = view.apply(raws, now_us, wall_us)
            newest = max(newest, result.clock_us)
            self._count(view.name, result)
            for raw, reason in result.refused:
                letter = DeadLetter(self._topic, raw.partition, raw.offset, reason, view.name, raw.key, raw.value)
                self._letters.write(letter)
        if newest and self._options.clock == "replay":
            self.views[0].online.advance_clock(newest)
        self._letters.flush()

    def _done(self, consumer: Any, messages: Sequence[Any]) -> None:
        now = to_micros(self._wall.now())
        for m in messages:
            if m.partition() in self._owned:
                self._owned[m.partition()] = m.offset() + 1
            kind, produced_ms = m.timestamp()
            if kind:
                self.metrics.freshness_seconds.observe(max(0.0, now / 1e6 - produced_ms / 1e3))
        partitions = {m.partition() for m in messages} & set(self._owned)
        self._commit(consumer, partitions, wait=False)
        self._batches += 1
        for p in partitions:
            for view in self.views:
                view.committed(p, self._owned[p])
                if self._batches % _COMPACT_EVERY == 0:
                    _compact(view, p)
        self._measure_lag(consumer, partitions)

    def _commit(self, consumer: Any, partitions: Any, wait: bool) -> None:
        from confluent_kafka import KafkaException, TopicPartition

        offsets = [TopicPartition(self._topic, p, self._owned[p]) for p in partitions if self._owned.get(p)]
        if not offsets:
            return
        try:
            consumer.commit(offsets=offsets, asynchronous=not wait)
        except KafkaException as e:
            # Nothing is lost: the next owner gets these events again and recognises them.
            log.warning("offsets not committed: %s", e.args[0].str())

    def _measure_lag(self, consumer: Any, partitions: Any) -> None:
        from confluent_kafka import TopicPartition

        for p in partitions:
            _, high = consumer.get_watermark_offsets(TopicPartition(self._topic, p), cached=True)
            if high >= 0:
                self.metrics.lag.labels(str(p)).set(max(0, high - self._owned[p]))

    def _count(self, view: str, result: BatchResult) -> None:
        outcomes = {
            "applied": result.applied,
            "duplicate": result.duplicates,
            "replayed": result.replayed,
            "dead_lettered": len(result.refused),
            "erased": result.erased,
        }
        for outcome, n in outcomes.items():
            self.metrics.events.labels(view, outcome).inc(n)
        self.metrics.late.labels(view).inc(result.late)
        self.metrics.without_value.labels(view).inc(result.without_value)

    def _on_commit(self, error: Any, _partitions: Any) -> None:
        from confluent_kafka import KafkaError

        if error is None:
            return
        self._recommit = True
        rebalancing = (KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.UNKNOWN_MEMBER_ID)
        level = logging.DEBUG if error.code() in rebalancing else logging.WARNING
        log.log(level, "offsets not committed, tried again later: %s", error.str())


def _compact(view: StreamView, partition: int) -> None:
    """Fewer log files, for readers; it can wait, for instance for room on the disk."""
    try:
        view.log.compact(partition)
    except OSError as e:
        log.warning("%s: log of partition %d not compacted: %s", view.name, partition, e)
