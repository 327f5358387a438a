"""From rows to values: what each statement's window holds at t, its aggregates, and the outputs made of them. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from feature_store.clock import from_micros
from feature_store.errors import PredictFlowError
from feature_store.windows.ir import Aggregate, AggregateRef, Output
from feature_store.windows.kept_events import events_of
from feature_store.windows.layout import Layout
from feature_store.windows.partials import Partials, Result
from feature_store.windows.plan import Input
from feature_store.windows.rows import NEVER, Array, Groups, ranges
from feature_store.windows.sketch import Sketch, slot_of
from feature_store.windows.state_errors import OverflowedError, TooManyEventsError, WindowStateError
from feature_store.windows.tracks import closed_session

if TYPE_CHECKING:
    from feature_store.windows.state import States

Column = tuple[Array, Array]
"""Values (int64 or float64) and which are null."""


@dataclass
class Finals:
    """The outputs of n entities at their times.

    `arrays`: values (int64, also of bool and of timestamps in microseconds, or float64) and which are null. `seen`:
    greatest time of a counted event by then. `errors`: why an entity has no values (they are null then). `watermark`: what
    windows were closed by, NEVER without one.
    """

    outputs: list[Output]
    arrays: dict[str, Column]
    last_seen: Array
    watermark: Array
    errors: dict[int, WindowStateError] = field(default_factory=dict)

    @cached_property
    def columns(self) -> dict[str, list[Any]]:
        """The outputs as Python values, None being null; a timestamp is its microseconds."""
        return {o.name: _listed(*self.arrays[o.name], o.type == "bool") for o in self.outputs}

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
    out = Finals(layout.definition.outputs, {}, states.last_seen, watermark)
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
    for i, statement in enumerate(layout.statements):
        columns = _statement(layout, states, i, t, watermark, out.errors)
        for output in statement.outputs:
            if isinstance(output.expression, AggregateRef):
                out.arrays[output.name] = columns[output.expression.index]
            else:
                out.arrays[output.name] = _evaluated(name, output, columns, unseen, out.errors)
    void = unseen
    if out.errors:
        void = unseen.copy()
        void[list(out.errors)] = True
    if void.any():
        out.arrays = {k: (values, null | void) for k, (values, null) in out.arrays.items()}
    return out


def _statement(
    layout: Layout, states: States, i: int, t: Array, watermark: Array, errors: dict[int, WindowStateError]
) -> list[Column]:
    """The aggregates of one statement."""
    window, place, n = layout.statements[i].window, layout.places[i], len(states)
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
        return _results(layout, i, partials, columns, sketch, whose, n, errors)
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
    return _results(layout, i, partials, columns, sketch, whose, n, errors)


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


def _results(
    layout: Layout,
    i: int,
    partials: Partials,
    columns: list[Array],
    sketch: Sketch | None,
    whose: Array,
    n: int,
    errors: dict[int, WindowStateError],
) -> list[Column]:
    statement, sources = layout.statement(i)
    out = []
    for aggregate, source in zip(statement.aggregates, sources, strict=True):
        counts = aggregate.function in ("count", "count_distinct")
        if not len(whose):
            kind = np.float64 if aggregate.type == "float64" else np.int64
            out.append((np.zeros(n, kind), np.full(n, not counts)))
            continue
        result = _result(partials, aggregate, source, columns, sketch, len(whose))
        if result.wrong is not None:
            for place in whose[result.wrong].tolist():
                errors.setdefault(place, _overflow(layout.definition.name, _named(statement.outputs, len(out))))
        if len(whose) == n:
            out.append((result.values, np.zeros(n, bool) if result.null is None else result.null))
            continue
        values, null = np.zeros(n, result.values.dtype), np.full(n, not counts)
        values[whose] = result.values
        null[whose] = False if result.null is None else result.null
        out.append((values, null))
    return out


def _result(
    partials: Partials,
    aggregate: Aggregate,
    source: Input,
    columns: list[Array],
    sketch: Sketch | None,
    groups: int,
) -> Result:
    if aggregate.function != "count_distinct":
        return partials.final(aggregate, source, columns)
    if sketch is None:
        return Result(np.zeros(groups, np.int64))
    return Result(sketch.numbers(groups, slot_of(partials, source.bit, source.value)))


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
    from feature_store.windows.evaluate import evaluate

    lists = [_listed(values, null, False) for values, null in columns]
    n = len(unseen)
    values = np.zeros(n, np.float64 if output.type == "float64" else np.int64)
    null = np.ones(n, bool)
    for i in np.flatnonzero(~unseen).tolist():
        if i in errors:
            continue
        try:
            value = evaluate(output.expression, [column[i] for column in lists])
        except (OverflowError, PredictFlowError) as e:
            errors[i] = OverflowedError(f"{view}.{output.name}: {e}")
            continue
        if value is not None:
            values[i], null[i] = value, False
    return values, null
