"""From the SQL of a windowed definition to `ir.Statement`: whether it makes sense, and what it means.

`sql_tokens` reads words, `sql_syntax` and `sql_reader` the tree, `sql_expressions` gives types, `sql_windows` the windows;
here stand aggregates and outputs.
Everything that is not supported is an SqlError with its place, the reason and the nearest supported form.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from feature_store.windows.definition import STATE_FIELD, EventSource
from feature_store.windows.ir import (
    Aggregate,
    AggregateRef,
    Column,
    Expression,
    Output,
    Statement,
    Type,
    Window,
    walk,
)
from feature_store.windows.ir import Function as AggregateFunction
from feature_store.windows.sql_expressions import SCALARS, Checker, both
from feature_store.windows.sql_syntax import selects
from feature_store.windows.sql_tokens import At, SqlError, Token
from feature_store.windows.sql_tree import (
    OVER_FORM,
    TABLE_FORM,
    Function,
    Item,
    Name,
    Node,
    Select,
    Star,
)
from feature_store.windows.sql_windows import BOUNDS, WINDOW_FUNCTIONS, WindowChecker

AGGREGATES: dict[str, AggregateFunction] = {
    "COUNT": "count",
    "SUM": "sum",
    "AVG": "avg",
    "MIN": "min",
    "MAX": "max",
    "FIRST": "first",
    "FIRST_VALUE": "first",
    "LAST": "last",
    "LAST_VALUE": "last",
    "STDDEV": "stddev",
    "STDDEV_SAMP": "stddev",
}


def parse(
    sql: str, source: EventSource, entity_key: Sequence[str], key_types: Sequence[Type] | None = None
) -> tuple[Statement, ...]:
    """What the SQL says: a Statement per SELECT, or per window where a SELECT has OVER windows of several sizes.

    `key_types`: of `entity_key`, default strings. SqlError (a DefinitionError) for any text that does not make sense.
    """
    columns: dict[str, Type] = dict(source.columns)
    if source.event_id is not None:
        columns.setdefault(source.event_id, "string")
    columns |= dict(zip(entity_key, key_types or ["string"] * len(entity_key), strict=True))
    columns[source.timestamp] = "timestamp"
    trees = selects(sql)
    for tree in trees[1:]:
        if tree.table.text != trees[0].table.text:
            raise SqlError(
                tree.table.at, "all SELECTs are over one event stream", value=tree.table.text,
                valid=[trees[0].table.text], nearest="a view of its own for another stream",
            )  # fmt: skip
    taken = {n.lower(): n for n in (*entity_key, source.timestamp, "created", STATE_FIELD)}
    if source.event_id is not None:
        taken[source.event_id.lower()] = source.event_id
    outputs: dict[str, str] = {}
    found: list[Statement] = []
    for tree in trees:
        found += _SelectMeaning(tree, source, tuple(entity_key), columns, taken, outputs).statements()
    return tuple(found)


@dataclass
class _Group:
    """The aggregates and outputs of one window so far."""

    aggregates: list[Aggregate] = field(default_factory=list)
    outputs: list[Output] = field(default_factory=list)


class _SelectMeaning:
    """One SELECT; `taken` and `outputs`: names (in lower case) that an output may not have."""

    def __init__(
        self, tree: Select, source: EventSource, key: tuple[str, ...], columns: Mapping[str, Type],
        taken: Mapping[str, str], outputs: dict[str, str],
    ) -> None:  # fmt: skip
        self._tree = tree
        self._source = source
        self._key = key
        self._columns = columns
        self._taken = taken
        self._names = outputs
        self._rows = Checker(columns, tree.names, self._no_aggregate)
        self._groups: dict[Window, _Group] = {}
        self._windows = WindowChecker(tree, source, key)
        self._grouped = self._windows.of_group()
        self._where = self._rows.condition(tree.where, "WHERE") if tree.where is not None else None

    def statements(self) -> list[Statement]:
        for item in self._tree.items:
            self._item(item)
        if not self._groups:
            at = self._tree.items[0].expression.at
            raise SqlError(at, "no output, only the key", nearest="an aggregate, like COUNT(*) AS n")
        return [Statement(w, tuple(g.aggregates), tuple(g.outputs)) for w, g in self._groups.items()]

    def _item(self, item: Item) -> None:
        node, alias = item.expression, item.alias
        if isinstance(node, Star):
            raise SqlError(node.at, "SELECT *: outputs are aggregates", value="*", nearest="COUNT(*) AS n")
        if isinstance(node, Name) and node.name in self._key:
            self._windows.check_table(node)
            if alias is not None and alias.text != node.name:
                raise SqlError(alias.at, "the key keeps its name", value=alias.text, nearest=node.name)
            return
        output = _OutputReader(self)
        expression = output.read(node)
        if alias is None:
            raise SqlError(node.at, "an output without a name", nearest="AS and a name behind it")
        self._check_name(alias)
        window = output.window
        if window is None:
            raise SqlError(
                node.at, "an output without an aggregate", value=alias.text, nearest="COUNT(*), SUM(x), LAST(x), ..."
            )
        self._groups[window].outputs.append(Output(alias.text, expression, expression.type))

    def _check_name(self, alias: Token) -> None:
        name = alias.text
        if not re.fullmatch("[A-Za-z][A-Za-z0-9_]*", name) or "__" in name:
            instead = re.sub("_+", "_", re.sub("[^A-Za-z0-9]", "_", name)).strip("_")[:40]
            raise SqlError(
                alias.at, "a feature's name has ASCII letters, digits and single _, and begins with a letter", value=name[:40],
                nearest=f"AS {instead}" if instead[:1].isalpha() else "AS n",
            )  # fmt: skip
        lower = name.lower()
        if lower in self._taken:
            raise SqlError(
                alias.at,
                f"the name is taken: {self._taken[lower]} stands beside every feature",
                value=name,
                nearest="AS another name",
            )
        if lower in BOUNDS:
            raise SqlError(alias.at, "the name is taken by the window", value=name, nearest="AS another name")
        if lower in self._names:
            also = "" if self._names[lower] == name else f" (DuckDB sees no case: {self._names[lower]})"
            raise SqlError(alias.at, f"two outputs of one name{also}", value=name, nearest="AS another name")
        self._names[lower] = name

    def aggregate(self, node: Function) -> tuple[Window, Expression]:
        """The window of an aggregate's call, and a reference to the aggregate among those of that window."""
        window = self._window_of(node)
        made = self._aggregate(node)
        group = self._groups.setdefault(window, _Group())
        if made not in group.aggregates:
            group.aggregates.append(made)
        return window, AggregateRef(group.aggregates.index(made), made.type)

    def _window_of(self, node: Function) -> Window:
        if self._grouped is not None:
            if node.over is not None:
                raise SqlError(
                    node.over.at, "OVER within a GROUP BY: a SELECT has one kind of window", value=node.name,
                    nearest="two SELECTs with ; between them",
                )  # fmt: skip
            return self._grouped
        if node.over is None:
            raise SqlError(node.at, "an aggregate without a window", value=node.name, nearest=OVER_FORM)
        over = node.over
        if isinstance(over, Token):
            named = self._tree.windows.get(over.text)
            if named is None:
                raise SqlError(
                    over.at, "unknown window", value=over.text, valid=self._tree.windows,
                    nearest=f"WINDOW {over.text} AS (...) at the end",
                )  # fmt: skip
            over = named
        return self._windows.of_over(over)

    def _aggregate(self, node: Function) -> Aggregate:
        name = node.name.upper()
        function = AGGREGATES[name]
        if len(node.arguments) != 1:
            form = "COUNT(*)" if name == "COUNT" else f"{name}(column)"
            raise SqlError(node.at, f"{name} takes 1 argument, not {len(node.arguments)}", nearest=form)
        condition = self._rows.condition(node.filter, "FILTER") if node.filter is not None else None
        parts = [c for c in (self._where, condition) if c is not None]
        filter_ = both(parts) if parts else None
        (argument,) = node.arguments
        if isinstance(argument, Star) and name == "COUNT" and not node.distinct:
            return Aggregate("count", None, filter_, "int64")
        if node.distinct and name != "COUNT":
            raise SqlError(
                node.at, f"{name}(DISTINCT ...) is not supported", nearest=f"{name}(x), or COUNT(DISTINCT x)"
            )
        x = self._rows.expression(argument)
        if function == "count" and not node.distinct and not any(isinstance(e, Column) for e in walk(x)):
            raise SqlError(argument.at, "COUNT of a constant", nearest="COUNT(*)")
        self._check_argument(argument.at, name, node.distinct, x.type)
        if function == "count":
            return Aggregate("count_distinct" if node.distinct else "count", x, filter_, "int64")
        kind: Type = "float64" if function in ("avg", "stddev") else x.type
        return Aggregate(function, x, filter_, kind)

    @staticmethod
    def _check_argument(at: At, name: str, distinct: bool, kind: Type) -> None:
        if name == "COUNT":
            if distinct and kind == "float64":
                raise SqlError(
                    at, "COUNT(DISTINCT) of floats: equal numbers may be written in several ways", value=kind,
                    valid=("int64", "string", "bool", "timestamp"), nearest="COUNT(DISTINCT an integer or string)",
                )  # fmt: skip
            return
        numbers = AGGREGATES[name] in ("sum", "avg", "stddev")
        valid = ("int64", "float64") if numbers else ("int64", "float64", "bool", "timestamp")
        if kind in valid:
            return
        if kind == "bool":
            instead = {"SUM": "COUNT(*) FILTER (WHERE x)"}.get(name, f"{name}(CAST(x AS BIGINT))")
        elif kind == "timestamp":
            instead = f"MIN, MAX, FIRST or LAST, or {name}(EXTRACT(HOUR FROM x))"
        else:
            instead = "COUNT(DISTINCT x), or COUNT(*) FILTER (WHERE x = 'a')"
        raise SqlError(at, f"{name} of {kind} is not supported", value=kind, valid=valid, nearest=instead)

    @staticmethod
    def _no_aggregate(node: Node) -> None:
        if not isinstance(node, Function):
            return
        name = node.name.upper()
        if name in AGGREGATES:
            raise SqlError(
                node.at, "an aggregate within WHERE, FILTER or another aggregate", value=node.name,
                nearest="it as an output, like SUM(a) / COUNT(*)",
            )  # fmt: skip
        if name in WINDOW_FUNCTIONS:
            raise SqlError(
                node.at, "a window function stands in FROM TABLE(...) or GROUP BY", value=node.name, nearest=TABLE_FORM
            )


