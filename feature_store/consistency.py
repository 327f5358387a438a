"""The check that recomputes what was served, by another path than serving's, and counts what differs.

Windowed values come from the event log (history and stream Parquet) by (t, offsets): one plain range join per
aggregate, sharing no code with the stream's states or history's SQL. Row values come from the Parquet row with exactly
the served (event_timestamp, created); statuses from ttl and t. A newer row that was known by t, but not yet served, is
`stale`, not different.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.clock import EPOCH, MICROSECOND, to_micros
from feature_store.errors import DataError, NotFoundError
from feature_store.windows.definition import WindowedView, definition_of

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureView

PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE = "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"
_EXAMPLES = 20


@dataclass(frozen=True)
class Difference:
    """One served value that history does not give. `served` and `recomputed` are `status value` pairs."""

    entity: dict[str, Any]
    feature: str
    t: str
    served: tuple[str, Any]
    recomputed: tuple[str, Any]


@dataclass
class Consistency:
    """Counts of served values. `not_checked`: served with an error status, or under a view that is gone."""

    checked: int = 0
    different: int = 0
    stale: int = 0
    not_checked: int = 0
    examples: list[Difference] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class _Served:
    """One served value of one record."""

    record: int
    entity: dict[str, Any]
    t_us: int
    feature: str
    value: Any
    status: str
    read: dict[str, Any]


def check(records: Iterable[Mapping[str, Any]], views: Iterable[FeatureView], offline_path: str | Path) -> Consistency:
    """Recomputes every feature of every record of the served log (architecture.md has its fields).

    `views`: the registry's feature views; `offline_path`: the offline store. Changes nothing. DataError for a record
    that is not one of the served log, and for unreadable Parquet; NotFoundError for a view without any data.
    """
    by_name = {v.name: v for v in views}
    groups: dict[str, dict[str, list[_Served]]] = defaultdict(lambda: defaultdict(list))
    result = Consistency()
    for number, record in enumerate(records):
        for of_view, served in _values_of(number, record):
            if of_view not in by_name or served.status not in (PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE):
                result.not_checked += 1
            else:
                groups[of_view][served.feature].append(served)
    for name, features in groups.items():
        view = by_name[name]
        definition = definition_of(view)
        if definition is not None:
            _check_windowed(view, definition, features, Path(offline_path), result)
        else:
            _check_rows(view, features, Path(offline_path), result)
    return result


def read_served(bootstrap_servers: str, topic: str, seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """The records of the served log that the topic holds now. DataError for a message that is not JSON."""
    from feature_store.topic import client_config, read_topic

    for message in read_topic(client_config(bootstrap_servers), topic, seconds):
        place = f"{topic} partition {message.partition()} offset {message.offset()}"
        yield _record(message.value() or b"", place)


def read_served_file(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file of the served log. NotFoundError, DataError as above."""
    if not path.is_file():
        raise NotFoundError("no such file", value=str(path))
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield _record(line, f"{path} line {number}")


