"""The batch that is on its way into the online store while the next one is prepared: written by `finish`, else it comes again."""

from __future__ import annotations

from collections.abc import Container, Sequence
from dataclasses import dataclass
from typing import Any

from feature_store.batch_result import BatchResult
from feature_store.errors import UnavailableError
from feature_store.event_decode import RawBatch
from feature_store.stream_batch import Begun


@dataclass(frozen=True)
class Delivered:
    """Messages with the time at which the broker took each partition's first one, milliseconds; none where it did not say."""

    raw: RawBatch
    taken_ms: dict[int, int]

    @classmethod
    def of(cls, messages: Sequence[Any]) -> Delivered:
        """confluent_kafka messages without error."""
        raw = RawBatch.consumed(messages)
        first: dict[int, Any] = {}
        wanted = len(set(raw.partitions))
        for partition, message in zip(raw.partitions, messages, strict=True):
            first.setdefault(partition, message)
            if len(first) == wanted:
                break
        stamps = {p: m.timestamp() for p, m in first.items()}
        return cls(raw, {p: at for p, (kind, at) in stamps.items() if kind})

    def __len__(self) -> int:
        return len(self.raw)

    @property
    def next_offsets(self) -> dict[int, int]:
        """Partition -> the offset after its last message; offsets ascend."""
        return {p: o + 1 for p, o in dict(zip(self.raw.partitions, self.raw.offsets, strict=True)).items()}

    def only(self, partitions: Container[int]) -> Delivered:
        """The messages of some partitions."""
        return Delivered(self.raw.only(partitions), {p: at for p, at in self.taken_ms.items() if p in partitions})

    def __add__(self, later: Delivered) -> Delivered:
        """These messages and later ones."""
        return Delivered(self.raw + later.raw, later.taken_ms | self.taken_ms)


class InHand:
    """A batch that every view has begun, in the order of the views. `now_us`: the latest clock by which a view placed it."""

    def __init__(self, batch: Delivered, begun: Sequence[Begun], now_us: int) -> None:
        self.batch, self.now_us = batch, now_us
        self._begun: Sequence[Begun] | None = begun

    def finish(self) -> list[BatchResult]:
        """What became of it in each view. UnavailableError: it is not wholly written, or was not at the last call: the batch
        must be applied again."""
        if self._begun is None:
            raise UnavailableError("the last batch is not written")
        begun, self._begun = self._begun, None
        try:
            return [b.finish() for b in begun]
        except BaseException:
            drop(begun)
            raise


def drop(begun: Sequence[Begun]) -> None:
    """Gives up what was begun."""
    for b in begun:
        b.drop()
