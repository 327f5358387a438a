"""Windowed values recomputed from the event log by (t, offsets), and the watermark where it matters, with the SQL of history.

A value is `stale` where the log had more by t than was served.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from feature_store.clock import EPOCH, MICROSECOND, from_micros, to_micros
from feature_store.consistency.parquet import load_reads, place_of
from feature_store.consistency.result import NULL_VALUE, PRESENT, Consistency, Difference, same, status_at
from feature_store.consistency.served_log import Served, after_t
from feature_store.event_log import HISTORY, STREAM
from feature_store.point_in_time.engine import EngineSettings, connect, ident, reading
from feature_store.point_in_time.source import open_source, scanning
from feature_store.point_in_time.windowed import EVENTS, make_events
from feature_store.windows.definition import WindowedView
from feature_store.windows.history import LAST_SEEN, history_sql
from feature_store.windows.ir import Aggregate, AggregateRef, Call, Constant, Output, Statement, walk

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureView

_TOLERANCE = 1e-9
"""Of the sum of the absolute numbers: how far doubles may be apart that were added in another order."""
_SCALE = "_scale_"
_ZERO = Constant(0.0, "float64")


_JUDGED = "_judged_events"


def _judged_sql(definition: WindowedView) -> str:
    """The log, whose first event of an id is no duplicate, whatever sync wrote: what it ignored wrongly must be seen."""
    event_id = definition.source.event_id
    if event_id is None:
        return f"CREATE OR REPLACE TEMP VIEW {_JUDGED} AS SELECT * FROM {EVENTS}"
    keys = ", ".join(ident(k) for k in (*definition.entity_key, event_id))
    order = "_partition >= 0, _visible_at, _partition, _offset"
    return f"""CREATE OR REPLACE TEMP VIEW {_JUDGED} AS SELECT * REPLACE (
        CASE WHEN _dropped = 'duplicate' AND rank() OVER (PARTITION BY {keys} ORDER BY {order}) = 1 THEN NULL
             ELSE _dropped END AS _dropped) FROM {EVENTS}"""


def check_windowed(
    view: FeatureView,
    definition: WindowedView,
    features: Mapping[str, list[Served]],
    offline_path: str,
    result: Consistency,
) -> None:
    """Recomputes the served values of one windowed view and counts them in `result`. Errors as `check` says."""
    place = place_of(offline_path, getattr(view.batch_source, "path", "") or view.name)
    outputs = {o.name: o for o in definition.outputs}
    checked: dict[str, list[Served]] = {}
    for name, served in features.items():
        if name not in outputs:
            result.skip(f"no output {view.name}:{name}", len(served))
            continue
        kept = [s for s in served if not definition.closes_windows or "watermark" in s.read]
        result.skip("a record without the watermark that was served", len(served) - len(kept))
        if kept:
            checked[name] = kept
    if not checked:
        return
    with connect(EngineSettings()) as con:
        next_step = f"`predictflow backfill {view.name}`"
        source = open_source(con, view.name, [f"{place}/{part}" for part in (HISTORY, STREAM)], next_step)
        load_reads(con, view, definition.entity_key, checked)
        columns = make_events(con, source, definition, ids=True)
        con.execute(_judged_sql(definition))
        with scanning(source, columns):
            found = _recomputed(con, definition)
        with reading(source.label):
            stale, ahead = _compared_with_log(con, definition)
    for name, served in checked.items():
        result.stale += sum(s.record in stale for s in served)
        for s in served:
            row = found[s.record]
            seen = row[LAST_SEEN]
            status = status_at(None if seen is None else to_micros(seen), s.t_us, definition.ttl)
            value = row[name] if status == PRESENT else None
            if status == PRESENT and value is None:
                status = NULL_VALUE
            leak = after_t(s, "visible_at") or ahead.get(s.record, "")
            equal = not leak and s.status == status and _equal(s.value, value, row.get(_SCALE + name))
            t = (EPOCH + s.t_us * MICROSECOND).isoformat()
            result.count(Difference(s.entity, s.feature, t, (s.status, s.value), (status, value), leak), equal=equal)


def _equal(served: Any, recomputed: Any, scale: float | None) -> bool:
    if isinstance(recomputed, float) and isinstance(served, int | float) and not isinstance(served, bool):
        return math.isclose(served, recomputed, rel_tol=_TOLERANCE, abs_tol=_TOLERANCE * (scale or 0.0))
    return same(served, recomputed)


def _recomputed(con: duckdb.DuckDBPyConnection, definition: WindowedView) -> dict[int, dict[str, Any]]:
    """Record to its outputs, their scales and LAST_SEEN. What was too old is still not NOT_FOUND; but its outputs are not
    computed, as they were not for the reader: they may overflow.
    """
    keys = ", ".join(ident(k) for k in definition.entity_key)
    con.execute(
        f"CREATE OR REPLACE TEMP VIEW _asked AS SELECT id AS _row, {keys}, make_timestamptz(t_us) AS _t, "
        "offsets AS _offsets, watermark_us AS _watermark_us FROM read"
    )
    found = con.sql(
        history_sql(with_scales(definition), "_asked", _JUDGED, known="by_offset", any_age=True)
    ).to_arrow_table()
    return {row["_row"]: row for row in found.to_pylist()}


def with_scales(definition: WindowedView) -> WindowedView:
    """The definition with another output for each of doubles: the size of the numbers in it."""
    statements = []
    for s in definition.statements:
        aggregates, outputs = list(s.aggregates), list(s.outputs)
        for o in s.outputs:
            scales = []
            for e in walk(o.expression):
                if isinstance(e, AggregateRef) and (sized := _sized(s.aggregates[e.index])) is not None:
                    scales.append(AggregateRef(len(aggregates), "float64"))
                    aggregates.append(sized)
            if scales:
                total = scales[0] if len(scales) == 1 else _added(scales)
                outputs.append(Output(_SCALE + o.name, total, "float64"))
        statements.append(Statement(s.window, tuple(aggregates), tuple(outputs)))
    sized_view = replace(definition, sql=f"{definition.sql}\n-- with scales")
    sized_view.__dict__["statements"] = tuple(statements)
    return sized_view


def _sized(a: Aggregate) -> Aggregate | None:
    if a.argument is None or a.argument.type != "float64" or a.function not in ("sum", "avg", "stddev"):
        return None
    function = "max" if a.function == "stddev" else a.function
    return Aggregate(function, Call("abs", (a.argument,), "float64"), a.filter, "float64")


def _added(scales: list[AggregateRef]) -> Call:
    zero = [Call("coalesce", (s, _ZERO), "float64") for s in scales]
    total = zero[0]
    for scale in zero[1:]:
        total = Call("+", (total, scale), "float64")
    return total


def _compared_with_log(con: duckdb.DuckDBPyConnection, definition: WindowedView) -> tuple[set[int], dict[int, str]]:
    """Records for which the log had more by t than the offsets served; and those with an event that t could not know."""
    keys = ", ".join(ident(k) for k in definition.entity_key)
    on_key = " AND ".join(f"l.{ident(k)} = r.{ident(k)}" for k in definition.entity_key)
    same_key = " AND ".join(f"f.{ident(k)} = r.{ident(k)}" for k in definition.entity_key)
    time = ident(definition.source.timestamp)
    order = f"PARTITION BY {keys}, _partition ORDER BY _offset"
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE _log AS
        SELECT {keys}, _partition, _offset,
               min(greatest(_visible_us, _us)) OVER ({order} ROWS BETWEEN CURRENT ROW AND UNBOUNDED FOLLOWING) AS _from_us,
               max(_visible_us) OVER ({order} ROWS UNBOUNDED PRECEDING) AS _until_us
        FROM (SELECT {keys}, _partition, _offset, min(epoch_us(_visible_at)) AS _visible_us, min(epoch_us({time})) AS _us
              FROM {_JUDGED} WHERE _dropped IS NULL AND _partition >= 0 AND ({keys}) IN (SELECT ({keys}) FROM read) GROUP BY ALL)"""
    )
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE _reads AS
        SELECT r.*, f._partition, coalesce(r.offsets[f._partition], -1) AS _offset
        FROM read AS r JOIN (SELECT DISTINCT {keys}, _partition FROM _log) AS f ON {same_key}"""
    )
    missed = con.execute(
        f"""SELECT DISTINCT r.id FROM _reads AS r ASOF JOIN _log AS l
        ON {on_key} AND l._partition = r._partition AND r._offset < l._offset WHERE l._from_us <= r.t_us"""
    ).fetchall()
    early = con.execute(
        f"""SELECT r.id, max(l._until_us) FROM _reads AS r ASOF JOIN _log AS l
        ON {on_key} AND l._partition = r._partition AND r._offset >= l._offset WHERE l._until_us > r.t_us GROUP BY r.id"""
    ).fetchall()
    return (
        {i for (i,) in missed},
        {i: f"an event visible at {from_micros(us).isoformat()} is after t" for i, us in early},
    )
