"""What we ask of a Kafka topic beside streaming it: that it exists, its id, its ends, all it holds now, and a group's place in it."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from typing import Any

from feature_store.errors import NotFoundError, UnavailableError

log = logging.getLogger(__name__)


def client_config(bootstrap_servers: str) -> dict[str, Any]:
    """Settings that every Kafka client of ours shares."""
    return {"bootstrap.servers": bootstrap_servers, "log_level": 3, "socket.keepalive.enable": True}


def default_group(project: str) -> str:
    """The consumer group of a Feast project's sync: projects that share a broker must not share partitions."""
    return f"predictflow-sync-{project}"


def partitions_of(config: dict[str, Any], topic: str, seconds: float = 5.0) -> list[int]:
    """The partitions of a topic, empty where it does not exist. UnavailableError when no broker answers."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    try:
        # All topics: asking for one by name makes it, on a broker that makes topics on demand.
        found = AdminClient(config).list_topics(timeout=seconds).topics.get(topic)
    except KafkaException as e:
        raise _unavailable(config, e) from e
    return [] if found is None or found.error is not None else sorted(found.partitions)


def ensure_topic(config: dict[str, Any], topic: str, partitions: int = 1, seconds: float = 5.0) -> list[int]:
    """The partitions of a topic, which is made where it is missing. NotFoundError when the broker does not allow that."""
    from confluent_kafka import KafkaException, Producer
    from confluent_kafka.admin import AdminClient, NewTopic

    found = partitions_of(config, topic, seconds)
    if found:
        return found
    reason = ""
    admin = AdminClient(config)  # must outlive its futures
    try:
        admin.create_topics([NewTopic(topic, partitions)], operation_timeout=seconds)[topic].result(seconds)
    except KafkaException as e:
        reason = str(e.args[0].str() if e.args else e)
        # A broker without admin calls may still make topics that a producer asks for.
        Producer(config).list_topics(topic, timeout=seconds)
    until = time.monotonic() + seconds
    while not (found := partitions_of(config, topic, seconds)):
        if time.monotonic() > until:
            raise NotFoundError(
                f"topic does not exist and could not be made ({reason})",
                value=topic,
                next_step="create it on the broker",
            )
        time.sleep(0.1)
    log.info("made topic %s with %d partition(s)", topic, len(found))
    return found


def topic_id(config: dict[str, Any], topic: str, seconds: float = 10.0) -> str:
    """The broker's id of a topic, which changes when it is deleted and made again; '' where the broker has none.

    UnavailableError when the broker does not answer.
    """
    from confluent_kafka import KafkaError, KafkaException, TopicCollection
    from confluent_kafka.admin import AdminClient

    admin = AdminClient(config)  # must outlive its futures
    try:
        future = admin.describe_topics(TopicCollection([topic]), request_timeout=seconds)[topic]
        return str(future.result(seconds).topic_id)
    except KafkaException as e:
        if e.args[0].code() not in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION):
            raise _unavailable(config, e) from e
        log.debug("no topic id of %s: %s", topic, e)
        return ""
    except TimeoutError as e:
        raise _unavailable(config, e) from e


def end_offsets(config: dict[str, Any], topic: str, seconds: float = 10.0) -> dict[int, int]:
    """partition -> the offset that the next message will get."""
    return {p: high for p, (_, high) in offset_ranges(config, topic, seconds).items()}


def offset_ranges(config: dict[str, Any], topic: str, seconds: float = 10.0) -> dict[int, tuple[int, int]]:
    """partition -> (the oldest offset it holds, the offset that the next message will get); empty without a topic."""
    from confluent_kafka import Consumer, KafkaException, TopicPartition

    partitions = partitions_of(config, topic, seconds)
    consumer = Consumer({**config, "group.id": "predictflow-offsets", "enable.auto.commit": False})
    try:
        return {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=seconds) for p in partitions}
    except KafkaException as e:
        raise _unavailable(config, e) from e
    finally:
        consumer.close()


def group_members(config: dict[str, Any], group: str, seconds: float = 30.0) -> list[str]:
    """The client ids and hosts of a consumer group's running members; none where the broker cannot tell (no admin calls).

    A fresh broker has no coordinator yet and is asked again for `seconds`; then UnavailableError.
    """
    from confluent_kafka import KafkaError, KafkaException
    from confluent_kafka.admin import AdminClient

    not_yet = (
        KafkaError.COORDINATOR_NOT_AVAILABLE,
        KafkaError.COORDINATOR_LOAD_IN_PROGRESS,
        KafkaError.NOT_COORDINATOR,
        KafkaError._TIMED_OUT,
        KafkaError._TRANSPORT,
    )
    admin = AdminClient(config)  # must outlive its futures
    until = time.monotonic() + seconds
    while True:
        try:
            described = admin.describe_consumer_groups([group], request_timeout=10)[group].result(20)
            return [f"{m.client_id} at {m.host}" for m in described.members]
        except KafkaException as e:
            code = e.args[0].code()
            if code == KafkaError.GROUP_ID_NOT_FOUND:
                return []
            if code in (KafkaError._UNSUPPORTED_FEATURE, KafkaError.UNSUPPORTED_VERSION):
                log.debug("no members of group %s: %s", group, e)
                return []
            if code not in not_yet or time.monotonic() > until:
                raise _unavailable(config, e) from e
        time.sleep(0.2)  # a fresh broker finds its coordinator within seconds


def committed_offsets(
    config: dict[str, Any], group: str, topic: str, partitions: list[int], seconds: float = 10.0
) -> dict[int, int]:
    """Partition -> next offset of a consumer group, of those that have one. UnavailableError: no broker."""
    from confluent_kafka import Consumer, KafkaException, TopicPartition

    consumer = Consumer({**config, "group.id": group, "enable.auto.commit": False})
    try:
        found = consumer.committed([TopicPartition(topic, p) for p in partitions], timeout=seconds)
    except KafkaException as e:
        raise _unavailable(config, e) from e
    finally:
        consumer.close()
    return {p.partition: p.offset for p in found if p.offset >= 0}


def begun_offsets(config: dict[str, Any], group: str, topic: str) -> dict[int, int]:
    """Partition -> next offset of a consumer group, of those where the topic holds messages before it."""
    ranges = offset_ranges(config, topic)
    held = committed_offsets(config, group, topic, list(ranges), seconds=60)  # a fresh broker has no coordinator yet
    return {p: o for p, o in held.items() if ranges[p][0] < o <= ranges[p][1]}


def commit_group(config: dict[str, Any], group: str, topic: str, offsets: dict[int, int]) -> None:
    """Sets where a consumer group starts. UnavailableError while the group has running members."""
    from confluent_kafka import Consumer, KafkaException, TopicPartition

    consumer = Consumer({**config, "group.id": group, "enable.auto.commit": False})
    try:
        consumer.commit(offsets=[TopicPartition(topic, p, o) for p, o in offsets.items()], asynchronous=False)
    except KafkaException as e:
        raise UnavailableError(
            f"offsets of consumer group {group} could not be set ({e.args[0].str()})",
            next_step="stop `predictflow sync` of this group, then try again",
        ) from e
    finally:
        consumer.close()


def read_topic(config: dict[str, Any], topic: str, seconds: float = 10.0) -> Iterator[Any]:
    """Every message from the oldest up to the ends at the call, without a group; none where the topic does not exist.

    UnavailableError when the broker gives nothing for `seconds`.
    """
    yield from _read(config, topic, offset_ranges(config, topic, seconds), set(), seconds)


def read_until(
    config: dict[str, Any],
    topic: str,
    ranges: dict[int, tuple[int, int]],
    enough: Callable[[Any], bool],
    seconds: float = 10.0,
) -> None:
    """Reads each partition's range of offsets [first, end) until `enough(message)`; errors as `read_topic`."""
    done: set[int] = set()
    for message in _read(config, topic, ranges, done, seconds):
        if enough(message):
            done.add(message.partition())


