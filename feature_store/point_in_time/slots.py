"""The match by slots: one pass over the feature rows, in any order, that keeps one candidate per entity row.

The entity rows are sorted by (key, t); each is a slot. A feature row is visible from some time on (its event_timestamp;
as-known also its `created`), so it is a candidate for the first slot of its key at or after that time and for all later
ones of the key. The pass keeps the greatest (event_timestamp, created, place) per slot; a running maximum along each key
then gives every slot its row. No sort of the feature rows, no product of rows and entities however many rows a key has,
and memory for the entity rows alone.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
LEAST = int(np.iinfo(np.int64).min)
GREATEST = int(np.iinfo(np.int64).max)
CELLS_PER_SLOT = 8


class Slots:
    """Candidates per entity row. `codes` numbers the keys from 0 (-1: matches nothing), `t_ns` is each row's time."""

    def __init__(self, codes: Ints, t_ns: Ints) -> None:
        self._rows = len(codes)
        order = _by_key_and_time(codes, t_ns)
        self._order = order
        self._codes = codes[order]
        self._t = t_ns[order]
        self._grid = _Grid(self._codes, self._t) if len(order) else None
        self._event = np.full(len(order), LEAST, np.int64)
        self._created = np.full(len(order), LEAST, np.int64)
        self._place = np.full(len(order), -1, np.int64)

    def add(self, codes: Ints, visible_ns: Ints, event: Ints, created: Ints, place: Ints) -> None:
        """Offers feature rows: `visible_ns` is the time from which each can be seen, `place` (>= 0) where it is stored.

        `event` and `created` are ticks of any unit; they are only compared with each other.
        """
        if self._grid is None:
            return
        slot = self._grid.first_slots(codes, visible_ns)
        some = np.flatnonzero(slot >= 0)
        if len(some) < len(slot):
            slot, event, created, place = slot[some], event[some], created[some], place[some]
        # of neighbours for one slot only the newest counts: in sorted files most rows go here
        last = np.flatnonzero((slot[1:] != slot[:-1]) | (event[1:] <= event[:-1]))
        if len(last) < len(slot) // 2:
            last = np.append(last, len(slot) - 1)
            slot, event, created, place = slot[last], event[last], created[last], place[last]
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


class _Grid:
    """Finds, for a key and a time, the first slot at or after it.

    Each key's time is cut into equal cells, a few for every slot. Of an empty cell the answer is known beforehand, so only
    rows that fall into a cell with slots are searched for, between few slots.
    """

    def __init__(self, codes: Ints, t: Ints) -> None:
        """Of the slots, sorted by code (from 0) and `t`; at least one."""
        self._codes, self._t = codes, t
        self._least, self._greatest = int(t.min()), int(t.max())
        keys = int(codes[-1]) + 1
        self._bits = max((CELLS_PER_SLOT * len(t) // keys).bit_length() - 1, 1)
        self._shift = max((self._greatest - self._least).bit_length() - self._bits, 0)
        cells = self._cells(codes, t)
        starts = np.flatnonzero(np.diff(cells, prepend=-1))
        self._steps = int(np.diff(starts, append=len(t)).max()).bit_length()
        taken = cells[starts]
        # cells up to a taken one lead to its first slot, as far as they are of the same key; the rest to none
        bounds = np.maximum(taken >> self._bits << self._bits, np.concatenate([[0], taken[:-1] + 1]))
        ends = np.stack([bounds, taken + 1], axis=1).ravel()
        leads = np.stack([np.full(len(starts), -1), 2 * starts], axis=1).ravel()
        # half the bytes of int64: the look-up is bound by memory
        leads = leads.astype(np.int32 if len(t) < 2**30 else np.int64)
        self._leads = np.full(keys << self._bits, -1, leads.dtype)
        self._leads[: ends[-1]] = np.repeat(leads, np.diff(ends, prepend=0))
        self._leads[taken] += 1

    def first_slots(self, codes: Ints, t: Ints) -> Ints:
        """For each key and time the first slot of the key at or after it; negative where there is none."""
        found = self._leads.take(self._cells(codes, np.clip(t, self._least, self._greatest)))
        found[t > self._greatest] = -1
        search = np.flatnonzero(found & (found > 0))
        found >>= 1
        slots = found.astype(np.int64)
        slots[search] = self._search(slots[search], codes[search], t[search])
        return slots

    def _search(self, low: Ints, codes: Ints, t: Ints) -> Ints:
        step = 1 << max(self._steps - 1, 0)
        while step:  # slots before `low` are known to be too early; take `step` more of them wherever that holds
            probe = low + (step - 1)
            early = (self._codes.take(probe, mode="clip") == codes) & (self._t.take(probe, mode="clip") < t)
            early &= probe < len(self._t)
            low += early * step
            step >>= 1
        there = (low < len(self._t)) & (self._codes.take(low, mode="clip") == codes)
        return np.where(there, low, -1)

    def _cells(self, codes: Ints, t: Ints) -> Ints:
        """`t` lies between the least and the greatest; their distance may need all 64 bits."""
        part = (t - self._least).view(np.uint64) >> np.uint64(self._shift)
        return (codes << self._bits) + part.view(np.int64)


def _by_key_and_time(codes: Ints, t: Ints) -> Ints:
    """The rows with a code, ordered by it and then by time."""
    rows = np.flatnonzero(codes >= 0)
    if not len(rows):
        return rows
    codes, t = codes[rows], t[rows]
    least = int(t.min())
    bits = (int(t.max()) - least).bit_length()
    if bits + int(codes.max()).bit_length() < 64:
        # one number holds both: sorting it is several times as fast
        return rows[np.argsort((codes << bits) + (t - least))]
    return rows[np.lexsort((t, codes))]
