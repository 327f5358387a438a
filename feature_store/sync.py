"""The Kafka consumer that keeps features current: effectively once, whatever stops it.

Per micro-batch: check messages → load states → log the events → write states and values → bad messages to the dead-letter
topic → advance the replay clock → commit offsets. The next batch is checked while Redis works on the last one (`in_hand.py`).
Offsets are committed last; whatever is delivered again is recognised by the offsets within each state and by the log, so
that a kill anywhere neither loses nor double-counts.
"""

from __future__ import annotations

import gc
import logging
import threading
import time
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_store.clock import Clock, ClockMode, WallClock, to_micros
from feature_store.dead_letters import DeadLetter, DeadLetterWriter, dead_letter_topic
from feature_store.errors import DataError, UnavailableError
from feature_store.in_hand import Delivered, InHand, drop
from feature_store.log_keeper import LogKeeper
from feature_store.redis_settings import warn_of_settings
from feature_store.replay_clock import ReplayClock
from feature_store.stream_batch import Begun, Prepared
from feature_store.stream_consumer import StreamConsumer
from feature_store.stream_metrics import StreamMetrics
from feature_store.stream_place import StreamPlace
from feature_store.stream_topic import AnyView, open_views, views_of_topic
from feature_store.stream_view import StreamView
from feature_store.topic import begun_offsets, client_config, default_group, ensure_topic, topic_id
from feature_store.topic_record import TopicRecord, refuse_other_id, refuse_other_partitions
from feature_store.topic_watch import TopicWatch
from feature_store.window_store import StateLostError

if TYPE_CHECKING:
    from feast import FeatureStore

    from feature_store.registry import FeatureRegistry

log = logging.getLogger(__name__)

_LONGEST_BACKOFF = 5.0
_COMPACT_EVERY = 64  # batches: short rounds, which a batch beside them hardly feels
_IDLE_SECONDS = 0.2
_TELL_SECONDS = 1.0
_TOPIC_SECONDS = 5.0


