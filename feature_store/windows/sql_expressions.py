"""Checked expressions: from what was written to `ir.Expression`, with every conversion of a type written out.

Int64 becomes float64 by an explicit `cast` wherever the two meet, so that no engine decides how they are compared.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta

from feature_store.windows.ir import Call, Column, Constant, Expression, Operator, Type, walk
from feature_store.windows.sql_intervals import Interval
from feature_store.windows.sql_tokens import At, SqlError
from feature_store.windows.sql_tree import Function, Literal_, Name, Node, Operation, Star

MAX_PARTS = 1_000
"""Of one expression, a part that is used twice (as by BETWEEN) counting twice."""

_CASTS: dict[str, Type] = {
    **dict.fromkeys(("BIGINT", "LONG", "INT64"), "int64"),
    **dict.fromkeys(("DOUBLE", "FLOAT64"), "float64"),
    **dict.fromkeys(("VARCHAR", "STRING", "TEXT"), "string"),
    **dict.fromkeys(("BOOLEAN", "BOOL"), "bool"),
    **dict.fromkeys(("TIMESTAMP", "TIMESTAMPTZ"), "timestamp"),
}
_NARROW = {
    **dict.fromkeys(("INT", "INTEGER", "SMALLINT", "TINYINT", "INT32"), "CAST(x AS BIGINT)"),
    **dict.fromkeys(("FLOAT", "REAL", "FLOAT32", "DECIMAL", "NUMERIC"), "CAST(x AS DOUBLE)"),
}
_ONE_ARGUMENT: dict[str, tuple[Operator, tuple[Type, ...], Type | None]] = {
    "ABS": ("abs", ("int64", "float64"), None),
    "FLOOR": ("floor", ("float64",), None),
    "CEIL": ("ceil", ("float64",), None),
    "CEILING": ("ceil", ("float64",), None),
    "LOWER": ("lower", ("string",), None),
    "UPPER": ("upper", ("string",), None),
    "LENGTH": ("length", ("string",), "int64"),
    "CHAR_LENGTH": ("length", ("string",), "int64"),
    "HOUR": ("hour", ("timestamp",), "int64"),
}
SCALARS = (*_ONE_ARGUMENT, "MOD", "COALESCE", "NULLIF", "CAST", "EXTRACT")
_INSTEAD = {
    **dict.fromkeys(("NOW", "CURRENT_TIMESTAMP", "LOCALTIMESTAMP", "CURRENT_DATE"), (
        "a clock within the definition: history could never give the value again", "the window's length")),
    **dict.fromkeys(("RANDOM", "RAND", "UUID"), ("chance: no two readings would agree", "a column of the event")),
    **dict.fromkeys(("GREATEST", "LEAST"), ("engines disagree on its nulls", "CASE WHEN a > b THEN a ELSE b END")),
    "ROUND": ("engines disagree on halves", "FLOOR(x + 0.5)"),
    **dict.fromkeys(("IF", "IIF"), ("not a function here", "CASE WHEN condition THEN a ELSE b END")),
    **dict.fromkeys(("IFNULL", "NVL", "ISNULL"), ("not a function here", "COALESCE(a, b)")),
    **dict.fromkeys(("CONCAT", "SUBSTRING", "SUBSTR", "TRIM", "REPLACE"), (
        "strings cannot be changed beyond LOWER and UPPER", "the wanted string as a column of the event")),
    **dict.fromkeys(("DAYOFWEEK", "WEEKDAY"), ("engines disagree on its first day", "EXTRACT(ISODOW FROM event_timestamp)")),
    **dict.fromkeys(("APPROX_COUNT_DISTINCT", "APPROX_DISTINCT"), ("not a function here", "COUNT(DISTINCT x)")),
    **dict.fromkeys(("STDDEV_POP", "VARIANCE", "VAR_SAMP", "VAR_POP"), ("not a function here", "STDDEV_SAMP(x)")),
    **dict.fromkeys(("MEDIAN", "PERCENTILE_CONT", "QUANTILE"), ("its parts cannot be merged", "AVG(x)")),
}  # fmt: skip

Special = Callable[[Node], Expression | None]
"""Asked first for every part of an expression; None: nothing special."""


class Null:
    """A null whose type its surroundings decide."""


class Checker:
    """Gives expressions their types. `columns`: what may be named, `tables`: what may stand before a column."""

    def __init__(self, columns: Mapping[str, Type], tables: Sequence[str], special: Special = lambda _: None) -> None:
        self._columns = columns
        self._tables = tables
        self._special = special

    def condition(self, node: Node, where: str) -> Expression:
        """The condition of a WHERE or FILTER."""
        found = self.expression(node)
        if found.type != "bool":
            raise SqlError(node.at, f"{where} needs a condition, not {found.type}", nearest="a comparison, like x > 0")
        return found

    def expression(self, node: Node) -> Expression:
        """The checked expression; SqlError where names, types or functions are wrong, or it is a null without a type."""
        found = self._part(node)
        if isinstance(found, Null):
            raise SqlError(node.at, "a null without a type", value="NULL", nearest="IS NULL, or CAST(NULL AS BIGINT)")
        count = 0
        for count, _ in enumerate(walk(found)):
            if count > MAX_PARTS:
                raise SqlError(node.at, f"an expression of more than {MAX_PARTS:,} parts", nearest="several outputs")
        return found

    def _part(self, node: Node) -> Expression | Null:
        special = self._special(node)
        if special is not None:
            return special
        match node:
            case Name():
                return self._column(node)
            case Literal_():
                return _literal(node)
            case Star():
                raise SqlError(
                    node.at, "* stands in COUNT(*) only", nearest="the outputs one by one, like COUNT(*) AS n"
                )
            case Interval():
                raise SqlError(
                    node.at, "an interval is the length of a window only", nearest="a condition on columns of the event"
                )
            case Function():
                return self._function(node)
            case Operation():
                return self._operation(node)

    def _column(self, node: Name) -> Expression:
        if node.table is not None and node.table not in self._tables:
            raise SqlError(node.at, "unknown table before a column", value=node.table, valid=self._tables)
        if node.name not in self._columns:
            if node.name.upper() in _INSTEAD:
                raise _refused(node.at, node.name)
            raise SqlError(node.at, "unknown column", value=node.name, valid=self._columns)
        return Column(node.name, self._columns[node.name])

    def _function(self, node: Function) -> Expression | Null:
        name = node.name.upper()
        if name not in SCALARS:
            raise _refused(node.at, node.name)
        if node.distinct or node.filter is not None or node.over is not None:
            raise SqlError(
                node.at, "DISTINCT, FILTER and OVER stand with an aggregate only", value=node.name, nearest=f"{name}(x)"
            )
        if name == "COALESCE":
            return self._same_type(node.at, "coalesce", node.arguments)
        wanted = 2 if name in ("MOD", "NULLIF") else 1
        if len(node.arguments) != wanted:
            raise SqlError(
                node.at, f"{name} takes {wanted} argument{'s'[: wanted - 1]}, not {len(node.arguments)}",
                nearest=f"{name}({', '.join('ab'[:wanted])})",
            )  # fmt: skip
        if name == "MOD":
            return self._arithmetic(node.at, "%", *node.arguments)
        if name == "NULLIF":
            return self._same_type(node.at, "nullif", node.arguments)
        operator, kinds, result = _ONE_ARGUMENT[name]
        argument = self._typed(node.arguments[0], kinds, name)
        return Call(operator, (argument,), result or argument.type)

    def _operation(self, node: Operation) -> Expression | Null:
        operator, arguments = node.operator, node.arguments
        match operator:
            case "and" | "or":
                found = [self._typed(a, ("bool",), operator.upper()) for a in arguments]
                return both(found) if operator == "and" else Call("or", tuple(found), "bool")
            case "not":
                return Call("not", (self._typed(arguments[0], ("bool",), "NOT"),), "bool")
            case "neg":
                argument = self._typed(arguments[0], ("int64", "float64"), "-")
                if isinstance(argument, Constant):
                    return _negated(node.at, argument)
                return Call("neg", (argument,), argument.type)
            case "+" | "-" | "*" | "/" | "%":
                return self._arithmetic(node.at, operator, *arguments)
            case "=" | "<>" | "<" | "<=" | ">" | ">=":
                return self._compare(node.at, operator, self.expression(arguments[0]), self.expression(arguments[1]))
            case "between":
                x, low, high = (self.expression(a) for a in arguments)
                return both([self._compare(node.at, ">=", x, low), self._compare(node.at, "<=", x, high)])
            case "is_null":
                return Call("is_null", (self.expression(arguments[0]),), "bool")
            case "in":
                return self._in(node.at, arguments)
            case "simple_case":
                x = self.expression(arguments[0])
                conditions = [self._compare(a.at, "=", x, self.expression(a)) for a in arguments[1:-1:2]]
                return self._case(node.at, conditions, [*arguments[2:-1:2], arguments[-1]])
            case "case":
                conditions = [self._typed(a, ("bool",), "WHEN") for a in arguments[:-1:2]]
                return self._case(node.at, conditions, [*arguments[1:-1:2], arguments[-1]])
            case "cast":
                return self._cast(node)
            case _:
                return self._extract(node)

    def _typed(self, node: Node, kinds: Sequence[Type], where: str) -> Expression:
        found = self.expression(node)
        if found.type not in kinds:
            instead = None
            if found.type == "int64" and kinds == ("float64",):
                instead = "the integer itself, which is whole already"
            elif found.type == "bool" and "int64" in kinds:
                instead = "CAST(x AS BIGINT)"
            elif kinds == ("bool",):
                instead = "a comparison, like x > 0"
            raise SqlError(
                node.at, f"{where} needs {' or '.join(kinds)}, not {found.type}", valid=kinds, nearest=instead
            )
        return found

    def _arithmetic(self, at: At, operator: Operator, left: Node, right: Node) -> Expression:
        kinds: tuple[Type, ...] = ("int64",) if operator == "%" else ("int64", "float64")
        a, b = self._typed(left, kinds, operator), self._typed(right, kinds, operator)
        if operator == "/" or a.type != b.type:
            return Call(operator, (_as_float(a), _as_float(b)), "float64")
        return Call(operator, (a, b), a.type)

    def _compare(self, at: At, operator: str, a: Expression, b: Expression) -> Expression:
        if {a.type, b.type} == {"int64", "float64"}:
            a, b = _as_float(a), _as_float(b)
        if a.type != b.type:
            instead = "TIMESTAMP '2024-01-31 00:00:00'" if "timestamp" in (a.type, b.type) else "both sides of one type"
            raise SqlError(at, f"{a.type} cannot be compared with {b.type}", value=operator, nearest=instead)
        if a.type == "bool" and operator not in ("=", "<>"):
            raise SqlError(at, "bools have no order", value=operator, nearest="=, <>, AND, OR or NOT")
        return Call(operator, (a, b), "bool")  # type: ignore[arg-type]  # one of the six comparisons

    def _in(self, at: At, nodes: Sequence[Node]) -> Expression:
        x = self.expression(nodes[0])
        found = []
        for node in nodes[1:]:
            constant = self._part(node)
            if isinstance(constant, Null) or (isinstance(constant, Constant) and constant.value is None):
                raise SqlError(node.at, "a null within IN", nearest="x IN (...) OR x IS NULL")
            if not isinstance(constant, Constant):
                raise SqlError(node.at, "IN takes constants", nearest="x = a OR x = b")
            found.append(constant)
        if x.type == "int64" and any(c.type == "float64" for c in found):
            x = _as_float(x)
        constants = [_as_float(c) if x.type == "float64" and c.type == "int64" else c for c in found]
        for node, c in zip(nodes[1:], constants, strict=True):
            if c.type != x.type:
                raise SqlError(
                    node.at, f"{x.type} cannot be compared with {c.type}", value="IN", nearest="constants of its type"
                )
        return Call("in", (x, *constants), "bool")

    def _case(self, at: At, conditions: list[Expression], nodes: list[Node]) -> Expression | Null:
        values = self._unified(at, nodes, "the values of a CASE")
        if values is None:
            return Null()
        pairs = [part for pair in zip(conditions, values[:-1], strict=True) for part in pair]
        return Call("case", (*pairs, values[-1]), values[0].type)

    def _same_type(self, at: At, operator: Operator, nodes: Sequence[Node]) -> Expression | Null:
        if not nodes:
            raise SqlError(at, "COALESCE takes arguments", nearest="COALESCE(x, 0)")
        values = self._unified(at, nodes, f"the arguments of {operator.upper()}")
        return Null() if values is None else Call(operator, tuple(values), values[0].type)

    def _unified(self, at: At, nodes: Sequence[Node], what: str) -> list[Expression] | None:
        """The expressions with one type; None where all are nulls."""
        parts = [self._part(n) for n in nodes]
        kinds = {p.type for p in parts if not isinstance(p, Null)}
        if not kinds:
            return None
        if kinds == {"int64", "float64"}:
            kinds = {"float64"}
        if len(kinds) > 1:
            raise SqlError(
                at, f"{what} are of different types ({', '.join(sorted(kinds))})", nearest="values of one type"
            )
        (kind,) = kinds
        return [Constant(None, kind) if isinstance(p, Null) else _as_float(p) if p.type != kind else p for p in parts]

    def _cast(self, node: Operation) -> Expression:
        name = node.word.upper()
        if name not in _CASTS:
            raise SqlError(
                node.at,
                "not a type to cast to",
                value=node.word,
                valid=_CASTS,
                nearest=_NARROW.get(name, "CAST(x AS DOUBLE)"),
            )
        kind = _CASTS[name]
        x = self._part(node.arguments[0])
        if isinstance(x, Null):
            return Constant(None, kind)
        if x.type == kind:
            return x
        if (x.type, kind) == ("int64", "float64"):
            return _as_float(x)
        if (x.type, kind) == ("bool", "int64"):
            return Call("cast", (x,), "int64")
        instead = (
            "FLOOR(x), which is a float64" if (x.type, kind) == ("float64", "int64") else "a column that has the type"
        )
        raise SqlError(
            node.at, f"{x.type} cannot be cast to {kind}", value=node.word,
            valid=("int64 to float64", "bool to int64"), nearest=instead,
        )  # fmt: skip

    def _extract(self, node: Operation) -> Expression:
        unit = node.word.upper()
        if unit not in ("HOUR", "ISODOW"):
            raise SqlError(
                node.at, "this part of a time is not supported", value=node.word, valid=("HOUR", "ISODOW"),
                nearest="EXTRACT(HOUR FROM event_timestamp)",
            )  # fmt: skip
        argument = self._typed(node.arguments[0], ("timestamp",), f"EXTRACT({unit})")
        return Call("hour" if unit == "HOUR" else "isodow", (argument,), "int64")


def both(conditions: Sequence[Expression]) -> Expression:
    """All of the conditions, as one flat AND."""
    flat: list[Expression] = []
    for c in conditions:
        flat += c.arguments if isinstance(c, Call) and c.operator == "and" else [c]
    return flat[0] if len(flat) == 1 else Call("and", tuple(flat), "bool")


def _as_float(x: Expression) -> Expression:
    if x.type == "float64":
        return x
    if isinstance(x, Constant):
        return Constant(None if x.value is None else float(x.value), "float64")
    return Call("cast", (x,), "float64")


def _negated(at: At, x: Constant) -> Constant:
    """Computed here: DuckDB would make a wider integer of the least int64."""
    if x.value == -(2**63) and x.type == "int64":
        raise SqlError(at, "beyond 64 bits", value=f"- {x.value}", nearest="a float, like 1e20")
    return Constant(None if x.value is None else -x.value, x.type)  # type: ignore[operator]  # it is a number


def _refused(at: At, name: str) -> SqlError:
    reason, instead = _INSTEAD.get(name.upper(), ("unknown function", None))
    if instead is not None:
        return SqlError(at, reason, value=name, nearest=instead)
    from feature_store.windows.parse import AGGREGATES

    return SqlError(
        at, reason, value=name.upper(), valid=(*AGGREGATES, *SCALARS), nearest="one of these, or a column of the event"
    )


def _literal(node: Literal_) -> Constant | Null:
    match node.kind:
        case "string":
            return Constant(node.text, "string")
        case "bool":
            return Constant(node.text == "TRUE", "bool")
        case "null":
            return Null()
        case "timestamp":
            return Constant(_micros(node), "timestamp")
    if re.fullmatch("-?[0-9]+", node.text):
        whole = node.text.lstrip("-").lstrip("0") or "0"
        if len(whole) < 20 and -(2**63) <= (number := int(node.text)) < 2**63:
            return Constant(number, "int64")
        raise SqlError(node.at, "beyond 64 bits", value=node.text[:40], nearest="a float, like 1e20")
    number_f = float(node.text)
    if not math.isfinite(number_f):
        raise SqlError(node.at, "beyond a float64", value=node.text[:40], nearest="a number below 1.8e308")
    return Constant(number_f, "float64")


def _micros(node: Literal_) -> int:
    try:
        time = datetime.fromisoformat(node.text.strip())
        time = time.replace(tzinfo=UTC) if time.tzinfo is None else time.astimezone(UTC)
    except (ValueError, OverflowError) as e:
        raise SqlError(
            node.at, "not a time", value=node.text[:40], nearest="TIMESTAMP '2024-01-31 00:00:00' (UTC)"
        ) from e
    return (time - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
