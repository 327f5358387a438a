"""The process that the kill test kills: two views' backfill with state in Postgres. Imported once by the fork server."""

from __future__ import annotations

import threading
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import duckdb  # noqa: F401  # slow to import, as the next two: loaded once in the fork server
import numpy as np
import psycopg2.extras  # noqa: F401  # as duckdb
import pyarrow as pa
import pyarrow.parquet as pq
import sqlglot.lineage  # noqa: F401  # as duckdb
from feast import Entity, FeatureView, Field, FileSource, ValueType
from feast.types import Float64, String

import feature_store.backfill
from feature_store.backfill_state import PostgresState
from feature_store.windows.declare import event_source, windowed_feature_view

T0 = datetime(2024, 1, 1, tzinfo=UTC)
MONTHS = 12


def views() -> list[Any]:
    """A row view and a windowed view of one entity."""
    customer = Entity(name="customer", join_keys=["customer"], value_type=ValueType.STRING)
    account = FeatureView(
        name="account",
        entities=[customer],
        ttl=timedelta(0),
        schema=[Field(name="charges", dtype=Float64), Field(name="customer", dtype=String)],
        source=FileSource(
            name="account_source",
            path="account",
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
            tags={"predictflow.sql": "SELECT customer, event_timestamp, created, charges FROM accounts"},
        ),
    )
    behaviour = windowed_feature_view(
        name="behaviour",
        entity=customer,
        source=event_source(topic="events", columns={"quantity": "int64"}, event_id="event_id"),
        path="events",
        sql="""SELECT customer, COUNT(*) OVER (PARTITION BY customer ORDER BY event_timestamp
               RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW) AS n_7d FROM events""",
        history_sql="SELECT event_id, customer, event_timestamp, created, quantity FROM events",
        ttl=timedelta(days=20),
    )
    return [account, behaviour]


def write_raw(raw: Path, rows: int) -> None:
    """Raw tables of so many rows each over MONTHS months, in no order, with late rows and ties."""
    rng = np.random.default_rng(5)
    raw.mkdir(parents=True)
    seconds = rng.integers(0, MONTHS * 30 * 86_400, rows)
    late = rng.integers(0, 5, rows) * 86_400
    epoch = int(T0.timestamp())
    times = {
        "event_timestamp": pa.array((epoch + seconds) * 1_000_000).cast(pa.timestamp("us", "UTC")),
        "created": pa.array((epoch + seconds + late) * 1_000_000).cast(pa.timestamp("us", "UTC")),
    }
    customer = pa.array([f"c{n}" for n in rng.integers(0, 500, rows)])
    pq.write_table(pa.table({"customer": customer, **times, "charges": rng.random(rows)}), raw / "accounts.parquet")
    ids = pa.array([f"e{n}" for n in rng.integers(0, rows * 9 // 10, rows)])
    events = {"event_id": ids, "customer": customer, **times, "quantity": rng.integers(0, 9, rows)}
    pq.write_table(pa.table(events), raw / "events.parquet")


def run(raw: str, offline: str, postgres_url: str, started: Connection) -> None:
    """Both backfills; says on `started` when it begins, each chunk it has done, and at the end how many it found done."""
    writing = threading.Lock()

    def done(_: int) -> None:
        with writing:
            started.send("chunk")

    with PostgresState(postgres_url, clock=lambda: datetime.now(UTC)) as state:
        started.send("started")
        skipped = 0
        for view in views():
            result = feature_store.backfill.backfill(
                view,
                raw_dir=raw,
                offline_path=offline,
                workers=2,
                state=state,
                start=T0,
                end=T0 + timedelta(days=400),
                progress=done,
            )
            skipped += result.skipped
    started.send(skipped)
