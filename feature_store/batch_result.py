"""What became of a batch of messages, for one view: the counts, and what was refused with the reason."""

from __future__ import annotations

from dataclasses import dataclass, field

from feature_store.event_decode import Raw
from feature_store.logged import NEVER


@dataclass
class PartitionResult:
    """What became of one partition's part of a batch. `watermark_us`: after it, NEVER: none.

    `erased`: messages of entities on the erasure list, which go nowhere, not even to the dead letters; `late`: events older than the newest of their partition so far; `dropped`: of them too late to count.
    """

    applied: int = 0
    erased: int = 0
    duplicates: int = 0
    replayed: int = 0
    late: int = 0
    dropped: int = 0
    watermark_us: int = NEVER


@dataclass
class BatchResult:
    """What became of a batch. `clock_us`: the newest `_visible_at` given, 0 if none; `refused`: with the reason.

    `without_value`: entities written without values; `fenced`: not written, a newer owner of their partition having been there.
    `ids_forgotten`: event ids that went because one entity had too many; `damaged`: entities whose state cannot be read, so
    that their events are in the log only; `moved`: entities with events in one more partition than before.
    """

    without_value: int = 0
    ids_forgotten: int = 0
    damaged: int = 0
    moved: int = 0
    fenced: int = 0
    clock_us: int = 0
    refused: list[tuple[Raw, str]] = field(default_factory=list)
    partitions: dict[int, PartitionResult] = field(default_factory=dict)

    def total(self, name: str) -> int:
        """A count over all partitions: applied, erased, duplicates, replayed, late or dropped."""
        return sum(getattr(p, name) for p in self.partitions.values())
