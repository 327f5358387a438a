"""What both kinds of views need to be recomputed with DuckDB: their place, their times, and what was read of them.

Times are compared in the unit of their column, so that a time that is finer than a microsecond is never taken for one
that was already over at t. Where a served time names a row, the row's is cut to the microsecond, as serving shows it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from feature_store.consistency.served_log import Served, micros
from feature_store.point_in_time.source import is_uri
from feature_store.point_in_time.types import ns_per_tick, ticks

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureView


def place_of(offline_path: str, path: str) -> str:
    """Where a source path is: URIs and absolute paths stay, others are below the offline store."""
    if is_uri(path) or Path(path).is_absolute():
        return path
    return f"{offline_path.rstrip('/')}/{path}" if is_uri(offline_path) else str(Path(offline_path) / path)


def not_after(column: str, sql_type: str, t_us: str) -> str:
    """SQL: the time column is at or before `t_us`, SQL for microseconds."""
    return f"{ticks(column, sql_type)} <= ({t_us}) * {1000 // ns_per_tick(sql_type)}"


def in_micros(column: str, sql_type: str) -> str:
    """SQL: a time column as microseconds since the epoch; what is finer is cut."""
    tick = ticks(column, sql_type)
    return tick if ns_per_tick(sql_type) == 1000 else f"(({tick} - (({tick} % 1000) + 1000) % 1000) // 1000)"


def load_reads(
    con: duckdb.DuckDBPyConnection, view: FeatureView, keys: Iterable[str], features: Mapping[str, list[Served]]
) -> None:
    """Table `read`: one row per record; `offsets` MAP(INTEGER, BIGINT), times in microseconds (`watermark`: that served)."""
    reads = {s.record: s for served in features.values() for s in served}.values()
    types = {c.name: c.dtype.to_value_type().name for c in view.entity_columns}
    columns: dict[str, pa.Array] = {"id": pa.array([s.record for s in reads], pa.int64())}
    for key in keys:
        kind = pa.int64() if types[key] in ("INT32", "INT64") else pa.string()
        columns[key] = pa.array([s.entity.get(key) for s in reads], kind)
    columns["t_us"] = pa.array([s.t_us for s in reads], pa.int64())
    offsets = [[(int(p), o) for p, o in (s.read.get("offsets") or {}).items()] for s in reads]
    columns["offsets"] = pa.array(offsets, pa.map_(pa.int32(), pa.int64()))
    for name in ("event_timestamp", "created", "watermark"):
        times = [micros(s.read[name]) if s.read.get(name) else None for s in reads]
        columns[f"{name.removesuffix('_timestamp')}_us"] = pa.array(times, pa.int64())
    con.register("_read", pa.table(columns))
    con.execute("CREATE TEMP TABLE read AS SELECT * FROM _read")
