"""A windowed definition as Flink SQL, for those who outgrow one machine; `windows explain` shows it.

TUMBLE, HOP and SESSION become Flink's own table functions, which give closed windows: the values of `EMIT ON WINDOW
CLOSE`. OVER RANGE gives the value as of every event. The open reading at any time t is ours alone.
"""

from __future__ import annotations

from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.in_words import window_text
from feature_store.windows.ir import Aggregate, Statement, Type
from feature_store.windows.sql_intervals import interval_sql
from feature_store.windows.sql_text import expression_sql, identifier

EVENTS = "events"
_TYPES: dict[Type, str] = {
    "int64": "BIGINT", "float64": "DOUBLE", "string": "STRING", "bool": "BOOLEAN", "timestamp": "TIMESTAMP_LTZ(6)",
}  # fmt: skip
CLOSED = "closed windows: one row per key and window, once the watermark has passed its end"
PER_EVENT = "neither closed windows nor tile partials: one row per event, the value at the event's time"


def flink_sql(definition: WindowedView) -> list[str]:
    """The table of events, then one query per Statement, each beginning with comments that say what it computes."""
    return [_table(definition), *(_query(definition, s) for s in definition.statements)]


def _table(d: WindowedView) -> str:
    source = d.source
    columns = {
        **dict(zip(d.entity_key, d.key_types, strict=True)),
        source.timestamp: "timestamp",
        **source.columns,
        **({source.event_id: "string"} if source.event_id is not None else {}),
    }
    lines = [f"  {_name(n)} {_TYPES[t]}" for n, t in columns.items()]  # type: ignore[index]  # all are of ir.Type
    lateness = _interval(source.allowed_lateness_us) if source.allowed_lateness_us else "INTERVAL '0' SECOND"
    lines.append(f"  WATERMARK FOR {_name(source.timestamp)} AS {_name(source.timestamp)} - {lateness}")
    body = ",\n".join(lines)
    topic = source.topic.replace("'", "''")
    coded = "'json', 'json.timestamp-format.standard' = 'ISO-8601'"
    if source.format == "avro":
        coded = (
            "'avro-confluent', 'avro-confluent.url' = '<schema registry>'" if source.avro_schema is None else "'avro'"
        )
    return (
        "-- what stands in <...> is yours to fill in\n"
        f"-- the events of {d.name}; set first: SET 'table.local-time-zone' = 'UTC' (windows and parts of times are in UTC)\n"
        f"{_idle(source)}CREATE TABLE {EVENTS} (\n{body}\n) WITH ('connector' = 'kafka', 'topic' = '{topic}',\n"
        f"  'properties.bootstrap.servers' = '<brokers>', 'scan.startup.mode' = 'earliest-offset', 'format' = {coded})"
    )


def _idle(source: EventSource) -> str:
    if source.idle_timeout_us is None:
        return ""
    return f"-- and: SET 'table.exec.source.idle-timeout' = '{source.idle_timeout_us // 1000} ms'\n"


def _query(d: WindowedView, s: Statement) -> str:
    over = s.window.kind == "over"
    call = [_call(a, over) for a in s.aggregates]
    comments = [f"{window_text(s.window)}; {PER_EVENT if over else CLOSED}", *_notes(d, s)]
    keys = ", ".join(_name(k) for k in d.entity_key)
    outputs = [f"{expression_sql(o.expression, 'flink', call)} AS {_name(o.name)}" for o in s.outputs]
    if over:
        select = [keys, _name(d.source.timestamp), *outputs]
        tail = (
            f"FROM {EVENTS}\nWINDOW w AS (PARTITION BY {keys} ORDER BY {_name(d.source.timestamp)}\n"
            f"  RANGE BETWEEN {_interval(s.window.size_us)} PRECEDING AND CURRENT ROW)"
        )
    else:
        select = [keys, "window_start", "window_end", *outputs]
        tail = f"FROM TABLE({_table_function(d, s)})\nGROUP BY {keys}, window_start, window_end"
    listed = ",\n  ".join(select)
    return "".join(f"-- {c}\n" for c in comments) + f"SELECT {listed}\n{tail}"


def _table_function(d: WindowedView, s: Statement) -> str:
    w, time = s.window, f"DESCRIPTOR({_name(d.source.timestamp)})"
    size = _interval(w.size_us)
    if w.kind == "session":
        keys = ", ".join(_name(k) for k in d.entity_key)
        return f"SESSION(TABLE {EVENTS} PARTITION BY {keys}, {time}, {size})"
    if w.kind == "tumble":
        return f"TUMBLE(TABLE {EVENTS}, {time}, {size})"
    return f"HOP(TABLE {EVENTS}, {time}, {_interval(w.slide_us)}, {size})"


def _call(a: Aggregate, over: bool) -> str:
    """An aggregate; within OVER, where Flink has no FILTER, its condition goes into the argument."""
    argument = "1" if a.argument is None else expression_sql(a.argument, "flink")
    filtered, end = "", " OVER w" if over else ""
    if a.filter is not None:
        condition = expression_sql(a.filter, "flink")
        if over:
            argument = f"CASE WHEN {condition} THEN {argument} END"
        else:
            filtered = f" FILTER (WHERE {condition})"
    if a.argument is None:
        return f"COUNT({argument if over and a.filter is not None else '*'}){filtered}{end}"
    match a.function:
        case "count_distinct":
            return f"COUNT(DISTINCT {argument}){filtered}{end}"
        case "avg" | "stddev":  # AVG of integers is an integer in Flink
            name = "AVG" if a.function == "avg" else "STDDEV_SAMP"
            return f"{name}(CAST({argument} AS DOUBLE)){filtered}{end}"
        case "first" | "last":
            return f"{a.function.upper()}_VALUE({argument}){filtered}{end}"
        case "min" | "max" if a.type == "bool":  # Flink has no order of bools
            return (
                f"({a.function.upper()}(CASE WHEN {argument} THEN 1 WHEN NOT {argument} THEN 0 END){filtered}{end} = 1)"
            )
        case name:
            return f"{name.upper()}({argument}){filtered}{end}"


def _notes(d: WindowedView, s: Statement) -> list[str]:
    """Where Flink's value may differ from ours."""
    functions = {a.function for a in s.aggregates}
    notes = []
    if s.window.kind != "over" and not s.window.on_close:
        notes.append("the view is read open, at any time t; these are the values once the window is over")
    if "count_distinct" in functions:
        notes.append(
            "COUNT(DISTINCT) is exact here, and approximate (standard error 3.1 % from 1,024 values on) in PredictFlow"
        )
    if functions & {"first", "last"}:
        notes.append("FIRST and LAST go by arrival here, by event time in PredictFlow")
    if any(a.function == "sum" and a.type == "int64" for a in s.aggregates):
        notes.append("a sum beyond 64 bits wraps around here, and is an error in PredictFlow")
    if d.source.event_id is not None:
        notes.append(
            f"repeated events ({d.source.event_id}) count again here: de-duplicate before, if the topic may repeat them"
        )
    return notes


def _interval(us: int) -> str:
    """Flink takes two digits unless told of more."""
    text = interval_sql(us)
    digits = len(text.split("'")[1].split(".")[0])
    return text if digits < 3 or "." in text else f"{text}({digits})"


def _name(name: str) -> str:
    return identifier(name, "flink")
