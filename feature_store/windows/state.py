"""The states of many entities of a windowed view, by column: what stream and serving compute values from. No I/O.

A state holds what any read at t >= its `visible_at` may need, and nothing more: tiles, sessions, events of OVER windows,
pending events, remembered ids, and how far each partition was read (see `layout.py`). All times are microseconds since the
epoch, UTC. Applying the same events in any batches gives the same values; so does any order that the rules allow.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from feature_store.windows import blob
from feature_store.windows.admission import (
    APPLIED,
    DUPLICATE,
    LATE,
    REPLAYED,
    is_duplicate,
    is_late,
    is_replayed,
    newest_ids,
    read_to,
    remembered,
)
from feature_store.windows.definition import WindowedView
from feature_store.windows.finals import Finals, finals
from feature_store.windows.kept_events import event_rows, events_kept
from feature_store.windows.layout import Layout, layout_of
from feature_store.windows.partials import Numbers
from feature_store.windows.rows import HISTORY_PARTITION, LEAST, NEVER, Array, Rows, bits
from feature_store.windows.sketch import SLOT_BITS, Sketch
from feature_store.windows.state_errors import OverflowedError, TooManyEventsError, WindowStateError
from feature_store.windows.tracks import (
    Held,
    add_to_sessions,
    add_to_tiles,
    sessions_kept,
    tile_keys,
    tiles_kept,
)

__all__ = [
    "APPLIED",
    "DUPLICATE",
    "HISTORY_PARTITION",
    "LATE",
    "NEVER",
    "REPLAYED",
    "Events",
    "Finals",
    "OverflowedError",
    "States",
    "TooManyEventsError",
    "WindowStateError",
]

_SILENT = np.errstate(over="ignore", invalid="ignore")
"""A double that is no longer finite is told as an error by the reads that need it."""
ORDER_BITS = 44
"""Events of one time are ordered by (partition + 1) << ORDER_BITS | offset."""


@dataclass(frozen=True)
class Events:
    """Events as columns of one length, int64; `values` int64 or float64 as `plan.values` says.

    `entity`: place in the States. `partition` -1: history. `watermark`: before the event, NEVER: none. Per entity and
    partition offsets ascend; `mask`, `values` and `id` are those of `plan.numbers_sql` and `event_id_sql`.
    """

    entity: Array
    time: Array
    partition: Array
    offset: Array
    visible_at: Array
    watermark: Array
    mask: Array
    id: Array
    values: list[Array] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.entity)


class States:
    """The states of n entities.

    `visible_at`: newest `_visible_at` applied. `last_seen`: greatest time of a counted event, pending ones left out. NEVER
    where there is none. `ids_forgotten`: how many event ids went, since these States were made, because an entity had more
    than `max_events_per_entity` of them: an event that repeats one counts again. `read`: which are made of a state that the
    online store held; None: not known.
    """

    def __init__(self, layout: Layout, fixed: Array, sections: Sequence[Rows]) -> None:
        self._layout = layout
        self.ids_forgotten = 0
        self.read: Array | None = None
        # `floor`: no watermark will be before it, as the entity's history says. `lost`: the greatest event time that the
        # cap removed although a window may still need it.
        self.visible_at, self.last_seen, self._floor, self._lost = np.ascontiguousarray(fixed.T)
        self._partitions, self._ids, self._pending, self._events, *rest = sections
        self._tracks: list[Held] = []
        i = 0
        for track in layout.tracks:
            rows, sketch = rest[i], Sketch.empty()
            i += 1
            if track.partials.sketches:
                code = rest[i].data[:, 0] + (rows.starts[rest[i].entity] << SLOT_BITS)
                sketch = Sketch(code, rest[i].data[:, 1])
                i += 1
            self._tracks.append(Held(rows, sketch))

    @classmethod
    def empty(cls, definition: WindowedView, n: int) -> States:
        """The states of n entities of which nothing is known."""
        layout = layout_of(definition)
        return cls(layout, np.full((n, 4), NEVER), [Rows.empty(n, w) for w in layout.widths])

    @classmethod
    def decode(cls, definition: WindowedView, blobs: Sequence[bytes | None]) -> States:
        """The states in `blobs`; None and b"" are empty ones.

        DefinitionError: written under another definition or format; WindowStateError: damaged. Either for any of them.
        """
        layout = layout_of(definition)
        return cls(layout, *blob.decode(layout, blobs))

    @classmethod
    def gathered(cls, definition: WindowedView, n: int, parts: Sequence[tuple[States, Array, Array]]) -> States:
        """n states out of several: of each part its states, which of them, and their places here; each place once.

        None of the parts may keep sketches (`has_sketches`).
        """
        layout = layout_of(definition)
        fixed = np.empty((n, 4), np.int64)
        for states, rows, places in parts:
            for i, column in enumerate((states.visible_at, states.last_seen, states._floor, states._lost)):
                fixed[places, i] = column[rows]
        sections = [
            Rows.gathered(n, width, [(states._sections[i], rows, places) for states, rows, places in parts])
            for i, width in enumerate(layout.widths)
        ]
        return cls(layout, fixed, sections)

    @property
    def has_sketches(self) -> bool:
        """Whether the definition counts distinct values."""
        return any(t.partials.sketches for t in self._layout.tracks)

    @property
    def nbytes(self) -> int:
        """Memory of the states."""
        return 32 * len(self) + sum(s.data.nbytes + s.starts.nbytes for s in self._sections)

    @property
    def _sections(self) -> list[Rows]:
        """All but the sketches."""
        return [self._partitions, self._ids, self._pending, self._events, *(held.rows for held in self._tracks)]

    def encode(self) -> list[bytes]:
        """One blob for each entity. The same events give the same bytes, but for the rounding of doubles."""
        sections = [self._partitions, self._ids, self._pending, self._events]
        for track, held in zip(self._layout.tracks, self._tracks, strict=True):
            sections.append(held.rows)
            if track.partials.sketches:
                whose = held.rows.entity[held.sketch.row]
                code = held.sketch.code - (held.rows.starts[whose] << SLOT_BITS)
                sections.append(Rows.of(len(self), whose, np.stack([code, held.sketch.hash], axis=1)))
        fixed = np.stack([self.visible_at, self.last_seen, self._floor, self._lost], axis=1)
        return blob.encode(self._layout, fixed, self.fences, sections)

    def __len__(self) -> int:
        return len(self.visible_at)

    def slice(self, first: int, end: int) -> States:
        """The states of some of the entities, which share what they hold with these."""
        if first <= 0 and end >= len(self):
            return self
        out = copy.copy(self)
        for name in ("visible_at", "last_seen", "_floor", "_lost"):
            setattr(out, name, getattr(self, name)[first:end])
        for name in ("_partitions", "_ids", "_pending", "_events"):
            setattr(out, name, getattr(self, name).slice(first, end))
        out._tracks = [held.slice(first, end) for held in self._tracks]
        out.read = None if self.read is None else self.read[first:end]
        return out

    @property
    def fences(self) -> Array:
        """The sum of (last offset + 1) over the log's partitions: of two states of one entity, the greater is the newer."""
        return _each(self._partitions, self._partitions.data[:, 1] + 1, np.add, 0)

    @property
    def watermark(self) -> Array:
        """The greatest watermark after the entity's own log rows; NEVER without one."""
        return _each(self._partitions, self._partitions.data[:, 2], np.maximum, NEVER)

    @property
    def in_partitions(self) -> Array:
        """From how many of the log's partitions each entity has events."""
        return self._partitions.counts

    def offsets_of(self, i: int) -> dict[int, int]:
        """The last offset applied of each of the log's partitions."""
        rows = self._partitions.data[self._partitions.starts[i] : self._partitions.starts[i + 1]]
        return dict(zip(rows[:, 0].tolist(), rows[:, 1].tolist()))

    def kept(self, i: int) -> dict[str, int]:
        """How many rows of each kind an entity's state holds."""
        names = ["partitions", "ids", "pending", "events", *(f"{t.kind}{j}" for j, t in enumerate(self._layout.tracks))]
        return {name: int(s.counts[i]) for name, s in zip(names, self._sections, strict=True)}

    # --- change -------------------------------------------------------------------------------------------------------

    @_SILENT
    def apply(self, events: Events) -> Array:
        """Counts events; what became of each: APPLIED, REPLAYED, DUPLICATE or LATE.

        Safe to repeat: an offset that the entity's state holds is REPLAYED and changes nothing. Rows of history
        (partition -1) are not known again: for bootstrap only, all of an entity at once and before its log rows.
        """
        layout = self._layout
        outcome = np.zeros(len(events), np.int64)
        outcome[is_replayed(self._partitions, events)] = REPLAYED
        outcome[(outcome == APPLIED) & (events.partition >= 0) & is_late(events, layout.retention)] = LATE
        if layout.has_id:
            able = np.flatnonzero(outcome == APPLIED)
            outcome[able[is_duplicate(self._ids, events, able, layout.retention)]] = DUPLICATE
        fresh, counted = outcome != REPLAYED, outcome == APPLIED
        self.visible_at = _raised(self.visible_at, events.entity[fresh], events.visible_at[fresh])
        after = np.maximum(events.watermark, events.time - layout.lateness)
        logged = fresh & (events.partition >= 0)
        if logged.any():
            some = np.flatnonzero(logged)
            self._partitions = read_to(
                self._partitions, events.entity[some], events.partition[some], events.offset[some], after[some]
            )
        past = counted & (events.partition < 0)
        if past.any():
            self._floor = _raised(self._floor, events.entity[past], after[past])
        some = np.flatnonzero(counted)
        if layout.has_id and len(some):
            self._ids = remembered(self._ids, events.entity[some], events.id[some], events.time[some])
        order = ((events.partition + 1) << ORDER_BITS) | events.offset
        numbers = Numbers(events.time, order, events.mask, events.values)
        if len(some) < len(events):
            numbers = numbers.take(some)
        self._count_on_close(events.entity[some], numbers, events.watermark[some])
        self._count(events.entity[some], numbers)
        return outcome

    def advance(self, t_us: int | Array) -> None:
        """Moves `visible_at` forward, never back: pending events whose time has come count, what no read needs goes."""
        self.visible_at = np.maximum(self.visible_at, t_us)
        nothing = np.empty(0, np.int64)
        values = [nothing.astype(np.float64 if v.is_float else np.int64) for v in self._layout.plan.values]
        self._count(nothing, Numbers(nothing, nothing, nothing, values))

    def _count_on_close(self, entity: Array, numbers: Numbers, watermark: Array) -> None:
        """Events count in the windows that were not closed before them, whatever the reader's clock."""
        for i, track in enumerate(self._layout.tracks):
            if not track.on_close or not len(entity):
                continue
            if track.kind == "tiles":
                key, open_ = tile_keys(track, numbers.time, watermark)
            else:
                key, open_ = numbers.time, (watermark == NEVER) | (numbers.time >= watermark)
            some = np.flatnonzero(open_)
            taken = numbers if len(some) == len(entity) else numbers.take(some)
            if track.kind == "tiles":
                self._tracks[i] = add_to_tiles(track, self._tracks[i], entity[some], key[some], taken)
            else:
                self._tracks[i] = add_to_sessions(track, self._tracks[i], entity[some], taken)

    def _count(self, entity: Array, numbers: Numbers) -> None:
        """Events count from their own time on; then everything that is no longer needed goes."""
        if len(self._pending):
            entity, numbers = self._with_pending(entity, numbers)
        ready = numbers.time <= self.visible_at[entity]
        if not ready.all():
            waiting = np.flatnonzero(~ready)
            self._pending = Rows.empty(len(self), self._layout.pending_width).insert(
                entity[waiting], _pending_rows(numbers.take(waiting))
            )
            entity, numbers = entity[ready], numbers.take(np.flatnonzero(ready))
        elif len(self._pending):
            self._pending = Rows.empty(len(self), self._layout.pending_width)
        self.last_seen = _raised(self.last_seen, entity, numbers.time)
        layout = self._layout
        for i, track in enumerate(layout.tracks):
            if track.on_close:
                continue
            if track.kind == "tiles":
                key, _ = tile_keys(track, numbers.time, numbers.time)
                self._tracks[i] = add_to_tiles(track, self._tracks[i], entity, key, numbers)
            else:
                self._tracks[i] = add_to_sessions(track, self._tracks[i], entity, numbers)
        if layout.over:
            self._events = self._events.insert(*event_rows(layout, entity, numbers))
        self._evict()

    def _with_pending(self, entity: Array, numbers: Numbers) -> tuple[Array, Numbers]:
        data = self._pending.data
        assert numbers.order is not None
        assert numbers.mask is not None
        values = []
        for i, value in enumerate(numbers.values):
            assert value is not None
            values.append(np.concatenate([np.ascontiguousarray(data[:, 3 + i]).view(value.dtype), value]))
        return np.concatenate([self._pending.entity, entity]), Numbers(
            np.concatenate([data[:, 0], numbers.time]),
            np.concatenate([data[:, 1], numbers.order]),
            np.concatenate([data[:, 2], numbers.mask]),
            values,
        )

    def _evict(self) -> None:
        layout = self._layout
        horizon, oldest = self._bounds()
        for i, (track, held) in enumerate(zip(layout.tracks, self._tracks, strict=True)):
            if not len(held.rows):
                continue
            if track.kind == "tiles":
                kept = tiles_kept(track, held.rows, horizon if track.on_close else self.visible_at)
            else:
                kept = sessions_kept(track, held.rows, self.visible_at, horizon, oldest)
            self._tracks[i] = held.keep(kept)
        if layout.has_id:
            self._ids, forgotten = newest_ids(self._ids, oldest, layout.cap)
            self.ids_forgotten += forgotten
        if layout.over:
            self._events, self._lost = events_kept(layout, self._events, self.visible_at, self._lost)

    def _bounds(self) -> tuple[Array, Array]:
        """The least watermark that a later read may use, and the least time that a later event may have (NEVER: any).

        Where an entity's events come from several partitions, the one that is behind is waited for, by one retention
        at most.
        """
        retention = self._layout.retention
        marks = self._partitions.data[:, 2]
        newest = self.watermark
        behind = np.maximum(_each(self._partitions, marks, np.minimum, NEVER), _minus(newest, retention))
        return np.maximum(newest, self._floor), _minus(np.maximum(behind, self._floor), retention)

    # --- read ---------------------------------------------------------------------------------------------------------

    @_SILENT
    def values(
        self,
        t_us: int | Array,
        watermarks: Mapping[int, int] | None = None,
        only: Collection[str] | None = None,
    ) -> Finals:
        """The values at t (one for all, or one each), of the outputs `only` (None: of all). Changes nothing.

        `watermarks`: of partitions, as far as they are known at t; those of the entity's own rows are in the state.
        Of partition -1: what history left off with.
        """
        t = np.broadcast_to(np.asarray(t_us, np.int64), len(self))
        held = self
        if len(self._pending) and (self._pending.data[:, 0] <= t[self._pending.entity]).any():
            held = copy.copy(self)
            held._tracks = list(self._tracks)
            held.advance(t)
        mark = np.maximum(self.watermark, self._floor)
        if watermarks and len(self._partitions):
            known = [watermarks.get(p, NEVER) for p in self._partitions.data[:, 0].tolist()]
            mark = np.maximum(mark, _each(self._partitions, np.array(known, np.int64), np.maximum, NEVER))
        if watermarks:  # an entity with a floor has rows of history
            mark = np.where(self._floor == NEVER, mark, np.maximum(mark, watermarks.get(HISTORY_PARTITION, NEVER)))
        return finals(self._layout, held, t, mark, self.visible_at, only)


def _each(rows: Rows, column: Array, reduce: np.ufunc, none: int) -> Array:
    """A column reduced to one number for each entity."""
    out = np.full(rows.entities, none)
    if len(rows):
        there = np.flatnonzero(rows.counts)
        out[there] = reduce.reduceat(column, rows.starts[there])
    return out


def _raised(numbers: Array, entity: Array, to: Array) -> Array:
    out = numbers.copy()
    np.maximum.at(out, entity, to)
    return out


def _minus(times: Array, length: int) -> Array:
    return np.where(times < LEAST + length, NEVER, times - length)


def _pending_rows(numbers: Numbers) -> Array:
    assert numbers.order is not None
    assert numbers.mask is not None
    values = [bits(v) for v in numbers.values if v is not None]
    return np.stack([numbers.time, numbers.order, numbers.mask, *values], axis=1)
