"""The dead-letter topic: messages that the stream refused, with their bytes as they came and the reason."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from feature_store.errors import UnavailableError

SUFFIX = "-dlq"
REPLAYED = "replayed"
"""Header of a mark in the dead-letter topic: the identity of a letter that was sent again."""
SENT_TO = "sent_to"
"""Header of the same mark: where in the topic it then stood, should it be refused there again."""
_LETTERS_AT_ONCE = 100
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
    truncated_from: int | None = None
    """Bytes of a value that was too large for the dead-letter topic; `value` is then its beginning."""
    replayed: bool = False
    first: str = ""
    """Of a message that was sent again and refused again: the identity of the one that came first."""

    @property
    def place(self) -> str:
        """Where the message was refused."""
        return f"{self.topic}/{self.partition}/{self.offset}"

    @property
    def content(self) -> str:
        """A digest of key and value."""
        return hashlib.sha256(b"\0".join([b"%d" % (self.key is None), self.key or b"", self.value or b""])).hexdigest()[
            :32
        ]

    @property
    def identity(self) -> str:
        """The message: the same however often, by whichever view and after however many replays it was refused; another
        one in a topic made again."""
        return self.first or f"{self.place}/{self.content}"


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


def read_dead_letters(config: dict[str, Any], topic: str, seconds: float = 10.0) -> list[DeadLetter]:
    """The dead letters of `topic`, oldest first, up to what the broker holds now; none where the topic does not exist.

    `replayed` tells those that `replay_dead_letters` sent again.
    """
    from feature_store.topic import read_topic

    letters, replayed = [], set()
    first: dict[tuple[str, str], str] = {}  # place and content of what was sent again -> identity of what came first
    for message in read_topic(config, dead_letter_topic(topic), seconds):
        headers = {k: (v or b"").decode("utf-8", "replace") for k, v in message.headers() or []}
        if REPLAYED in headers:
            replayed.add(headers[REPLAYED])
            if SENT_TO in headers:
                first[headers[SENT_TO], headers[REPLAYED].rpartition("/")[2]] = headers[REPLAYED]
            continue
        letters.append(
            DeadLetter(
                topic=headers.get("topic", topic),
                partition=int(headers.get("partition") or -1),
                offset=int(headers.get("offset") or -1),
                reason=headers.get("reason", ""),
                view=headers.get("view", ""),
                key=message.key(),
                value=message.value(),
                truncated_from=int(headers["truncated_from_bytes"]) if "truncated_from_bytes" in headers else None,
            )
        )
    letters = [replace(x, first=first.get((x.place, x.content), "")) for x in letters]
    return [replace(x, replayed=True) if x.identity in replayed else x for x in letters]


@dataclass(frozen=True)
class Replayed:
    """What a replay did: messages sent again; letters that had been replayed before; letters that hold a part only."""

    sent: list[DeadLetter]
    before: int
    truncated: int


def replay_dead_letters(
    config: dict[str, Any], topic: str, letters: Sequence[DeadLetter], *, again: bool = False, dry_run: bool = False
) -> Replayed:
    """Produces the messages of `letters` to `topic` once more, with their key and bytes, each to the partition that it came
    in, as the events of its entity do; those replayed before only `again`.

    A message that several views refused, or that was refused again after a replay, is sent once. Each is sent in one
    transaction with a mark in the dead-letter topic, so that a replay that is killed, or two at once, send nothing twice. UnavailableError: the
    broker does not take a transaction; what was sent before it stays sent, and is known.
    """
    wanted = list({x.identity: x for x in letters}.values())
    whole = [x for x in wanted if x.truncated_from is None]
    todo = [x for x in whole if again or not x.replayed]
    result = Replayed(todo, len(whole) - len(todo), len(wanted) - len(whole))
    if dry_run or not todo:
        return result
    from confluent_kafka import KafkaException, Producer

    producer = Producer(
        {**config, "transactional.id": f"predictflow-dlq-{topic}", "message.max.bytes": 100_000_000, "linger.ms": 5}
    )
    try:
        producer.init_transactions(30)
        if not again:  # another replay may have run since the letters were read, and can no more
            done = {x.identity for x in read_dead_letters(config, topic) if x.replayed}
            todo = [x for x in todo if x.identity not in done]
        for i in range(0, len(todo), _LETTERS_AT_ONCE):
            producer.begin_transaction()
            some = todo[i : i + _LETTERS_AT_ONCE]
            places: dict[str, str] = {}
            for x in some:
                headers: list[tuple[str, str | bytes | None]] = [("replayed_from", x.place.encode())]
                # Its own partition: the producer's choice for the key, which our client need not share (Java: murmur2).
                producer.produce(topic, x.value, x.key, x.partition, headers=headers, on_delivery=_placed(places, x))
            producer.flush(60)  # the marks say where they went
            for x in some:
                headers = [(REPLAYED, x.identity.encode())]
                if x.identity in places:  # else the commit fails
                    headers.append((SENT_TO, places[x.identity].encode()))
                producer.produce(dead_letter_topic(topic), key=x.key, headers=headers)
            producer.commit_transaction(60)
    except KafkaException as e:
        raise UnavailableError(
            f"dead letters not replayed ({e.args[0].str()})",
            next_step="run the same command again: what was sent is not sent twice",
        ) from e
    return Replayed(todo, len(whole) - len(todo), result.truncated)


def _placed(places: dict[str, str], letter: DeadLetter) -> Callable[[Any, Any], None]:
    def delivered(error: Any, message: Any) -> None:
        if error is None:
            places[letter.identity] = f"{message.topic()}/{message.partition()}/{message.offset()}"

    return delivered
