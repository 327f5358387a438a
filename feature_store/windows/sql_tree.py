"""The tree of a windowed definition's SQL: what was written and where, before asking whether it makes sense."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from feature_store.windows.sql_intervals import Interval
from feature_store.windows.sql_tokens import At, Token

OVER_FORM = "COUNT(*) OVER (PARTITION BY key ORDER BY event_timestamp RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW)"
TABLE_FORM = "FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' HOUR))"


@dataclass(frozen=True)
class Name:
    """A column, maybe behind its table's name."""

    at: At
    name: str
    table: str | None = None
    depth: int = 1


@dataclass(frozen=True)
class Literal_:
    """A number as it was written, a string, a bool, a null, or a timestamp's text."""

    at: At
    kind: Literal["number", "string", "bool", "null", "timestamp"]
    text: str
    depth: int = 1


@dataclass(frozen=True)
class Star:
    at: At
    depth: int = 1


@dataclass(frozen=True)
class Operation:
    """An operator of `ir.Operator`, or `between`, `simple_case`, `extract <unit>`; `cast` with the type's name in `word`."""

    at: At
    operator: str
    arguments: tuple[Node, ...]
    word: str = ""
    depth: int = 1


@dataclass(frozen=True)
class Over:
    """`OVER (...)` or a named window."""

    at: At
    partition: tuple[Name, ...]
    order: Name
    size: Interval


@dataclass(frozen=True)
class Function:
    """A call; `over` is a window's name where that stands in the WINDOW clause."""

    at: At
    name: str
    arguments: tuple[Node, ...]
    distinct: bool = False
    filter: Node | None = None
    over: Over | Token | None = None
    depth: int = 1


Node = Name | Literal_ | Star | Operation | Function | Interval


@dataclass(frozen=True)
class Item:
    """An entry of the select list."""

    expression: Node
    alias: Token | None


@dataclass(frozen=True)
class TableFunction:
    """`TABLE(TUMBLE(TABLE events [PARTITION BY ...], DESCRIPTOR(ts), length, ...))`."""

    at: At
    kind: str
    partition: tuple[Name, ...] | None
    timestamp: Name
    lengths: tuple[Interval, ...]


@dataclass(frozen=True)
class Select:
    """One SELECT. `group_by` None: without that clause."""

    at: At
    items: tuple[Item, ...]
    table: Token
    names: tuple[str, ...]
    """By which the table may be called in front of a column."""
    function: TableFunction | None
    where: Node | None
    group_by: tuple[Node, ...] | None
    windows: dict[str, Over]
    emit: At | None
