"""Rows of int64 words of many entities, in one matrix: sorted by entity, then by the first word (their key).

Doubles are kept as their bits. Nothing here changes a matrix that was given to it, so that copies may share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
NEVER = -(2**63)
"""No time: before all times."""
HISTORY_PARTITION = -1
"""`_partition` of the rows that were backfilled: what was before the stream."""
LEAST, GREATEST = -(2**63), 2**63 - 1
_LONG_RUN = 28
"""Rows of a run from which on copying it by itself is cheaper than numbering its rows."""


class Rows:
    """`data`: a row per line; `starts`: where the rows of each entity begin (one more than entities)."""

    __slots__ = ("__dict__", "data", "starts")

    def __init__(self, starts: Array, data: Array) -> None:
        self.starts, self.data = starts, data

    @classmethod
    def empty(cls, entities: int, width: int) -> Rows:
        return cls(np.zeros(entities + 1, np.int64), np.empty((0, width), np.int64))

    @classmethod
    def of(cls, entities: int, entity: Array, data: Array) -> Rows:
        """Rows that are sorted already; `entity` says whose each is."""
        return cls(_starts(entity, entities), data)

    @classmethod
    def gathered(cls, entities: int, width: int, parts: Sequence[tuple[Rows, Array, Array]]) -> Rows:
        """Of each part the rows of some of its entities, which get these numbers here; each number once."""
        counts = np.zeros(entities, np.int64)
        some_counts = [rows.counts[some] for rows, some, _ in parts]
        for (_, _, places), sizes in zip(parts, some_counts, strict=True):
            counts[places] = sizes
        starts = np.zeros(entities + 1, np.int64)
        np.cumsum(counts, out=starts[1:])
        data = np.empty((int(starts[-1]), width), np.int64)
        if not len(data):
            return cls(starts, data)
        # The places of all parts' rows at once: of many small parts these are most of the work.
        sizes = np.concatenate(some_counts)
        at = np.concatenate([starts[places] for _, _, places in parts])
        first = np.concatenate([rows.starts[some] for rows, some, _ in parts])
        if sizes.sum() >= _LONG_RUN * len(sizes):
            for rows, some, places in parts:
                copy_runs(data, starts[places], rows.data, rows.starts[some], rows.counts[some])
            return cls(starts, data)
        to, begin = ranges(at, at + sizes)[0], 0
        out_of = ranges(first, first + sizes)[0]
        for (rows, _, _), n in zip(parts, some_counts, strict=True):
            end = begin + int(n.sum())
            lines(data)[to[begin:end]] = lines(rows.data).take(out_of[begin:end])
            begin = end
        return cls(starts, data)

    def __len__(self) -> int:
        return len(self.data)

    @property
    def entities(self) -> int:
        return len(self.starts) - 1

    @cached_property
    def counts(self) -> Array:
        return np.diff(self.starts)

    @cached_property
    def entity(self) -> Array:
        """Whose each row is."""
        return np.repeat(np.arange(self.entities), self.counts)

    def find(self, entity: Array, key: Array) -> Array:
        """For each (entity, key), the place of the entity's first row with that key or a greater one."""
        if self.entities == 1:
            return np.searchsorted(self.data[:, 0], key)
        low, high = self.starts[entity], self.starts[entity + 1]
        if not len(self.data) or not len(entity):
            return low
        keys = self.data[:, 0]
        if len(entity) > len(keys) // 16:  # else copying all of them takes longer than looking at some
            keys = np.ascontiguousarray(keys)
        for _ in range(int((high - low).max()).bit_length()):
            middle = (low + high) >> 1
            less = keys[np.minimum(middle, len(keys) - 1)] < key
            less &= low < high
            low, high = np.where(less, middle + 1, low), np.where(less, high, np.maximum(middle, low))
        return low

    def holds(self, places: Array, entity: Array, key: Array) -> Array:
        """Which of the places that `find` gave are of a row with exactly that key."""
        there = places < self.starts[entity + 1]
        if len(self.data):
            there &= self.data[np.minimum(places, len(self.data) - 1), 0] == key
        return there

    def slice(self, first: int, end: int) -> Rows:
        """The rows of the entities from `first` to before `end`."""
        starts = self.starts[first : end + 1]
        return Rows(starts - starts[0], self.data[starts[0] : starts[-1]])

    def keep(self, wanted: Array) -> Rows:
        """The rows for which `wanted` is true."""
        if wanted.all():
            return self
        before = np.zeros(len(wanted) + 1, np.int64)
        np.cumsum(wanted, out=before[1:])
        return Rows(before[self.starts], _matrix(lines(self.data)[wanted], self.data.shape[1]))

    def put(self, places: Array, there: Array, entity: Array, data: Array) -> Rows:
        """With rows replaced (`there`) or inserted at the places that `find` gave; the new ones are sorted, too."""
        new = ~there
        inserted = int(np.count_nonzero(new))
        if not inserted:
            out = self.data.copy()
            out[places] = data
            return Rows(self.starts, out)
        at = places[new] + np.arange(inserted)
        out = np.empty((len(self.data) + inserted, self.data.shape[1]), np.int64)
        old = np.ones(len(out), bool)
        old[at] = False
        lines(out)[old] = lines(self.data)
        out[at] = data[new]
        if inserted < len(new):
            replaced = places[there]
            out[replaced + np.searchsorted(places[new], replaced, side="right")] = data[there]
        added = np.zeros(len(self.starts), np.int64)
        np.cumsum(np.bincount(entity[new], minlength=self.entities), out=added[1:])
        return Rows(self.starts + added, out)

    def insert(self, entity: Array, data: Array) -> Rows:
        """With further rows, in any order, which does not show: rows of one key are sorted by their other words."""
        if not len(entity):
            return self
        order = order_of(self.entities, entity, data[:, 0])
        entity, data = entity[order], data[order]
        if not len(self.data):
            return Rows.of(self.entities, entity, _settled(entity, data))
        # Behind the old rows of the same key; no key is the greatest int64.
        places = self.find(entity, data[:, 0] + 1)
        out = self.put(places, np.zeros(len(entity), bool), entity, data)
        at = places + np.arange(len(entity))
        twins = (at > out.starts[entity]) & (out.data[np.maximum(at - 1, 0), 0] == data[:, 0])
        if twins.any():
            self._settle(out.data, at, twins, entity, data[:, 0])
        return out

    def _settle(self, out: Array, at: Array, twins: Array, entity: Array, key: Array) -> None:
        """Sorts those rows of `out` by their other words whose key new rows, which stand `at` these places, share with
        another one (`twins`)."""
        first = np.ones(len(at), bool)
        first[1:] = (entity[1:] != entity[:-1]) | (key[1:] != key[:-1])
        begin = np.flatnonzero(first)
        some = np.flatnonzero(np.logical_or.reduceat(twins, begin))
        begin, end = begin[some], np.append(begin[1:], len(at))[some]
        # As many new rows stand before the old ones of a key as before the new ones of it.
        rows, sizes = ranges(self.find(entity[begin], key[begin]) + begin, at[end - 1] + 1)
        group = np.repeat(np.arange(len(sizes)), sizes)
        out[rows] = out[rows][np.lexsort((*out[rows].T[:0:-1], group))]


