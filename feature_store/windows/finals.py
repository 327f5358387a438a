"""From rows to values: what each statement's window holds at t, its aggregates, and the outputs made of them. Pure."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.clock import from_micros
from feature_store.windows.ir import AggregateRef, Output, Type
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
"""Values (int64, float64, or str as objects) and which are null."""


class Finals:
    """The outputs of n entities at their times.

    `last_seen`: greatest time of a counted event by then. `watermark`: what windows were closed by, NEVER
    without one. `errors`: of an entity, why an output has no value (it is null then).
    """

    def __init__(self, outputs: list[Output], last_seen: Array, watermark: Array) -> None:
        self.outputs, self.last_seen, self.watermark = outputs, last_seen, watermark
        self.errors: dict[int, dict[str, WindowStateError]] = {}
        self._names = {o.name for o in outputs}
        self._made: dict[str, Column] = {}
        self._one: dict[str, Any] | None = None  # of one entity: the values as they are in `columns`

    def fail(self, entity: int, outputs: Iterable[Output], error: WindowStateError) -> None:
        """Says that an entity has no value of these outputs; the first reason stays."""
        for o in self.wanted(outputs):
            self.errors.setdefault(entity, {}).setdefault(o.name, error)

    def wanted(self, outputs: Iterable[Output]) -> list[Output]:
        """Those that were asked for."""
        return [o for o in outputs if o.name in self._names]

    @cached_property
    def arrays(self) -> dict[str, Column]:
        """Values (int64, also of bool and of timestamps in microseconds, float64, or str) and which are null."""
        if self._one is None:
            return self._made
        out = {}
        for o in self.outputs:
            value = self._one[o.name]
            column = _empty(1, o.type)
            if value is not None:
                column[0] = value
            out[o.name] = column, np.array([value is None])
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


def _empty(n: int, kind: Type) -> Array:
    """Room for n values of an output."""
    if kind == "string":
        return np.full(n, "", np.object_)
    return np.zeros(n, np.float64 if kind == "float64" else np.int64)


def _listed(values: Array, null: Array, truth: bool) -> list[Any]:
    out = (values != 0).tolist() if truth else values.tolist()
    return [None if n else v for v, n in zip(out, null.tolist())] if null.any() else out


def finals(
    layout: Layout, states: States, t: Array, watermark: Array, visible_at: Array, only: Collection[str] | None = None
) -> Finals:
    """The values of states in which no event is pending at t. `visible_at`: before pending events were counted; `only`:
    the outputs that are asked for (None: all)."""
    name = layout.definition.name
    unseen = states.last_seen == NEVER
    outputs = layout.outputs if only is None else [o for o in layout.outputs if o.name in only]
    out = Finals(outputs, states.last_seen, watermark)
    for i in np.flatnonzero(t < visible_at).tolist():
        early = WindowStateError(
            f"{name}: read at a time before the state's newest event was known",
            value=from_micros(int(t[i])).isoformat(),
            next_step=f"read at {from_micros(int(visible_at[i])).isoformat()} or later",
        )
        out.fail(i, outputs, early)
    if layout.over and (states._lost != NEVER).any():
        _lost_events(layout, out, states._lost, t)
    if len(states) == 1:
        out._one = _one(layout, states, t, watermark, bool(unseen[0]), out)
        return out
    for i, statement in enumerate(layout.statements):
        wanted = out.wanted(statement.outputs)
        if not wanted:
            continue
        columns = _results(layout, i, _window(layout, states, i, t, watermark), len(states), out)
        for output in wanted:
            if isinstance(output.expression, AggregateRef):
                out._made[output.name] = columns[output.expression.index]
            else:
                out._made[output.name] = _evaluated(name, output, columns, unseen, out)
    if unseen.any():
        out._made = {k: (values, null | unseen) for k, (values, null) in out._made.items()}
    failed: dict[str, list[int]] = {}
    for entity, errors in out.errors.items():
        for output_name in errors:
            failed.setdefault(output_name, []).append(entity)
    for output_name, entities in failed.items():
        values, null = out._made[output_name]
        null = null.copy()
        null[entities] = True
        out._made[output_name] = values, null
    return out


def _lost_events(layout: Layout, out: Finals, lost: Array, t: Array) -> None:
    """An OVER window that reaches back to an event that the cap removed has no value; a shorter one has."""
    name = layout.definition.name
    for number in layout.over:
        statement = layout.statements[number]
        for i in np.flatnonzero((lost != NEVER) & (t - statement.window.size_us <= lost)).tolist():
            error = TooManyEventsError(
                f"{name}: one entity has more events in its window than max_events_per_entity",
                value=layout.cap,
                next_step=f"raise max_events_per_entity, then `predictflow windows bootstrap {name}`",
            )
            out.fail(i, statement.outputs, error)


def _one(layout: Layout, states: States, t: Array, watermark: Array, unseen: bool, said: Finals) -> dict[str, Any]:
    """The outputs of a single entity: what takes the time is then not the numbers but calls of numpy."""
    out: dict[str, Any] = {o.name: None for o in said.outputs}
    failed = said.errors.get(0, {})
    if unseen or len(failed) == len(out):
        return out
    for i, statement in enumerate(layout.statements):
        wanted = said.wanted(statement.outputs)
        if not wanted:
            continue
        found = _window(layout, states, i, t, watermark)
        words = [c.item() for c in found.columns]
        values: list[Any] = []
        for place in layout.places[i]:
            if place.function == "count_distinct":
                values.append(int(found.sketch.numbers(1, place.at)[0]) if found.sketch is not None else 0)
            elif not len(found.whose):
                values.append(0 if place.function == "count" else None)
            else:
                try:
                    values.append(found.partials.one(place, words))
                except OverflowError:
                    _overflow(layout, said, 0, i, len(values))
                    values.append(None)
        failed = said.errors.get(0, {})
        for output in wanted:
            if output.name in failed:
                continue
            try:
                value = _expression(output, values)
            except OverflowError:
                said.fail(0, [output], _overflowed(layout.definition.name, output))
                continue
            out[output.name] = bool(value) if output.type == "bool" and value is not None else value
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


def _results(layout: Layout, i: int, found: Found, n: int, said: Finals) -> list[Column]:
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
            for entity in whose[result.wrong].tolist():
                _overflow(layout, said, entity, i, len(out))
        if len(whose) == n:
            out.append((result.values, np.zeros(n, bool) if result.null is None else result.null))
            continue
        values, null = np.zeros(n, result.values.dtype), np.full(n, not counts)
        values[whose] = result.values
        null[whose] = False if result.null is None else result.null
        out.append((values, null))
    return out


def _overflow(layout: Layout, said: Finals, entity: int, statement: int, aggregate: int) -> None:
    """Every output that is made of an aggregate without a value has none."""
    for o in layout.statements[statement].outputs:
        if aggregate in layout.needs[o.name]:
            said.fail(entity, [o], _overflowed(layout.definition.name, o))


def _overflowed(view: str, output: Output) -> OverflowedError:
    return OverflowedError(f"{view}.{output.name}: the result does not fit into 64 bits")


def _evaluated(view: str, output: Output, columns: list[Column], unseen: Array, said: Finals) -> Column:
    """An expression over aggregates, entity by entity."""
    lists = [_listed(values, null, False) for values, null in columns]
    n = len(unseen)
    values, null = _empty(n, output.type), np.ones(n, bool)
    for i in np.flatnonzero(~unseen).tolist():
        if output.name in said.errors.get(i, ()):
            continue
        try:
            value = _expression(output, [column[i] for column in lists])
        except OverflowError:
            said.fail(i, [output], _overflowed(view, output))
            continue
        if value is not None:
            values[i], null[i] = value, False
    return values, null


def _expression(output: Output, aggregates: list[Any]) -> Any:
    if isinstance(output.expression, AggregateRef):
        return aggregates[output.expression.index]
    from feature_store.windows.evaluate import evaluate

    return evaluate(output.expression, aggregates)
