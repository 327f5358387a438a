"""The states of the last few writes as they stood in memory, so that the next batch need not unpack them. Bounded."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from feature_store.held_states import Key
from feature_store.windows.rows import Array
from feature_store.windows.state import States


class RecentStates:
    """`most_bytes`: of all of them together; the oldest write goes first. What is kept must not be changed."""

    def __init__(self, most_bytes: int) -> None:
        self._most, self._size = most_bytes, 0
        self._writes: deque[tuple[int, States]] = deque()  # number of the first state, states
        self._numbers: dict[Key, int] = {}  # entity key -> the number of its newest state, maybe of a write that went
        self._next = 0

    def put(self, keys: Sequence[Key], states: States) -> None:
        """Call with what was written."""
        if not len(states):
            return
        size = states.nbytes
        if size > self._most or states.has_sketches:
            self.forget()
            return
        self._numbers.update(zip(keys, range(self._next, self._next + len(keys)), strict=True))
        self._writes.append((self._next, states))
        self._next += len(keys)
        self._size += size
        while self._size > self._most:
            self._size -= self._writes.popleft()[1].nbytes
        first = self._writes[0][0]
        if len(self._numbers) > 2 * (self._next - first):
            self._numbers = {key: number for key, number in self._numbers.items() if number >= first}

    def of(self, keys: Sequence[Key]) -> list[tuple[States, Array, Array]]:
        """By write: its states, which of them, and whose they are (places in `keys`). Keys that are not kept are in none."""
        if not self._writes:
            return []
        find = self._numbers.get
        numbers = np.fromiter((find(k, -1) for k in keys), np.int64, len(keys))
        firsts = np.array([first for first, _ in self._writes])
        which = np.searchsorted(firsts, numbers, side="right") - 1
        found = []
        for i, (first, states) in enumerate(self._writes):
            places = np.flatnonzero(which == i)
            if len(places):
                found.append((states, numbers[places] - first, places))
        return found

    def forget(self) -> None:
        """Call when Redis may hold other states than were written last."""
        self._writes.clear()
        self._numbers.clear()
        self._size = 0
