"""What the state of a definition holds: its tracks, the columns of their rows, and where each aggregate is read.

| section | a row |
|---|---|
| partitions | partition, last offset, watermark after it |
| ids | id, greatest event time it counted with |
| pending | event time beyond `visible_at`, order, mask, values |
| events (OVER) | event time, order (FIRST, LAST only), mask, values, of events that an OVER statement reads |
| a tile track, open | tile, partial |
| a tile track, on close | tile and how many of its windows had closed before the events, partial |
| a session track | first and last event time, partial |
| a track's sketch | row of the track and slot, hash |
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

from feature_store.windows.definition import WindowedView
from feature_store.windows.ir import Aggregate, AggregateRef, walk
from feature_store.windows.partials import Partials, Place
from feature_store.windows.plan import Input, Plan, plan_of
from feature_store.windows.rows import NEVER


@dataclass(frozen=True)
class Track:
    """Rows that several statements share. Tiles: `length_us` long, `windows` of them in the longest window; sessions: the gap."""

    kind: Literal["tiles", "sessions"]
    length_us: int
    on_close: bool
    windows: int
    partials: Partials

    @property
    def keys(self) -> int:
        return 1 if self.kind == "tiles" else 2

    @property
    def width(self) -> int:
        return self.keys + self.partials.width

    @property
    def factor(self) -> int:
        """A tile row's key is `tile * factor + skip`."""
        return self.windows + 1 if self.on_close else 1


class Layout:
    """Of one definition. By statement: `tracked`, its track (None: OVER); `places`, where its aggregates are."""

    def __init__(self, definition: WindowedView) -> None:
        self.definition = definition
        self.plan: Plan = plan_of(definition)
        source = definition.source
        self.hash = int.from_bytes(bytes.fromhex(definition.hash), "little", signed=True)
        self.retention, self.lateness = source.retention_us, source.allowed_lateness_us
        self.cap = definition.max_events_per_entity
        self.has_id = source.event_id is not None
        self.statements = definition.statements
        self.outputs = definition.outputs
        grids: dict[tuple[str, int, bool], list[int]] = {}
        over: list[int] = []
        for i, s in enumerate(self.statements):
            w = s.window
            if w.kind == "over":
                over.append(i)
            elif w.kind == "session":
                grids.setdefault(("sessions", w.size_us, w.on_close), []).append(i)
            else:
                grids.setdefault(("tiles", w.slide_us or w.size_us, w.on_close), []).append(i)
        self.tracks: list[Track] = []
        self.tracked: list[int | None] = [None] * len(self.statements)
        self.places: list[list[Place]] = [[] for _ in self.statements]
        for (kind, length, on_close), members in grids.items():
            windows = max(self.statements[i].window.size_us for i in members) // length if kind == "tiles" else 0
            partials = Partials(self.plan, [p for i in members for p in self.sources(i)])
            start = 0
            for i in members:
                self.tracked[i] = len(self.tracks)
                end = start + len(self.statements[i].aggregates)
                self.places[i], start = partials.places[start:end], end
            self.tracks.append(Track(kind, length, on_close, windows, partials))  # type: ignore[arg-type]  # as above
        self.over_size = max((self.statements[i].window.size_us for i in over), default=NEVER)
        self.over = {i: Partials(self.plan, self.sources(i)) for i in over}
        for i, partials in self.over.items():
            self.places[i] = partials.places
        kept = Partials(self.plan, [p for i in over for p in self.sources(i)])
        self.over_every, self.over_bits, self.over_values = kept.every_event, kept.bits, kept.values
        self.over_order = kept.needs_order
        self.needs = {
            o.name: frozenset(e.index for e in walk(o.expression) if isinstance(e, AggregateRef)) for o in self.outputs
        }
        """The aggregates that each output is made of."""

    def sources(self, statement: int) -> list[tuple[Aggregate, Input]]:
        return list(zip(self.statements[statement].aggregates, self.plan.inputs[statement], strict=True))

    @property
    def pending_width(self) -> int:
        return 3 + len(self.plan.values)

    @property
    def event_width(self) -> int:
        return 1 + self.over_order + bool(self.over_bits) + len(self.over_values)

    @cached_property
    def widths(self) -> list[int]:
        """Words per row of every section, in the order of the blob."""
        tracks = [w for t in self.tracks for w in ((t.width, 2) if t.partials.sketches else (t.width,))]
        return [3, 2, self.pending_width, self.event_width, *tracks]


@lru_cache(maxsize=256)
def layout_of(definition: WindowedView) -> Layout:
    """The layout of a definition, made once. DefinitionError: SQL that is not supported."""
    return Layout(definition)
