"""A windowed definition as DuckDB SQL over the event log: the same values as the stream's state, for any time in the past.

The text refers to two relations by name and touches nothing else, so that the caller decides what they are (Parquet
globs, temporary tables, a test's few rows). Every statement's window at t becomes a range of event times per entity row;
`history_ranges.py` aggregates ranges, `history_sessions.py` finds those of sessions.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from feature_store.windows.definition import WindowedView
from feature_store.windows.history_partials import final_sql, partials_of
from feature_store.windows.history_ranges import SEEN, aligned, range_ctes
from feature_store.windows.history_sessions import session_ctes
from feature_store.windows.plan import Plan, plan_of
from feature_store.windows.sql_text import expression_sql, identifier

LAST_SEEN = "_last_seen"
"""Extra column of the result: greatest event time seen by t, TIMESTAMPTZ; null where the row has no value, or, with
`any_age`, only where nothing was seen."""

Known = Literal["by_time", "by_offset"]
_NEVER = "(-9223372036854775807 - 1)"


def history_sql(
    definition: WindowedView, entities: str, events: str, known: Known = "by_time", *, any_age: bool = False
) -> str:
    """A SELECT that gives `_row`, one column per output (BIGINT, DOUBLE, BOOLEAN, TIMESTAMPTZ) and `_last_seen`, once per
    row of `entities`.

    `entities`: `_row` BIGINT (unique), the entity keys, `_t` TIMESTAMPTZ; for `by_offset` also `_offsets`
    MAP(INTEGER, BIGINT), the last offset included per partition (-1: history, all of it where it has none), and where the
    definition closes windows `_watermark_us` BIGINT, the watermark served (null: none). `events`: the event log's columns,
    of history and stream together; rows of the stream repeated on (partition, offset) count once, dropped rows never.
    `by_time` counts events with `_visible_at <= _t`. Never seen by t, or silent for longer than ttl: all null. Seen, but
    nothing in a window: counts 0, the rest null. Beyond an int64 or a finite float64: duckdb.InvalidInputException or
    duckdb.OutOfRangeException. Order is not kept.
    """
    plan = plan_of(definition)
    # Named first, so that no name in here can hide one of the caller's.
    relations = [f"__entities AS NOT MATERIALIZED (SELECT * FROM {entities})"]
    relations += [f"__events AS NOT MATERIALIZED (SELECT * FROM {events})"]
    entities, events = "__entities", "__events"
    keys = [identifier(k) for k in definition.entity_key]
    named = ", ".join(f"{k} AS _key{i}" for i, k in enumerate(keys))
    on_keys = " AND ".join(f"r.{k} = q._key{i}" for i, k in enumerate(keys))
    closes = definition.closes_windows
    extra = ", r._offsets" if known == "by_offset" else ""
    if known == "by_offset" and closes:
        extra += f", nullif(r._watermark_us, {_NEVER}) AS _w"
    time = identifier(definition.source.timestamp)
    row = (
        f"q._k, r._partition AS _p, r._offset AS _o, epoch_us(r.{time}) AS _us, epoch_us(r._visible_at) AS _vis, "
        f"epoch_us(r._watermark) AS _wm, {plan.numbers_sql()}"
    )
    own = f"SELECT {row}, r._dropped FROM {events} AS r JOIN wanted AS q ON {on_keys} WHERE"
    ctes = [
        f"wanted AS MATERIALIZED (SELECT *, row_number() OVER () AS _k FROM (SELECT DISTINCT {named} FROM {entities}))",
        f"asked AS MATERIALIZED (SELECT r._row, q._k, epoch_us(r._t) AS _t{extra} FROM {entities} AS r JOIN wanted AS q ON {on_keys})",
        # History has its own numbers, which only order it; the stream's rows may stand in two files for a while. What
        # became visible first counts, or was dropped: so the latter is asked last.
        f"""log AS MATERIALIZED (
  SELECT * EXCLUDE (_dropped) FROM (
    {own} r._partition < 0
    UNION ALL
    SELECT * FROM (SELECT DISTINCT ON (_p, _o) * FROM ({own} r._partition >= 0) ORDER BY _p, _o, _vis)
  ) WHERE _dropped IS NULL
)""",
    ]
    ctes.insert(0, f"every AS (SELECT r._row, epoch_us(r._t) AS _t FROM {entities} AS r)")
    if closes and known == "by_time":
        ctes += _watermark_ctes(definition, events, on_keys)
    else:
        ctes.append("timed AS (SELECT * FROM asked)")
    sessions = [i for i, s in enumerate(definition.statements) if s.window.kind == "session"]
    for i in sessions:
        ctes += session_ctes(i, definition.statements[i].window, by_offset=known == "by_offset")
    ranges = [_range(plan, i) for i in range(len(definition.statements))]
    ctes += range_ctes(plan, ranges, by_offset=known == "by_offset")
    ctes += _value_ctes(plan)
    outputs = ",\n       ".join(_outputs(plan))
    return (
        "WITH "
        + ",\n".join([*relations, *ctes])
        + f"\nSELECT _row,\n       {outputs},\n       {_last_seen(any_age)}\nFROM aggregated\n"
    )


def _last_seen(any_age: bool) -> str:
    time = "make_timestamptz(_last_us)"
    return f"{time if any_age else f'CASE WHEN _valued THEN {time} END'} AS {LAST_SEEN}"


def _watermark_ctes(definition: WindowedView, events: str, on_keys: str) -> list[str]:
    """`timed`: asked rows with `_w`, the greatest watermark at t of the partitions (-1: history) in which the entity has rows."""
    time = f"epoch_us(r.{identifier(definition.source.timestamp)})"
    after = f"coalesce(CASE WHEN r._dropped IS DISTINCT FROM 'idle' THEN {time} - {definition.source.allowed_lateness_us} END, {_NEVER})"
    return [
        f"""advances AS (
  SELECT r._partition AS _p, epoch_us(r._visible_at) AS _vis, max(greatest(coalesce(epoch_us(r._watermark), {_NEVER}), {after})) AS _w
  FROM {events} AS r GROUP BY ALL
)""",
        "watermarks AS (SELECT _p, _vis, max(_w) OVER (PARTITION BY _p ORDER BY _vis) AS _w FROM advances)",
        f"""members AS (
  SELECT q._k, r._partition AS _p, min(epoch_us(r._visible_at)) AS _vis
  FROM {events} AS r JOIN wanted AS q ON {on_keys} GROUP BY ALL
)""",
        "asked_in AS (SELECT r._row, r._t, m._p FROM asked AS r JOIN members AS m ON m._k = r._k AND m._vis <= r._t)",
        f"""timed AS MATERIALIZED (
  SELECT r.*, w._w FROM asked AS r LEFT JOIN (
    SELECT i._row, nullif(max(w._w), {_NEVER}) AS _w
    FROM asked_in AS i ASOF JOIN watermarks AS w ON w._p = i._p AND i._t >= w._vis GROUP BY ALL
  ) AS w USING (_row)
)""",
    ]


def _range(plan: Plan, number: int) -> str:
    """SELECT of the event times that the statement reads for each entity row, both ends included. `_e`: rows whose
    watermark was there already do not count."""
    window = plan.definition.statements[number].window
    if window.kind == "session":
        return f"SELECT _row, _k, _t, {number} AS _s, _lo, _hi, CAST(NULL AS BIGINT) AS _e, {window.on_close} AS _timely FROM session_{number}"
    if window.on_close:
        end = aligned("_w", window.slide_us)
        where = " WHERE _w IS NOT NULL"
        lo, hi = f"{end} - {window.size_us}", f"{end} - 1"
    else:
        end, where, hi = "CAST(NULL AS BIGINT)", "", "_t"
        lo = f"_t - {window.size_us}"
        if window.kind != "over":
            lo = f"{aligned('_t', window.slide_us)} + {window.slide_us - window.size_us}"
    return f"SELECT _row, _k, _t, {number} AS _s, {lo} AS _lo, {hi} AS _hi, {end} AS _e, FALSE AS _timely FROM timed{where}"


def _value_ctes(plan: Plan) -> list[str]:
    """`aggregated`: every row of `entities` with `_valued`, `_last_us` and the aggregates `_a<statement>_<number>`."""
    d = plan.definition
    ttl = f" AND e._t - s._last_us <= {_us(d.ttl)}" if d.ttl else ""
    ctes = [
        f"""judged AS MATERIALIZED (
  SELECT e._row, s._last_us, s._last_us IS NOT NULL{ttl} AS _valued
  FROM every AS e LEFT JOIN (SELECT _row, _last AS _last_us FROM summed WHERE _s = {SEEN}) AS s USING (_row)
)"""
    ]
    columns = []
    joins = []
    for n, statement in enumerate(d.statements):
        needed = ", ".join(p.name for p in partials_of(plan, [n]))
        values = []
        for i, (a, wanted) in enumerate(zip(statement.aggregates, plan.inputs[n], strict=True)):
            where = f"{d.name}.{statement.outputs[0].name}" if len(statement.outputs) == 1 else d.name
            values.append(f"CASE WHEN _valued THEN {final_sql(a, wanted, where)} END AS _a{n}_{i}")
        ctes.append(
            f"""valued_{n} AS (
  SELECT j._row, {", ".join(values)}
  FROM judged AS j LEFT JOIN (SELECT _row, {needed} FROM summed WHERE _s = {n}) USING (_row)
)"""
        )
        columns.append(f"v{n}.* EXCLUDE (_row)")
        joins.append(f"JOIN valued_{n} AS v{n} USING (_row)")
    ctes.append(f"aggregated AS (SELECT j.*, {', '.join(columns)} FROM judged AS j {' '.join(joins)})")
    return ctes


def _outputs(plan: Plan) -> list[str]:
    out = []
    for n, statement in enumerate(plan.definition.statements):
        names = [f"_a{n}_{i}" for i in range(len(statement.aggregates))]
        for o in statement.outputs:
            value = expression_sql(o.expression, "duckdb", names, f"{plan.definition.name}.{o.name}")
            out.append(f"CASE WHEN _valued THEN {value} END AS {identifier(o.name)}")
    return out


def _us(delta: timedelta) -> int:
    return delta // timedelta(microseconds=1)
