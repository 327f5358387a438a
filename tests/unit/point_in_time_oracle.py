"""A Feast project in a directory, and the point-in-time join in plain Python to compare it with: loops, no libraries."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

Row = Mapping[str, Any]


def as_of(
    rows: Sequence[Row],
    keys: Mapping[str, Any],
    t_ns: int,
    *,
    ttl_ns: int = 0,
    as_known: bool = False,
) -> Row | None:
    """The row with the greatest (event, created) with t - ttl <= event <= t; `event` and `created` are ns."""
    best: Row | None = None
    for row in rows:
        if any(value is None or row[key] != value for key, value in keys.items()):
            continue
        if row["event"] > t_ns or (ttl_ns and row["event"] < t_ns - ttl_ns):
            continue
        if as_known and row["created"] > t_ns:
            continue
        if best is None or (row["event"], row["created"]) >= (best["event"], best["created"]):
            best = row
    return best


def time_array(ns: Sequence[int | None], unit: str = "us", tz: str | None = "UTC") -> pa.Array:
    """Times given in ns as an Arrow array of `unit`; the ns must be whole units."""
    factor = {"ns": 1, "us": 1_000, "ms": 1_000_000, "s": 1_000_000_000}[unit]
    assert all(n is None or n % factor == 0 for n in ns)
    return pa.array([None if n is None else n // factor for n in ns], pa.int64()).cast(pa.timestamp(unit, tz))


def write_rows(
    path: Path, rows: Sequence[Row], columns: Mapping[str, pa.DataType], *, unit: str = "us", tz: str | None = "UTC"
) -> None:
    """Rows of the oracle as one Parquet file with columns event_timestamp and created."""
    path.parent.mkdir(parents=True, exist_ok=True)
    table = {name: pa.array([r[name] for r in rows], kind) for name, kind in columns.items()}
    table["event_timestamp"] = time_array([r["event"] for r in rows], unit, tz)
    table["created"] = time_array([r["created"] for r in rows], unit, tz)
    pq.write_table(pa.table(table), path, row_group_size=7)


def feast_store(
    directory: Path, objects: Sequence[Any], *, batch_engine: Mapping[str, Any] | None = None, **offline: Any
) -> Any:
    """A FeatureStore with our offline store, a registry file and SQLite as online store, `objects` applied."""
    from feast import FeatureStore, RepoConfig

    config = RepoConfig(
        project="test",
        provider="local",
        registry=str(directory / "registry.db"),
        online_store={"type": "sqlite", "path": str(directory / "online.db")},
        offline_store={
            "type": "feature_store.offline_store.PredictFlowOfflineStore",
            "path": str(directory / "offline"),
            "threads": 2,
            **offline,
        },
        batch_engine=dict(batch_engine) if batch_engine else "local",
        entity_key_serialization_version=3,
        repo_path=directory,
    )
    store = FeatureStore(config=config)
    store.apply(list(objects))
    return store
