"""Partial aggregates as columns of words: of single events, of tiles and of sessions, combined by one primitive.

`lift` makes the partial of every event, `combine` those of groups of rows, `final` the results. What is combined in any
order and grouping gives the same integers, extremes and sketches bit for bit, and doubles up to rounding. Vectorised; pure.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from feature_store.windows.ir import Aggregate
from feature_store.windows.plan import Input, Plan
from feature_store.windows.rows import GREATEST, LEAST, Array, Groups

_LOW = 0xFFFFFFFF
_WORD, _DOUBLE = struct.Struct("<q"), struct.Struct("<d")
_KINDS: dict[str, tuple[str, ...]] = {
    "count": ("count",),
    "count_distinct": ("distinct",),
    "sum": ("count", "sum"),
    "avg": ("count", "sum"),
    "min": ("count", "min"),
    "max": ("count", "max"),
    "first": ("count", "first"),
    "last": ("count", "last"),
    "stddev": ("count", "spread"),
}


@dataclass(frozen=True)
class Part:
    """One mergeable number or few: `count` (int), `sum` (int: two limbs of 32 bits; double: one), `min`, `max`, `first` and
    `last` (event time, order, value), `spread` (mean, sum of squared deviations), `distinct` (no words: a sketch beside).

    `bit` of the mask says which events count (None: all), `value` is the number column.
    """

    kind: Literal["count", "sum", "min", "max", "first", "last", "spread", "distinct"]
    bit: int | None
    value: int | None = None
    is_float: bool = False

    @property
    def floats(self) -> tuple[bool, ...]:
        """Of each of its words, whether it is a double."""
        match self.kind:
            case "count":
                return (False,)
            case "sum":
                return (True,) if self.is_float else (False, False)
            case "min" | "max":
                return (self.is_float,)
            case "first" | "last":
                return (False, False, False)
            case "spread":
                return (True, True)
            case _:
                return ()


@dataclass(frozen=True)
class Result:
    """Of each group: the value (int64 or float64), whether it is null, and whether it is one that cannot be told (overflow)."""

    values: Array
    null: Array | None = None
    wrong: Array | None = None


class Place(NamedTuple):
    """Where an aggregate is among the words: of its count, and of its own part (of count_distinct: its sketch's slot)."""

    function: str
    counted: int
    at: int
    is_float: bool


class Numbers:
    """Events as the plan's numbers: `mask`, `time`, `order` and `values` (only those that are asked for need be there)."""

    def __init__(self, time: Array, order: Array | None, mask: Array | None, values: Sequence[Array | None]) -> None:
        self.time, self.order, self.mask, self.values = time, order, mask, values
        self._on: dict[int, Array] = {}

    def on(self, bit: int | None) -> Array | None:
        """For which events the bit is set; None: for all."""
        if bit is None or self.mask is None:
            return None
        if bit not in self._on:
            self._on[bit] = (self.mask & (1 << bit)) != 0
        return self._on[bit]

    def value(self, i: int | None) -> Array:
        assert i is not None
        found = self.values[i]
        assert found is not None
        return found

    def take(self, rows: Array) -> Numbers:
        def some(a: Array | None) -> Array | None:
            return None if a is None else a[rows]

        return Numbers(self.time[rows], some(self.order), some(self.mask), [some(v) for v in self.values])


class Partials:
    """The parts that some aggregates need, each once."""

    def __init__(self, plan: Plan, aggregates: Sequence[tuple[Aggregate, Input]]) -> None:
        self.parts: list[Part] = []
        for aggregate, source in aggregates:
            for part in _parts(plan, aggregate, source):
                if part not in self.parts:
                    self.parts.append(part)
        self._plan = plan
        self.sketches = [p for p in self.parts if p.kind == "distinct"]
        self.floats = [f for p in self.parts for f in p.floats]
        """Of each word, whether it is a double."""
        self.width = len(self.floats)
        ends = np.cumsum([len(p.floats) for p in self.parts]).tolist()
        self._at = {p: end - len(p.floats) for p, end in zip(self.parts, ends)}
        self.needs_order = any(p.kind in ("first", "last") for p in self.parts)
        self.every_event = any(p.bit is None for p in self.parts)
        self.bits = 0
        for p in self.parts:
            self.bits |= 0 if p.bit is None else 1 << p.bit
        self.places = [self._place(a, i) for a, i in aggregates]
        """Of each aggregate given, in their order."""
        self.values = sorted({p.value for p in self.parts if p.value is not None})

    def _place(self, aggregate: Aggregate, source: Input) -> Place:
        parts = _parts(self._plan, aggregate, source)
        if aggregate.function == "count_distinct":
            return Place("count_distinct", -1, self.sketches.index(parts[0]), False)
        return Place(aggregate.function, self._at[parts[0]], self._at[parts[-1]], parts[-1].is_float)

    def lift(self, numbers: Numbers) -> list[Array]:
        """The words of each event's partial, a column each."""
        out: list[Array] = []
        for p in self.parts:
            if p.kind != "distinct":
                out += _lift(p, numbers, numbers.on(p.bit))
        return out

    def combine(self, columns: Sequence[Array], groups: Groups) -> list[Array]:
        """The words of each group of rows."""
        if len(groups) == groups.size:
            return list(columns)
        out: list[Array] = []
        for p in self.parts:
            at = self._at[p]
            own = columns[at : at + len(p.floats)]
            match p.kind:
                case "count" | "sum":
                    out += [np.add.reduceat(c, groups.starts) for c in own]
                case "min":
                    out.append(np.minimum.reduceat(own[0], groups.starts))
                case "max":
                    out.append(np.maximum.reduceat(own[0], groups.starts))
                case "first":
                    out += _ends(own, groups, np.minimum, GREATEST)
                case "last":
                    out += _ends(own, groups, np.maximum, LEAST)
                case "spread":
                    at = self._at[Part("count", p.bit)]
                    out += _spread(columns[at], out[at], own, groups)
        return out

    def columns(self, words: Array) -> list[Array]:
        """The columns of a matrix of words."""
        turned = np.ascontiguousarray(words.T)
        return [turned[i].view(np.float64) if f else turned[i] for i, f in enumerate(self.floats)]

    def final(self, place: Place, columns: Sequence[Array]) -> Result:
        """An aggregate of each group (not count_distinct, which `sketch.py` answers)."""
        function, counted, at, is_float = place
        count = columns[counted]
        if function == "count":
            return Result(count)
        null = count == 0
        match function:
            case "sum" if is_float:
                return _finite(columns[at], null)
            case "sum":
                return _joined(columns[at], columns[at + 1], null)
            case "avg" if is_float:
                return _finite(columns[at] / np.maximum(count, 1), null)
            case "avg":
                return Result(_average(columns[at], columns[at + 1], count), null)
            case "min" | "max":
                return Result(columns[at], null)
            case "first" | "last":
                value = columns[at + 2]
                return Result(value.view(np.float64) if is_float else value, null)
            case _:
                few = count < 2
                return _finite(np.sqrt(columns[at + 1] / np.maximum(count - 1, 1)), few)

    def one(self, place: Place, words: Sequence[Any]) -> int | float | None:
        """As `final`, of one group as Python numbers: a prediction reads one entity. OverflowError where `wrong`."""
        function, counted, at, is_float = place
        count = words[counted]
        if function == "count":
            return int(count)
        if count < (2 if function == "stddev" else 1):
            return None
        value: int | float
        match function:
            case "sum" | "avg":
                value = words[at] if is_float else (words[at + 1] << 32) + words[at]
                value = value / count if function == "avg" else value
            case "min" | "max":
                return words[at]
            case "first" | "last":
                return _DOUBLE.unpack(_WORD.pack(words[at + 2]))[0] if is_float else words[at + 2]
            case _:
                value = math.sqrt(words[at + 1] / (count - 1))
        if not (math.isfinite(value) if isinstance(value, float) else LEAST <= value <= GREATEST):
            raise OverflowError
        return value


def _parts(plan: Plan, aggregate: Aggregate, source: Input) -> list[Part]:
    is_float = source.value is not None and plan.values[source.value].is_float
    out = []
    for kind in _KINDS[aggregate.function]:
        if kind == "count":
            out.append(Part("count", source.bit))
        else:
            out.append(Part(kind, source.bit, source.value, is_float))  # type: ignore[arg-type]  # the kinds of the table above
    return out


def _lift(p: Part, numbers: Numbers, on: Array | None) -> list[Array]:
    if p.kind == "count":
        return [np.ones(len(numbers.time), np.int64) if on is None else on.astype(np.int64)]
    value = numbers.value(p.value)
    match p.kind:
        case "sum":
            x = value if on is None else np.where(on, value, value.dtype.type(0))
            return [x] if p.is_float else [x & _LOW, x >> 32]
        case "min" | "max":
            if p.is_float:
                none: float = np.inf if p.kind == "min" else -np.inf
            else:
                none = GREATEST if p.kind == "min" else LEAST
            return [value if on is None else np.where(on, value, value.dtype.type(none))]
        case "first" | "last":
            none = GREATEST if p.kind == "first" else LEAST
            assert numbers.order is not None
            word = value.view(np.int64)
            if on is None:
                return [numbers.time, numbers.order, word]
            return [np.where(on, numbers.time, none), np.where(on, numbers.order, none), np.where(on, word, 0)]
        case _:
            x = value.astype(np.float64)
            return [x if on is None else np.where(on, x, 0.0), np.zeros(len(x))]


def _ends(own: Sequence[Array], groups: Groups, extreme: np.ufunc, none: int) -> list[Array]:
    """First or last by (time, order): the value of the one row that has both. Rows without any have the value 0."""
    time, order, value = own
    best_time = extreme.reduceat(time, groups.starts)
    there = time == groups.spread(best_time)
    order = np.where(there, order, none)
    best_order = extreme.reduceat(order, groups.starts)
    there &= order == groups.spread(best_order)
    return [best_time, best_order, np.maximum.reduceat(np.where(there, value, LEAST), groups.starts)]


def _spread(before: Array, after: Array, own: Sequence[Array], groups: Groups) -> list[Array]:
    """Chan's merge of many: the mean, refined once, and the squares about it."""
    mean, squares = own
    counts = before.astype(np.float64)
    weights = counts / groups.spread(np.maximum(after, 1))
    centre = np.add.reduceat(weights * mean, groups.starts)
    away = mean - groups.spread(centre)
    centre = centre + np.add.reduceat(weights * away, groups.starts)
    away = np.where(before > 0, mean - groups.spread(centre), 0.0)
    with np.errstate(over="ignore"):  # an infinite spread is told as such by `final`
        return [centre, np.add.reduceat(squares + counts * away * away, groups.starts)]


def _joined(low: Array, high: Array, null: Array) -> Result:
    high = high + (low >> 32)
    wrong = (high < -(2**31)) | (high >= 2**31)
    return Result((high << 32) | (low & _LOW), null, wrong if wrong.any() else None)


def _average(low: Array, high: Array, count: Array) -> Array:
    """The exact sum by the count, rounded once."""
    high, low = high + (low >> 32), low & _LOW
    whole = (high.astype(np.float64) * 2.0**32 + low) / np.maximum(count, 1)
    for i in np.flatnonzero(np.abs(high) >= 2**20).tolist():  # beyond 2**53 a double is not the exact sum
        whole[i] = ((int(high[i]) << 32) + int(low[i])) / max(int(count[i]), 1)
    return whole


def _finite(values: Array, null: Array) -> Result:
    wrong = ~(null | np.isfinite(values))
    return Result(values, null, wrong if wrong.any() else None)
