"""From rows to values: what each statement's window holds at t, its aggregates, and the outputs made of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.clock import from_micros
from feature_store.windows.ir import AggregateRef, Output
from feature_store.windows.kept_events import events_of
from feature_store.windows.layout import Layout
from feature_store.windows.partials import Partials, Result
from feature_store.windows.rows import NEVER, Array, Groups, ranges
from feature_store.windows.sketch import Sketch
from feature_store.windows.state_errors import OverflowedError, TooManyEventsError, WindowStateError
from feature_store.windows.tracks import closed_session

if TYPE_CHECKING:
    from feature_store.windows.state import States

Column = tuple[Array, Array]
"""Values (int64 or float64) and which are null."""


class Finals:
    """The outputs of n entities at their times.

    `last_seen`: greatest time of a counted event by then. `errors`: why an entity has no values (they are null then).
    `watermark`: what windows were closed by, NEVER without one.
    """

    def __init__(self, outputs: list[Output], last_seen: Array, watermark: Array) -> None:
        self.outputs, self.last_seen, self.watermark = outputs, last_seen, watermark
        self.errors: dict[int, WindowStateError] = {}
        self._made: dict[str, Column] = {}
        self._one: dict[str, Any] | None = None  # of one entity: the values as they are in `columns`

    @cached_property
    def arrays(self) -> dict[str, Column]:
        """Values (int64, also of bool and of timestamps in microseconds, or float64) and which are null."""
        if self._one is None:
            return self._made
        out = {}
        for o in self.outputs:
            value = self._one[o.name]
            kind = np.float64 if o.type == "float64" else np.int64
            out[o.name] = np.array([value or 0], kind), np.array([value is None])
        return out

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The outputs as Python values, None being null; a timestamp is its microseconds."""
        if self._one is not None:
            return {name: [value] for name, value in self._one.items()}
        return {o.name: _listed(*self._made[o.name], o.type == "bool") for o in self.outputs}

    @cached_property
    def seen(self) -> list[int | None]:
        """Greatest time of a counted event by then; None: never seen."""
        return [None if t == NEVER else t for t in self.last_seen.tolist()]


def _listed(values: Array, null: Array, truth: bool) -> list[Any]:
    out = (values != 0).tolist() if truth else values.tolist()
    return [None if n else v for v, n in zip(out, null.tolist())] if null.any() else out


def finals(layout: Layout, states: States, t: Array, watermark: Array, visible_at: Array) -> Finals:
    """The values of states in which no event is pending at t. `visible_at`: before pending events were counted."""
    name = layout.definition.name
    unseen = states.last_seen == NEVER
    out = Finals(layout.outputs, states.last_seen, watermark)
    for i in np.flatnonzero(t < visible_at).tolist():
        out.errors[i] = WindowStateError(
            f"{name}: read at a time before the state's newest event was known",
            value=from_micros(int(t[i])).isoformat(),
            next_step=f"read at {from_micros(int(visible_at[i])).isoformat()} or later",
        )
    if layout.over:
        lost = states._lost
        for i in np.flatnonzero((lost != NEVER) & (t - layout.over_size <= lost)).tolist():
            out.errors.setdefault(
                i,
                TooManyEventsError(
                    f"{name}: one entity has more events in its window than max_events_per_entity",
                    value=layout.cap,
                    next_step=f"raise max_events_per_entity, then `predictflow windows bootstrap {name}`",
                ),
            )
    if len(states) == 1:
        out._one = _one(layout, states, t, watermark, bool(unseen[0]), out.errors)
        return out
    for i, statement in enumerate(layout.statements):
        columns = _results(layout, i, _window(layout, states, i, t, watermark), len(states), out.errors)
        for output in statement.outputs:
            if isinstance(output.expression, AggregateRef):
                out._made[output.name] = columns[output.expression.index]
            else:
                out._made[output.name] = _evaluated(name, output, columns, unseen, out.errors)
    void = unseen
    if out.errors:
        void = unseen.copy()
        void[list(out.errors)] = True
    if void.any():
        out._made = {k: (values, null | void) for k, (values, null) in out._made.items()}
    return out


def _one(
    layout: Layout, states: States, t: Array, watermark: Array, unseen: bool, errors: dict[int, WindowStateError]
) -> dict[str, Any]:
    """The outputs of a single entity: what takes the time is then not the numbers but calls of numpy."""
    out: dict[str, Any] = {o.name: None for o in layout.outputs}
    if unseen or errors:
        return out
    for i, statement in enumerate(layout.statements):
        found = _window(layout, states, i, t, watermark)
        words = [c.item() for c in found.columns]
        values: list[Any] = []
        at = 0
        try:
            for place in layout.places[i]:
                if place.function == "count_distinct":
                    values.append(int(found.sketch.numbers(1, place.at)[0]) if found.sketch is not None else 0)
                elif not len(found.whose):
                    values.append(0 if place.function == "count" else None)
                else:
                    values.append(found.partials.one(place, words))
                at += 1
            for output in statement.outputs:
                value = _expression(output, values)
                out[output.name] = bool(value) if output.type == "bool" and value is not None else value
        except OverflowError:
            name = _named(statement.outputs, at) if at < len(layout.places[i]) else output.name
            errors[0] = _overflow(layout.definition.name, name)
            return dict.fromkeys(out)
    return out


@dataclass
class Found:
    """What a statement's window holds: per group its words and its sketch; `whose` the groups are (entities)."""

    partials: Partials
    columns: list[Array]
    sketch: Sketch | None
    whose: Array


