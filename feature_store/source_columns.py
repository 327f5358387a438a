"""Which raw columns each output column of a source's SQL is made from. Pure: text in, names out."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feature_store.errors import DefinitionError

if TYPE_CHECKING:
    from sqlglot.exp import Table
    from sqlglot.lineage import Node as SqlNode

RAW_TABLES: Mapping[str, Mapping[str, str]] = {
    "accounts": {
        "customer_id": "text",
        "event_timestamp": "timestamptz",
        "created": "timestamptz",
        "joined_at": "timestamptz",
        "monthly_charges": "double",
        "contract_months": "bigint",
        "payment_method": "text",
    },
    "events": {
        "event_id": "text",
        "customer_id": "text",
        "event_type": "text",
        "event_timestamp": "timestamptz",
        "created": "timestamptz",
        "quantity": "bigint",
        "amount_cents": "bigint",
    },
}
"""The raw tables of every source adapter (docs/architecture.md): they tell whose an unqualified column of a join is."""

_COLOUR = re.compile(r"\x1b\[\d*m")


@dataclass(frozen=True)
class SourceColumn:
    """An output column of a SELECT: the raw columns it reads (`table.column`, sorted; `table.*` for one that reads rows
    only, as count(*) does), its expression, and the rest of the statement, which its value depends on as well."""

    columns: tuple[str, ...]
    expression: str
    statement: str


def columns_of(sql: str, where: str) -> dict[str, SourceColumn]:
    """The output columns of a DuckDB SELECT by name; `where` names it in errors.

    DefinitionError when the text is not one readable SELECT, or an output column has no name.
    """
    from sqlglot import exp, parse
    from sqlglot.errors import SqlglotError
    from sqlglot.lineage import lineage

    try:
        statements = [s for s in parse(sql, dialect="duckdb") if s is not None]
        if len(statements) != 1 or not isinstance(statements[0], exp.Query):
            raise DefinitionError(f"{where}: predictflow.sql is not one SELECT", value=" ".join(sql.split())[:80])
        query = statements[0]
        nodes = lineage(None, query, schema={t: dict(c) for t, c in RAW_TABLES.items()}, dialect="duckdb")
    except SqlglotError as e:
        reason = " ".join(_COLOUR.sub("", str(e)).split())
        raise DefinitionError(f"{where}: predictflow.sql cannot be read: {reason}", next_step="mend the SELECT") from e
    written = {s.alias_or_name: s.unalias().sql(dialect="duckdb") for s in query.selects if not s.is_star}
    rest = query.copy()
    if isinstance(rest, exp.Select):
        rest.set("expressions", [])
    statement = rest.sql(dialect="duckdb")
    named = {cte.alias for cte in query.find_all(exp.CTE)}
    rows = tuple(sorted({f"{_table(t)}.*" for t in query.find_all(exp.Table) if t.name not in named}))
    return {
        name: SourceColumn(_raw_columns(node) or rows, written.get(name, name), statement)
        for name, node in nodes.items()
        if name != "*"
    }


def _raw_columns(node: SqlNode) -> tuple[str, ...]:
    """`table.column` of every leaf below `node` that is a column of a table."""
    from sqlglot import exp

    found = set()
    for leaf in node.walk():
        if not leaf.downstream and isinstance(leaf.expression, exp.Table):
            found.add(f"{_table(leaf.expression)}.{leaf.name.rpartition('.')[2]}")
    return tuple(sorted(found))


def _table(table: Table) -> str:
    """A table's name, or the text of a table function such as read_parquet('x.parquet')."""
    return table.name or table.this.sql(dialect="duckdb")
