"""A windowed definition as DuckDB SQL over the event log: the same values as `state.py`, for any time in the past.

The text refers to two relations by name and touches nothing else, so that the caller decides what they are (Parquet
globs, temporary tables, a test's few rows). Times are compared as microseconds since the epoch: no time zone, no calendar.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Literal

from feature_store.windows.definition import Aggregate, WindowedView

LAST_SEEN = "_last_seen"
"""Extra column of the result: greatest event time seen by t, TIMESTAMPTZ; null where the row has no value."""

# Rows of history (-1) without an offset in the map all count; a partition without one was not yet read.
_KNOWN = {
    "by_time": "v._visible_us <= e._t_us",
    "by_offset": "v._offset <= coalesce(e._offsets[v._partition], "
    "CASE WHEN v._partition < 0 THEN 9223372036854775807 ELSE -1 END)",
}


def history_sql(
    definition: WindowedView, entities: str, events: str, known: Literal["by_time", "by_offset"] = "by_time"
) -> str:
    """A SELECT that gives `_row`, one BIGINT column per aggregate and `_last_seen`, once per row of `entities`.

    `entities`: `_row` BIGINT (unique), the entity keys, `_t` TIMESTAMPTZ; for `by_offset` also `_offsets`
    MAP(INTEGER, BIGINT), the last offset included per partition (-1: history). `events`: the event log's columns, of
    history and stream together; rows repeated on (partition, offset) count once, dropped rows never.
    `by_time` counts events with `_visible_at <= _t`. Never seen by t, or silent for longer than ttl: all null. Seen, but
    nothing in a window: COUNT 0, SUM null. A sum beyond int64 raises duckdb.InvalidInputException. Order is not kept.
    """
    keys = [_name(k) for k in definition.entity_key]
    columns = sorted(
        {a.column for a in definition.aggregates if a.column}
        | {a.where.column for a in definition.aggregates if a.where}
    )
    # Older events could only say that the entity was seen too long ago to have a value.
    reach = max(_us(definition.longest_window), _us(definition.ttl)) if definition.ttl else None
    ttl = f" AND e._t_us - s._last_us <= {_us(definition.ttl)}" if definition.ttl else ""
    offsets = ", _offsets" if known == "by_offset" else ""
    partials = ",\n         ".join(f"{_partial(a)} AS {_name(a.name)}" for a in definition.aggregates)
    finals = ",\n       ".join(f"{_final(definition, a)} AS {_name(a.name)}" for a in definition.aggregates)
    return f"""
WITH logged AS (
  SELECT {", ".join([*keys, *map(_name, columns)])}, _partition, _offset,
         epoch_us({_name(definition.timestamp)}) AS _us, epoch_us(_visible_at) AS _visible_us
  FROM {events}
  WHERE _dropped IS NULL
), log AS (
  SELECT * FROM logged WHERE _partition < 0
  UNION ALL
  (SELECT DISTINCT ON (_partition, _offset) * FROM logged WHERE _partition >= 0
   ORDER BY _partition, _offset, _visible_us)
), asked AS (
  SELECT _row, {", ".join(keys)}, epoch_us(_t) AS _t_us{offsets} FROM {entities}
), summed AS (
  SELECT e._row,
         max(v._us) AS _last_us,
         {partials}
  FROM asked AS e JOIN log AS v
    ON {" AND ".join(f"v.{k} = e.{k}" for k in keys)}
   AND v._us <= e._t_us{f" AND v._us >= e._t_us - {reach}" if reach is not None else ""}
   AND {_KNOWN[known]}
  GROUP BY e._row
), valued AS (
  SELECT e._row, s.* EXCLUDE (_row), s._row IS NOT NULL{ttl} AS _valued
  FROM asked AS e LEFT JOIN summed AS s ON s._row = e._row
)
SELECT _row,
       {finals},
       CASE WHEN _valued THEN make_timestamptz(_last_us) END AS {LAST_SEEN}
FROM valued
"""


def _partial(a: Aggregate) -> str:
    condition = f"v._us >= e._t_us - {_us(a.window)}"
    if a.where is not None:
        values = ", ".join(_text(v) for v in a.where.values)
        condition += f" AND v.{_name(a.where.column)} IN ({values})"
    function = "count(*)" if a.column is None else f"sum(v.{_name(a.column)}::HUGEINT)"
    return f"{function} FILTER (WHERE {condition})"


def _final(definition: WindowedView, a: Aggregate) -> str:
    column = _name(a.name)
    if a.column is None:
        return f"CASE WHEN _valued THEN {column} END"
    message = _text(f"{definition.name}.{a.name}: the sum does not fit into an int64")
    fits = f"{column} IS NULL OR {column} BETWEEN -9223372036854775808 AND 9223372036854775807"
    return f"CASE WHEN NOT _valued THEN NULL WHEN {fits} THEN {column}::BIGINT ELSE error({message}) END"


def _name(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"


def _us(delta: timedelta) -> int:
    return delta // timedelta(microseconds=1)
