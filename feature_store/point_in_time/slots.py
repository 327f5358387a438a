"""The match by slots: one pass over the feature rows, in any order, that keeps one candidate per entity row.

The entity rows are sorted by (key, t); each is a slot. A feature row is visible from some time on (its event_timestamp;
as-known also its `created`), so it is a candidate for the first slot of its key at or after that time and for all later
ones of the key. The pass keeps the greatest (event_timestamp, created, place) per slot; a running maximum along each key
then gives every slot its row. No sort of the feature rows, no product of rows and entities however many rows a key has,
and memory for the entity rows alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
LEAST = int(np.iinfo(np.int64).min)
GREATEST = int(np.iinfo(np.int64).max)


class Slots:
    """Candidates per entity row. `codes` numbers the keys from 0 (-1: matches nothing), `t_ns` is each row's time."""

    def __init__(self, codes: Ints, t_ns: Ints) -> None:
        self._rows = len(codes)
        order = np.lexsort((t_ns, codes))
        order = order[np.searchsorted(codes[order], 0) :]
        self._order = order
        self._codes = codes[order]
        self._t = t_ns[order]
        count = int(self._codes[-1]) + 1 if len(order) else 0
        bounds = np.searchsorted(self._codes, np.arange(count + 1))
        # half the bytes of int64: the search is bound by memory
        self._narrow: Any = np.int32 if len(order) < 2**30 else np.int64
        self._starts, self._ends = bounds[:-1].astype(self._narrow), bounds[1:].astype(self._narrow)
        self._steps = int(np.diff(bounds).max()).bit_length() if count else 0
        self._before = np.concatenate([np.array([LEAST]), self._t])  # [i]: the time of the slot before slot i
        self._event = np.full(len(order), LEAST, np.int64)
        self._created = np.full(len(order), LEAST, np.int64)
        self._place = np.full(len(order), -1, np.int64)

    def add(self, codes: Ints, visible_ns: Ints, event: Ints, created: Ints, place: Ints) -> None:
        """Offers feature rows: `visible_ns` is the time from which each can be seen, `place` (>= 0) where it is stored.

        `event` and `created` are ticks of any unit; they are only compared with each other.
        """
        slot, end = self._first_slot(codes, visible_ns)
        some = np.flatnonzero(slot < end)
        slot, event, created, place = slot[some], event[some], created[some], place[some]
        before = self._event[slot]
        np.maximum.at(self._event, slot, event)
        best = np.flatnonzero(self._event[slot] == event)
        self._forget(slot[best[before[best] < event[best]]], created=True)
        slot, created, place = slot[best], created[best], place[best]
        before = self._created[slot]
        np.maximum.at(self._created, slot, created)
        best = np.flatnonzero(self._created[slot] == created)
        self._forget(slot[best[before[best] < created[best]]], created=False)
        np.maximum.at(self._place, slot[best], place[best])

    def _forget(self, risen: Ints, *, created: bool) -> None:
        """A slot that rose keeps nothing of the rows it had."""
        self._place[risen] = -1
        if created:
            self._created[risen] = LEAST

    def _first_slot(self, codes: Ints, visible_ns: Ints) -> tuple[Any, Any]:
        """For each row: the first slot of its key at or after its time, and the end of the key's slots."""
        low: Any = self._starts.take(codes)
        end: Any = self._ends.take(codes)
        step = 1 << max(self._steps - 1, 0)
        while step:  # slots before `low` are known to be too early; take `step` more of them wherever that holds
            probe = low + step
            inside = probe <= end
            np.minimum(probe, end, out=probe)
            inside &= self._before.take(probe) < visible_ns
            low += inside * self._narrow(step)
            step >>= 1
        return low, end

    def places(self, lowest: Ints | None, seen_when_happened: bool) -> Ints:
        """For each entity row, in the order given at first: the place of its feature row, or -1.

        `lowest` bounds each entity row's event ticks from below (ttl). `seen_when_happened`: every row was visible from its
        event time on, so a later slot's candidate is the newer one.
        """
        slots = len(self._order)
        result = np.full(self._rows, -1, np.int64)
        if not slots:
            return result
        filled = np.flatnonzero(self._place >= 0)
        ranked = filled
        if not seen_when_happened:
            ranked = filled[np.lexsort((self._place[filled], self._created[filled], self._event[filled]))]
        rank = np.zeros(slots, np.int64)
        rank[ranked] = np.arange(1, len(ranked) + 1)
        base = self._codes * (len(ranked) + 1)
        best = np.maximum.accumulate(base + rank) - base
        found = np.flatnonzero(best > 0)
        winner = ranked[best[found] - 1]
        rows = self._order[found]
        if lowest is not None:
            fresh = self._event[winner] >= lowest[rows]
            winner, rows = winner[fresh], rows[fresh]
        result[rows] = self._place[winner]
        return result