@dataclass(frozen=True)
class SyncOptions:
    """How one consumer runs. `group` None: the project's; `topic` None: the only one that feeds views of the registry.

    `max_batch`: messages at once under load; what has arrived is taken at once when there is less. `commit_delay`: seconds
    by which commits stay behind, so that what a failing-over Redis lost is read again. `schema_registry`: URL, for Avro.
    """

    bootstrap_servers: str
    offline_path: str
    clock: ClockMode
    group: str | None = None
    topic: str | None = None
    max_batch: int = 100_000
    report_seconds: float = 10.0
    commit_delay: float = 0.0
    schema_registry: str | None = None


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
        self.finished = threading.Event()
        self.views: list[AnyView] = []
        self._store = store
        self._options = options
        self._group = options.group or default_group(store.project)
        self._registry = registry
        self._wall = wall or WallClock()
        self._stop = threading.Event()
        self._batches = 0
        self._in_hand: InHand | None = None
        self._keeper = LogKeeper()
        self._topic_id, self._paused = "", False
        self._idle_at = self._place_at = self._told_at = self._reported = 0.0
        self._now_us = 0  # the features' clock, as far as we know it

    def stop(self) -> None:
        """Ends `run` after the batch in hand."""
        self._stop.set()

    def run(self) -> None:
        """Consumes until stopped. Safe to start again after any end, and several times in one group.

        NotFoundError: no such topic or view; DataError: the topic was made anew or got partitions, or offsets are gone,
        since the states were written, or a view is new and the group is not at the topic's beginning; StateLostError: Redis lost the states; UnavailableError: no broker or Redis at the start. Later a missing server is waited for, and logged.
        """
        o = self._options
        config = self._config = client_config(o.bootstrap_servers)
        self._topic, views = views_of_topic(self._store, o.topic)
        self._partitions = len(ensure_topic(config, self._topic))
        ensure_topic(config, dead_letter_topic(self._topic))
        now = self._topic_id = topic_id(config, self._topic)
        self._watch = TopicWatch(config, self._topic)
        self.views = open_views(
            self._store,
            views,
            self._topic,
            now,
            self._partitions,
            o.offline_path,
            o.clock,
            o.schema_registry,
            lambda: begun_offsets(config, self._group, self._topic),
        )
        warn_of_settings(self._store)
        self._record_lineage()
        online: Any = self._store._get_provider().online_store  # Feast has no public way
        redis = online._get_client(self._store.config.online_store)
        self._replay = ReplayClock(redis, self._store.project)
        self._place = StreamPlace(redis, self._store.project, self._group, self._topic)
        self._letters = DeadLetterWriter(config, self._topic)
        self._consumer = StreamConsumer(
            config,
            self._group,
            self._topic,
            max_batch=o.max_batch,
            commit_delay=o.commit_delay,
            start=self._start_partition,
            stop=self._stop_partition,
            settle=self._settled,
            assigned=self.assigned.set,
            stopping=self._stop.is_set,
        )
        try:
            log.info("group %s reads topic %s into %s", self._group, self._topic, ", ".join(v.name for v in self.views))
            self._consume()
        finally:
            try:
                self._settled()
            finally:
                self._close()

    def _close(self) -> None:
        gc.unfreeze()  # else what is in a cycle is never freed, and its libraries complain at the end of the process
        self._consumer.close()
        self._keeper.close()
        for view in self.views:
            view.close()
        self.finished.set()
        log.info("stopped: %s", self.metrics.line())

    def _record_lineage(self) -> None:
        if self._registry is not None:
            edges = [
                (
                    ("topic", self._topic),
                    ("feature_view", v.name),
                    *(("windows", v.definition.to_json()) if isinstance(v, StreamView) else ("stream", "")),
                )
                for v in self.views
            ]
            self._registry.record_lineage(edges, at=self._wall.now(), run_id=f"sync-{self._group}")

    # Partitions

    def _start_partition(self, partition: int, offset: int) -> None:
        self._keeper.wait()
        self._check_topic(_TOPIC_SECONDS)
        if partition >= self._partitions:  # the topic got partitions while we ran
            for view in self.views:
                if isinstance(view, StreamView):
                    refuse_other_partitions(
                        view.name,
                        TopicRecord(self._topic, "", self._partitions),
                        len(ensure_topic(self._config, self._topic)),
                    )
        self._place.start(partition, offset)
        for view in self.views:
            view.start_partition(partition, offset, to_micros(self._wall.now()))
        self._listened()

    def _listened(self) -> None:
        """After a pause, in which no partition was heard."""
        for view in self.views:
            if isinstance(view, StreamView):
                view.listened(to_micros(self._wall.now()))

    def _stop_partition(self, partition: int) -> None:
        self._settled()
        self._keeper.wait()
        self._place.forget(partition)
        self.metrics.gave_up(partition, [v.name for v in self.views])
        for view in self.views:
            view.stop_partition(partition)

    # Stream

    def _consume(self) -> None:
        self._reported = time.monotonic()
        gc.freeze()  # what stands now stays: the collector need not walk it while batches come and go
        while not self._stop.is_set():
            messages = self._consumer.messages(at_once=self._in_hand is not None)
            self._check_topic(_TOPIC_SECONDS if self._paused else 0.0)
            self._paused = False
            if messages or self._in_hand is not None:
                self._apply(Delivered.of(messages))
            else:
                self._check_place()
            self._advance_idle()
            self._tell()

    def _tell(self, ask: bool = False) -> None:
        """Lag and watermarks as they are now, about once a second; now and then the counts. `ask`: for the lag the broker."""
        now = time.monotonic()
        if now >= self._told_at:
            self._told_at = now + _TELL_SECONDS
            if self._options.clock == "wall":
                self._now_us = to_micros(self._wall.now())
            views = [v for v in self.views if isinstance(v, StreamView)]
            for p, lag in self._consumer.lags(ask).items():
                self.metrics.stands(p, lag, {v.name: v.watermark(p) for v in views if self._now_us}, self._now_us)
        if now - self._reported >= self._options.report_seconds:
            self._reported = now
            log.info(self.metrics.line())

    def _check_topic(self, wait: float) -> None:
        """DataError, as at the start, when the topic was deleted and made again since: its offsets are other messages'.
        `wait`: seconds for what the broker says now; else by what it said last."""
        if self._topic_id and (now := self._watch.id(wait)) != self._topic_id:
            for view in self.views:
                if isinstance(view, StreamView):
                    refuse_other_id(view.name, self._topic, self._topic_id, now)

    def _check_place(self) -> None:
        """Whether Redis lost what was written before we started, also where no message comes."""
        if self._place.unchecked and time.monotonic() >= self._place_at:
            try:
                self._went_back()
            except UnavailableError as e:
                self._place_at = time.monotonic() + _LONGEST_BACKOFF
                log.warning("not known yet whether Redis holds what was written: %s", e)

    def _apply(self, batch: Delivered) -> None:
        """Settles the batch in hand and begins this one, again and again while a server is away. Without messages: only the
        first. What is not begun when stopped, or of a partition that was lost, comes again."""
        backoff, waited = 0.1, False
        try:
            while not self._stop.is_set():
                try:
                    with self.metrics.batch_seconds.time() if len(batch) else nullcontext():
                        self._begin(batch)
                    return
                except StateLostError:
                    raise  # waiting does not bring them back
                except (UnavailableError, OSError) as e:
                    log.warning("batch not applied, next try in %.1f s: %s", backoff, e)
                    self.metrics.retries.inc()
                    waited = True
                    self._consumer.wait(backoff)
                    self._tell(ask=True)
                    backoff = min(2 * backoff, _LONGEST_BACKOFF)
                    if self._in_hand is not None and not self._settled():
                        batch, self._in_hand = self._in_hand.batch + batch, None
                    if not set(batch.raw.partitions) <= set(self._consumer.owned):
                        batch = batch.only(self._consumer.owned)
        finally:
            if waited:
                self._paused = True
                self._consumer.resume()
                self._listened()

    def _went_back(self) -> bool:
        """Whether Redis lost what we wrote: then the messages since the last commit are read again."""
        lost = self._place.lost()
        if not lost:
            return False
        for view in self.views:
            if isinstance(view, StreamView):
                view.went_back()
        back = self._consumer.go_back()
        deeper = {p: held for p, held in lost.items() if held < back.get(p, 0)}
        if deeper:
            raise DataError(
                f"Redis lost states of topic {self._topic} that were written before the last commit",
                value=", ".join(f"partition {p} back at offset {o}" for p, o in sorted(deeper.items())),
                next_step="`predictflow sync --from-log` rebuilds them from the event log; a longer --commit-delay reads more again",
            )
        log.warning("Redis lost what was written after %s: reading again from %s", lost, back)
        return True

    def _begin(self, batch: Delivered) -> None:
        """Prepares a batch while Redis works on the one in hand, settles that, and takes this one in hand."""
        ahead = None
        if self._options.clock == "wall" and self._in_hand is not None and len(batch):
            ahead = [self._prepared(view, batch) for view in self.views]
        if not self._settle():
            ahead = None  # it was made on what another owner has replaced
        if not len(batch) or self._went_back():
            return
        begun: list[Begun] = []
        now_us = 0
        try:
            for i, view in enumerate(self.views):
                # One by one: a view of rows moves the replay clock, which the next one must not stay behind.
                prepared = ahead[i] if ahead else self._prepared(view, batch)
                now_us = max(now_us, prepared.now_us)
                begun.append(view.begin(prepared))
        except BaseException:
            drop(begun)
            raise
        self._in_hand = InHand(batch, begun, now_us)

    def _prepared(self, view: AnyView, batch: Delivered) -> Prepared:
        wall_us = to_micros(self._wall.now())
        now_us = wall_us if self._options.clock == "wall" else self._replay.now_us()
        return view.prepare(batch.raw, now_us, wall_us)

    def _settle(self) -> bool:
        """Waits until what is in hand is written, counts it, and commits it. False: a newer owner's states were met.

        UnavailableError: it must be applied again; it stays in hand.
        """
        in_hand = self._in_hand
        if in_hand is None:
            return True
        results = in_hand.finish()
        for view, result in zip(self.views, results, strict=True):
            self.metrics.count(view.name, result, in_hand.now_us)
            self._now_us = max(self._now_us, in_hand.now_us, result.clock_us)
        newest = max((r.clock_us for r in results), default=0)
        if newest and self._options.clock == "replay":
            self._replay.advance(newest)
        next_offsets = in_hand.batch.next_offsets
        for view, result in zip(self.views, results, strict=True):
            for refused, reason in result.refused:
                letter = DeadLetter(
                    self._topic, refused.partition, refused.offset, reason, view.name, refused.key, refused.value
                )
                self._letters.write(letter)
        self._letters.flush()
        if not self._place.note(next_offsets):
            raise UnavailableError("Redis lost what was written before")
        self._in_hand = None
        self._done(next_offsets, in_hand.batch.taken_ms)
        return not any(r.fenced for r in results)

    def _settled(self) -> bool:
        """As `_settle`, where what is not written can only be applied again."""
        try:
            self._settle()
            return True
        except (UnavailableError, OSError) as e:
            log.warning("batch not written, it comes again: %s", e)
            return False

    def _done(self, next_offsets: Mapping[int, int], taken_ms: Mapping[int, int]) -> None:
        now = to_micros(self._wall.now())
        for p, taken in taken_ms.items():
            self.metrics.freshness_seconds.labels(str(p)).observe(max(0.0, now / 1e6 - taken / 1e3))
        self._consumer.done(next_offsets)
        self._batches += 1
        for p, offset in next_offsets.items():
            for view in self.views:
                view.committed(p, offset)
            self.metrics.lag.labels(str(p)).set(self._consumer.lag(p) or 0)
        if self._batches % _COMPACT_EVERY == 0:
            self._keeper.start(self.views, self._consumer.owned, now)

    def _advance_idle(self) -> None:
        """Now and then: the watermark of partitions that are read to their end, and silent."""
        now = time.monotonic()
        if self._options.clock != "wall" or now < self._idle_at:
            return
        self._idle_at = now + _IDLE_SECONDS
        read_to = {p: o for p, o in self._consumer.owned.items() if self._consumer.lag(p) == 0}
        asked: dict[int, bool] = {}  # what we know of the ends may be old: a silent broker, messages on their way
        for view in self.views:
            if isinstance(view, StreamView) and read_to:
                try:
                    wall_us = to_micros(self._wall.now())
                    silent = view.silent(read_to, wall_us)
                    asked |= {p: self._consumer.at_end(p) for p in silent if p not in asked}
                    view.advance_idle({p: o for p, o in silent.items() if asked[p]}, wall_us)
                except (UnavailableError, OSError) as e:
                    log.warning("watermarks of idle partitions not advanced: %s", e)
