"""Types at the border: times as integer ticks of their own unit (never rounded), keys by kind, values as declared.

A tick is one unit of the stored column: 1 ns or 1 us. Entity times are nanoseconds; they are brought to the column's
unit by floor (upper bound) and ceiling (lower bound), which is exact: `e <= t` in ticks is `e <= t` in nanoseconds.
"""

from __future__ import annotations

from typing import Any

from feature_store.errors import DataError
from feature_store.point_in_time.engine import text

_INTEGERS = {
    "TINYINT", "SMALLINT", "INTEGER", "BIGINT", "HUGEINT", "UTINYINT", "USMALLINT", "UINTEGER", "UBIGINT", "UHUGEINT",
}  # fmt: skip
_FLOATS = {"FLOAT", "DOUBLE"}
_SMALL = {"TINYINT", "SMALLINT", "UTINYINT", "USMALLINT"}
_EXACT = {"FLOAT": _SMALL, "DOUBLE": _SMALL | {"INTEGER", "UINTEGER"}}
"""Integer types of which a floating-point type holds every value."""
_TIMES_US = {"TIMESTAMP", "TIMESTAMP WITH TIME ZONE", "TIMESTAMP_S", "TIMESTAMP_MS", "DATE"}
_TIMES_NS = {"TIMESTAMP_NS", "TIMESTAMPTZ_NS"}


def kind(sql_type: str) -> str:
    """The family of a DuckDB type; only values of one kind are comparable."""
    if sql_type in _INTEGERS:
        return "integer"
    if sql_type in _FLOATS or sql_type.startswith("DECIMAL"):
        return "number"
    if sql_type == "VARCHAR" or sql_type.startswith("ENUM"):
        return "string"
    if sql_type in _TIMES_US | _TIMES_NS:
        return "time"
    return {"BLOB": "bytes", "BOOLEAN": "bool", "UUID": "uuid"}.get(sql_type, sql_type.lower())


def ns_per_tick(sql_type: str) -> int:
    """Nanoseconds per tick of a time column of this DuckDB type."""
    return 1 if sql_type in _TIMES_NS else 1000


def ticks(column: str, sql_type: str) -> str:
    """SQL for a time column as BIGINT ticks since the epoch."""
    if sql_type in _TIMES_NS:
        return f"epoch_ns({column})"
    if sql_type in ("TIMESTAMP", "TIMESTAMP WITH TIME ZONE"):
        return f"epoch_us({column})"
    return f"epoch_us(CAST({column} AS TIMESTAMP))"


def time_literal(tick: int, sql_type: str) -> str:
    """A constant of the column's own type, so that the filter reaches the row group statistics of the file."""
    ns = tick * ns_per_tick(sql_type)
    if sql_type in _TIMES_NS:
        return f"CAST(make_timestamp_ns({ns}) AS {sql_type})"
    return f"CAST(make_timestamp({ns // 1000}) AS {sql_type})"


def sql_type_of(dtype: Any) -> str | None:
    """The DuckDB type that holds a declared Feast type; None where the stored type is passed through."""
    from feast import types as feast_types

    simple = {
        feast_types.String: "VARCHAR",
        feast_types.Uuid: "VARCHAR",
        feast_types.TimeUuid: "VARCHAR",
        feast_types.Bytes: "BLOB",
        feast_types.PdfBytes: "BLOB",
        feast_types.ImageBytes: "BLOB",
        feast_types.Bool: "BOOLEAN",
        feast_types.Int32: "INTEGER",
        feast_types.Int64: "BIGINT",
        feast_types.Float32: "FLOAT",
        feast_types.Float64: "DOUBLE",
        feast_types.UnixTimestamp: "TIMESTAMP WITH TIME ZONE",
    }
    if isinstance(dtype, feast_types.Array):
        inner = sql_type_of(dtype.base_type)
        return f"{inner}[]" if inner else None
    return simple.get(dtype)


def as_declared(column: str, stored: str, dtype: Any, where: str) -> str:
    """SQL that reads `column` (DuckDB type `stored`) as the declared Feast type.

    Widths may differ; a value that does not fit is an error at run time, a kind that does not fit is a DataError now.
    Whole numbers stored as floating point (how pandas writes integers with nulls) are read as integers.
    `where` names the view, feature and path.
    """
    target = sql_type_of(dtype)
    if target is None:
        return column
    have, want = kind(stored), kind(target)
    if target == "TIMESTAMP WITH TIME ZONE" and have == "time":
        per_second = 1_000_000_000 // ns_per_tick(stored)  # Feast keeps UnixTimestamp as whole seconds online
        return f"CAST(make_timestamp(({ticks(column, stored)} // {per_second}) * 1000000) AS {target})"
    if stored == target or stored == '"NULL"':
        return f"CAST({column} AS {target})"
    if have == "integer" and want == "number":
        return as_stored(column, stored, target, where)
    if have == "number" and want == "integer":
        message = text(f"{where}: not a whole number: ")
        return (
            f"CASE WHEN {column} IS NULL OR isnan(CAST({column} AS DOUBLE)) THEN NULL "
            f"WHEN trunc({column}) = {column} THEN CAST({column} AS {target}) "
            f"ELSE error({message} || CAST({column} AS VARCHAR)) END"
        )
    fits = have == want or (have == "integer" and want == "number") or (have == "uuid" and want == "string")
    if not fits and not (target.endswith("[]") and stored.endswith("]")):
        raise DataError(f"{where}: stored as {stored}, which does not fit the declared type", value=str(dtype))
    return f"CAST({column} AS {target})"


def as_stored(column: str, stored: str, target: str, where: str) -> str:
    """SQL that brings `column` from one file's type to the common type of all files, without losing a digit.

    DataError when the kinds differ: what the engine would make of both is text, or a rounded number.
    """
    if stored == target or stored == '"NULL"':
        return f"CAST({column} AS {target})"
    have, want = kind(stored), kind(target)
    if have == "integer" and want == "number":
        if stored in _EXACT.get(target, ()):
            return f"CAST({column} AS {target})"
        message = text(f"{where}: {target} would lose digits of ")
        return (
            f"CASE WHEN CAST(CAST({column} AS {target}) AS HUGEINT) <> {column} "
            f"THEN error({message} || CAST({column} AS VARCHAR)) ELSE CAST({column} AS {target}) END"
        )
    if have != want and not (target.endswith("]") and stored.endswith("]")):
        raise DataError(f"{where}: stored as {stored}, other files have {target}", value=stored)
    return f"CAST({column} AS {target})"