def lines(data: Array) -> Array:
    """The rows of a matrix as items, which numpy picks and places several times as fast as rows."""
    return data.view((np.void, data.itemsize * data.shape[1]))[:, 0]


def _matrix(items: Array, width: int) -> Array:
    return items.view(np.int64).reshape(len(items), width)


def _settled(entity: Array, data: Array) -> Array:
    """Sorted rows, those of one entity and key now by their other words too."""
    twin = np.zeros(len(data) + 1, bool)
    twin[1:-1] = (entity[1:] == entity[:-1]) & (data[1:, 0] == data[:-1, 0])
    some = np.flatnonzero(twin[:-1] | twin[1:])
    if not len(some):
        return data
    data = data.copy()
    rows = data[some]
    data[some] = rows[np.lexsort((*rows.T[:0:-1], rows[:, 0], entity[some]))]
    return data


def _starts(entity: Array, entities: int) -> Array:
    starts = np.zeros(entities + 1, np.int64)
    np.cumsum(np.bincount(entity, minlength=entities), out=starts[1:])
    return starts


def packed(entities: int, entity: Array, *keys: Array) -> Array:
    """One int64 per row that sorts as (entity, *keys) does, and is equal where they are."""
    out, size = entity, max(entities, 1)
    if not len(entity):
        return out
    for key in keys:
        least = int(key.min())
        span = int(key.max()) - least + 1
        if size * span >= 2**62:
            key = np.unique(key, return_inverse=True)[1]
            least, span = 0, len(key)
            if size * span >= 2**62:
                out = np.unique(out, return_inverse=True)[1]
                size = len(out)
        out, size = out * span + (key - least), size * span
    return out


def order_of(entities: int, entity: Array, *keys: Array) -> Array:
    """The order that sorts rows by (entity, *keys), stably."""
    return np.argsort(packed(entities, entity, *keys), kind="stable")


class Groups:
    """Consecutive rows that belong together. `starts`: the first row of each group; `size`: of all rows."""

    def __init__(self, starts: Array, size: int) -> None:
        self.starts, self.size = starts, size

    @classmethod
    def of(cls, key: Array) -> Groups:
        """One group per run of equal keys."""
        first = np.empty(len(key), bool)
        first[:1] = True
        np.not_equal(key[1:], key[:-1], out=first[1:])
        return cls(np.flatnonzero(first), len(key))

    def __len__(self) -> int:
        return len(self.starts)

    @cached_property
    def sizes(self) -> Array:
        return np.diff(self.starts, append=self.size)

    def spread(self, of_group: Array) -> Array:
        """What each row's group has."""
        return np.repeat(of_group, self.sizes)


def copy_runs(to: Array, at: Array, data: Array, first: Array, sizes: Array) -> None:
    """Copies `sizes[i]` rows of `data` from `first[i]` on to the rows of `to` from `at[i]` on, for all i."""
    if sizes.sum() < _LONG_RUN * len(sizes):
        to[ranges(at, at + sizes)[0]] = data.take(ranges(first, first + sizes)[0], axis=0)
        return
    for a, f, n in zip(at.tolist(), first.tolist(), sizes.tolist()):
        to[a : a + n] = data[f : f + n]


def ranges(low: Array, high: Array) -> tuple[Array, Array]:
    """The places in all ranges [low, high), and how many each has (none where high <= low)."""
    sizes = np.maximum(high - low, 0)
    ends = np.cumsum(sizes)
    return np.arange(int(ends[-1]) if len(ends) else 0) + np.repeat(low - (ends - sizes), sizes), sizes


def bits(column: Array) -> Array:
    """The column as words."""
    return column.view(np.int64) if column.dtype == np.float64 else column


def stacked(columns: Sequence[Array], rows: int) -> Array:
    """The columns as a matrix of words."""
    out = np.empty((rows, len(columns)), np.int64)
    for i, column in enumerate(columns):
        out[:, i] = bits(column)
    return out