class _OutputReader:
    """One output: finds its aggregates, and that they are of one window."""

    def __init__(self, select: _SelectMeaning) -> None:
        self._select = select
        self.window: Window | None = None
        self._checker = Checker({}, (), self._special)

    def read(self, node: Node) -> Expression:
        return self._checker.expression(node)

    def _special(self, node: Node) -> Expression | None:
        if isinstance(node, Name):
            raise self._column(node)
        if not isinstance(node, Function):
            return None
        name = node.name.upper()
        if name in ("LOWER", "UPPER", "LENGTH", "CHAR_LENGTH"):
            raise SqlError(
                node.at, "strings of an output are constants", value=node.name, nearest="the constant itself"
            )
        if name in WINDOW_FUNCTIONS:
            raise SqlError(
                node.at, "a window function stands in FROM TABLE(...) or GROUP BY", value=node.name, nearest=TABLE_FORM
            )
        if name not in AGGREGATES:
            if node.over is not None and name not in SCALARS:
                raise SqlError(node.at, "unknown aggregate", value=name, valid=AGGREGATES, nearest=OVER_FORM)
            return None
        window, reference = self._select.aggregate(node)
        if self.window is not None and window != self.window:
            raise SqlError(
                node.at, "an output over aggregates of two windows", value=node.name,
                nearest="two outputs, or the same window in both",
            )  # fmt: skip
        self.window = window
        return reference

    def _column(self, node: Name) -> SqlError:
        s = self._select
        if node.name.lower() in (*BOUNDS, "window_time"):
            return SqlError(
                node.at, "the bounds of a window are not served: they follow from the time of the read", value=node.name,
                nearest="MIN(event_timestamp) or MAX(event_timestamp)".replace("event_timestamp", s._source.timestamp),
            )  # fmt: skip
        if node.name not in s._columns:
            return _unknown(s, node)
        return SqlError(
            node.at, "a column outside of an aggregate", value=node.name,
            nearest=f"LAST({node.name}) or COUNT(DISTINCT {node.name})",
        )  # fmt: skip


def _unknown(select: _SelectMeaning, node: Name) -> SqlError:
    try:
        select._rows.expression(node)
    except SqlError as e:
        return e
    raise AssertionError(f"{node.name} is a column")
