"""Expressions of a windowed definition as SQL text for DuckDB, Flink and Spark, each meaning what `ir.Operator` says.

`plain` is for people (lineage, `windows explain`): nothing runs it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Literal

from feature_store.windows.ir import AggregateRef, Call, Column, Constant, Expression, Type, walk

Dialect = Literal["duckdb", "flink", "spark", "plain"]

_SAME = ("+", "-", "*", "=", "<>", "<", "<=", ">", ">=")
_CAST: dict[Dialect, dict[Type, str]] = {
    "duckdb": {"int64": "BIGINT", "float64": "DOUBLE", "string": "VARCHAR", "bool": "BOOLEAN", "timestamp": "TIMESTAMPTZ"},
    "flink": {"int64": "BIGINT", "float64": "DOUBLE", "string": "STRING", "bool": "BOOLEAN", "timestamp": "TIMESTAMP_LTZ(6)"},
    "spark": {"int64": "BIGINT", "float64": "DOUBLE", "string": "STRING", "bool": "BOOLEAN", "timestamp": "TIMESTAMP"},
    "plain": {"int64": "BIGINT", "float64": "DOUBLE", "string": "VARCHAR", "bool": "BOOLEAN", "timestamp": "TIMESTAMP"},
}  # fmt: skip
_FUNCTION: dict[str, dict[Dialect, str]] = {
    "abs": {},
    "floor": {},
    "ceil": {},
    "coalesce": {},
    "nullif": {},
    "lower": {},
    "upper": {},
    "length": {"flink": "char_length", "spark": "char_length"},
}


_REPEATED = 200
"""Up to so many characters a value is written down thrice to be checked; longer ones once, or nesting would explode."""


def expression_sql(expression: Expression, dialect: Dialect, aggregates: Sequence[str] = (), finite: str = "") -> str:
    """The text of an expression. `aggregates`: what stands for each AggregateRef. Always safe to put within another expression.

    `finite`: the output's name, of which DuckDB is to raise an error where a float on the way is no longer finite.
    """
    match expression:
        case Column(name, _):
            return identifier(name, dialect)
        case Constant(value, kind):
            return constant_sql(value, kind, dialect)
        case AggregateRef(index, _):
            return aggregates[index]
    text = _call_sql(expression, dialect, aggregates, finite)
    return finite_sql(text, finite) if finite and _may_be_infinite(expression) else text


def _call_sql(expression: Call, dialect: Dialect, aggregates: Sequence[str], finite: str) -> str:
    parts = [expression_sql(a, dialect, aggregates, finite) for a in expression.arguments]
    kinds = [a.type for a in expression.arguments]
    double = _CAST[dialect]["float64"]
    match expression.operator:
        case operator if operator in _SAME:
            return f"({parts[0]} {operator} {parts[1]})"
        case "and" | "or" as operator:
            every = "(" + f" {operator.upper()} ".join(parts) + ")"
            if dialect != "duckdb" or not any(_may_fail(a, finite) for a in expression.arguments):
                return every
            # DuckDB looks at all parts of a condition or at some, in an order of its own; a CASE, at no more than decide.
            decides = "NOT {}" if operator == "and" else "{}"
            whens = " ".join(f"WHEN {decides.format(p)} THEN {'TRUE' if operator == 'or' else 'FALSE'}" for p in parts)
            return f"CASE {whens} ELSE {every} END"
        case "neg":
            return f"(-{parts[0]})"
        case "not":
            return f"(NOT {parts[0]})"
        case "/" | "%" if dialect == "plain":
            return f"({parts[0]} {expression.operator} {parts[1]})"
        case "/":
            # Engines differ on a zero divisor (null, infinity, error), so it is taken out first.
            return f"(CAST({parts[0]} AS {double}) / nullif(CAST({parts[1]} AS {double}), 0))"
        case "%":
            return f"({parts[0]} % nullif({parts[1]}, 0))"
        case "is_null":
            return f"({parts[0]} IS NULL)"
        case "in":
            return f"({parts[0]} IN ({', '.join(parts[1:])}))"
        case "case":
            whens = " ".join(f"WHEN {c} THEN {v}" for c, v in zip(parts[:-1:2], parts[1:-1:2], strict=True))
            return f"CASE {whens} ELSE {parts[-1]} END"
        case "cast":
            if kinds[0] == "bool" and dialect == "flink":
                return f"CASE WHEN {parts[0]} THEN 1 WHEN NOT {parts[0]} THEN 0 END"
            return f"CAST({parts[0]} AS {_CAST[dialect][expression.type]})"
        case "hour":
            return f"EXTRACT(HOUR FROM {_utc(parts[0], dialect)})"
        case "isodow":
            day = "DAYOFWEEK_ISO" if dialect == "spark" else "ISODOW"
            return f"EXTRACT({day} FROM {_utc(parts[0], dialect)})"
        case name:
            return f"{_FUNCTION[name].get(dialect, name)}({', '.join(parts)})"


def finite_sql(value: str, where: str) -> str:
    """The float, or an error where it is none."""
    raised = f"error({beyond_sql(where, 'a float64')})"
    if len(value) > _REPEATED:
        return f"list_transform([{value}], lambda v: CASE WHEN v IS NULL OR isfinite(v) THEN v ELSE {raised} END)[1]"
    return f"CASE WHEN {value} IS NULL OR isfinite({value}) THEN {value} ELSE {raised} END"


def beyond_sql(where: str, kind: str) -> str:
    """A literal: what is said of a result beyond its type."""
    return constant_sql(f"{where}: the result does not fit into {kind}", "string")


def _may_fail(expression: Expression, finite: str) -> bool:
    """Whether DuckDB may raise an error for it: int64 arithmetic overflows, and so do floats that are checked."""
    fails = ("+", "-", "*", "%", "neg", "abs")
    return any(
        isinstance(e, Call) and ((e.type == "int64" and e.operator in fails) or (finite != "" and _may_be_infinite(e)))
        for e in walk(expression)
    )


def _may_be_infinite(call: Call) -> bool:
    """Of finite arguments: not for a quotient of integers."""
    floats = any(a.type == "float64" for a in call.arguments)
    return floats and call.operator in ("+", "-", "*", "/")


def _utc(timestamp: str, dialect: Dialect) -> str:
    """Parts of a time are taken in UTC, whatever the session's zone; Flink and Spark take it from the session (see `explain`)."""
    return f"({timestamp} AT TIME ZONE 'UTC')" if dialect == "duckdb" else timestamp


