"""Tiles and sessions: events merged into the rows of a track, and rows that no read needs any more dropped. Pure."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from feature_store.windows.layout import Track
from feature_store.windows.partials import Numbers
from feature_store.windows.rows import LEAST, NEVER, Array, Groups, Rows, bits, order_of, packed, stacked
from feature_store.windows.sketch import Sketch


@dataclass
class Held:
    """The rows of one track, and their sketches (empty where it counts nothing distinct)."""

    rows: Rows
    sketch: Sketch

    def slice(self, first: int, end: int) -> Held:
        """The rows of the entities from `first` to before `end`."""
        row = self.rows.starts[[first, min(end, self.rows.entities)]]
        return Held(self.rows.slice(first, end), self.sketch.slice(int(row[0]), int(row[1])))

    def keep(self, wanted: Array) -> Held:
        """The rows for which `wanted` is true."""
        if wanted.all():
            return self
        return Held(self.rows.keep(wanted), self.sketch.moved(_renumbered(wanted)) if len(self.sketch) else self.sketch)


def _renumbered(wanted: Array) -> Array:
    return np.where(wanted, np.cumsum(wanted) - 1, -1)


# --- tiles ------------------------------------------------------------------------------------------------------------


def tile_keys(track: Track, time: Array, watermark: Array) -> tuple[Array, Array]:
    """The key of each event's row, and whether a window may still count the event.

    On close, an event counts in the windows that end after the watermark before it: of the `windows` that a tile belongs
    to, the first `skip` had closed.
    """
    tile = time // track.length_us
    if not track.on_close:
        return tile, np.ones(len(time), bool)
    skip = np.where(watermark == NEVER, 0, np.clip(watermark // track.length_us - tile, 0, track.windows))
    return tile * track.factor + skip, skip < track.windows


def tiles_kept(track: Track, rows: Rows, horizon: Array) -> Array:
    """The rows of tiles that a window read at `horizon` (visible_at, on close the watermark) or later holds."""
    oldest = np.where(horizon == NEVER, LEAST // 2, horizon // track.length_us - track.windows + (not track.on_close))
    return rows.data[:, 0] // track.factor >= oldest[rows.entity]


def add_to_tiles(track: Track, held: Held, entity: Array, key: Array, numbers: Numbers) -> Held:
    """With events, whose rows `key` names."""
    if not len(entity):
        return held
    rows, partials = held.rows, track.partials
    code = packed(rows.entities, entity, key)
    order = np.argsort(code, kind="stable")
    groups = Groups.of(code[order])
    first = order[groups.starts]
    whose, which = entity[first], key[first]
    places = rows.find(whose, which)
    there = rows.holds(places, whose, which)
    # The rows that exist already take part as one more event each, and then are written back.
    group = groups.spread(np.arange(len(groups)))
    old = places[there]
    columns = [c[order] for c in partials.lift(numbers)]
    if len(old):
        again = np.flatnonzero(there)
        merged = np.argsort(np.concatenate([group, again]), kind="stable")
        held_columns = partials.columns(rows.data[old, track.keys :])
        combined = partials.combine(
            [np.concatenate(pair)[merged] for pair in zip(columns, held_columns)],
            Groups.of(np.concatenate([group, again])[merged]),
        )
    else:
        combined = partials.combine(columns, groups)
    added = rows.put(places, there, whose, stacked([which, *combined], len(which)))
    sketch = held.sketch
    if partials.sketches:
        inserted = np.cumsum(~there)
        now = places + inserted - ~there
        if inserted[-1]:
            fresh = np.zeros(len(rows) + 1, np.int64)
            np.add.at(fresh, places[~there], 1)
            sketch = sketch.moved(np.arange(len(rows)) + np.cumsum(fresh)[:-1])
        sketch = sketch.with_(Sketch.lifted(partials, numbers.take(order), now[group]))
    return Held(added, sketch)


# --- sessions ---------------------------------------------------------------------------------------------------------


def add_to_sessions(track: Track, held: Held, entity: Array, numbers: Numbers) -> Held:
    """With events; sessions that are now at most a gap apart are one."""
    if not len(entity):
        return held
    rows, partials = held.rows, track.partials
    n, m = len(rows), len(entity)
    whose = np.concatenate([rows.entity, entity])
    first = np.concatenate([rows.data[:, 0], numbers.time])
    last = np.concatenate([rows.data[:, 1], numbers.time])
    order = order_of(rows.entities, whose, first)
    whose, first, last = whose[order], first[order], last[order]
    reach = _running_last(whose, last)
    opens = np.ones(n + m, bool)
    opens[1:] = (whose[1:] != whose[:-1]) | (first[1:] - reach[:-1] > track.length_us)
    groups = Groups(np.flatnonzero(opens), n + m)
    lifted = partials.lift(numbers)
    if n:
        lifted = [np.concatenate(pair) for pair in zip(partials.columns(rows.data[:, 2:]), lifted)]
    combined = partials.combine([c[order] for c in lifted], groups)
    whose, first = whose[groups.starts], first[groups.starts]
    last = np.maximum.reduceat(last, groups.starts)
    sketch = held.sketch
    if partials.sketches:
        row = np.empty(n + m, np.int64)
        row[order] = groups.spread(np.arange(len(groups)))
        sketch = sketch.moved(row[:n]).with_(Sketch.lifted(partials, numbers, row[n:]))
    return Held(Rows.of(rows.entities, whose, stacked([first, last, *map(bits, combined)], len(groups))), sketch)


def _running_last(whose: Array, last: Array) -> Array:
    """The greatest `last` so far of each entity, whose rows stand together."""
    least, span = int(last.min()), int(last.max()) - int(last.min()) + 1
    if (int(whose[-1]) + 1) * span < 2**62:
        return np.maximum.accumulate(whose * span + (last - least)) - whose * span + least
    values, rank = np.unique(last, return_inverse=True)
    return values[np.maximum.accumulate(whose * len(values) + rank) - whose * len(values)]


def sessions_kept(track: Track, rows: Rows, visible_at: Array, floor: Array, oldest: Array) -> Array:
    """The sessions that a read at `visible_at` or later may answer with, or that an event may still reach.

    `floor`: no watermark will be before it. `oldest`: no event that counts will be (NEVER: any may come).
    """
    gap = track.length_us
    last, whose = rows.data[:, 1], rows.entity
    if not track.on_close:
        bound = np.minimum(oldest, visible_at)
        return last >= np.where(bound < LEAST + gap, LEAST, bound - gap)[whose]
    bound = np.minimum(oldest, floor)
    kept = last >= np.where(bound < LEAST + gap, LEAST, bound - gap)[whose]
    closed = closed_session(rows, gap, floor)
    kept[closed[closed >= 0]] = True  # the newest that is closed, until the next one closes
    return kept


def closed_session(rows: Rows, gap: int, watermark: Array) -> Array:
    """The place of each entity's newest session that the watermark has closed; -1: none."""
    if not len(rows):
        return np.full(rows.entities, -1)
    late = watermark[rows.entity]
    closed = (late != NEVER) & (late - gap > rows.data[:, 1])
    out = np.full(rows.entities, -1)
    np.maximum.at(out, rows.entity[closed], np.flatnonzero(closed))
    return out
