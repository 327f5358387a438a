"""What of an event the aggregates need: a row of numbers, computed by the same SQL in the stream and in history.

Every distinct (filter, argument) of the aggregates becomes a bit of `_mask` (the filter is true and the argument not
null), every distinct argument a number column (0 where null). The stream runs the projection with DuckDB over a batch,
history over the event log: an expression cannot mean two things.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

from feature_store.errors import DefinitionError
from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.ir import Aggregate, Expression
from feature_store.windows.sql_text import expression_sql, identifier

MASK_BITS = 63
SKETCH_SIZE = 1024
"""COUNT(DISTINCT) keeps so many smallest hashes: a standard error of about 1 / sqrt(SKETCH_SIZE - 2), 3.1%."""
HASH_BITS = 63
"""COUNT(DISTINCT) counts hashes: the upper bits of `md5_number_lower` of the value as text (a time: its microseconds), so
that they fit an int64."""


@dataclass(frozen=True)
class Input:
    """What one aggregate reads: the bits of `_mask` that must be set, and the number column (None: COUNT of any kind)."""

    bit: int | None
    """None: COUNT(*) without a filter, every event."""
    value: int | None


@dataclass(frozen=True)
class Value:
    """A number column `_v<i>`: int64 (also of bools, timestamps in microseconds, and hashes) or float64."""

    argument: Expression
    hashed: bool

    @property
    def is_float(self) -> bool:
        return not self.hashed and self.argument.type == "float64"


class Plan:
    """The inputs of a definition's aggregates: `inputs[statement][aggregate]`, and `values`, the number columns."""

    def __init__(self, definition: WindowedView) -> None:
        self.definition = definition
        self.conditions: list[tuple[Expression | None, Expression | None]] = []  # (filter, argument not null) per bit
        self.values: list[Value] = []
        self.inputs = [[self._input(a) for a in s.aggregates] for s in definition.statements]
        if len(self.conditions) > MASK_BITS:
            raise DefinitionError(
                f"{definition.name}: more distinct filters and arguments than one view can hold",
                value=len(self.conditions),
                valid=[f"at most {MASK_BITS}"],
                next_step="split the view",
            )

    def _input(self, a: Aggregate) -> Input:
        bit = value = None
        if a.filter is not None or a.argument is not None:
            condition = (a.filter, a.argument)
            if condition not in self.conditions:
                self.conditions.append(condition)
            bit = self.conditions.index(condition)
        if a.argument is not None and a.function != "count":
            wanted = Value(a.argument, a.function == "count_distinct")
            if wanted not in self.values:
                self.values.append(wanted)
            value = self.values.index(wanted)
        return Input(bit, value)

    @cached_property
    def event_columns(self) -> list[str]:
        """The columns of an event in a batch or in the log, without those that the log adds."""
        d = self.definition
        names = [*d.entity_key, d.source.timestamp, *d.source.columns]
        return [*names, d.source.event_id] if d.source.event_id is not None else names

    def numbers_sql(self) -> str:
        """Select-list items over the event's columns: `_mask` BIGINT and `_v0`, `_v1`, ... BIGINT or DOUBLE, never null.

        Raises within DuckDB (duckdb.OutOfRangeException) where int64 overflows. A DOUBLE may be infinite or NaN: the caller's to refuse.
        """
        bits = [
            f"CASE WHEN {_valid(*condition)} THEN {1 << i}::BIGINT ELSE 0::BIGINT END"
            for i, condition in enumerate(self.conditions)
        ]
        items = [f"({' + '.join(bits)}) AS _mask" if bits else "0::BIGINT AS _mask"]
        for i, v in enumerate(self.values):
            items.append(f"{_number(v)} AS _v{i}")
        return ", ".join(items)

    def event_id_sql(self) -> str:
        """A select-list item: `_id` BIGINT, which stands for the event id in the state (0 without one)."""
        column = self.definition.source.event_id
        return f"{hash_sql(identifier(column))} AS _id" if column is not None else "0::BIGINT AS _id"


NOT_FINITE = "not_finite"
"""In `_dropped` of history: an event with a NaN or an infinity, which in the stream is a dead letter."""


def not_finite_sql(source: EventSource) -> str | None:
    """SQL over an event's columns: true where one of them is NaN or infinite; None: none of them is a float."""
    finite = [f"isfinite({identifier(n)})" for n, kind in source.columns.items() if kind == "float64"]
    return f"(NOT ({' AND '.join(finite)}))" if finite else None


def hash_sql(text: str) -> str:
    """63 bits of a string that any engine can compute: in Python `int.from_bytes(md5(text).digest()[8:], "little") >> 1`."""
    return f"CAST(md5_number_lower({text}) >> 1 AS BIGINT)"


def _valid(condition: Expression | None, argument: Expression | None) -> str:
    parts = []
    if condition is not None:
        parts.append(f"({expression_sql(condition, 'duckdb')})")
    if argument is not None:
        parts.append(f"({expression_sql(argument, 'duckdb')}) IS NOT NULL")
    return " AND ".join(parts)


def _number(v: Value) -> str:
    sql = expression_sql(v.argument, "duckdb")
    if v.hashed:
        # A time as text would depend on the session's time zone.
        value = f"epoch_us({sql})" if v.argument.type == "timestamp" else sql
        return f"coalesce({hash_sql(f'CAST({value} AS VARCHAR)')}, 0)"
    if v.argument.type == "timestamp":
        return f"coalesce(epoch_us({sql}), 0)"
    if v.argument.type == "float64":
        return f"coalesce(CAST({sql} AS DOUBLE), 0)"
    return f"coalesce(CAST({sql} AS BIGINT), 0)"


@lru_cache(maxsize=256)
def plan_of(definition: WindowedView) -> Plan:
    """The plan of a definition, made once. DefinitionError: SQL that is not supported."""
    return Plan(definition)
