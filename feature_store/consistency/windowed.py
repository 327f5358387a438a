"""Windowed values recomputed from the event log by (t, offsets); `stale` where the log had more by t than was served."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from feature_store.clock import MICROSECOND, from_micros
from feature_store.consistency.parquet import in_micros, load_reads, place_of
from feature_store.consistency.result import NULL_VALUE, PRESENT, Consistency, status_at
from feature_store.consistency.served_log import Served, after_t
from feature_store.event_log import HISTORY, STREAM
from feature_store.point_in_time.engine import EngineSettings, connect, ident, reading
from feature_store.point_in_time.source import ParquetSource, open_source, require_same_kind, scanning
from feature_store.windows.definition import WindowedView

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureView


def check_windowed(
    view: FeatureView,
    definition: WindowedView,
    features: Mapping[str, list[Served]],
    offline_path: str,
    result: Consistency,
) -> None:
    """Recomputes the served values of one windowed view and counts them in `result`. Errors as `check` says."""
    place = place_of(offline_path, getattr(view.batch_source, "path", "") or view.name)
    aggregates = {a.name: a for a in definition.aggregates}
    with connect(EngineSettings()) as con:
        next_step = f"`predictflow backfill {view.name}`"
        source = open_source(con, view.name, [f"{place}/{part}" for part in (HISTORY, STREAM)], next_step)
        load_reads(con, view, definition.entity_key, features)
        _load_log(con, source, definition)
        on_key = " AND ".join(f"l.{ident(k)} = r.{ident(k)}" for k in definition.entity_key)
        # What the reader had: all history, and of each partition the offsets up to the one it served from.
        had = "(l._partition < 0 OR l._offset <= r.offsets[l._partition])"
        with reading(source.label):
            seen = con.execute(
                f"""SELECT r.id,
                    max(l._us) FILTER (WHERE {had}),
                    count(*) FILTER (WHERE NOT coalesce({had}, false) AND l._visible_us <= r.t_us),
                    max(l._visible_us) FILTER (WHERE {had} AND l._partition >= 0 AND l._visible_us > r.t_us)
                FROM read AS r JOIN log AS l ON {on_key} AND l._us <= r.t_us GROUP BY r.id"""
            ).fetchall()
        last_seen = {i: us for i, us, _, _ in seen if us is not None}
        stale = {i for i, _, missed, _ in seen if missed}
        ahead = {i: f"an event visible at {from_micros(us).isoformat()} is after t" for i, *_, us in seen if us}
        for name, served in features.items():
            a = aggregates.get(name)
            if a is None:
                result.skip(f"no aggregate {view.name}:{name}", len(served))
                continue
            result.stale += sum(s.record in stale for s in served)
            width = a.window // MICROSECOND
            what = "count(*)" if a.column is None else f"sum(l.{ident(a.column)})"
            where = ""
            if a.where is not None:
                where = f"AND list_contains($values, l.{ident(a.where.column)})"
            with reading(source.label):
                found = dict(
                    con.execute(
                        f"""SELECT r.id, {what} FROM read AS r JOIN log AS l ON {on_key} AND {had} {where}
                        AND l._us BETWEEN r.t_us - {width} AND r.t_us GROUP BY r.id""",
                        {"values": list(a.where.values)} if a.where is not None else {},
                    ).fetchall()
                )
            empty = 0 if a.column is None else None
            for s in served:
                status = status_at(last_seen.get(s.record), s.t_us, definition.ttl)
                value = found.get(s.record, empty) if status == PRESENT else None
                leak = after_t(s, "visible_at") or ahead.get(s.record, "")
                result.compare(s, (NULL_VALUE if status == PRESENT and value is None else status, value), leak)


def _load_log(con: duckdb.DuckDBPyConnection, source: ParquetSource, definition: WindowedView) -> None:
    """Table `log`: the events that count, of the entities in table `read`; `_us` and `_visible_us` in microseconds."""
    own = [definition.timestamp, "_visible_at"]
    columns = [*definition.entity_key, *definition.columns, "_partition", "_offset", "_dropped"]
    if definition.event_id is not None:
        columns.append(definition.event_id)
    time, visible = (in_micros(ident(c), source.require_time(c, "an event's time")) for c in own)
    for column in columns:
        source.require(column, "the event log")
    require_same_kind(source, [*definition.entity_key, *own])
    # Which of repeated events counts is decided here again, not taken from what sync wrote into `_dropped`.
    counted = "WHERE _dropped IS NULL"
    keys = ", ".join(ident(k) for k in definition.entity_key)
    if definition.event_id is not None:
        counted = f"""QUALIFY row_number() OVER (
            PARTITION BY {keys}, {ident(definition.event_id)} ORDER BY _partition >= 0, _visible_us, _partition, _offset) = 1"""
    # Compaction may show a row of the stream in two files for a while.
    with scanning(source, [*columns, *own]):
        con.execute(
            f"""CREATE TEMP TABLE log AS
            WITH files AS (SELECT {", ".join(map(ident, columns))}, {time} AS _us, {visible} AS _visible_us
                FROM {source.relation} WHERE ({keys}) IN (SELECT ({keys}) FROM read)),
            rows AS (SELECT * FROM files WHERE _partition < 0
                UNION ALL (SELECT DISTINCT ON (_partition, _offset) * FROM files WHERE _partition >= 0))
            SELECT * FROM rows {counted}"""
        )
