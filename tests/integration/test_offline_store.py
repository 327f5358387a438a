"""`predictflow backfill` and retrieval in the checkout's own project: Postgres registry, Redis online store, Parquet."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis

from feature_store.clock import replay_clock_key, to_micros

ROOT = Path(__file__).parents[2]
T0 = datetime(2024, 1, 1, tzinfo=UTC)
CUT = T0 + timedelta(days=60)
TIME = pa.timestamp("us", "UTC")


@pytest.fixture
def environment(postgres_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    return {
        **os.environ,
        "POSTGRES_URL": postgres_url,
        "REDIS_URL": redis_url,
        "PREDICTFLOW_OFFLINE": str(tmp_path / "offline"),
        "PREDICTFLOW_CLOCK": "replay",
        "PREDICTFLOW_HOME": str(tmp_path / "home"),
    }


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    """20 customers with weekly statements and daily events for 70 days, of which the last 10 are after the cut."""
    directory = tmp_path / "raw"
    directory.mkdir()
    statements = [(f"C{c}", T0 + timedelta(days=7 * w)) for c in range(20) for w in range(10)]
    accounts = {
        "customer_id": pa.array([s[0] for s in statements]),
        "event_timestamp": pa.array([s[1] for s in statements], TIME),
        "created": pa.array([s[1] for s in statements], TIME),
        "joined_at": pa.array([T0 - timedelta(days=61)] * len(statements), TIME),
        "monthly_charges": pa.array([float(s[1].day) for s in statements]),
        "contract_months": pa.array([12] * len(statements), pa.int64()),
        "payment_method": pa.array(["card"] * len(statements)),
    }
    pq.write_table(pa.table(accounts), directory / "accounts.parquet")
    days = [(f"C{c}", T0 + timedelta(days=d)) for d in range(70) for c in range(20)]
    events = {
        "event_id": pa.array([f"e{i:05}" for i in range(len(days))]),
        "customer_id": pa.array([d[0] for d in days]),
        "event_type": pa.array(["usage"] * len(days)),
        "event_timestamp": pa.array([d[1] for d in days], TIME),
        "created": pa.array([d[1] for d in days], TIME),
        "quantity": pa.array([2] * len(days), pa.int64()),
        "amount_cents": pa.array([100] * len(days), pa.int64()),
    }
    pq.write_table(pa.table(events), directory / "events.parquet")
    summary = {"start": T0.isoformat(), "cut": CUT.isoformat()}
    (directory / "summary.json").write_text(json.dumps(summary))
    return directory


def run(environment: dict[str, str], *command: str) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / command[0]
    return subprocess.run(
        [str(program), *command[1:]], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


def test_backfill_apply_and_retrieval_agree_and_lineage_is_recorded(
    environment: dict[str, str], raw: Path, tmp_path: Path, postgres_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied = run(environment, "feast", "apply")
    assert applied.returncode == 0, applied.stderr + applied.stdout
    done = run(environment, "predictflow", "backfill", "--all", "--raw", str(raw), "--json")
    assert done.returncode == 0, done.stderr
    results = {r["view"]: r for r in map(json.loads, done.stdout.splitlines())}
    assert results["churn_features"]["rows"] == 20 * 9  # the statement of day 63 is after the cut
    assert results["customer_behavior"]["rows"] == 20 * 61  # the cut itself is inside

    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    from feast import FeatureStore

    from feature_store.registry import FeatureRegistry

    store = FeatureStore(repo_path=str(ROOT))
    t = T0 + timedelta(days=45, hours=6)
    entities = pa.table({"customer_id": ["C3", "nobody", "C4"], "event_timestamp": pa.array([t, t, T0], TIME)})
    service = store.get_feature_service("churn_v1")
    rows = store.get_historical_features(
        entity_df=entities, features=service, filter_by_created_timestamp=True
    ).to_arrow().to_pylist()  # fmt: skip
    assert rows[0]["monthly_charges"] == float((T0 + timedelta(days=42)).day)
    assert (rows[0]["events_7d"], rows[0]["quantity_30d"], rows[0]["problems_30d"]) == (7, 60, 0)
    assert rows[1]["monthly_charges"] is None
    assert rows[1]["events_7d"] is None
    assert (rows[2]["events_7d"], rows[2]["contract_months"]) == (1, 12)

    with FeatureRegistry(postgres_url) as registry:
        upstream = {str(s.edge.source) for s in registry.upstream("table:churn_features")}
    assert "column:accounts.joined_at" in upstream

    materialised = run(environment, "feast", "materialize", T0.isoformat(), CUT.isoformat())
    assert materialised.returncode == 0, materialised.stderr + materialised.stdout
    with redis.Redis.from_url(environment["REDIS_URL"]) as client:
        client.set(replay_clock_key("predictflow"), to_micros(CUT))
    online = store.get_online_features(
        features=["churn_features:monthly_charges"], entity_rows=[{"customer_id": "C3"}]
    ).to_dict()  # fmt: skip
    assert online["monthly_charges"] == [float((T0 + timedelta(days=56)).day)]


def test_wrong_usage_is_one_line_with_the_valid_names(environment: dict[str, str], raw: Path, tmp_path: Path) -> None:
    assert run(environment, "feast", "apply").returncode == 0
    unknown = run(environment, "predictflow", "backfill", "churn_feature", "--raw", str(raw))
    assert unknown.returncode == 2
    assert "no such feature view: 'churn_feature'; valid: churn_features, customer_behavior" in unknown.stderr
    assert len(unknown.stderr.strip().splitlines()) == 1
    nowhere = run(environment, "predictflow", "backfill", "--all", "--raw", str(tmp_path / "absent"))
    assert (nowhere.returncode, "next: predictflow data" in nowhere.stderr) == (2, True)
    neither = run(environment, "predictflow", "backfill", "--raw", str(raw))
    assert (neither.returncode, "--all" in neither.stderr) == (2, True)
    time = run(environment, "predictflow", "backfill", "--all", "--raw", str(raw), "--start", "yesterday")
    assert (time.returncode, "--start is not an ISO 8601 time: 'yesterday'" in time.stderr) == (2, True)