def _read(
    config: dict[str, Any], topic: str, ranges: dict[int, tuple[int, int]], done: set[int], seconds: float
) -> Iterator[Any]:
    """Messages of the ranges; of a partition that the caller puts into `done`, no more."""
    from confluent_kafka import Consumer, KafkaError, TopicPartition

    left = {p: end for p, (first, end) in ranges.items() if end > first}
    if not left:
        return
    consumer = Consumer(
        {
            **config,
            "group.id": "predictflow-read",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "auto.offset.reset": "earliest",
        }
    )
    try:
        consumer.assign([TopicPartition(topic, p, ranges[p][0]) for p in left])
        while left:
            first = consumer.poll(seconds)
            if first is None:
                raise UnavailableError(
                    f"topic {topic}: no answer from {config['bootstrap.servers']} (KAFKA_BOOTSTRAP_SERVERS)",
                    next_step="start the broker, or `predictflow up`",
                )
            messages: list[Any] = [first, *consumer.consume(500, timeout=0)]
            for m in messages:
                p = m.partition()
                if m.error() is not None:
                    if m.error().code() != KafkaError._PARTITION_EOF:
                        raise UnavailableError(f"topic {topic} cannot be read ({m.error().str()})")
                    left.pop(p, None)  # also where compaction or transactions leave no last message
                elif p in left and m.offset() < left[p]:
                    yield m
                    if p in done or m.offset() + 1 >= left[p]:
                        del left[p]
                        consumer.pause([TopicPartition(topic, p)])
    finally:
        consumer.close()


def _unavailable(config: dict[str, Any], error: Exception) -> UnavailableError:
    reason = str(error)
    if error.args and hasattr(error.args[0], "str"):
        reason = error.args[0].str().rstrip(": ") + f", {error.args[0].name()}"
    return UnavailableError(
        f"Kafka at {config['bootstrap.servers']} (KAFKA_BOOTSTRAP_SERVERS) does not answer ({reason})",
        next_step="start it, or `predictflow up`, and check KAFKA_BOOTSTRAP_SERVERS",
    )
