"""One member of a consumer group on one topic: partitions come and go, messages come, offsets are committed, maybe late.

Knows nothing of views: who follows the partitions is told by `start`, `stop`, and by `settle` that what is not `done` had
better be, partitions being about to go. Callbacks run within `messages`, `wait`, `go_back` and `close`.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from feature_store.errors import DataError, NotFoundError, UnavailableError

log = logging.getLogger(__name__)

_POLL_SECONDS = 0.25
_COMMITTED_SECONDS = 120.0
_END_SECONDS = 1.0
_WARN_SECONDS = 10.0
_QUEUE_KB = 32 * 1024
"""Memory for messages fetched ahead, beside the batch in hand: enough that a batch is whole while the next is fetched."""


class StreamConsumer:
    """A consumer; `close` it. `owned`: partition -> the offset after the last message that was `done`."""

    def __init__(
        self,
        config: Mapping[str, Any],
        group: str,
        topic: str,
        *,
        max_batch: int,
        commit_delay: float,
        start: Callable[[int, int], None],
        stop: Callable[[int], None],
        settle: Callable[[], object],
        assigned: Callable[[], None],
        stopping: Callable[[], bool],
    ) -> None:
        self.owned: dict[int, int] = {}
        self._group, self._topic = group, topic
        self._max_batch, self._delay = max_batch, commit_delay
        self._start, self._stop, self._settle = start, stop, settle
        self._assigned, self._stopping = assigned, stopping
        self._committed: dict[int, int] = {}
        self._to_commit: deque[tuple[float, dict[int, int]]] = deque()
        self._recommit = False
        self._warned: dict[int, float] = {}
        self._buffer: list[Any] = []
        self._consumer = self._made(config)
        self._consumer.subscribe([topic], on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost)

    def _made(self, config: Mapping[str, Any]) -> Any:
        from confluent_kafka import Consumer

        return Consumer(
            {
                **config,
                "group.id": self._group,
                "enable.auto.commit": False,
                "auto.offset.reset": "error",  # offsets that are gone are lost events: say so
                "partition.assignment.strategy": "cooperative-sticky",
                "session.timeout.ms": 6000,  # how long a killed consumer's partitions wait
                "heartbeat.interval.ms": 2000,
                "fetch.min.bytes": 100_000,  # else a broker answers a fetch for each of a busy topic's messages
                "fetch.wait.max.ms": 20,  # by which a quiet topic's event may come later for that
                "queued.max.messages.kbytes": _QUEUE_KB,
                "fetch.queue.backoff.ms": 10,  # a full queue is looked at again after this: the default is a second
                "on_commit": self._on_commit,
                "log_level": 2,  # `_warn` tells it, once in a while
                "error_cb": self._warn,
            }
        )

    # Messages

    def messages(self, at_once: bool = False) -> list[Any]:
        """What has arrived of owned partitions: up to `max_batch`, as few as one when little is to do, none after 0.25 s
        (`at_once`: none where there is none).

        DataError, NotFoundError, UnavailableError: the topic cannot be read on.
        """
        from confluent_kafka import Message

        found, self._buffer = self._buffer, []
        if not found:
            first = self._consumer.poll(0 if at_once else _POLL_SECONDS)
            if first is None:
                self._commit_due(again=self._recommit)
                self._recommit = False
                return []
            found = [first]
            if self._max_batch > 1:
                found += self._consumer.consume(self._max_batch - 1, timeout=0)
        # By column: a call of ours per message costs more than all the rest of taking it.
        if set(map(Message.error, found)) == {None} and self.owned.keys() >= set(map(Message.partition, found)):
            return found
        return [m for m in found if self._is_event(m)]

    def _is_event(self, message: Any) -> bool:
        from confluent_kafka import KafkaError

        error = message.error()
        if error is None:
            return message.partition() in self.owned
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

    def wait(self, seconds: float) -> None:
        """Keeps our place in the group without taking messages. Call `resume` when they are wanted again."""
        self._consumer.pause(self._consumer.assignment())
        message = self._consumer.poll(seconds)
        if message is not None:  # of a partition just assigned: it comes later
            self._buffer.append(message)

    def resume(self) -> None:
        """Takes messages again."""
        self._consumer.resume(self._consumer.assignment())

    def lag(self, partition: int) -> int | None:
        """Messages not yet done, by what the broker said last; None where it has not said."""
        from confluent_kafka import TopicPartition

        _, high = self._consumer.get_watermark_offsets(TopicPartition(self._topic, partition), cached=True)
        return None if high < 0 or partition not in self.owned else max(0, high - self.owned[partition])

    def lags(self, ask: bool = False) -> dict[int, int | None]:
        """`lag` of each owned partition. `ask`: the broker is asked now, as far as it answers: while we wait it says
        nothing by itself."""
        lags = {}
        for p, done in self.owned.items():
            end = self._end(p) if ask else None
            ask = end is not None
            lags[p] = self.lag(p) if end is None else max(0, end - done)
        return lags

    def at_end(self, partition: int) -> bool:
        """Whether all messages are done, as the broker says now; False where it does not answer within a second."""
        end = self._end(partition)
        return end is not None and partition in self.owned and end <= self.owned[partition]

    def _end(self, partition: int) -> int | None:
        """The offset that the next message will get, as the broker says now; None where it does not answer."""
        from confluent_kafka import KafkaException, TopicPartition

        try:
            ends = self._consumer.get_watermark_offsets(
                TopicPartition(self._topic, partition), timeout=_END_SECONDS, cached=False
            )
        except KafkaException as e:
            log.debug("end of partition %d not known: %s", partition, e.args[0].str())
            return None
        return None if ends is None else int(ends[1])

    def close(self) -> None:
        """Commits what is due and leaves the group."""
        self._commit_due(wait=True)
        self._consumer.close()

    # Offsets

    def done(self, next_offsets: Mapping[int, int]) -> None:
        """Messages before these offsets need not come again: they are committed, after the delay."""
        fresh = {p: o for p, o in next_offsets.items() if p in self.owned}
        self.owned.update(fresh)
        if fresh:
            self._to_commit.append((time.monotonic() + self._delay, fresh))
        self._commit_due()

    def go_back(self) -> dict[int, int]:
        """Reads every owned partition again from its committed offset; partition -> that offset."""
        from confluent_kafka import TopicPartition

        self._to_commit.clear()
        self._buffer = []
        back = {p: self._committed[p] for p in self.owned}
        for p, offset in back.items():
            self._consumer.seek(TopicPartition(self._topic, p, offset))
            self.owned[p] = offset
            self._start(p, offset)
        return back

    def _commit_due(self, again: bool = False, wait: bool = False) -> None:
        from confluent_kafka import KafkaException, TopicPartition

        now = time.monotonic()
        due: dict[int, int] = dict(self._committed) if again else {}
        while self._to_commit and self._to_commit[0][0] <= now:
            due |= self._to_commit.popleft()[1]
        due = {p: o for p, o in due.items() if p in self.owned and o}
        if not due:
            return
        try:
            self._consumer.commit(
                offsets=[TopicPartition(self._topic, p, o) for p, o in due.items()], asynchronous=not wait
            )
        except KafkaException as e:
            # Nothing is lost: the next owner gets these events again and recognises them.
            log.warning("offsets not committed: %s", e.args[0].str())
        self._committed |= due

    def _warn(self, error: Any) -> None:
        """Told by the client some twenty times a second while a broker is away."""
        now = time.monotonic()
        if now >= self._warned.get(error.code(), 0.0):
            self._warned[error.code()] = now + _WARN_SECONDS
            log.warning("Kafka: %s", error.str())

    def _on_commit(self, error: Any, _partitions: Any) -> None:
        from confluent_kafka import KafkaError

        if error is None:
            return
        self._recommit = True
        rebalancing = (KafkaError.ILLEGAL_GENERATION, KafkaError.REBALANCE_IN_PROGRESS, KafkaError.UNKNOWN_MEMBER_ID)
        level = logging.DEBUG if error.code() in rebalancing else logging.WARNING
        log.log(level, "offsets not committed, tried again later: %s", error.str())

    # Rebalance: called from within poll

    def _on_assign(self, consumer: Any, partitions: list[Any]) -> None:
        from confluent_kafka import OFFSET_BEGINNING

        for p in self._places(consumer, partitions):
            if p.error is not None:
                raise UnavailableError(f"no committed offset of partition {p.partition} ({p.error.str()})")
            start = max(p.offset, 0)
            self._start(p.partition, start)
            self.owned[p.partition] = self._committed[p.partition] = start
            for given in partitions:
                if given.partition == p.partition:
                    given.offset = p.offset if p.offset >= 0 else OFFSET_BEGINNING
        consumer.incremental_assign(partitions)
        log.info("assigned %s", {p.partition: self.owned[p.partition] for p in partitions})
        self._assigned()

    def _places(self, consumer: Any, partitions: list[Any]) -> list[Any]:
        """The group's place in partitions; a broker that is away is waited for."""
        from confluent_kafka import KafkaException

        until = time.monotonic() + _COMMITTED_SECONDS
        while partitions:
            try:
                return list(consumer.committed(partitions, timeout=10))
            except KafkaException as e:
                if self._stopping() or time.monotonic() > until:
                    raise UnavailableError(
                        f"no committed offsets of group {self._group} ({e.args[0].str()})", next_step="start sync again"
                    ) from e
                log.warning("committed offsets not read, trying again: %s", e.args[0].str())
                time.sleep(1)  # within a rebalance: the client's own thread keeps our place in the group
        return []

    def _on_revoke(self, consumer: Any, partitions: list[Any]) -> None:
        self._settle()
        self._commit_due(again=True, wait=True)
        self._on_lost(consumer, partitions)

    def _on_lost(self, _consumer: Any, partitions: list[Any]) -> None:
        for p in partitions:
            self.owned.pop(p.partition, None)
            self._committed.pop(p.partition, None)
            self._stop(p.partition)
        log.info("gave up %s", sorted(p.partition for p in partitions))
