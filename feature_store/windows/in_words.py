"""A definition in the words of SQL, for lineage and `windows explain`: what an output is made of, and of which columns."""

from __future__ import annotations

from feature_store.windows.ir import Aggregate, AggregateRef, Column, Output, Statement, Window, walk
from feature_store.windows.sql_intervals import interval_sql
from feature_store.windows.sql_text import expression_sql


def window_text(window: Window) -> str:
    """`OVER (RANGE INTERVAL '7' DAY PRECEDING)`, `HOP(INTERVAL '1' DAY, INTERVAL '90' DAY)`, ..."""
    size = interval_sql(window.size_us)
    text = {
        "over": f"OVER (RANGE {size} PRECEDING)",
        "tumble": f"TUMBLE({size})",
        "hop": f"HOP({interval_sql(window.slide_us or window.size_us)}, {size})",
        "session": f"SESSION({size})",
    }[window.kind]
    return f"{text} EMIT ON WINDOW CLOSE" if window.on_close else text


def aggregate_text(a: Aggregate) -> str:
    """`SUM(quantity) FILTER (WHERE (event_type = 'ticket'))`."""
    argument = "*" if a.argument is None else expression_sql(a.argument, "plain")
    call = f"COUNT(DISTINCT {argument})" if a.function == "count_distinct" else f"{a.function.upper()}({argument})"
    if a.filter is None:
        return call
    condition = expression_sql(a.filter, "plain")
    return f"{call} FILTER (WHERE {_bare(condition)})"


def output_text(statement: Statement, output: Output) -> str:
    """An output with its window: the whole of what its value is."""
    aggregates = [aggregate_text(a) for a in statement.aggregates]
    return f"{_bare(expression_sql(output.expression, 'plain', aggregates))} {window_text(statement.window)}"


def output_columns(statement: Statement, output: Output) -> set[str]:
    """The event's columns that an output reads, beside the time column."""
    used = [statement.aggregates[e.index] for e in walk(output.expression) if isinstance(e, AggregateRef)]
    parts = [e for a in used for e in (a.argument, a.filter) if e is not None]
    return {e.name for part in parts for e in walk(part) if isinstance(e, Column)}


def _bare(text: str) -> str:
    """Without parentheses around the whole."""
    if not (text.startswith("(") and text.endswith(")")):
        return text
    depth, quoted = 0, False
    for i, c in enumerate(text):
        quoted ^= c == "'"
        depth += 0 if quoted else (c == "(") - (c == ")")
        if depth == 0:
            return text[1:-1] if i == len(text) - 1 else text
    return text
