"""What a windowed view means, read word by word from the rules: loops over all events, no numpy, no SQL, no state.

It is fed the raw events of the topic in the order in which they arrived and decides for itself what was late, what was a
duplicate and where the watermarks stood; then it answers any read. Slow on purpose; shares nothing with the platform but
the definition's types (`ir.py`). All times are microseconds since the epoch, UTC; a null is None.

The rules are methods, one each, so that a test can break one and demand that the comparison sees it.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from feature_store.windows.ir import AggregateRef, Call, Column, Constant, Expression, Statement, Window

Value = int | float | str | bool | None
HISTORY = -1
"""The partition of rows that were there before the stream began."""
K = 1024
"""How many hashes a COUNT(DISTINCT) keeps."""


class OutOfRangeError(ArithmeticError):
    """An int64 that overflows, or a float that is not finite where it must be."""


# Events


@dataclass(frozen=True)
class Raw:
    """One message of the topic (or row of history, partition -1), as it came. `idle`: only moves the watermark there."""

    entity: str | None
    time: int
    partition: int
    offset: int
    visible_at: int
    columns: Mapping[str, Value] = field(default_factory=dict)
    event_id: str | None = None
    idle: int | None = None


@dataclass(frozen=True)
class Logged:
    """An event and what became of it."""

    raw: Raw
    watermark: int | None
    """Before it."""
    dropped: str | None
    inputs: tuple[tuple[Value, ...], ...] = ()
    """By statement and aggregate: the argument (True for COUNT(*)), None where the aggregate passes the event over."""


@dataclass(frozen=True)
class Answer:
    """One read. `values`: per output its possible results, the smallest and the greatest the same where it is exact."""

    status: str
    last_seen: int | None
    values: Mapping[str, Possible]
    watermark: int | None = None


@dataclass(frozen=True)
class Possible:
    """What may stand there: a null, an error, a value between two."""

    low: Value = None
    high: Value = None
    null: bool = False
    error: bool = False

    def allows(self, got: Value) -> bool:
        if got is None:
            return self.null
        if self.low is None:
            return False
        if isinstance(got, bool) or isinstance(self.low, (bool, str)) or isinstance(got, str):
            return type(got) is type(self.low) and got == self.low == self.high
        if isinstance(got, float) and math.isnan(got):
            return False
        return self.low <= got <= self.high  # type: ignore[operator]  # numbers, as the branch above leaves


class Oracle:
    """All events of a view's topic, and the reads of them.

    `statements` is what the definition's SQL is taken to mean; lengths are the source's and the view's.
    """

    def __init__(
        self,
        statements: Sequence[Statement],
        *,
        retention_us: int,
        lateness_us: int = 0,
        ttl_us: int = 0,
        has_event_id: bool = False,
        history_watermark: int | None = None,
    ) -> None:
        self.statements = tuple(statements)
        self.retention_us = retention_us
        self.lateness_us = lateness_us
        self.ttl_us = ttl_us
        self.has_event_id = has_event_id
        self.history_watermark = history_watermark
        self.log: list[Logged] = []
        self._watermarks: dict[int, int | None] = {}
        self._ids: dict[tuple[str, str], list[int]] = {}
        self._of_entity: dict[str, list[Logged]] = {}
        self._partitions: dict[int, list[Logged]] = {}

    # From raw events to the log

    def feed(self, events: Iterable[Raw]) -> list[Logged]:
        """Takes events in the order of their arrival (offsets ascend in each partition)."""
        fresh = []
        for e in events:
            before = None if e.partition == HISTORY else self._watermarks.get(e.partition, self.history_watermark)
            if e.idle is not None:
                logged = Logged(e, before, "idle")
                self._watermarks[e.partition] = e.idle if before is None else max(before, e.idle)
            else:
                logged = Logged(e, before, self._dropped(e, before), self.inputs(e))
                if e.partition != HISTORY:
                    after = e.time - self.lateness_us
                    self._watermarks[e.partition] = after if before is None else max(before, after)
            self.log.append(logged)
            fresh.append(logged)
            if e.entity is not None:
                self._of_entity.setdefault(e.entity, []).append(logged)
            self._partitions.setdefault(e.partition, []).append(logged)
        return fresh

    def _dropped(self, e: Raw, before: int | None) -> str | None:
        if self.is_late(e, before):
            return "late"
        if self.has_event_id and e.event_id is not None:
            assert e.entity is not None
            counted = self._ids.setdefault((e.entity, e.event_id), [])
            if any(self.remembers(time, before) for time in counted):
                return "duplicate"
            counted.append(e.time)
        return None

    def is_late(self, e: Raw, before: int | None) -> bool:
        return before is not None and e.time < before - self.retention_us

    def remembers(self, counted_at: int, watermark: int | None) -> bool:
        return watermark is None or counted_at >= watermark - self.retention_us

    def inputs(self, e: Raw) -> tuple[tuple[Value, ...], ...]:
        """OutOfRangeError: no engine can take this event, it goes to the dead letters."""
        return tuple(tuple(self._input(e, a.filter, a.argument) for a in s.aggregates) for s in self.statements)

    def _input(self, e: Raw, condition: Expression | None, argument: Expression | None) -> Value:
        # Both are always computed, so that an overflow does not depend on the filter.
        passes = condition is None or evaluate(condition, e.columns) is True
        value = True if argument is None else evaluate(argument, e.columns)
        if isinstance(value, float) and not math.isfinite(value):
            raise OutOfRangeError(value)
        return self.passed(value) if passes else None

    def passed(self, value: Value) -> Value:
        return value

    # Reads

    def counted(self, entity: str) -> list[Logged]:
        return [e for e in self._of_entity.get(entity, []) if e.dropped is None]

    def is_known(self, e: Logged, t: int) -> bool:
        return e.raw.visible_at <= t

    def read_by_time(self, entity: str, t: int) -> Answer:
        """What was known at t: every event and every move of the watermark visible by then."""
        known = [e for e in self.counted(entity) if self.is_known(e, t)]
        return self._answer(known, t, self.watermark_at(entity, t))

    def read_by_offset(self, entity: str, t: int, offsets: Mapping[int, int], watermark: int | None) -> Answer:
        """What a state held that had applied these offsets (history always), with the watermark that it used."""
        known = [
            e
            for e in self.counted(entity)
            if e.raw.partition == HISTORY or e.raw.offset <= offsets.get(e.raw.partition, -1)
        ]
        return self._answer(known, t, watermark)

    def watermark_at(self, entity: str, t: int) -> int | None:
        """The greatest over the partitions in which the entity has rows, of what was known by t."""
        rows = self._of_entity.get(entity, [])
        partitions = {e.raw.partition for e in rows if self.is_known(e, t)}
        found: list[int] = []
        for e in itertools.chain.from_iterable(self._partitions[p] for p in partitions):
            if self.is_known(e, t):
                found += [] if e.watermark is None else [e.watermark]
                found.append(e.raw.idle if e.raw.idle is not None else e.raw.time - self.lateness_us)
        return max(found) if found else None

    def _answer(self, known: Sequence[Logged], t: int, watermark: int | None) -> Answer:
        seen = [e for e in known if e.raw.time <= t]
        null = Possible(null=True)
        names = [o.name for s in self.statements for o in s.outputs]
        if not seen:
            return Answer("NOT_FOUND", None, dict.fromkeys(names, null), watermark)
        last = max(e.raw.time for e in seen)
        if self.is_expired(t - last):
            return Answer("OUTSIDE_MAX_AGE", last, dict.fromkeys(names, null), watermark)
        values: dict[str, Possible] = {}
        for i, s in enumerate(self.statements):
            inside = self.closed(s.window, known, watermark) if s.window.on_close else self.open(s.window, seen, t)
            inside = sorted(inside, key=self.order)
            results = [self.aggregate(a.function, [e.inputs[i][j] for e in inside]) for j, a in enumerate(s.aggregates)]
            for o in s.outputs:
                values[o.name] = possible(o.expression, results)
        return Answer("PRESENT", last, values, watermark)

    def is_expired(self, silent: int) -> bool:
        return self.ttl_us > 0 and silent > self.ttl_us

    def order(self, e: Logged) -> tuple[int, int, int]:
        return e.raw.time, e.raw.partition, e.raw.offset

    def aggregate(self, function: str, inputs: Sequence[Value]) -> Result:
        return aggregate(function, inputs)

    # Windows

    def open(self, w: Window, seen: Sequence[Logged], t: int) -> list[Logged]:
        if w.kind == "session":
            return self.open_session(w, seen, t)
        if w.kind == "over":
            return [e for e in seen if self.within_over(e.raw.time, t, w.size_us)]
        end = self.open_end(w, t)
        return [e for e in seen if self.within_window(e.raw.time, end, w.size_us)]

    def open_end(self, w: Window, t: int) -> int:
        """Of the windows that contain t, the one that ends first."""
        return t // w.slide_us * w.slide_us + w.slide_us

    def within_over(self, time: int, t: int, size: int) -> bool:
        return t - size <= time <= t

    def within_window(self, time: int, end: int, size: int) -> bool:
        return end - size <= time < end

    def open_session(self, w: Window, seen: Sequence[Logged], t: int) -> list[Logged]:
        sessions = self.sessions(seen, w.size_us)
        newest = sessions[-1] if sessions else []
        return newest if newest and t - newest[-1].raw.time <= w.size_us else []

    def sessions(self, events: Sequence[Logged], gap: int) -> list[list[Logged]]:
        out: list[list[Logged]] = []
        for e in sorted(events, key=self.order):
            if out and not self.splits(e.raw.time - out[-1][-1].raw.time, gap):
                out[-1].append(e)
            else:
                out.append([e])
        return out

    def splits(self, apart: int, gap: int) -> bool:
        return apart > gap

    def closed(self, w: Window, known: Sequence[Logged], watermark: int | None) -> list[Logged]:
        if watermark is None:
            return []
        if w.kind == "session":
            on_time = [e for e in known if e.watermark is None or e.raw.time >= e.watermark]
            done = [s for s in self.sessions(on_time, w.size_us) if self.has_closed(s, w.size_us, watermark)]
            return done[-1] if done else []
        end = watermark // w.slide_us * w.slide_us
        return [
            e for e in known if self.within_window(e.raw.time, end, w.size_us) and self.in_time_for(end, e.watermark)
        ]

    def has_closed(self, session: Sequence[Logged], gap: int, watermark: int) -> bool:
        return watermark > session[-1].raw.time + gap

    def in_time_for(self, end: int, before: int | None) -> bool:
        return before is None or end > before


# Aggregates


@dataclass(frozen=True)
class Result:
    """An aggregate, and by how much an engine that adds doubles in another order may differ from it."""

    value: Value
    tolerance: float = 0.0
    error: bool = False


def aggregate(function: str, inputs: Sequence[Value]) -> Result:
    """One aggregate over a window's inputs, in the order (event time, partition, offset); None is passed over."""
    values: list[Any] = [v for v in inputs if v is not None]
    if function == "count":
        return Result(len(values))
    if function == "count_distinct":
        return Result(distinct(values))
    if not values:
        return Result(None)
    if function == "min":
        return Result(min(values))
    if function == "max":
        return Result(max(values))
    if function == "first":
        return Result(values[0])
    if function == "last":
        return Result(values[-1])
    floats = isinstance(values[0], float)
    total = _fsum(values) if floats else sum(values)
    slack = 1e-9 * math.fsum(abs(v) / len(values) for v in values) if floats else 0.0
    if function == "sum":
        out_of_range = not math.isfinite(total) if floats else not -(2**63) <= total < 2**63
        return Result(total, slack * len(values), out_of_range)
    if function == "avg":
        mean = total / len(values)
        return Result(mean, slack if floats else 4e-16 * abs(mean), not math.isfinite(mean))
    assert function == "stddev"
    if len(values) < 2:
        return Result(None)
    deviation = _stddev(values)
    return Result(deviation, 1e-9 * deviation + 1e-12 * max(abs(float(v)) for v in values))


