"""Random windowed definitions: the SQL a user would write, and beside it what it means, made together from one seed.

The meaning goes to the oracle, the SQL to the platform, so that a text read wrongly shows as a difference in values.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from random import Random

from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.ir import (
    Aggregate,
    AggregateRef,
    Call,
    Column,
    Constant,
    Expression,
    Output,
    Statement,
    Type,
    Window,
)

SECOND = 1_000_000
UNITS = {"SECOND": SECOND, "MINUTE": 60 * SECOND, "HOUR": 3600 * SECOND, "DAY": 86_400 * SECOND}
COLUMNS: dict[str, Type] = {
    "kind": "string",
    "n": "int64",  # mostly small, sometimes near the ends of 64 bits
    "m": "int64",  # small
    "x": "float64",  # quarters: sums are exact in any order
    "y": "float64",  # huge and tiny
    "z": "float64",  # a large offset with small differences: what an unstable variance gets wrong
    "flag": "bool",
    "at": "timestamp",
}
TIME = "event_timestamp"


@dataclass(frozen=True)
class Meant:
    """A definition, and what its SQL means."""

    view: WindowedView
    statements: tuple[Statement, ...]
    unit_us: int
    unit: str


def view_of(
    sql: str,
    *,
    columns: dict[str, Type] | None = None,
    retention_us: int = 3600 * SECOND,
    lateness_us: int = 0,
    ttl_us: int = 0,
    event_id: bool = False,
    cap: int = 100_000,
    entity_key: str = "k",
) -> WindowedView:
    """A windowed view of one string key over a topic with COLUMNS."""
    source = EventSource(
        topic="events",
        columns=COLUMNS if columns is None else columns,
        retention_us=retention_us,
        timestamp=TIME,
        event_id="id" if event_id else None,
        allowed_lateness_us=lateness_us,
    )
    return WindowedView(
        name="v",
        entity_key=(entity_key,),
        key_types=("string",),
        source=source,
        sql=sql,
        ttl=timedelta(microseconds=ttl_us),
        max_events_per_entity=cap,
    )


def random_definition(random: Random, *, event_id: bool, sessions: bool = True) -> Meant:
    unit = random.choice(["SECOND", "SECOND", "MINUTE", "HOUR", "DAY"])
    u = UNITS[unit]
    maker = _Maker(random, unit, sessions)
    made = [maker.statement() for _ in range(random.choice([1, 1, 2, 2, 3]))]
    view = view_of(
        ";\n".join(text for text, _ in made),
        retention_us=random.choice([0, u, 3 * u, 10 * u, 1000 * u]),
        lateness_us=random.choice([0, 0, u, 3 * u, u // 2 + 1]),
        ttl_us=random.choice([0, 0, 5 * u, 40 * u, 40 * u + 1]),
        event_id=event_id,
    )
    return Meant(view, tuple(s for _, s in made), u, unit)


class _Maker:
    def __init__(self, random: Random, unit: str, sessions: bool) -> None:
        self.sessions = sessions
        self.random = random
        self.unit = unit
        self.u = UNITS[unit]
        self.names = 0

    def interval(self, count: int) -> str:
        return f"INTERVAL '{count}' {self.unit}"

    def statement(self) -> tuple[str, Statement]:
        r = self.random
        kind = r.choice(["over", "over", "tumble", "hop", "hop", *["session"] * 2 * self.sessions])
        on_close = kind != "over" and r.random() < 0.45
        where = self.condition(1) if r.random() < 0.25 else None
        self.aggregates: list[tuple[Aggregate, str]] = []
        over = " OVER w" if kind == "over" else ""
        outputs: list[Output] = []
        texts: list[str] = []
        for _ in range(r.randint(1, 4)):
            expression, text = self.output(where, over)
            name = f"f{self.names}"
            self.names += 1
            outputs.append(Output(name, expression, expression.type))
            texts.append(f"{text} AS {name}")
        condition = f" WHERE {sql_of(where)}" if where is not None else ""
        size, slide = r.choice([(1, 1), (2, 1), (3, 1), (6, 2), (5, 1), (12, 3), (10, 5), (4, 4)])
        if kind == "tumble":
            slide = size
        window = Window(
            kind,
            size * self.u,
            slide * self.u if kind in ("tumble", "hop") else 0,
            on_close,
        )
        head = f"SELECT k, {', '.join(texts)}"
        emit = " EMIT ON WINDOW CLOSE" if on_close else ""
        shorthand = r.random() < 0.3
        if kind == "over":
            sql = (
                f"{head} FROM events{condition} WINDOW w AS (PARTITION BY k ORDER BY {TIME} "
                f"RANGE BETWEEN {self.interval(size)} PRECEDING AND CURRENT ROW)"
            )
        else:
            arguments = {
                "tumble": self.interval(size),
                "hop": f"{self.interval(slide)}, {self.interval(size)}",
                "session": self.interval(size),
            }[kind]
            if shorthand and not (kind == "session" and where is not None):
                sql = f"{head} FROM events{condition} GROUP BY k, {kind.upper()}({TIME}, {arguments}){emit}"
            else:
                by = " PARTITION BY k" if kind == "session" else ""
                sql = (
                    f"{head} FROM TABLE({kind.upper()}(TABLE events{by}, DESCRIPTOR({TIME}), {arguments})){condition} "
                    f"GROUP BY k, window_start, window_end{emit}"
                )
        return sql, Statement(window, tuple(a for a, _ in self.aggregates), tuple(outputs))

    # Outputs

    def output(self, where: Expression | None, over: str) -> tuple[Expression, str]:
        r = self.random
        a, at = self.aggregate(where, over)
        if r.random() < 0.65:
            return a, at
        shape = r.choice(["coalesce", "ratio", "minus", "case", "times", "nullif", "abs", "is_null", "share", "level"])
        if shape == "coalesce" and a.type in ("int64", "float64"):
            zero = Constant(0, "int64") if a.type == "int64" else Constant(0.5, "float64")
            return Call("coalesce", (a, zero), a.type), f"COALESCE({at}, {sql_of(zero)})"
        if shape == "is_null":
            return Call("is_null", (a,), "bool"), f"{at} IS NULL"
        b, bt = self.aggregate(where, over)
        if a.type in ("int64", "float64") and b.type in ("int64", "float64"):
            pair = self._of_two(shape, a, at, b, bt)
            if pair is not None:
                return pair
        self.aggregates.pop()  # the text does not have it, and what is not in the text cannot overflow
        if a.type not in ("int64", "float64") or b.type not in ("int64", "float64"):
            return a, at
        if shape == "times":
            two = Constant(2, "int64")
            return Call("*", (a, two), a.type), f"{at} * 2"
        if shape == "abs":
            return Call("abs", (a,), a.type), f"ABS({at})"
        if shape == "nullif" and a.type == "int64":
            return Call("nullif", (a, Constant(0, "int64")), "int64"), f"NULLIF({at}, 0)"
        if shape == "share":
            return Call("/", (a, Constant(3, "int64")), "float64"), f"{at} / 3"
        if shape == "level" and a.type == "int64":
            test = Call(">", (a, Constant(2, "int64")), "bool")
            none = Call("is_null", (a,), "bool")
            words = (none, Constant(None, "string"), test, Constant("many", "string"), Constant("", "string"))
            return (
                Call("case", words, "string"),
                f"CASE WHEN {at} IS NULL THEN NULL WHEN {at} > 2 THEN 'many' ELSE '' END",
            )
        return a, at

    def _of_two(self, shape: str, a: AggregateRef, at: str, b: AggregateRef, bt: str) -> tuple[Expression, str] | None:
        both: Type = "float64" if "float64" in (a.type, b.type) else "int64"
        if shape == "ratio":
            return Call("/", (a, b), "float64"), f"{at} / {bt}"
        if shape == "minus":
            return Call("-", (a, b), both), f"{at} - {bt}"
        if shape == "case" and a.type == "int64":
            test = Call(">", (a, Constant(2, "int64")), "bool")
            return (
                Call("case", (test, b, Constant(None, b.type)), b.type),
                f"CASE WHEN {at} > 2 THEN {bt} END",
            )
        if shape == "share" and a.type == "int64":
            top = Call("+", (Call("cast", (a,), "float64"), b), "float64")
            return Call("/", (top, Constant(3, "int64")), "float64"), f"(CAST({at} AS DOUBLE) + {bt}) / 3"
        return None

    def aggregate(self, where: Expression | None, over: str) -> tuple[AggregateRef, str]:
        r = self.random
        function = r.choice(
            ["count", "count", "count_distinct", "sum", "sum", "avg", "min", "max", "first", "last", "stddev"]
        )
        argument: Expression | None
        if function == "count":
            argument = None if r.random() < 0.5 else self.any_argument()
        elif function == "count_distinct":
            argument = r.choice(
                [_column("kind"), _column("n"), _column("m"), _column("flag"), _column("at"), self.integer()]
            )
        elif function == "stddev":
            argument = r.choice([_column("m"), _column("x"), _column("z"), _column("n"), self.small_float()])
        elif function in ("sum", "avg"):
            argument = self.integer() if r.random() < 0.55 else self.floating()
        else:
            argument = r.choice([self.integer(), self.floating(), _column("flag"), _column("at"), _column(TIME)])
        condition = self.condition(2) if r.random() < 0.4 else None
        kind: Type = {"count": "int64", "count_distinct": "int64", "avg": "float64", "stddev": "float64"}.get(  # type: ignore[assignment]
            function, argument.type if argument is not None else "int64"
        )
        inner = "*" if argument is None else ("DISTINCT " if function == "count_distinct" else "") + sql_of(argument)
        name = {
            "count_distinct": "COUNT",
            "stddev": r.choice(["STDDEV", "STDDEV_SAMP"]),
            "first": r.choice(["FIRST", "FIRST_VALUE"]),
            "last": r.choice(["LAST", "LAST_VALUE"]),
        }.get(function, function.upper())
        text = f"{name}({inner})" + (f" FILTER (WHERE {sql_of(condition)})" if condition is not None else "") + over
        parts = [c for c in (where, condition) if c is not None]
        whole = parts[0] if len(parts) == 1 else Call("and", tuple(parts), "bool") if parts else None
        self.aggregates.append((Aggregate(function, argument, whole, kind), text))  # type: ignore[arg-type]
        return AggregateRef(len(self.aggregates) - 1, kind), text

    # Expressions over the event

    def any_argument(self) -> Expression:
        return self.random.choice([_column(c) for c in COLUMNS] + [self.integer(), self.floating()])

    def integer(self, depth: int = 2) -> Expression:
        r = self.random
        simple: list[Expression] = [_column("n"), _column("m"), _column("m")]
        if depth == 0 or r.random() < 0.5:
            return r.choice(simple)
        a, b = self.integer(depth - 1), self.integer(depth - 1)
        number = Constant(r.choice([-3, 1, 2, 7]), "int64")
        return r.choice(
            [
                Call("+", (a, b), "int64"),
                Call("-", (a, number), "int64"),
                Call("*", (a, number), "int64"),
                Call("%", (a, Constant(r.choice([-4, 3, 10]), "int64")), "int64"),
                Call("%", (a, _column("m")), "int64") if "m" not in _names(a) else Call("neg", (a,), "int64"),
                Call("neg", (a,), "int64"),
                Call("abs", (a,), "int64"),
                Call("case", (self.condition(1), a, b), "int64"),
                Call("case", (self.condition(1), a, self.condition(1), b, Constant(None, "int64")), "int64"),
                Call("coalesce", (a, number), "int64"),
                Call("nullif", (a, number), "int64"),
                Call("length", (_column("kind"),), "int64"),
                Call("hour", (_column(TIME),), "int64"),
                Call("isodow", (_column("at"),), "int64"),
                Call("cast", (_column("flag"),), "int64"),
            ]
        )

    def small_float(self) -> Expression:
        r = self.random
        x = _column("x")
        return r.choice(
            [
                x,
                Call("/", (_column("m"), Constant(4, "int64")), "float64"),
                Call("*", (x, Constant(0.5, "float64")), "float64"),
                Call("+", (x, _column("m")), "float64"),
                Call("floor", (x,), "float64"),
                Call("ceil", (x,), "float64"),
                Call("abs", (x,), "float64"),
                Call("cast", (_column("m"),), "float64"),
                Call("case", (self.condition(1), x, Constant(0.25, "float64")), "float64"),
            ]
        )

    def floating(self) -> Expression:
        r = self.random
        if r.random() < 0.5:
            return self.small_float()
        y, x = _column("y"), _column("x")
        return r.choice(
            [
                y,
                y,
                _column("z"),
                Call("*", (y, x), "float64"),
                Call("/", (y, x), "float64"),
                Call("/", (x, _column("m")), "float64"),
            ]
        )

    def condition(self, depth: int) -> Expression:
        r = self.random
        if depth and r.random() < 0.4:
            a, b = self.condition(depth - 1), self.condition(depth - 1)
            return r.choice([Call("and", (a, b), "bool"), Call("or", (a, b), "bool"), Call("not", (a,), "bool")])
        compare = r.choice(["=", "<>", "<", "<=", ">", ">="])
        words = [Constant(w, "string") for w in ("a", "B", "it's", "é")]
        at = Constant(r.choice([0, 1_709_164_800_000_000]), "timestamp")
        return r.choice(
            [
                Call("=", (_column("kind"), r.choice(words)), "bool"),
                Call(compare, (_column("kind"), r.choice(words)), "bool"),  # type: ignore[arg-type]
                Call("in", (_column("kind"), *r.sample(words, 2)), "bool"),
                Call("=", (Call("lower", (_column("kind"),), "string"), Constant("b", "string")), "bool"),
                Call("=", (Call("upper", (_column("kind"),), "string"), Constant("É", "string")), "bool"),
                Call("is_null", (_column(r.choice(list(COLUMNS))),), "bool"),
                Call(compare, (_column("m"), Constant(r.randint(-3, 3), "int64")), "bool"),  # type: ignore[arg-type]
                Call(compare, (_column("n"), _column("m")), "bool"),  # type: ignore[arg-type]
                Call(compare, (_column("x"), Constant(r.randint(-8, 8) / 4, "float64")), "bool"),  # type: ignore[arg-type]
                Call(compare, (_column("n"), _column("x")), "bool"),  # type: ignore[arg-type]
                Call("in", (_column("m"), Constant(1, "int64"), Constant(-2, "int64")), "bool"),
                Call("=", (_column("flag"), Constant(r.random() < 0.5, "bool")), "bool"),
                _column("flag"),
                Call(
                    ">=", (Call("hour", (_column(TIME),), "int64"), Constant(r.choice([0, 1, 12, 23]), "int64")), "bool"
                ),
                Call(compare, (_column("at"), at), "bool"),  # type: ignore[arg-type]
                Call(compare, (_column("at"), _column(TIME)), "bool"),  # type: ignore[arg-type]
            ]
        )


def _column(name: str) -> Column:
    return Column(name, "timestamp" if name == TIME else COLUMNS[name])


def _names(e: Expression) -> set[str]:
    if isinstance(e, Call):
        return {n for a in e.arguments for n in _names(a)}
    return {e.name} if isinstance(e, Column) else set()


def sql_of(e: Expression | None) -> str:
    """An expression as a user writes it."""
    assert e is not None
    if isinstance(e, Column):
        return e.name
    if isinstance(e, Constant):
        return _literal(e)
    assert isinstance(e, Call)
    p = [sql_of(a) for a in e.arguments]
    match e.operator:
        case "+" | "-" | "*" | "/" | "%" | "=" | "<>" | "<" | "<=" | ">" | ">=":
            return f"({p[0]} {e.operator} {p[1]})"
        case "and" | "or":
            return "(" + f" {e.operator.upper()} ".join(p) + ")"
        case "neg":
            return f"(-{p[0]})"
        case "not":
            return f"(NOT {p[0]})"
        case "is_null":
            return f"({p[0]} IS NULL)"
        case "in":
            return f"({p[0]} IN ({', '.join(p[1:])}))"
        case "case":
            whens = " ".join(f"WHEN {c} THEN {v}" for c, v in zip(p[:-1:2], p[1:-1:2]))
            last = e.arguments[-1]
            otherwise = "" if isinstance(last, Constant) and last.value is None else f" ELSE {p[-1]}"
            return f"CASE {whens}{otherwise} END"
        case "cast":
            return f"CAST({p[0]} AS {'DOUBLE' if e.type == 'float64' else 'BIGINT'})"
        case "hour":
            return f"EXTRACT(HOUR FROM {p[0]})"
        case "isodow":
            return f"EXTRACT(ISODOW FROM {p[0]})"
        case "length":
            return f"CHAR_LENGTH({p[0]})"
        case name:
            return f"{name.upper()}({', '.join(p)})"


def _literal(c: Constant) -> str:
    if c.value is None:
        return "NULL"
    if c.type == "string":
        return "'" + str(c.value).replace("'", "''") + "'"
    if c.type == "bool":
        return "TRUE" if c.value else "FALSE"
    if c.type == "timestamp":
        at = datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=int(c.value))
        return f"TIMESTAMP '{at:%Y-%m-%d %H:%M:%S.%f}'"
    if c.type == "float64":
        return f"{float(c.value)!r}"
    return f"({c.value})" if int(c.value) < 0 else str(c.value)


def constants(values: Sequence[int]) -> tuple[Constant, ...]:
    return tuple(Constant(v, "int64") for v in values)
