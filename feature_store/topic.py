"""What we ask of a Kafka topic beside streaming it: that it exists, its id, its ends, and all it holds now."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator
from typing import Any

from feature_store.errors import NotFoundError, UnavailableError

log = logging.getLogger(__name__)


def client_config(bootstrap_servers: str) -> dict[str, Any]:
    """Settings that every Kafka client of ours shares."""
    return {"bootstrap.servers": bootstrap_servers, "log_level": 3, "socket.keepalive.enable": True}


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
    """The broker's id of a topic, which changes when it is deleted and made again; '' where the broker has none."""
    from confluent_kafka import KafkaException, TopicCollection
    from confluent_kafka.admin import AdminClient

    admin = AdminClient(config)  # must outlive its futures
    try:
        future = admin.describe_topics(TopicCollection([topic]), request_timeout=seconds)[topic]
        return str(future.result(seconds).topic_id)
    except KafkaException as e:
        log.debug("no topic id of %s: %s", topic, e)
        return ""


def end_offsets(config: dict[str, Any], topic: str, seconds: float = 10.0) -> dict[int, int]:
    """partition -> the offset that the next message will get."""
    from confluent_kafka import Consumer, KafkaException, TopicPartition

    partitions = partitions_of(config, topic, seconds)
    consumer = Consumer({**config, "group.id": "predictflow-offsets", "enable.auto.commit": False})
    try:
        return {p: consumer.get_watermark_offsets(TopicPartition(topic, p), timeout=seconds)[1] for p in partitions}
    except KafkaException as e:
        raise _unavailable(config, e) from e
    finally:
        consumer.close()


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
    from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicPartition

    ends = {p: end for p, end in end_offsets(config, topic, seconds).items() if end > 0}
    if not ends:
        return
    consumer = Consumer(
        {**config, "group.id": "predictflow-read", "enable.auto.commit": False, "enable.partition.eof": True}
    )
    try:
        consumer.assign([TopicPartition(topic, p, OFFSET_BEGINNING) for p in ends])
        left = set(ends)
        while left:
            first = consumer.poll(seconds)
            if first is None:
                raise UnavailableError(
                    f"topic {topic}: no answer from {config['bootstrap.servers']} (KAFKA_BOOTSTRAP_SERVERS)",
                    next_step="start the broker, or `predictflow up`",
                )
            messages: list[Any] = [first, *consumer.consume(500, timeout=0)]
            for m in messages:
                if m.error() is not None:
                    if m.error().code() != KafkaError._PARTITION_EOF:
                        raise UnavailableError(f"topic {topic} cannot be read ({m.error().str()})")
                    left.discard(m.partition())  # also where compaction or transactions leave no last message
                elif m.offset() < ends[m.partition()]:
                    yield m
                    if m.offset() + 1 >= ends[m.partition()]:
                        left.discard(m.partition())
    finally:
        consumer.close()


def _unavailable(config: dict[str, Any], error: Exception) -> UnavailableError:
    reason = error.args[0].str() if error.args and hasattr(error.args[0], "str") else str(error)
    return UnavailableError(
        f"Kafka at {config['bootstrap.servers']} (KAFKA_BOOTSTRAP_SERVERS) does not answer ({reason})",
        next_step="start it, or `predictflow up`, and check KAFKA_BOOTSTRAP_SERVERS",
    )
