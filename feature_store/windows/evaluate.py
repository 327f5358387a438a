"""Expressions in plain Python: the outputs of a windowed view when it is read online.

The same meaning as `sql_text.expression_sql` in DuckDB, which history runs; tests/unit/test_window_evaluate.py holds them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from feature_store.windows.ir import AggregateRef, Call, Column, Constant, Expression, Type

Value = int | float | str | bool | None
"""A timestamp is an int of microseconds since the epoch, UTC."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_COMPARE: dict[str, Callable[..., bool]] = {
    "=": lambda a, b: a == b,
    "<>": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
}


def evaluate(
    expression: Expression, aggregates: Sequence[Value] = (), names: Mapping[str, Value] | None = None
) -> Value:
    """The value of an expression over the statement's `aggregates`, or over the event's columns, by name.

    OverflowError where an int64 overflows or a float64 is no longer finite; a division by zero is null. AND, OR, CASE
    and COALESCE look at no more arguments than they need.
    """
    match expression:
        case Constant(value, _):
            return value
        case AggregateRef(index, _):
            return aggregates[index]
        case Column(name, _):
            return (names or {})[name]
    arguments = expression.arguments

    def part(i: int) -> Value:
        return evaluate(arguments[i], aggregates, names)

    match expression.operator:
        case "and" | "or" as operator:
            deciding = operator == "or"
            found: Value = not deciding
            for i in range(len(arguments)):
                one = part(i)
                if one is not None and bool(one) == deciding:
                    return deciding
                found = None if one is None else found
            return found
        case "is_null":
            return part(0) is None
        case "case":
            for i in range(0, len(arguments) - 1, 2):
                if part(i):
                    return part(i + 1)
            return part(len(arguments) - 1)
        case "coalesce":
            return next((v for i in range(len(arguments)) if (v := part(i)) is not None), None)
        case "nullif":
            first, second = part(0), part(1)
            return None if first is not None and second is not None and first == second else first
    parts = [part(i) for i in range(len(arguments))]
    if any(p is None for p in parts):
        return None
    return _strict(expression, parts)


def _strict(call: Call, parts: list[Value]) -> Value:
    """An operator whose value is null if an argument is, of arguments that are not."""
    operator = call.operator
    if operator in _COMPARE:
        return _COMPARE[operator](*(p.encode() if isinstance(p, str) else p for p in parts))
    first = parts[0]
    match operator:
        case "not":
            return not first
        case "in":
            return first in parts[1:]
        case "lower":
            return "".join(_one(c, c.lower()) for c in str(first))
        case "upper":
            return "".join(_one(c, c.upper()) for c in str(first))
        case "length":
            return len(str(first))
    assert first is not None
    assert not isinstance(first, str)
    match operator:
        case "hour":
            return _time(first).hour
        case "isodow":
            return _time(first).isoweekday()
        case "neg":
            return _checked(-first, call.type)
        case "abs":
            return _checked(abs(first), call.type)
        case "floor" | "ceil":
            # copysign: ceil of -0.5 is -0.0, which an int cannot be.
            return math.copysign(float(math.floor(first) if operator == "floor" else math.ceil(first)), first)
        case "cast":
            return float(first) if call.type == "float64" else int(first)
    second = parts[1]
    assert second is not None
    assert not isinstance(second, str)
    match operator:
        case "/":
            return None if second == 0 else _checked(float(first) / float(second), "float64")
        case "%":
            return _remainder(int(first), int(second))
        case "+":
            return _checked(first + second, call.type)
        case "-":
            return _checked(first - second, call.type)
        case "*":
            return _checked(first * second, call.type)
    raise AssertionError(f"unknown operator {operator}")


def _checked(value: int | float, kind: Type) -> int | float:
    if kind == "int64" and not -(2**63) <= value < 2**63:
        raise OverflowError("beyond 64 bits")
    if kind == "float64" and not math.isfinite(value):
        raise OverflowError("beyond a float64")
    return value


def _remainder(a: int, b: int) -> int | None:
    if b == 0:
        return None
    if a == -(2**63) and b == -1:
        raise OverflowError("beyond 64 bits")  # DuckDB divides, and the quotient does not fit
    rest = abs(a) % abs(b)
    return -rest if a < 0 else rest


def _one(char: str, mapped: str) -> str:
    """Case changes character by character, as in DuckDB: one that would become several stays.

    Only for expressions over an event: strings of an output are constants, so serving never comes here.
    """
    return mapped if len(mapped) == 1 else char


def _time(micros: int | float) -> datetime:
    return _EPOCH + timedelta(microseconds=int(micros))
