"""The watermark of each partition, as it stands before an event: a property of the log, whatever the batches.

Before an event it is the greatest event time over the smaller offsets of its partition, less the allowed lateness; or what
an idle row, or the history that the states were made from, puts it at, where that is later. It never goes back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from feature_store.event_log import EventLog
from feature_store.logged import NEVER, Ints, Logged


@dataclass
class _Partition:
    value: int
    idle: list[tuple[int, int]] = field(default_factory=list)
    """Offsets and watermarks of idle rows that the events after those offsets have not met yet."""


class Watermarks:
    """The watermarks of the partitions that a consumer holds. Times are microseconds; NEVER: no watermark yet."""

    def __init__(self, allowed_lateness_us: int) -> None:
        self._lateness = allowed_lateness_us
        self._partitions: dict[int, _Partition] = {}

    def start(self, log: EventLog, timestamp: str, partition: int, offset: int, logged: Logged, history: int) -> None:
        """The watermark before an offset, as the log tells it. `logged`: the rows from the offset on, to be met again."""
        value = history
        if len(logged):
            value = max(value, int(logged.watermarks[0]))
        else:
            newest = log.newest(partition, offset, timestamp)
            if newest is not None:
                value = max([value, newest[0], newest[1] - self._lateness])
        idle = log.idle(partition)
        value = max([value, *(w for o, w in idle if o < offset)])
        self._partitions[partition] = _Partition(value, [i for i in idle if i[0] >= offset])

    def stop(self, partition: int) -> None:
        """The partition is another consumer's now."""
        self._partitions.pop(partition, None)

    def of(self, partition: int) -> int:
        """The watermark after all events and idle rows so far."""
        held = self._partitions.get(partition)
        return NEVER if held is None else max([held.value, *(w for _, w in held.idle)])

    def before(self, partitions: Ints, offsets: Ints, times: Ints, logged: Ints) -> tuple[Ints, dict[int, int]]:
        """The watermark before each event of a batch, and after the batch by partition. Changes nothing: see `advance`.

        Offsets ascend within each partition. `logged`: an event's watermark where it is in the log already, else NEVER.
        """
        before = np.empty(len(times), np.int64)
        after = {}
        for p in np.unique(partitions).tolist():
            mine = np.flatnonzero(partitions == p)
            held = self._partitions.get(p) or _Partition(NEVER)
            until = np.full(len(mine) + 1, NEVER, np.int64)  # what is known before each event, and after the last
            until[0] = held.value
            until[1:] = times[mine] - self._lateness
            known = logged[mine]
            np.maximum(until[:-1], known, out=until[:-1])
            for offset, watermark in held.idle:
                at = int(np.searchsorted(offsets[mine], offset, side="right"))
                until[at] = max(int(until[at]), watermark)
            running = np.maximum.accumulate(until)
            before[mine] = np.where(known != NEVER, known, running[:-1])
            after[p] = int(running[-1])
        return before, after

    def advance(self, after: Mapping[int, int], next_offsets: Mapping[int, int]) -> None:
        """Call when the batch is in the log: what `before` gave as its end, and the offset after its last."""
        for p, value in after.items():
            held = self._partitions.setdefault(p, _Partition(NEVER))
            held.value = max(held.value, value)
            held.idle = [i for i in held.idle if i[0] >= next_offsets[p]]

    def idle(self, partition: int, watermark: int) -> None:
        """An idle row was logged."""
        held = self._partitions.setdefault(partition, _Partition(NEVER))
        held.value = max(held.value, watermark)
