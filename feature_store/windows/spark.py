"""A windowed definition as Spark SQL, for those who outgrow one machine; `windows explain` shows it.

`window()` and `session_window()` give closed windows, in Structured Streaming as in batch: the values of `EMIT ON WINDOW
CLOSE`. OVER RANGE is for batch: the value as of every event. The open reading at any time t is ours alone.
"""

from __future__ import annotations

from feature_store.windows.definition import WindowedView
from feature_store.windows.in_words import window_text
from feature_store.windows.ir import Aggregate, Statement
from feature_store.windows.sql_intervals import interval_sql
from feature_store.windows.sql_text import expression_sql, identifier

EVENTS = "events"
CLOSED = "closed windows: one row per key and window; as a stream in append mode, once the watermark has passed its end"
PER_EVENT = "neither closed windows nor tile partials: one row per event, the value at the event's time; for batch only"


def spark_sql(definition: WindowedView) -> list[str]:
    """One query per Statement over a table `events`, each beginning with comments that say what it computes."""
    return [_query(definition, s) for s in definition.statements]


def _query(d: WindowedView, s: Statement) -> str:
    over = s.window.kind == "over"
    comments = [f"{window_text(s.window)}; {PER_EVENT if over else CLOSED}", *_notes(d, s)]
    keys = [_name(k) for k in d.entity_key]
    time = _name(d.source.timestamp)
    call = [_call(a, time, over) for a in s.aggregates]
    outputs = [f"{expression_sql(o.expression, 'spark', call)} AS {_name(o.name)}" for o in s.outputs]
    if over:
        select = [*keys, time, *outputs]
        tail = (
            f"FROM {EVENTS}\nWINDOW w AS (PARTITION BY {', '.join(keys)} ORDER BY {time}\n"
            f"  RANGE BETWEEN {interval_sql(s.window.size_us)} PRECEDING AND CURRENT ROW)"
        )
    else:
        function, column = _window(s, time)
        select = [*keys, f"{column}.start AS window_start", f"{column}.end AS window_end", *outputs]
        tail = f"FROM {EVENTS}\nGROUP BY {', '.join([*keys, function])}"
    listed = ",\n  ".join(select)
    return "".join(f"-- {c}\n" for c in comments) + f"SELECT {listed}\n{tail}"


def _window(s: Statement, time: str) -> tuple[str, str]:
    size = f"'{_length(s.window.size_us)}'"
    if s.window.kind == "session":
        return f"session_window({time}, {size})", "session_window"
    if s.window.kind == "tumble":
        return f"window({time}, {size})", "window"
    return f"window({time}, {size}, '{_length(s.window.slide_us)}')", "window"


def _length(us: int) -> str:
    """Weeks and days in Spark's words: `7 days`."""
    for unit, length in (
        ("days", 86_400_000_000),
        ("hours", 3_600_000_000),
        ("minutes", 60_000_000),
        ("seconds", 1_000_000),
    ):
        if us % length == 0:
            return f"{us // length} {unit}"
    return f"{us // 1000} milliseconds"


def _call(a: Aggregate, time: str, over: bool) -> str:
    """An aggregate; its condition goes into the argument, as Spark's OVER has no FILTER."""
    argument = "1" if a.argument is None else expression_sql(a.argument, "spark")
    if a.filter is not None:
        argument = f"CASE WHEN {expression_sql(a.filter, 'spark')} THEN {argument} END"
    end = " OVER w" if over else ""
    if a.argument is None:
        return f"count({argument if a.filter is not None else '*'}){end}"
    match a.function:
        case "count_distinct":  # Spark counts distinct values exactly neither over a window nor in a stream
            return f"approx_count_distinct({argument}){end}"
        case "stddev":
            return f"stddev_samp({argument}){end}"
        case "first" | "last" if over:
            return f"{a.function}_value({argument}, TRUE){end}"
        case "first" | "last":  # nulls give no order, so they are never taken
            name = "min_by" if a.function == "first" else "max_by"
            return f"{name}({argument}, CASE WHEN ({argument}) IS NOT NULL THEN {time} END)"
        case name:
            return f"{name}({argument}){end}"


def _notes(d: WindowedView, s: Statement) -> list[str]:
    """Where Spark's value may differ from ours."""
    functions = {a.function for a in s.aggregates}
    notes = [
        "set first: SET spark.sql.session.timeZone = UTC; SET spark.sql.ansi.enabled = true (overflow is an error)"
    ]
    if s.window.kind != "over":
        notes.append(
            f"as a stream: .withWatermark('{d.source.timestamp}', '{_length(d.source.allowed_lateness_us)}') on the events"
        )
        if not s.window.on_close:
            notes.append("the view is read open, at any time t; these are the values once the window is over")
    if "count_distinct" in functions:
        notes.append("COUNT(DISTINCT) is approximate in both, by different sketches")
    if functions & {"first", "last"}:
        notes.append("events of one time have no order here; in PredictFlow partition and offset decide")
    if d.source.event_id is not None:
        notes.append(
            f"repeated events count again here: dropDuplicates(['{d.source.event_id}']) before, if the topic may repeat them"
        )
    return notes


def _name(name: str) -> str:
    return identifier(name, "spark")