def _record(data: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as e:
        raise DataError(f"served log: not JSON ({e})", value=place) from e
    if not isinstance(record, dict):
        raise DataError("served log: not a JSON object", value=place)
    return record


def _values_of(number: int, record: Mapping[str, Any]) -> Iterator[tuple[str, _Served]]:
    try:
        t_us = _us(record["t"])
        for f in record["features"].values():
            read = record["views"].get(f["view"]) or {}
            yield f["view"], _Served(number, record["entity"], t_us, f["feature"], f["value"], f["status"], read)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise DataError(f"not a record of the served log ({e!r})", value=str(record)[:200]) from e


# Windowed views


def _check_windowed(
    view: FeatureView,
    definition: WindowedView,
    features: Mapping[str, list[_Served]],
    offline_path: Path,
    result: Consistency,
) -> None:
    place = offline_path / (getattr(view.batch_source, "path", "") or view.name)
    files = [str(p) for part in ("history", "stream") for p in (place / part).rglob("*.parquet") if p.name[0] != "."]
    if not files:
        raise NotFoundError(f"{view.name}: no event log", value=str(place), next_step="`predictflow backfill`")
    aggregates = {a.name: a for a in definition.aggregates}
    keys = [_quoted(k) for k in definition.entity_key]
    with _connect() as con:
        # Which of repeated events counts is decided here again, not taken from what sync wrote into `_dropped`.
        counted = "WHERE _dropped IS NULL"
        if definition.event_id is not None:
            event = ", ".join([*keys, _quoted(definition.event_id)])
            counted = f"""QUALIFY row_number() OVER (
                PARTITION BY {event} ORDER BY _partition >= 0, _visible_at, _partition, _offset) = 1"""
        # Compaction may show a row of the stream in two files for a while.
        con.execute(
            f"""CREATE TEMP TABLE log AS
            WITH files AS (SELECT * FROM read_parquet($files, union_by_name => true)),
            rows AS (SELECT * FROM files WHERE _partition < 0
                UNION ALL (SELECT DISTINCT ON (_partition, _offset) * FROM files WHERE _partition >= 0))
            SELECT * FROM rows {counted}""",
            {"files": files},
        )
        _load_reads(con, view, definition.entity_key, features)
        on_key = " AND ".join(f"l.{k} = r.{k}" for k in keys)
        # What the reader had: all history, and of each partition the offsets up to the one it served from.
        had = "(l._partition < 0 OR l._offset <= r.offsets[l._partition])"
        con.execute(
            f"""CREATE TEMP TABLE seen AS
            SELECT r.id, max(epoch_us(l.{_quoted(definition.timestamp)})) AS last_us
            FROM read AS r JOIN log AS l ON {on_key} AND {had} AND epoch_us(l.{_quoted(definition.timestamp)}) <= r.t_us
            GROUP BY r.id"""
        )
        last_seen: dict[int, int] = dict(con.execute("SELECT id, last_us FROM seen").fetchall())
        for name, served in features.items():
            a = aggregates.get(name)
            if a is None:
                result.not_checked += len(served)
                continue
            width = a.window // MICROSECOND
            what = "count(*)" if a.column is None else f"sum(l.{_quoted(a.column)})"
            where = ""
            if a.where is not None:
                where = f"AND list_contains($values, l.{_quoted(a.where.column)})"
            found = dict(
                con.execute(
                    f"""SELECT r.id, {what} FROM read AS r JOIN log AS l ON {on_key} AND {had} {where}
                    AND epoch_us(l.{_quoted(definition.timestamp)}) BETWEEN r.t_us - {width} AND r.t_us GROUP BY r.id""",
                    {"values": list(a.where.values)} if a.where is not None else {},
                ).fetchall()
            )
            empty = 0 if a.column is None else None
            for s in served:
                status = _status(last_seen.get(s.record), s.t_us, definition.ttl)
                value = found.get(s.record, empty) if status == PRESENT else None
                _compare(s, (NULL_VALUE if status == PRESENT and value is None else status, value), result)


# Row views


def _check_rows(
    view: FeatureView, features: Mapping[str, list[_Served]], offline_path: Path, result: Consistency
) -> None:
    source: Any = view.batch_source
    place = offline_path / source.path
    files = [str(place)] if place.is_file() else [str(p) for p in place.rglob("*.parquet") if p.name[0] != "."]
    if not files:
        raise NotFoundError(f"{view.name}: no Parquet", value=str(place), next_step="`predictflow backfill`")
    back = {ours: theirs for theirs, ours in (source.field_mapping or {}).items()}
    column = {c: _quoted(back.get(c, c)) for c in [*view.join_keys, *features]}
    event = f"epoch_us(p.{_quoted(back.get(source.timestamp_field, source.timestamp_field))})"
    created_name = source.created_timestamp_column
    created = f"epoch_us(p.{_quoted(created_name)})" if created_name else "NULL::BIGINT"
    listed = ", ".join(f"p.{column[f]} AS {_quoted(f)}" for f in features)
    with _connect() as con:
        con.execute(
            "CREATE TEMP TABLE rows AS SELECT * FROM read_parquet($files, union_by_name => true)", {"files": files}
        )
        _load_reads(con, view, view.join_keys, features)
        on_key = " AND ".join(f"p.{column[k]} = r.{_quoted(k)}" for k in view.join_keys)
        exact: Any = con.sql(
            f"""SELECT r.id, {listed} FROM read AS r JOIN rows AS p ON {on_key} AND {event} = r.event_us
            AND {created} IS NOT DISTINCT FROM {"r.created_us" if created_name else "NULL"}"""
        ).to_arrow_table()
        known = f"coalesce({created}, {event})"
        newer: dict[int, bool] = dict(
            con.execute(
                f"""SELECT r.id, bool_or((r.event_us IS NULL OR {event} > r.event_us OR
                                          ({event} = r.event_us AND {created} > r.created_us)))
                FROM read AS r JOIN rows AS p ON {on_key} AND {event} <= r.t_us AND {known} <= r.t_us GROUP BY r.id"""
            ).fetchall()
        )
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for r in exact.to_pylist():
        rows[r["id"]].append(r)
    stale = {i for i, is_newer in newer.items() if is_newer}
    result.stale += sum(s.record in stale for served in features.values() for s in served)
    ttl = view.ttl or timedelta(0)
    missing = ("NO SUCH ROW", None)
    for name, served in features.items():
        for s in served:
            event_us = _us(s.read["event_timestamp"]) if s.read.get("event_timestamp") else None
            status = _status(event_us, s.t_us, ttl)
            if status == PRESENT:
                if s.record not in rows:
                    _compare(s, missing, result)
                    continue
                # Twins with the same times may differ: the served one must be among them.
                values = [r[name] for r in rows[s.record]]
                value = next((v for v in values if _same(s.value, v)), values[0])
                _compare(s, (PRESENT if value is not None else NULL_VALUE, value), result)
            elif status == OUTSIDE_MAX_AGE and s.record not in rows:
                _compare(s, missing, result)
            else:
                _compare(s, (status, None), result)


# Both


def _connect() -> duckdb.DuckDBPyConnection:
    import duckdb

    return duckdb.connect()


def _load_reads(
    con: duckdb.DuckDBPyConnection, view: FeatureView, keys: Iterable[str], features: Mapping[str, list[_Served]]
) -> None:
    """Table `read`: one row per record; `offsets` MAP(INTEGER, BIGINT), times in microseconds."""
    reads = {s.record: s for served in features.values() for s in served}.values()
    types = {c.name: c.dtype.to_value_type().name for c in view.entity_columns}
    columns: dict[str, pa.Array] = {"id": pa.array([s.record for s in reads], pa.int64())}
    for key in keys:
        kind = pa.int64() if types[key] in ("INT32", "INT64") else pa.string()
        columns[key] = pa.array([s.entity.get(key) for s in reads], kind)
    columns["t_us"] = pa.array([s.t_us for s in reads], pa.int64())
    offsets = [[(int(p), o) for p, o in (s.read.get("offsets") or {}).items()] for s in reads]
    columns["offsets"] = pa.array(offsets, pa.map_(pa.int32(), pa.int64()))
    for name in ("event_timestamp", "created"):
        times = [_us(s.read[name]) if s.read.get(name) else None for s in reads]
        columns[f"{name.removesuffix('_timestamp')}_us"] = pa.array(times, pa.int64())
    con.register("_read", pa.table(columns))
    con.execute("CREATE TEMP TABLE read AS SELECT * FROM _read")


def _status(seen_us: int | None, t_us: int, ttl: timedelta) -> str:
    if seen_us is None:
        return NOT_FOUND
    return OUTSIDE_MAX_AGE if ttl and t_us - seen_us > ttl // MICROSECOND else PRESENT


def _compare(s: _Served, recomputed: tuple[str, Any], result: Consistency) -> None:
    result.checked += 1
    if s.status == recomputed[0] and _same(s.value, recomputed[1]):
        return
    result.different += 1
    if len(result.examples) < _EXAMPLES:
        t = (EPOCH + s.t_us * MICROSECOND).isoformat()
        result.examples.append(Difference(s.entity, s.feature, t, (s.status, s.value), recomputed))


def _same(served: Any, recomputed: Any) -> bool:
    if isinstance(recomputed, datetime):
        recomputed = recomputed.replace(tzinfo=recomputed.tzinfo or UTC)
        try:
            return served is not None and _us(served) // 1_000_000 == to_micros(recomputed) // 1_000_000
        except (TypeError, ValueError):
            return False
    if isinstance(served, bool) or isinstance(recomputed, bool) or not isinstance(recomputed, (int, float)):
        return type(served) is type(recomputed) and bool(served == recomputed)
    if not isinstance(served, (int, float)):
        return False
    return bool(served == recomputed) or (math.isnan(served) and math.isnan(recomputed))


def _us(time: str) -> int:
    return to_micros(datetime.fromisoformat(time))


def _quoted(identifier: str) -> str:
    return '"' + identifier.replace('"', '""') + '"'
