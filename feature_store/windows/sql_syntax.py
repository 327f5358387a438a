"""Reads the SELECTs of a windowed definition."""

from __future__ import annotations

from feature_store.windows.sql_reader import RESERVED, ExpressionReader
from feature_store.windows.sql_tokens import At, SqlError, Token, tokens
from feature_store.windows.sql_tree import OVER_FORM, TABLE_FORM, Item, Node, Over, Select, TableFunction


def selects(text: str) -> list[Select]:
    """Every SELECT of a text. SqlError for anything that is none, or has a clause that is not supported."""
    return _SelectReader(tokens(text)).selects()


class _SelectReader(ExpressionReader):
    def selects(self) -> list[Select]:
        found = []
        while True:
            while self._accept(";"):
                pass
            if self._next.kind == "end":
                break
            found.append(self._select())
            if self._next.kind != "end" and not self._is(";"):
                self._unexpected("expected ; or the end of the text")
        if not found:
            raise SqlError(At(1, 1), "there is no SELECT", nearest=f"SELECT {OVER_FORM} AS name FROM events")
        return found

    def _select(self) -> Select:
        if self._is("WITH"):
            raise SqlError(
                self._next.at, "WITH is not supported", nearest="one SELECT over the events, with FILTER (WHERE ...)"
            )
        at = self._expect("SELECT", nearest=f"SELECT {OVER_FORM} AS name FROM events").at
        if self._is("DISTINCT"):
            raise SqlError(
                self._next.at, "SELECT DISTINCT: an entity has one row", nearest="SELECT, or COUNT(DISTINCT column)"
            )
        self._accept("ALL")
        items = [self._item()]
        while self._accept(","):
            items.append(self._item())
        self._expect("FROM", nearest="FROM events, or an alias with AS before the next comma")
        table, names, function = self._from()
        if self._is(","):
            raise SqlError(
                self._next.at, "a join: the SQL is over one event stream", nearest="one table, or a view of its own"
            )
        where = self._expression() if self._accept("WHERE") else None
        group_by = self._group_by() if self._accept("GROUP") else None
        windows = self._windows() if self._accept("WINDOW") else {}
        emit = self._emit() if self._is("EMIT") else None
        return Select(at, tuple(items), table, names, function, where, group_by, windows, emit)

    def _item(self) -> Item:
        expression = self._expression()
        if not self._accept("AS"):
            if self._next.kind in ("name", "quoted") and self._next.upper not in RESERVED:
                self._unexpected("expected AS before the name of an output", f"AS {self._next.text}")
            return Item(expression, None)
        return Item(expression, self._identifier("the name of an output"))

    def _from(self) -> tuple[Token, tuple[str, ...], TableFunction | None]:
        if self._is("("):
            raise SqlError(
                self._next.at, "a subquery is not supported", nearest="FROM events, with WHERE or FILTER (WHERE ...)"
            )
        function = None
        if self._is("TABLE"):
            table, function = self._table_function()
        else:
            table = self._identifier("the name of the events' table", "FROM events")
            if self._is("("):
                raise SqlError(
                    table.at, "a table function stands within TABLE(...)", value=table.text, nearest=TABLE_FORM
                )
            if self._is("."):
                raise SqlError(self._next.at, "the events' table is one name", nearest="FROM events")
        names = [table.text]
        if self._accept("AS") or (self._next.kind in ("name", "quoted") and self._next.upper not in RESERVED):
            names.append(self._identifier("an alias of the table").text)
        return table, tuple(names), function

    def _table_function(self) -> tuple[Token, TableFunction]:
        self._expect("TABLE", "(", nearest=TABLE_FORM)
        kind = self._identifier("TUMBLE, HOP or SESSION", TABLE_FORM)
        if kind.upper not in ("TUMBLE", "HOP", "SESSION"):
            raise SqlError(
                kind.at,
                "unknown window function",
                value=kind.text,
                valid=("TUMBLE", "HOP", "SESSION"),
                nearest=TABLE_FORM,
            )
        self._expect("(", "TABLE", nearest=f"{kind.upper}(TABLE events, ...)")
        table = self._identifier("the name of the events' table", f"{kind.upper}(TABLE events, ...)")
        partition = self._partition() if self._is("PARTITION") else None
        self._expect(",", "DESCRIPTOR", "(", nearest="DESCRIPTOR(event_timestamp)")
        timestamp = self._column()
        self._expect(")")
        lengths = []
        while self._accept(","):
            lengths.append(self._interval())
        self._expect(")", ")", nearest=TABLE_FORM)
        return table, TableFunction(kind.at, kind.upper, partition, timestamp, tuple(lengths))

    def _group_by(self) -> tuple[Node, ...]:
        self._expect("BY")
        found = [self._expression()]
        while self._accept(","):
            found.append(self._expression())
        return tuple(found)

    def _windows(self) -> dict[str, Over]:
        found: dict[str, Over] = {}
        while True:
            name = self._identifier("the name of a window")
            if name.text in found:
                raise SqlError(name.at, "two windows of one name", value=name.text)
            self._expect("AS", "(", nearest=f"WINDOW {name.text} AS (PARTITION BY ... ORDER BY ... RANGE ...)")
            found[name.text] = self._over(name.at)
            if not self._accept(","):
                return found

    def _emit(self) -> At:
        at = self._next.at
        if not self._accept("EMIT", "ON", "WINDOW", "CLOSE"):
            raise SqlError(
                at, "only closed windows can be asked for", nearest="EMIT ON WINDOW CLOSE, or nothing for the open one"
            )
        return at
