"""A Feast project with one windowed view on the test's servers, its consumer, its reader and small histories."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.bootstrap import StreamPlace, bootstrap
from feature_store.consistency import Consistency, check
from feature_store.event_log import log_files
from feature_store.online_reader import OnlineReader
from feature_store.read_plan import ReadPlan
from feature_store.redis_connection import connect
from feature_store.sync import Sync, SyncOptions
from feature_store.topic import default_group
from feature_store.windows.declare import event_source, windowed_feature_view
from feature_store.windows.definition import definition_of
from feature_store.windows.history import history_sql

ROOT = Path(__file__).parents[2]
T0 = datetime(2024, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
FEATURES = ["events_7d", "quantity_7d", "spend_cents_30d", "problems_30d"]
SQL = """
SELECT customer_id,
       COUNT(*) OVER w7 AS events_7d,
       SUM(quantity) OVER w7 AS quantity_7d,
       SUM(amount_cents) OVER w30 AS spend_cents_30d,
       COUNT(*) FILTER (WHERE event_type = 'ticket') OVER w30 AS problems_30d
FROM events
WINDOW w7 AS (PARTITION BY customer_id ORDER BY event_timestamp RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW),
       w30 AS (PARTITION BY customer_id ORDER BY event_timestamp RANGE BETWEEN INTERVAL '30' DAYS PRECEDING AND CURRENT ROW)
"""
UTC_US = pa.timestamp("us", "UTC")
EVENT_SCHEMA = pa.schema(
    [
        ("event_id", pa.string()),
        ("customer_id", pa.string()),
        ("event_type", pa.string()),
        ("event_timestamp", UTC_US),
        ("created", UTC_US),
        ("quantity", pa.int64()),
        ("amount_cents", pa.int64()),
        ("_topic_id", pa.string()),
        ("_partition", pa.int32()),
        ("_offset", pa.int64()),
        ("_visible_at", UTC_US),
        ("_watermark", UTC_US),
        ("_dropped", pa.string()),
    ]
)


@dataclass
class Project:
    """A directory with feature_store.yaml, the environment in which its commands run, and its store."""

    repo: Path
    environ: dict[str, str]
    topic: str
    store: Any

    @property
    def offline(self) -> Path:
        return Path(self.environ["PREDICTFLOW_OFFLINE"])

    @property
    def clock(self) -> Any:
        return self.environ["PREDICTFLOW_CLOCK"]

    @property
    def kafka(self) -> str:
        return self.environ["KAFKA_BOOTSTRAP_SERVERS"]

    @property
    def group(self) -> str:
        return default_group(self.store.project)

    @property
    def view(self):
        return self.store.get_feature_view("customer_behavior")

    def start(self, *command: str, errors: Any = subprocess.PIPE) -> subprocess.Popen:
        """A predictflow command, running. `errors`: a file, for one that may say more than a pipe holds."""
        return subprocess.Popen(
            [sys.executable, "-m", "predictflow.cli", *command],
            cwd=self.repo,
            env={**os.environ, **self.environ},
            stderr=errors,
            stdout=subprocess.PIPE,
            text=True,
        )

    def bootstrap(self, known_by: datetime = T0, **options):
        place = StreamPlace(self.kafka, self.group)
        return bootstrap(self.store, str(self.offline), known_by, clock=self.clock, stream=place, **options)

    @contextmanager
    def syncing(self, **options) -> Iterator[Sync]:
        """A consumer in a thread of this process, from its assignment on; its errors are raised at the end."""
        consumer = Sync(
            self.store, SyncOptions(self.kafka, str(self.offline), self.clock, report_seconds=3600, **options)
        )
        with ThreadPoolExecutor(1) as pool:
            done = pool.submit(consumer.run)
            while not consumer.assigned.wait(0.1):
                if done.done():
                    done.result()
            try:
                yield consumer
            finally:
                consumer.stop()
                done.result()

    def reader(self) -> OnlineReader:
        features = [f"customer_behavior:{f}" for f in FEATURES]
        plan = ReadPlan.compile(self.store, features)
        return OnlineReader(plan, connect(self.environ["REDIS_URL"]), self.store.project, "replay")

    def served(self, customers: Sequence[str], at: datetime | None = None) -> list[dict]:
        """Reads all features of customers as the server does, as records of the served log."""
        rows = self.reader().read([{"customer_id": c} for c in customers], at)
        records = []
        for row in rows.rows:
            read = row.views["customer_behavior"]
            records.append(
                {
                    "served_at": datetime.now(UTC).isoformat(),
                    "t": rows.t.isoformat(),
                    "entity": row.entity,
                    "features": {
                        name: {
                            "view": "customer_behavior",
                            "feature": name,
                            "value": row.values[name],
                            "status": row.statuses[name],
                            "event_timestamp": None,
                        }
                        for name in FEATURES
                    },
                    "views": {
                        "customer_behavior": {
                            "event_timestamp": read.event_timestamp and read.event_timestamp.isoformat(),
                            "created": read.created and read.created.isoformat(),
                            "offsets": read.offsets and {str(p): o for p, o in read.offsets.items()},
                            "visible_at": read.visible_at and read.visible_at.isoformat(),
                        }
                    },
                }
            )
        return json.loads(json.dumps(records))

    def check(self, records: Sequence[dict]) -> Consistency:
        return check(records, [self.view], self.offline)

    def history(self, customers: Sequence[str], t: datetime) -> list[dict]:
        """The values at t by history's own SQL, by time."""
        with duckdb.connect() as con:
            con.execute(
                "CREATE TABLE log AS SELECT * FROM read_parquet($1, union_by_name => true)",
                [log_files(self.offline / "customer_events")],
            )
            asked = pa.table(
                {"_row": range(len(customers)), "customer_id": list(customers), "_t": [t] * len(customers)},
                schema=pa.schema([("_row", pa.int64()), ("customer_id", pa.string()), ("_t", UTC_US)]),
            )
            con.register("asked", asked)
            rows = con.sql(history_sql(definition_of(self.view), "asked", "log")).to_arrow_table().to_pylist()
        return [{f: r[f] for f in FEATURES} for r in sorted(rows, key=lambda r: r["_row"])]


