"""The states that this process wrote last, so that they need not be read again: as bytes, bounded, the oldest go first.

For the one consumer that owns the entities' partition. What Redis holds decides all the same: a write is refused where
another owner has written a newer state, and where the state is gone (see `window_write.FENCED`); then all of them go.
"""

from __future__ import annotations

from collections.abc import Sequence

Key = tuple[str | int, ...]


class HeldStates:
    """Entity key -> the blob of its state. `most_bytes`: of all blobs together; 0: none is held."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._size = most_bytes, 0
        self._blobs: dict[Key, bytes] = {}  # in the order of their last writes

    def __len__(self) -> int:
        return len(self._blobs)

    def of(self, keys: Sequence[Key]) -> list[bytes | None]:
        """What is held of each; None: nothing."""
        return list(map(self._blobs.get, keys))

    def put(self, keys: Sequence[Key], blobs: Sequence[bytes]) -> None:
        """Call with what was sent; `forget` where it turns out that not all of it was written."""
        if not self._most:
            return
        held = self._blobs
        for key, blob in zip(keys, blobs, strict=True):
            self._size += len(blob) - len(held.pop(key, b""))
            held[key] = blob
        while self._size > self._most:
            self._size -= len(held.pop(next(iter(held))))

    def forget(self) -> None:
        """Call when Redis may hold other states than were written last."""
        self._blobs.clear()
        self._size = 0
