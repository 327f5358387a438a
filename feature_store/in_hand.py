"""The batch that is on its way into the online store while the next one is prepared: written by `finish`, else it comes again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feature_store.batch_result import BatchResult
from feature_store.errors import UnavailableError
from feature_store.event_decode import RawBatch
from feature_store.stream_batch import Begun


@dataclass(frozen=True)
class Delivered:
    """Messages with the time at which the broker took each partition's first one, milliseconds; none where it did not say."""

    raw: RawBatch
    taken_ms: dict[int, int]

    def __add__(self, later: Delivered) -> Delivered:
        """These messages and later ones."""
        return Delivered(self.raw + later.raw, later.taken_ms | self.taken_ms)


class InHand:
    """A batch that every view has begun, in the order of the views. `now_us`: the clock by which it was placed."""

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
