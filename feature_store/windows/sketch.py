"""COUNT(DISTINCT): of each row of a track and each of its distinct counts, the SKETCH_SIZE smallest hashes of the values seen.

Fewer are the exact number; so many tell how dense the hashes are.
A union of sketches is the sketch of the union, whatever the order. Vectorised; pure.
"""

from __future__ import annotations

import numpy as np

from feature_store.windows.partials import Numbers, Partials
from feature_store.windows.plan import SKETCH_SIZE
from feature_store.windows.rows import Array

SLOT_BITS = 6
"""A definition has at most 63 bits, so at most as many distinct counts."""


class Sketch:
    """`code`: row << SLOT_BITS | slot; `hash`. Sorted by both, each pair once, at most SKETCH_SIZE of a code."""

    __slots__ = ("code", "hash")

    def __init__(self, code: Array, hash: Array) -> None:
        self.code, self.hash = code, hash

    @classmethod
    def empty(cls) -> Sketch:
        return cls(np.empty(0, np.int64), np.empty(0, np.int64))

    @classmethod
    def of(cls, code: Array, hash: Array) -> Sketch:
        """From pairs in any order, repeated or not."""
        if len(code):
            order = np.lexsort((hash, code))
            code, hash = code[order], hash[order]
            again = np.zeros(len(code), bool)
            again[1:] = (code[1:] == code[:-1]) & (hash[1:] == hash[:-1])
            if again.any():
                code, hash = code[~again], hash[~again]
            first = np.flatnonzero(np.append(True, code[1:] != code[:-1]))
            sizes = np.diff(first, append=len(code))
            if int(sizes.max()) > SKETCH_SIZE:
                kept = np.arange(len(code)) - np.repeat(first, sizes) < SKETCH_SIZE
                code, hash = code[kept], hash[kept]
        return cls(code, hash)

    @classmethod
    def lifted(cls, partials: Partials, numbers: Numbers, group: Array) -> Sketch:
        """Of events, each belonging to a group."""
        codes, hashes = [], []
        for slot, part in enumerate(partials.sketches):
            on, value = numbers.on(part.bit), numbers.value(part.value)
            codes.append(((group if on is None else group[on]) << SLOT_BITS) | slot)
            hashes.append(value if on is None else value[on])
        return cls.of(np.concatenate(codes), np.concatenate(hashes))

    def __len__(self) -> int:
        return len(self.code)

    def slice(self, first: int, end: int) -> Sketch:
        """Those of the rows from `first` to before `end`."""
        if not len(self):
            return self
        low, high = np.searchsorted(self.code, [first << SLOT_BITS, end << SLOT_BITS]).tolist()
        return Sketch(self.code[low:high] - (first << SLOT_BITS), self.hash[low:high])

    @property
    def row(self) -> Array:
        return self.code >> SLOT_BITS

    def moved(self, row: Array) -> Sketch:
        """With the rows numbered anew; those that become -1 are left out. Rows that get one number are merged."""
        to = row[self.row]
        kept = to >= 0
        code = (to << SLOT_BITS) | (self.code & ((1 << SLOT_BITS) - 1))
        return Sketch.of(code[kept], self.hash[kept])

    def with_(self, other: Sketch) -> Sketch:
        """The union."""
        if not len(other):
            return self
        return Sketch.of(np.concatenate([self.code, other.code]), np.concatenate([self.hash, other.hash]))

    def numbers(self, groups: int, slot: int) -> Array:
        """How many different values each of `groups` rows has seen in a slot."""
        mine = np.flatnonzero((self.code & ((1 << SLOT_BITS) - 1)) == slot)
        row = self.code[mine] >> SLOT_BITS
        out = np.bincount(row, minlength=groups).astype(np.int64)
        full = np.flatnonzero(out >= SKETCH_SIZE)
        if len(full):
            last = np.searchsorted(row, full, side="right") - 1
            for group, kth in zip(full.tolist(), self.hash[mine[last]].tolist()):
                out[group] = estimate(kth)
        return out


def estimate(kth: int) -> int:
    """The number of different values whose SKETCH_SIZE-th smallest hash is `kth` (not negative, below 2**63)."""
    return round((SKETCH_SIZE - 1) * 2.0**63 / float(kth)) if kth else 2**63 - 1
