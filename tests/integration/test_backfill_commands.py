"""The commands `backfill`, `compact` and `erase` in the checkout's own project: exit codes, state in Postgres, both stores."""

# ruff: noqa: F811  # fixtures are imported
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import psycopg2
import pyarrow as pa
import pytest
import redis
from click.testing import CliRunner
from test_offline_store import CUT, ROOT, T0, environment, raw  # noqa: F401  # fixtures

from feature_store.clock import replay_clock_key, to_micros
from feature_store.durable import locked
from feature_store.published import table_lock
from predictflow.cli import cli
from serving.jobs import Jobs


@pytest.fixture
def project(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Any:
    """The project's Feast store, applied; commands run in this process with its environment."""
    for name in ("POSTGRES_URL", "REDIS_URL", "PREDICTFLOW_OFFLINE", "PREDICTFLOW_CLOCK", "PREDICTFLOW_HOME"):
        monkeypatch.setenv(name, environment[name])
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT))
    from feast import FeatureStore

    from features.behavioral_features import customer_behavior
    from features.customer_features import churn_features
    from features.entities import customer

    store = FeatureStore(repo_path=str(ROOT))
    store.apply([customer, churn_features, customer_behavior])
    store.refresh_registry()
    return store


def run(*command: str) -> tuple[int, str, str]:
    """Exit code, standard output and the error line, as the entry point gives them."""
    import click

    try:
        result = CliRunner().invoke(cli, command, standalone_mode=False, catch_exceptions=False)
    except click.ClickException as e:
        return e.exit_code, "", e.format_message()
    return result.exit_code, result.stdout, result.stderr


def query(url: str, sql: str) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall()
    finally:
        connection.close()


def rows(path: Path) -> list[dict[str, Any]]:
    frames = [pd.read_parquet(p) for p in sorted(path.rglob("*.parquet"))]
    return pd.concat(frames).to_dict("records") if frames else []


def test_backfill_compact_and_erase_end_to_end(
    project: Any,
    environment: dict[str, str],
    raw: Path,
    tmp_path: Path,
    postgres_url: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    command = ("backfill", "--all", "--raw", str(raw), "--json")
    code, out, _ = run(*command)
    first = {r["view"]: r for r in map(json.loads, out.splitlines())}
    assert (code, {v: (r["chunks"], r["skipped"]) for v, r in first.items()}) == (
        0, {"churn_features": (2, 0), "customer_behavior": (3, 0)},
    )  # fmt: skip
    code, out, _ = run(*command)
    again = {r["view"]: r for r in map(json.loads, out.splitlines())}
    assert {v: r["skipped"] for v, r in again.items()} == {"churn_features": 2, "customer_behavior": 3}
    assert {v: (r["run_id"], r["rows"]) for v, r in again.items()} == {
        v: (r["run_id"], r["rows"]) for v, r in first.items()
    }
    assert query(postgres_url, "SELECT status, count(*) FROM predictflow.backfill_runs GROUP BY 1") == [("done", 2)]
    chunks = query(postgres_url, "SELECT status, sum(row_count), count(*) FROM predictflow.backfill_chunks GROUP BY 1")
    assert chunks == [("done", sum(r["rows"] for r in first.values()), 5)]
    recorded = query(
        postgres_url, "SELECT DISTINCT run_id FROM predictflow.feature_lineage WHERE target_kind = 'table'"
    )
    assert {r["run_id"] for r in first.values()} <= {row[0] for row in recorded}

    offline = tmp_path / "offline"
    for i in range(3):
        columns: dict[str, Any] = {"tenure_months": [1.0], "monthly_charges": [float(i)], "contract_months": [1]}
        columns |= {"payment_method": ["card"], "event_timestamp": [T0], "created": [CUT]}
        project.write_to_offline_store("churn_features", pd.DataFrame({"customer_id": [f"C{i}"], **columns}))
    code, out, _ = run("compact", "--all", "--json")
    merged = json.loads(out)
    assert (code, merged["view"], merged["absorbed"], merged["written"]) == (0, "churn_features", 3, 1)

    project.materialize(T0, CUT)
    assert run("erase", "customer", "C1")[0] == 2
    served = Path(environment["PREDICTFLOW_HOME"]) / "serving" / "jobs"
    jobs = Jobs(served, lambda: CUT)
    jobs.submit(1, lambda: iter([pa.table({"customer_id": ["C1"]})]), None)
    jobs.close()
    code, out, _ = run("erase", "customer", "C1", "--dry-run", "--online", "--json")
    planned = json.loads(out)
    assert (code, planned["online_keys"], planned["jobs"], planned["dry_run"]) == (0, 1, 1, True)
    assert any(r["customer_id"] == "C1" for r in rows(offline / "churn_features"))
    code, out, _ = run("erase", "customer", "C1", "--yes", "--online", "--json")
    done = json.loads(out)
    assert (code, done["rows"], done["online_keys"], done["jobs"]) == (0, planned["rows"], 1, 1)
    assert list(served.iterdir()) == []
    run(*command)
    for table in ("churn_features", "customer_events"):
        assert {r["customer_id"] for r in rows(offline / table)} == {f"C{c}" for c in range(20) if c != 1}
    with redis.Redis.from_url(environment["REDIS_URL"]) as client:
        client.set(replay_clock_key("predictflow"), to_micros(CUT))
    features = ["churn_features:monthly_charges"]
    entities = [{"customer_id": "C1"}, {"customer_id": "C2"}]
    online = project.get_online_features(features=features, entity_rows=entities, full_feature_names=False)
    charges = online.to_dict()["monthly_charges"]
    assert (charges[0], charges[1] is None) == (None, False)
    assert run("erase", "custmer", "C1", "--yes")[2].startswith("no such entity: 'custmer'; valid: customer")

    with locked(table_lock(offline / "churn_features")):
        monkeypatch.setattr("feature_store.backfill.LOCK_SECONDS", 0.0)
        code, _, line = run("backfill", "churn_features", "--raw", str(raw), "--end", "2024-02-10")
    assert (code, "another process" in line) == (75, True)
    failed = query(postgres_url, "SELECT status FROM predictflow.backfill_runs ORDER BY updated_at DESC LIMIT 1")
    assert failed == [("failed",)]
    (raw / "accounts.parquet").write_bytes(b"PAR1")
    code, _, line = run("backfill", "churn_features", "--raw", str(raw))
    assert (code, "accounts.parquet" in line) == (1, True)


def test_postgres_away_is_try_again(
    project: Any,
    raw: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from predictflow import cli_offline

    views = {v.name: v for v in project.list_feature_views()}
    monkeypatch.setattr(cli_offline, "_views", lambda settings: views)  # Feast's own registry needs the same server
    monkeypatch.setenv("POSTGRES_URL", "postgresql://nobody@127.0.0.1:1/none")
    code, _, line = run("backfill", "churn_features", "--raw", str(raw))
    assert (code, "Postgres does not serve 127.0.0.1:1/none" in line) == (75, True)
    assert not (tmp_path / "offline/churn_features").exists()