def _fsum(values: Sequence[float]) -> float:
    try:
        return math.fsum(values)
    except OverflowError:
        return math.inf


def _stddev(values: Sequence[Any]) -> float:
    n = len(values)
    if isinstance(values[0], int):
        return math.sqrt(_ratio(n * sum(v * v for v in values) - sum(values) ** 2, n * (n - 1)))
    mean = math.fsum(values) / n
    apart = [v - mean for v in values]
    return math.sqrt(max(0.0, (math.fsum(d * d for d in apart) - math.fsum(apart) ** 2 / n) / (n - 1)))


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator


def distinct(values: Iterable[Value]) -> int:
    """The number of different values: exact under K of them, else estimated from the K-th smallest hash."""
    hashes = sorted({hash63(text_of(v)) for v in values})
    if len(hashes) < K:
        return len(hashes)
    return round((K - 1) * 2.0**63 / float(hashes[K - 1]))


def hash63(text: str) -> int:
    return int.from_bytes(hashlib.md5(text.encode(), usedforsecurity=False).digest()[8:], "little") >> 1


def text_of(value: Value) -> str:
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else str(value)


# Expressions


def possible(expression: Expression, results: Sequence[Result]) -> Possible:
    """An output over aggregates: computed at both ends of every tolerance, so that an exact result allows one value."""
    used = sorted(set(_references(expression)))
    if any(results[i].error for i in used):
        return Possible(error=True)
    ends: list[list[Value]] = []
    for r in results:
        if r.tolerance:
            assert isinstance(r.value, (int, float))
            ends.append([r.value - r.tolerance, r.value, r.value + r.tolerance])
        else:
            ends.append([r.value])
    low: Any = None
    high: Any = None
    null = error = False
    for combination in itertools.product(*(ends[i] if i in used else [None] for i in range(len(results)))):
        try:
            got = evaluate(expression, {}, combination)
            if isinstance(got, float) and not math.isfinite(got):
                raise OutOfRangeError(got)
        except OutOfRangeError:
            error = True
            continue
        if got is None:
            null = True
        else:
            low = got if low is None else min(low, got)
            high = got if high is None else max(high, got)
    if isinstance(low, float) and low != high:
        low, high = low - 1e-15 * abs(low), high + 1e-15 * abs(high)
    return Possible(low, high, null, error)