def identifier(name: str, dialect: Dialect = "duckdb") -> str:
    """A quoted name."""
    if dialect == "plain" and re.fullmatch("[a-zA-Z_][a-zA-Z0-9_]*", name):
        return name
    quote = '"' if dialect in ("duckdb", "plain") else "`"
    return quote + name.replace(quote, quote * 2) + quote


def constant_sql(value: int | float | str | bool | None, kind: Type, dialect: Dialect = "duckdb") -> str:
    """A literal of the type, a null too."""
    if value is None:
        return "NULL" if dialect == "plain" else f"CAST(NULL AS {_CAST[dialect][kind]})"
    if kind == "string":
        text = str(value).replace("\\", "\\\\") if dialect == "spark" else str(value)
        return "'" + text.replace("'", "\\'" if dialect == "spark" else "''") + "'"
    if kind == "bool":
        return "TRUE" if value else "FALSE"
    if dialect == "plain":
        time = datetime(1970, 1, 1) + timedelta(microseconds=int(value)) if kind == "timestamp" else None  # noqa: DTZ001 - UTC, printed without zone
        return f"TIMESTAMP '{time}'" if time is not None else repr(value)
    if kind == "timestamp":
        if dialect == "duckdb":
            return f"make_timestamptz({int(value)})"
        if (
            dialect == "flink"
        ):  # whose TO_TIMESTAMP_LTZ has milliseconds at most; the session's zone is UTC (`flink_sql`)
            utc = datetime(1970, 1, 1) + timedelta(microseconds=int(value))  # noqa: DTZ001 - UTC, printed without zone
            return f"CAST(TIMESTAMP '{utc.isoformat(' ', 'microseconds')}' AS TIMESTAMP_LTZ(6))"
        return f"timestamp_micros({int(value)})"
    if kind == "float64":
        return f"CAST('{float(value)!r}' AS {_CAST[dialect]['float64']})"
    number = int(value)
    return f"CAST({number} AS BIGINT)" if number >= 0 else f"CAST('{number}' AS BIGINT)"