def _window(layout: Layout, states: States, i: int, t: Array, watermark: Array) -> Found:
    """What the window of one statement holds at t."""
    window, place, n = layout.statements[i].window, layout.tracked[i], len(states)
    every = np.arange(n)
    sketch: Sketch | None = None
    if place is None:
        partials, rows = layout.over[i], states._events
        low, high = rows.find(every, t - window.size_us), rows.starts[1:]
        whose, groups, data = _taken(rows.data, low, high)
        numbers = events_of(layout, data)
        columns = partials.combine(partials.lift(numbers), groups) if len(whose) else []
        if partials.sketches and len(whose):
            sketch = Sketch.lifted(partials, numbers, groups.spread(np.arange(len(groups))))
        return Found(partials, columns, sketch, whose)
    track, held = layout.tracks[place], states._tracks[place]
    rows, partials = held.rows, track.partials
    if track.kind == "sessions":
        if track.on_close:
            at = closed_session(rows, track.length_us, watermark)
        else:
            at = rows.starts[1:] - 1
            there = np.flatnonzero(rows.counts)
            live = np.zeros(n, bool)
            live[there] = t[there] - rows.data[at[there], 1] <= track.length_us
            at = np.where(live, at, -1)
        low = np.maximum(at, 0)
        high = np.where(at < 0, low, low + 1)
        chosen = None
    else:
        now = (watermark if track.on_close else t) // track.length_us
        windows = window.size_us // track.length_us
        if track.on_close:
            low, high = rows.find(every, (now - windows) * track.factor), rows.find(every, now * track.factor)
            high = np.where(watermark == NEVER, low, high)
            chosen = rows.data[:, 0] // track.factor + rows.data[:, 0] % track.factor
            chosen = chosen < np.repeat(now, rows.counts)
        else:
            low, high, chosen = rows.find(every, now + 1 - windows), rows.starts[1:], None
    if partials.sketches or (chosen is not None and not chosen.all()):
        index, sizes = ranges(low, high)
        owner = np.repeat(every, sizes)
        if chosen is not None:
            index, owner = index[chosen[index]], owner[chosen[index]]
        whose = np.unique(owner)
        groups, data = Groups.of(owner), rows.data[index]
        if partials.sketches and len(whose):
            to = np.full(len(rows), -1)
            to[index] = groups.spread(np.arange(len(groups)))
            sketch = held.sketch.moved(to)
    else:
        whose, groups, data = _taken(rows.data, low, high)
    columns = partials.combine(partials.columns(data[:, track.keys :]), groups) if len(whose) else []
    return Found(partials, columns, sketch, whose)


def _taken(data: Array, low: Array, high: Array) -> tuple[Array, Groups, Array]:
    """Whose rows there are in the ranges, the groups that they form, and the rows."""
    if len(low) == 1:
        taken = data[int(low[0]) : int(high[0])]
        return np.arange(int(len(taken) > 0)), Groups(np.zeros(int(len(taken) > 0), np.int64), len(taken)), taken
    sizes = np.maximum(high - low, 0)
    whose = np.flatnonzero(sizes)
    starts = (np.cumsum(sizes) - sizes)[whose]
    size = int(sizes.sum())
    return whose, Groups(starts, size), data if size == len(data) else data[ranges(low, high)[0]]


def _results(layout: Layout, i: int, found: Found, n: int, errors: dict[int, WindowStateError]) -> list[Column]:
    """The aggregates of one statement, of all entities."""
    whose, out = found.whose, []
    for aggregate, place in zip(layout.statements[i].aggregates, layout.places[i], strict=True):
        counts = aggregate.function in ("count", "count_distinct")
        if not len(whose):
            kind = np.float64 if aggregate.type == "float64" else np.int64
            out.append((np.zeros(n, kind), np.full(n, not counts)))
            continue
        if aggregate.function != "count_distinct":
            result = found.partials.final(place, found.columns)
        elif found.sketch is not None:
            result = Result(found.sketch.numbers(len(whose), place.at))
        else:
            result = Result(np.zeros(len(whose), np.int64))
        if result.wrong is not None:
            name = _named(layout.statements[i].outputs, len(out))
            for entity in whose[result.wrong].tolist():
                errors.setdefault(entity, _overflow(layout.definition.name, name))
        if len(whose) == n:
            out.append((result.values, np.zeros(n, bool) if result.null is None else result.null))
            continue
        values, null = np.zeros(n, result.values.dtype), np.full(n, not counts)
        values[whose] = result.values
        null[whose] = False if result.null is None else result.null
        out.append((values, null))
    return out


def _named(outputs: Iterable[Output], index: int) -> str:
    for o in outputs:
        if isinstance(o.expression, AggregateRef) and o.expression.index == index:
            return o.name
    return f"aggregate {index + 1}"


def _overflow(view: str, output: str) -> OverflowedError:
    return OverflowedError(f"{view}.{output}: the result does not fit into 64 bits")


def _evaluated(
    view: str, output: Output, columns: list[Column], unseen: Array, errors: dict[int, WindowStateError]
) -> Column:
    """An expression over aggregates, entity by entity."""
    lists = [_listed(values, null, False) for values, null in columns]
    n = len(unseen)
    values = np.zeros(n, np.float64 if output.type == "float64" else np.int64)
    null = np.ones(n, bool)
    for i in np.flatnonzero(~unseen).tolist():
        if i in errors:
            continue
        try:
            value = _expression(output, [column[i] for column in lists])
        except OverflowError:
            errors[i] = _overflow(view, output.name)
            continue
        if value is not None:
            values[i], null[i] = value, False
    return values, null


def _expression(output: Output, aggregates: list[Any]) -> Any:
    if isinstance(output.expression, AggregateRef):
        return aggregates[output.expression.index]
    from feature_store.windows.evaluate import evaluate

    return evaluate(output.expression, aggregates)
