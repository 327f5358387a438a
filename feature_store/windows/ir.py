"""What a windowed definition means, once its SQL has been read: typed, immutable, without I/O.

`parse.py` makes it from SQL; the stream (`plan.py`, `state.py`), history (`history.py`) and the emitted Flink and Spark
SQL are all compiled from it, so that they cannot disagree on what was asked. Times and lengths are microseconds, UTC.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, get_args

Type = Literal["int64", "float64", "string", "bool", "timestamp"]
"""int64: 64 bits, overflow is an error. float64: finite. timestamp: microseconds since the epoch, UTC."""
TYPES: tuple[Type, ...] = get_args(Type)


# Expressions. Three-valued logic as in SQL. One meaning for all engines, so what they disagree on is not offered.


@dataclass(frozen=True)
class Column:
    """A column of the event."""

    name: str
    type: Type


@dataclass(frozen=True)
class Constant:
    """A literal; None is a null of `type`. A timestamp is an int of microseconds."""

    value: int | float | str | bool | None
    type: Type


@dataclass(frozen=True)
class AggregateRef:
    """The result of the statement's aggregate number `index`; only in outputs."""

    index: int
    type: Type


Operator = Literal[
    "+", "-", "*", "/", "%", "neg", "=", "<>", "<", "<=", ">", ">=", "and", "or", "not", "is_null", "in",
    "case", "cast", "abs", "floor", "ceil", "coalesce", "nullif", "lower", "upper", "length", "hour", "isodow",
]  # fmt: skip
"""How each is computed, its arguments being null-strict unless said otherwise:

`+ - *` int64 with int64 gives int64 (overflow is an error), with a float64 float64; `neg`, `abs` keep the type.
`/` float64, null where the divisor is 0. `%` int64, the sign of the dividend, null where the divisor is 0.
Comparisons give bool; int64 with float64 compares as float64; strings compare by their UTF-8 bytes; bools only by = and <>.
`and or not` bool, three-valued. `is_null` bool, never null. `in`: the first argument is one of the others, all constants, none null.
`case`: condition, value, condition, value, ..., otherwise (always there, maybe a null constant). `coalesce`: first that is not null.
`nullif`: null where both are equal, else the first. `cast`: int64 to float64, bool to int64 (nothing else).
`floor`, `ceil`: float64 to float64. `lower`, `upper`, `length` (code points): string. `hour` 0-23, `isodow` 1 (Monday)-7: of a timestamp, UTC.
"""


@dataclass(frozen=True)
class Call:
    """An operator over its arguments."""

    operator: Operator
    arguments: tuple[Expression, ...]
    type: Type


Expression = Column | Constant | AggregateRef | Call


def walk(expression: Expression) -> Iterator[Expression]:
    """The expression and everything in it."""
    yield expression
    if isinstance(expression, Call):
        for argument in expression.arguments:
            yield from walk(argument)


# Windows and aggregates


@dataclass(frozen=True)
class Window:
    """`over`: t - size <= event time <= t. `tumble`, `hop`: [start, start + size), start a multiple of `slide_us` since
    the epoch (tumble: slide = size; size is a multiple of slide). `session`: events at most `size_us` apart.

    Open, it is read at t; `on_close`, the newest window that the watermark has closed.
    """

    kind: Literal["over", "tumble", "hop", "session"]
    size_us: int
    slide_us: int = 0
    on_close: bool = False


Function = Literal["count", "count_distinct", "sum", "avg", "min", "max", "first", "last", "stddev"]


@dataclass(frozen=True)
class Aggregate:
    """`function` over `argument` (None: COUNT(*)) of the window's events for which `filter` (None: all) is true and
    `argument` is not null. `filter` has the statement's WHERE in it.

    Of no event: count and count_distinct 0, the rest null. `count`, `count_distinct`: int64. `sum`: int64 (exact; beyond 64
    bits is an error) or float64. `avg`: float64. `min`, `max`, `first`, `last`: the argument's type (int64, float64, bool,
    timestamp); first and last by (event time, partition, offset). `stddev`: sample, float64, null of fewer than two.
    """

    function: Function
    argument: Expression | None
    filter: Expression | None
    type: Type


@dataclass(frozen=True)
class Output:
    """One feature: an expression over aggregates (mostly a single AggregateRef)."""

    name: str
    expression: Expression
    type: Type


@dataclass(frozen=True)
class Statement:
    """One SELECT: the aggregates of one window, and the outputs made of them."""

    window: Window
    aggregates: tuple[Aggregate, ...]
    outputs: tuple[Output, ...]
