"""The dead-letter topic: messages that the stream refused, with their bytes as they came and the reason."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from feature_store.errors import UnavailableError

SUFFIX = "-dlq"
_LONGEST_REASON = 1000
_KEPT_BYTES = 100_000
"""Of a message that is too large for the dead-letter topic."""


def dead_letter_topic(topic: str) -> str:
    """The name of a topic's dead-letter topic."""
    return topic + SUFFIX


@dataclass(frozen=True)
class DeadLetter:
    """One refused message; `view` is the feature view that refused it."""

    topic: str
    partition: int
    offset: int
    reason: str
    view: str
    key: bytes | None
    value: bytes | None


class DeadLetterWriter:
    """Produces to the dead-letter topic; `flush` returns when the broker has everything."""

    def __init__(self, config: dict[str, Any], topic: str) -> None:
        from confluent_kafka import Producer

        # The headers make a message larger than it came, so the client's own limit must not be what refuses it.
        settings = {
            "enable.idempotence": True,
            "linger.ms": 5,
            "compression.type": "zstd",
            "message.max.bytes": 100_000_000,
        }
        self._producer = Producer({**config, **settings})
        self._topic = dead_letter_topic(topic)
        self._failed: list[str] = []
        self._too_large: list[DeadLetter] = []

    def write(self, letter: DeadLetter) -> None:
        """Queues one message; a message refused again after a restart is written again."""
        self._produce(letter, letter.value)

    def flush(self, seconds: float = 30.0) -> None:
        """UnavailableError when the broker did not take all within the time: nothing may be committed then."""
        left = self._producer.flush(seconds)
        large, self._too_large = self._too_large, []
        for letter in large:
            self._produce(letter, (letter.value or b"")[:_KEPT_BYTES], truncated=True)
        if large:
            left = self._producer.flush(seconds)
        failed, self._failed = self._failed, []
        if left or failed:
            raise UnavailableError(
                f"dead letters not written to {self._topic} ({failed[0] if failed else f'{left} waiting'})",
                next_step="check KAFKA_BOOTSTRAP_SERVERS and the broker; nothing was committed",
            )

    def _produce(self, letter: DeadLetter, value: bytes | None, truncated: bool = False) -> None:
        headers: list[tuple[str, str | bytes | None]] = [
            ("reason", letter.reason[:_LONGEST_REASON].encode("utf-8", "replace")),
            ("topic", letter.topic.encode()),
            ("partition", str(letter.partition).encode()),
            ("offset", str(letter.offset).encode()),
            ("view", letter.view.encode()),
        ]
        if truncated:
            headers.append(("truncated_from_bytes", str(len(letter.value or b"")).encode()))

        def delivered(error: Any, _message: Any) -> None:
            from confluent_kafka import KafkaError

            if error is None:
                return
            if error.code() == KafkaError.MSG_SIZE_TOO_LARGE and not truncated:
                self._too_large.append(letter)
            else:
                self._failed.append(str(error))

        self._producer.produce(self._topic, key=letter.key, value=value, headers=headers, on_delivery=delivered)


def read_dead_letters(config: dict[str, Any], topic: str, seconds: float = 10.0) -> Iterator[DeadLetter]:
    """The dead letters of `topic`, oldest first, up to what the broker holds now; none where the topic does not exist."""
    from feature_store.topic import read_topic

    for message in read_topic(config, dead_letter_topic(topic), seconds):
        headers = {k: (v or b"").decode("utf-8", "replace") for k, v in message.headers() or []}
        yield DeadLetter(
            topic=headers.get("topic", topic),
            partition=int(headers.get("partition") or -1),
            offset=int(headers.get("offset") or -1),
            reason=headers.get("reason", ""),
            view=headers.get("view", ""),
            key=message.key(),
            value=message.value(),
        )