def make_project(
    tmp_path: Path,
    postgres_url: str,
    redis_url: str,
    kafka: str,
    topic: str,
    monkeypatch,
    name: str = "predictflow",
    clock: str = "replay",
) -> Project:
    """A project with one windowed view of `topic`, applied to a registry of the test's own."""
    from feast import Entity, FeatureStore, ValueType

    repo = tmp_path / "repo"
    repo.mkdir(parents=True)
    settings = (ROOT / "feature_store.yaml").read_text()
    (repo / "feature_store.yaml").write_text(settings.replace("project: predictflow\n", f"project: {name}\n"))
    environ = {
        "POSTGRES_URL": postgres_url,
        "REDIS_URL": redis_url,
        "KAFKA_BOOTSTRAP_SERVERS": kafka,
        "PREDICTFLOW_OFFLINE": str(tmp_path / "offline"),
        "PREDICTFLOW_CLOCK": clock,
        "PREDICTFLOW_REPO": str(repo),
        "PREDICTFLOW_HOME": str(tmp_path / "home"),
    }
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = event_source(
        topic=topic,
        columns={"event_type": "string", "quantity": "int64", "amount_cents": "int64"},
        event_id="event_id",
        retention=100 * DAY,
    )
    view = windowed_feature_view(
        name="customer_behavior",
        entity=customer,
        source=source,
        path="customer_events",
        sql=SQL,
        history_sql="SELECT * FROM events",
        ttl=60 * DAY,
    )
    store = FeatureStore(repo_path=str(repo))
    store.apply([customer, view])
    store.refresh_registry()  # a cache from before the apply would not know the view
    return Project(repo, environ, topic, store)


def event(n: int, customer: str, at: datetime, created: datetime | None = None, kind: str = "usage", quantity: int = 1):
    """One event as a row of `events.parquet`."""
    return {
        "event_id": f"e{n}",
        "customer_id": customer,
        "event_type": kind,
        "event_timestamp": at,
        "created": created or at,
        "quantity": quantity,
        "amount_cents": 10 * quantity,
    }


def write_history(offline: Path, events: list[dict]) -> None:
    """What backfill leaves."""
    log = {"_topic_id": "", "_partition": -1, "_watermark": None, "_dropped": None}
    rows = [{**e, **log, "_offset": i, "_visible_at": e["created"]} for i, e in enumerate(events)]
    path = offline / "customer_events" / "history" / "2024-02.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, EVENT_SCHEMA), path)


def message(e: dict) -> tuple[bytes, bytes]:
    """Key and value of an event's Kafka message."""
    times = {k: e[k].strftime("%Y-%m-%dT%H:%M:%S.%fZ") for k in ("event_timestamp", "created")}
    return e["customer_id"].encode(), json.dumps({**e, **times}).encode()


def produce(kafka: str, topic: str, messages: list[tuple[bytes | None, bytes | None]]) -> None:
    from confluent_kafka import Producer

    producer = Producer({"bootstrap.servers": kafka, "linger.ms": 0})
    for key, value in messages:
        producer.produce(topic, key=key, value=value)
    assert producer.flush(30) == 0


def wait_until(condition, seconds: float = 240.0) -> None:
    """Returns when `condition()` holds; fails after `seconds`, many more than any machine needs."""
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "timed out"
        time.sleep(0.02)
