"""What the log holds beyond the committed offset of a partition: rows that may be delivered again.

An event that comes again keeps the time at which it first became visible, and the watermark that stood before it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from feature_store.windows.rows import NEVER

__all__ = ["NEVER", "Bools", "Ints", "Logged", "LoggedTails"]

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


@dataclass(frozen=True)
class Logged:
    """Rows of one partition, by offset: when each became visible first, and the watermark before it (NEVER: none)."""

    offsets: Ints
    visible_at: Ints
    watermarks: Ints

    @classmethod
    def none(cls) -> Logged:
        """No rows."""
        nothing = np.empty(0, np.int64)
        return cls(nothing, nothing, nothing)

    def __len__(self) -> int:
        return len(self.offsets)

    def find(self, offsets: Ints) -> tuple[np.ndarray[Any, np.dtype[np.bool_]], Ints]:
        """Whether each offset is here, and its place."""
        at = np.minimum(np.searchsorted(self.offsets, offsets), max(len(self) - 1, 0))
        return (self.offsets[at] == offsets if len(self) else np.zeros(len(offsets), bool)), at

    def since(self, offset: int) -> Logged:
        """The rows from an offset on."""
        keep = self.offsets >= offset
        return Logged(self.offsets[keep], self.visible_at[keep], self.watermarks[keep])


class LoggedTails:
    """The logged rows of each partition that a consumer holds, from its committed offset on."""

    def __init__(self) -> None:
        self._chunks: dict[int, list[Logged]] = {}

    def start(self, partition: int, logged: Logged) -> None:
        """What the log held when the partition was assigned."""
        self._chunks[partition] = [logged] if len(logged) else []

    def stop(self, partition: int) -> None:
        """The partition is another consumer's now."""
        self._chunks.pop(partition, None)

    def add(self, partition: int, logged: Logged) -> None:
        """Rows that were appended."""
        if len(logged):
            self._chunks.setdefault(partition, []).append(logged)

    def committed(self, partition: int, next_offset: int) -> None:
        """What was logged before an offset will not come again."""
        left = [c for c in self._chunks.get(partition, []) if c.offsets[-1] >= next_offset]
        if left:
            self._chunks[partition] = left
        elif partition in self._chunks:
            self._chunks[partition] = []

    def find(self, partitions: Ints, offsets: Ints) -> tuple[Bools, Ints, Ints]:
        """Of each event: whether it is logged, its `_visible_at` and its watermark (0 and NEVER where it is not)."""
        found = np.zeros(len(offsets), bool)
        visible, watermarks = np.zeros(len(offsets), np.int64), np.full(len(offsets), NEVER)
        for p, chunks in self._chunks.items():
            mine = np.flatnonzero(partitions == p) if chunks else np.empty(0, np.int64)
            if not len(mine):
                continue
            wanted = offsets[mine]
            for chunk in chunks:
                if chunk.offsets[-1] < wanted[0] or chunk.offsets[0] > wanted[-1]:
                    continue
                here, at = chunk.find(wanted)
                place = mine[here]
                found[place] = True
                visible[place] = chunk.visible_at[at[here]]
                watermarks[place] = chunk.watermarks[at[here]]
        return found, visible, watermarks