def _references(expression: Expression) -> Iterable[int]:
    if isinstance(expression, AggregateRef):
        yield expression.index
    elif isinstance(expression, Call):
        for a in expression.arguments:
            yield from _references(a)


def evaluate(expression: Expression, row: Mapping[str, Value], aggregates: Sequence[Value] = ()) -> Value:
    """The value of an expression, three-valued. OutOfRangeError where an int64 overflows; floats may become infinite."""
    if isinstance(expression, Column):
        return row[expression.name]
    if isinstance(expression, Constant):
        return expression.value
    if isinstance(expression, AggregateRef):
        return aggregates[expression.index]
    operator, arguments = expression.operator, expression.arguments
    if operator == "case":
        for condition, value in zip(arguments[:-1:2], arguments[1:-1:2]):
            if evaluate(condition, row, aggregates) is True:
                return evaluate(value, row, aggregates)
        return evaluate(arguments[-1], row, aggregates)
    if operator == "coalesce":
        for argument in arguments:
            value = evaluate(argument, row, aggregates)
            if value is not None:
                return value
        return None
    values: list[Any] = [evaluate(a, row, aggregates) for a in arguments]
    if operator == "and":
        return False if False in values else None if None in values else True
    if operator == "or":
        return True if True in values else None if None in values else False
    if operator == "is_null":
        return values[0] is None
    if operator == "nullif":
        return None if values[0] is not None and values[1] is not None and values[0] == values[1] else values[0]
    if None in values:
        return None
    return _strict(expression, values)


