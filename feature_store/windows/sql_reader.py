"""Reads expressions of a windowed definition's SQL, and the windows of OVER that stand in them."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from feature_store.windows.sql_intervals import Interval, interval
from feature_store.windows.sql_tokens import At, SqlError, Token
from feature_store.windows.sql_tree import OVER_FORM, Function, Literal_, Name, Node, Operation, Over, Star

MAX_DEPTH = 100
"""Levels of an expression: few enough that nothing which walks a tree runs out of stack."""
MAX_NESTED = 30
"""Expressions within parentheses, CASE or calls, each of which takes the reader ten calls of its own."""

_CLAUSES = {
    **dict.fromkeys(
        ("JOIN", "LEFT", "RIGHT", "INNER", "FULL", "CROSS", "NATURAL", "LATERAL"),
        ("a join: the SQL is over one event stream", "the joined column into the events, or a view of its own"),
    ),
    "HAVING": (
        "HAVING: an entity always has a value",
        "a condition in the output, like CASE WHEN COUNT(*) > 3 THEN SUM(x) END AS name",
    ),
    "ORDER": ("ORDER BY: one row is served at a time", "the SELECT without it (ORDER BY stands within OVER (...))"),
    **dict.fromkeys(
        ("LIMIT", "OFFSET", "FETCH"), ("a limit of rows: one row per entity is served", "the SELECT without it")
    ),
    **dict.fromkeys(
        ("UNION", "INTERSECT", "EXCEPT", "MINUS"), ("a set operation", "several SELECTs with ; between them")
    ),
    "QUALIFY": ("QUALIFY", "FILTER (WHERE ...) behind the aggregate"),
}
RESERVED = {
    *_CLAUSES, "SELECT", "FROM", "WHERE", "GROUP", "BY", "AS", "ON", "WINDOW", "EMIT", "OVER", "FILTER", "AND", "OR", "NOT",
    "IN", "IS", "BETWEEN", "LIKE", "CASE", "WHEN", "THEN", "ELSE", "END", "DISTINCT", "WITH", "PARTITION", "TABLE", "USING",
}  # fmt: skip
_COMPARISONS = {"=": "=", "<>": "<>", "!=": "<>", "<": "<", "<=": "<=", ">": ">", ">=": ">="}


class ExpressionReader:
    """Reads words from the front to the back; every method leaves the place behind what it has read."""

    def __init__(self, words: list[Token]) -> None:
        self._words = words
        self._place = 0
        self._nested = 0

    # Words

    @property
    def _next(self) -> Token:
        return self._words[self._place]

    def _after(self, count: int = 1) -> Token:
        return self._words[min(self._place + count, len(self._words) - 1)]

    def _take(self) -> Token:
        word = self._next
        if word.kind != "end":
            self._place += 1
        return word

    def _is(self, *texts: str) -> bool:
        """Whether the next words are these keywords or signs."""
        return all(says(self._after(i), text) for i, text in enumerate(texts))

    def _accept(self, *texts: str) -> bool:
        if not self._is(*texts):
            return False
        self._place += len(texts)
        return True

    def _expect(self, *texts: str, nearest: str | None = None) -> Token:
        first = self._next
        for text in texts:
            if not says(self._next, text):
                self._unexpected(f"expected {text}", nearest)
            self._place += 1
        return first

    def _unexpected(self, what: str, nearest: str | None = None) -> NoReturn:
        word = self._next
        if word.upper in _CLAUSES:
            reason, instead = _CLAUSES[word.upper]
            raise SqlError(word.at, f"{reason} is not supported" if ":" not in reason else reason, nearest=instead)
        if word.kind == "end":
            raise SqlError(word.at, f"{what}, but the text ends", nearest=nearest)
        raise SqlError(word.at, what, value=word.text, nearest=nearest)

    def _identifier(self, what: str, nearest: str | None = None) -> Token:
        word = self._next
        if word.kind not in ("name", "quoted") or word.upper in RESERVED:
            self._unexpected(f"expected {what}", nearest)
        return self._take()

    def _partition(self) -> tuple[Name, ...]:
        self._expect("PARTITION", "BY")
        names = [self._column()]
        # After a comma, DESCRIPTOR is the table function's next argument.
        while self._is(",") and not says(self._after(), "DESCRIPTOR"):
            self._take()
            names.append(self._column())
        return tuple(names)

    def _column(self) -> Name:
        word = self._identifier("a column")
        if self._accept("."):
            return Name(word.at, self._identifier("a column").text, word.text)
        return Name(word.at, word.text)

    def _over(self, at: At) -> Over:
        """After the opening parenthesis."""
        if not self._is("PARTITION"):
            raise SqlError(
                self._next.at, "a window begins with PARTITION BY", value=self._next.text or None, nearest=OVER_FORM
            )
        partition = self._partition()
        self._expect("ORDER", "BY", nearest=OVER_FORM)
        order = self._column()
        if self._is("DESC"):
            raise SqlError(
                self._next.at, "a window is ordered by time, ascending", value="DESC", nearest="ORDER BY without DESC"
            )
        self._accept("ASC")
        if self._is("ROWS") or self._is("GROUPS"):
            raise SqlError(
                self._next.at,
                "a window of a number of rows: what it holds depends on events of later times",
                value=self._next.text,
                nearest="RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW",
            )
        self._expect("RANGE", nearest=OVER_FORM)
        between = self._accept("BETWEEN")
        if self._is("UNBOUNDED"):
            raise SqlError(
                self._next.at,
                "a window without a beginning: its state would grow for ever",
                value="UNBOUNDED",
                nearest="INTERVAL '365' DAYS PRECEDING",
            )
        size = self._interval()
        self._expect("PRECEDING", nearest="PRECEDING AND CURRENT ROW")
        if between:
            self._expect("AND", "CURRENT", "ROW", nearest="PRECEDING AND CURRENT ROW")
        self._expect(")", nearest=OVER_FORM)
        return Over(at, partition, order, size)

    def _interval(self) -> Interval:
        if not self._is("INTERVAL"):
            self._unexpected("expected the length of a window", "INTERVAL '7' DAYS")
        at = self._take().at
        count, unit = self._take(), self._next
        if count.kind == "string" and (unit.kind != "name" or unit.upper in RESERVED or unit.upper == "PRECEDING"):
            return interval(at, count, None)
        self._take()
        if self._is("TO"):
            raise SqlError(self._next.at, "an interval of two units", nearest="INTERVAL '90' MINUTES")
        return interval(at, count, unit)

    # Expressions, loosest first

    def _expression(self) -> Node:
        self._nested += 1
        if self._nested > MAX_NESTED:
            raise _too_deep(self._next.at, MAX_NESTED)
        try:
            return self._any("OR", lambda: self._any("AND", self._not))
        finally:
            self._nested -= 1

    def _any(self, word: str, part: Callable[[], Node]) -> Node:
        first = part()
        found, at = [first], self._next.at
        while self._accept(word):
            found.append(part())
        return first if len(found) == 1 else self._operation(at, word.lower(), *found)

    def _not(self) -> Node:
        nots: list[At] = []
        while self._is("NOT"):
            nots.append(self._take().at)
        found = self._predicate()
        for at in reversed(nots):
            found = self._operation(at, "not", found)
        return found

    def _predicate(self) -> Node:
        left = self._sum()
        while True:
            at = self._next.at
            if self._next.kind == "op" and self._next.text in _COMPARISONS:
                left = self._operation(at, _COMPARISONS[self._take().text], left, self._sum())
            elif self._is("=="):
                raise SqlError(at, "not an operator", value="==", nearest="=")
            elif self._accept("IS"):
                negated = self._accept("NOT")
                if not self._accept("NULL"):
                    self._unexpected("IS stands before NULL or NOT NULL only", "IS NULL, or the condition itself")
                left = self._operation(at, "is_null", left)
                left = self._operation(at, "not", left) if negated else left
            elif self._is("NOT") or self._is("IN") or self._is("BETWEEN") or self._is("LIKE"):
                negated = self._accept("NOT")
                left = self._membership(at, left)
                left = self._operation(at, "not", left) if negated else left
            else:
                return left

    def _membership(self, at: At, left: Node) -> Node:
        if self._accept("BETWEEN"):
            low = self._sum()
            self._expect("AND")
            return self._operation(at, "between", left, low, self._sum())
        if self._accept("IN"):
            self._expect("(", nearest="IN ('a', 'b')")
            if self._is("SELECT"):
                raise SqlError(self._next.at, "a subquery is not supported", nearest="IN ('a', 'b')")
            found = [self._expression()]
            while self._accept(","):
                found.append(self._expression())
            self._expect(")", nearest="IN ('a', 'b')")
            return self._operation(at, "in", left, *found)
        self._unexpected("this condition is not supported", "=, IN (...), BETWEEN or IS NULL")

    def _sum(self) -> Node:
        left = self._product()
        while self._next.kind == "op" and self._next.text in ("+", "-", "||"):
            sign = self._take()
            if sign.text == "||":
                raise SqlError(
                    sign.at, "strings cannot be joined", value="||", nearest="several columns, or COUNT(DISTINCT a)"
                )
            left = self._operation(sign.at, sign.text, left, self._product())
        return left

    def _product(self) -> Node:
        left = self._signed()
        while self._next.kind == "op" and self._next.text in ("*", "/", "%"):
            sign = self._take()
            left = self._operation(sign.at, sign.text, left, self._signed())
        return left

    def _signed(self) -> Node:
        signs: list[Token] = []
        while self._next.kind == "op" and self._next.text in ("+", "-"):
            signs.append(self._take())
        found = self._primary()
        for sign in reversed(signs):
            if sign.text == "+":
                continue
            if isinstance(found, Literal_) and found.kind == "number" and not found.text.startswith("-"):
                found = Literal_(sign.at, "number", f"-{found.text}")  # so that the least int64 can be written
            else:
                found = self._operation(sign.at, "neg", found)
        if self._is("::"):
            raise SqlError(self._next.at, "not an operator", value="::", nearest="CAST(x AS DOUBLE)")
        return found

    def _primary(self) -> Node:
        word = self._next
        if word.kind == "number":
            return Literal_(self._take().at, "number", word.text)
        if word.kind == "string":
            return Literal_(self._take().at, "string", word.text)
        if self._accept("*"):
            return Star(word.at)
        if self._accept("("):
            if self._is("SELECT"):
                raise SqlError(
                    self._next.at, "a subquery is not supported", nearest="FILTER (WHERE ...) behind the aggregate"
                )
            found = self._expression()
            self._expect(")")
            return found
        if word.upper in ("TRUE", "FALSE"):
            return Literal_(self._take().at, "bool", word.upper)
        if word.upper == "NULL":
            return Literal_(self._take().at, "null", "")
        if word.upper == "CASE":
            return self._case()
        if word.upper == "INTERVAL":
            return self._interval()
        if word.upper in ("TIMESTAMP", "TIMESTAMPTZ") and self._after().kind == "string":
            self._take()
            return Literal_(word.at, "timestamp", self._take().text)
        if word.upper in ("EXISTS", "SELECT"):
            raise SqlError(word.at, "a subquery is not supported", nearest="FILTER (WHERE ...) behind the aggregate")
        if word.kind in ("name", "quoted") and says(self._after(), "(") and word.upper not in RESERVED:
            return self._function()
        name = self._identifier("a column, a constant or a function")
        if not self._accept("."):
            return Name(name.at, name.text)
        if self._is("*"):
            return Star(self._take().at)
        return Name(name.at, self._identifier("a column").text, name.text)

    def _case(self) -> Node:
        at = self._expect("CASE").at
        simple = None if self._is("WHEN") else self._expression()
        found: list[Node] = []
        while self._accept("WHEN"):
            found.append(self._expression())
            self._expect("THEN")
            found.append(self._expression())
        if not found:
            self._unexpected("expected WHEN", "CASE WHEN condition THEN value ELSE value END")
        otherwise = self._expression() if self._accept("ELSE") else Literal_(self._next.at, "null", "")
        self._expect("END", nearest="CASE WHEN condition THEN value ELSE value END")
        if simple is not None:
            return self._operation(at, "simple_case", simple, *found, otherwise)
        return self._operation(at, "case", *found, otherwise)

    def _function(self) -> Node:
        name = self._take()
        self._expect("(")
        if name.upper in ("CAST", "TRY_CAST"):
            return self._cast(name)
        if name.upper == "EXTRACT":
            unit = self._identifier("HOUR or ISODOW", "EXTRACT(HOUR FROM event_timestamp)")
            self._expect("FROM", nearest=f"EXTRACT({unit.text} FROM event_timestamp)")
            argument = self._expression()
            self._expect(")")
            return self._operation(unit.at, "extract", argument, word=unit.text)
        distinct = self._accept("DISTINCT")
        arguments: list[Node] = []
        if not self._is(")"):
            arguments.append(self._expression())
            while self._accept(","):
                arguments.append(self._expression())
        if self._is("ORDER") or self._is("IGNORE") or self._is("RESPECT"):
            self._within_call()
        self._expect(")")
        if self._is("IGNORE") or self._is("RESPECT"):
            self._within_call()
        if self._is("WITHIN"):
            raise SqlError(self._next.at, "WITHIN GROUP is not supported", nearest="AVG(x), MIN(x) or MAX(x)")
        condition = None
        if self._accept("FILTER"):
            self._expect("(", "WHERE", nearest="FILTER (WHERE condition)")
            condition = self._expression()
            self._expect(")")
        over: Over | Token | None = None
        if self._is("OVER"):
            at = self._take().at
            over = self._over(at) if self._accept("(") else self._identifier("a window's name", OVER_FORM)
        depth = 1 + max((a.depth for a in [*arguments, *([condition] if condition else [])]), default=0)
        found = Function(name.at, name.text, tuple(arguments), distinct, condition, over, depth)
        if depth > MAX_DEPTH:
            raise _too_deep(name.at, MAX_DEPTH)
        return found

    def _within_call(self) -> NoReturn:
        word = self._next
        if word.upper == "ORDER":
            raise SqlError(
                word.at, "events are always in the order of time", value=word.text, nearest="FIRST(x) or LAST(x)"
            )
        raise SqlError(word.at, "nulls are always ignored", value=word.text, nearest="FIRST(x) or LAST(x)")

    def _cast(self, name: Token) -> Node:
        argument = self._expression()
        self._expect("AS", nearest="CAST(x AS DOUBLE)")
        kind = self._identifier("a type", "CAST(x AS DOUBLE)")
        self._accept("PRECISION")
        if self._accept("("):  # VARCHAR(10), DECIMAL(10, 2): the length is part of the refusal
            while self._next.kind != "end" and not self._accept(")"):
                self._take()
        self._expect(")")
        if name.upper == "TRY_CAST":
            raise SqlError(name.at, "TRY_CAST is not supported", nearest="CAST(x AS DOUBLE)")
        return self._operation(kind.at, "cast", argument, word=kind.text)

    def _operation(self, at: At, operator: str, *arguments: Node, word: str = "") -> Operation:
        depth = 1 + max(a.depth for a in arguments)
        if depth > MAX_DEPTH:
            raise _too_deep(at, MAX_DEPTH)
        return Operation(at, operator, arguments, word, depth)


def _too_deep(at: At, limit: int) -> SqlError:
    return SqlError(at, f"an expression of more than {limit} levels", nearest="fewer levels, or several outputs")


def says(word: Token, text: str) -> bool:
    return word.upper == text or (word.kind == "op" and word.text == text)