def _strict(call: Call, v: list[Any]) -> Value:
    operator = call.operator
    if operator in ("+", "-", "*", "neg", "abs"):
        if call.type == "float64":
            v = [float(x) for x in v]
        out = {
            "+": lambda: v[0] + v[1],
            "-": lambda: v[0] - v[1],
            "*": lambda: v[0] * v[1],
            "neg": lambda: -v[0],
            "abs": lambda: abs(v[0]),
        }[operator]()
        if isinstance(out, int) and not -(2**63) <= out < 2**63:
            raise OutOfRangeError(out)
        return out
    if operator == "/":
        return None if v[1] == 0 else float(v[0]) / float(v[1])
    if operator == "%":
        if v == [-(2**63), -1]:
            raise OutOfRangeError(v)
        return None if v[1] == 0 else int(math.copysign(1, v[0])) * (abs(v[0]) % abs(v[1]))
    if operator in ("=", "<>", "<", "<=", ">", ">="):
        a, b = v
        if "float64" in (call.arguments[0].type, call.arguments[1].type):
            a, b = float(a), float(b)
        elif isinstance(a, str):
            a, b = a.encode(), b.encode()
        return {"=": a == b, "<>": a != b, "<": a < b, "<=": a <= b, ">": a > b, ">=": a >= b}[operator]
    if operator == "not":
        return not v[0]
    if operator == "in":
        return v[0] in v[1:]
    if operator == "cast":
        return float(v[0]) if call.type == "float64" else int(v[0])
    if operator in ("floor", "ceil"):
        return v[0] if not math.isfinite(v[0]) else float(math.floor(v[0]) if operator == "floor" else math.ceil(v[0]))
    if operator == "lower":
        return v[0].lower()
    if operator == "upper":
        return v[0].upper()
    if operator == "length":
        return len(v[0])
    at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=v[0])
    return at.hour if operator == "hour" else at.isoweekday()
