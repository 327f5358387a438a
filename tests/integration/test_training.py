"""Training on real Postgres: the DVC pipeline from raw data to a champion, its lineage, reruns, and promotion."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sysconfig
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import yaml

from feature_store.errors import NotFoundError, UnavailableError
from feature_store.registry import FeatureRegistry
from training.dataset import LEAKY, POINT_IN_TIME, TrainingSet, content_hash
from training.model import TrainParams, make_model
from training.pipeline import prepare_workspace, run_pipeline
from training.promote import NotPromotedError, promote, restore
from training.tracking import MODEL_NAME, Tracker
from training.train import train

ROOT = Path(__file__).parents[2]
T0 = datetime(2025, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")
FEATURES = ("charges", "payment")


def test_dvc_repro_leads_from_raw_data_to_a_champion_with_its_data_version(
    tmp_path: Path, postgres_url: str, redis_url: str, mlflow_url: str
) -> None:
    env = {
        **os.environ,
        "POSTGRES_URL": postgres_url,
        "REDIS_URL": redis_url,
        "MLFLOW_TRACKING_URI": mlflow_url,
        "PREDICTFLOW_OFFLINE": str(tmp_path / "not-used"),
        "PREDICTFLOW_CLOCK": "replay",
        "PREDICTFLOW_HOME": str(tmp_path / "home"),
        "PREDICTFLOW_REPO": str(ROOT),
    }
    feast = Path(sysconfig.get_path("scripts")) / "feast"
    applied = subprocess.run([feast, "apply"], cwd=ROOT, env=env, capture_output=True, text=True)
    assert applied.returncode == 0, applied.stderr
    workspace = tmp_path / "home" / "telco"
    data = {"source": "telco", "customers": 500, "days": 200, "seed": 7}
    prepare_workspace(workspace, {"data": data}, ROOT)
    lines: list[str] = []
    assert run_pipeline(workspace, env, show=lines.append) == ["data", "backfill", "dataset", "train"], lines

    metrics = json.loads((workspace / "work" / "model" / "metrics.json").read_text())
    assert metrics["auc"]["leaky_heldout"] - metrics["auc"]["pit_heldout"] > 0.05
    assert metrics["auc"]["leaky_future"] < metrics["auc"]["pit_future"]
    lock = yaml.safe_load((workspace / "dvc.lock").read_text())
    (out,) = lock["stages"]["dataset"]["outs"]
    assert metrics["data_version"] == out["md5"]

    tracker = Tracker(mlflow_url, tmp_path / "home" / "mlartifacts")
    champion = tracker.champion()
    assert champion is not None
    assert tracker.champion_version() == metrics["model_version"] == "1"
    assert champion.tags["data_version"] == out["md5"]
    assert champion.tags["raw_data_version"] == lock["stages"]["data"]["outs"][0]["md5"]
    assert champion.tags["feature_service"] == "churn_v1"
    runs = tracker.client.search_runs([tracker.experiment_id()])
    assert {r.info.run_name: r.info.status for r in runs} == {"point-in-time": "FINISHED", "leaky": "FINISHED"}
    point_in_time = tracker.client.get_run(metrics["run_ids"]["point-in-time"])
    assert point_in_time.data.metrics["pit_heldout"] == metrics["auc"]["pit_heldout"]
    assert point_in_time.data.tags["data_version"] == out["md5"]
    assert "dvc.lock" in [f.path for f in tracker.client.list_artifacts(point_in_time.info.run_id)]

    with FeatureRegistry(postgres_url) as registry:
        path = registry.path("feature:churn_features:tenure_months", f"model_version:{MODEL_NAME}/1")
    assert [edge.target.kind for edge in path][-3:] == ["feature_service", "training_set", "model_version"]
    assert path[-1].source.name == metrics["training_set"]

    assert run_pipeline(workspace, env) == []
    assert run_pipeline(workspace, env, force=True, stage="train") == ["train"]
    again = json.loads((workspace / "work" / "model" / "metrics.json").read_text())
    assert again["run_ids"] != metrics["run_ids"]
    assert {**again, "run_ids": None} == {**metrics, "run_ids": None}


@pytest.fixture
def tracker(mlflow_url: str, tmp_path: Path) -> Tracker:
    return Tracker(mlflow_url, tmp_path / "artifacts")


@pytest.fixture
def registry(postgres_url: str) -> FeatureRegistry:
    registry = FeatureRegistry(postgres_url)
    registry.migrate()
    return registry


def write_sets(directory: Path, signal: float = 1.0, seed: int = 1) -> Path:
    """A raw summary and two training sets over 300 customers and 8 months; `signal`: how much charges tell."""
    rng = np.random.default_rng(seed)
    days, rows = np.arange(0, 240, 30), 300 * 8
    churned = rng.random(rows) < 0.3
    charges = rng.normal(50, 10, rows) + signal * 10 * churned
    labels = {
        "customer_id": [f"C{i % 300:04d}" for i in range(rows)],
        "event_timestamp": pa.array([T0 + timedelta(days=int(days[i // 300])) for i in range(rows)], TIME),
        "churned": pa.array(churned.astype(np.int8)),
        "best_probability": pa.nulls(rows, pa.float64()),
    }
    payment = pa.array([("card", "check", None)[i] for i in rng.integers(0, 3, rows)], pa.string())
    for variant, values in ((POINT_IN_TIME, charges), (LEAKY, np.where(churned, np.nan, charges))):
        table = pa.table({**labels, "charges": pa.array(values, from_pandas=True), "payment": payment})
        name = f"test/{variant}@{content_hash(table)}"
        TrainingSet(name, table, "churn_v1", FEATURES, True).save(directory / "training" / f"{variant}.parquet")
    (directory / "raw").mkdir(exist_ok=True)
    times = {
        "cut": T0 + timedelta(days=300),
        "train_until": T0 + timedelta(days=150),
        "future_from": T0 + timedelta(days=180),
    }
    summary = {"dataset": "test", "horizon_days": 30} | {k: v.isoformat() for k, v in times.items()}
    (directory / "raw" / "summary.json").write_text(json.dumps(summary))
    return directory


def run_train(directory: Path, tracker: Tracker, registry: FeatureRegistry, **params: Any) -> dict[str, Any]:
    return train(
        directory / "training",
        directory / "raw",
        directory / "model",
        tracker=tracker,
        registry=registry,
        params=dataclasses.replace(TrainParams(), **params),
        at=T0,
        tags={"git_commit": "abc"},
    )


def versions(tracker: Tracker) -> list[str]:
    return sorted(str(v.version) for v in tracker.client.search_model_versions(f"name = '{MODEL_NAME}'"))


def test_a_registered_model_serves_what_it_was_trained_to_say(
    tmp_path: Path, tracker: Tracker, registry: FeatureRegistry
) -> None:
    import mlflow.sklearn
    import pandas as pd

    metrics = run_train(write_sets(tmp_path), tracker, registry)
    assert metrics["auc"]["best_possible"] is None
    model = mlflow.sklearn.load_model(f"models:/{MODEL_NAME}@champion")
    low, high = (
        model.predict_proba(pd.DataFrame([{"charges": c, "payment": None}], columns=list(FEATURES)))[0, 1]
        for c in (30.0, 80.0)
    )
    assert low < 0.3 < 0.4 < high
    served = mlflow.pyfunc.load_model(f"models:/{MODEL_NAME}@champion")
    assert served.predict(pd.DataFrame({"charges": [30.0], "payment": ["card"]})).shape == (1, 2)
    assert served.metadata.signature.inputs.input_names() == list(FEATURES)


def test_only_a_different_model_becomes_a_new_version(
    tmp_path: Path, tracker: Tracker, registry: FeatureRegistry
) -> None:
    first = run_train(write_sets(tmp_path / "a"), tracker, registry)
    other = run_train(write_sets(tmp_path / "b", seed=2), tracker, registry)
    assert versions(tracker) == ["1", "2"]
    assert tracker.champion_version() == other["model_version"] == "2"

    again = run_train(tmp_path / "a", tracker, registry)
    assert (again["model_version"], again["auc"], versions(tracker)) == ("1", first["auc"], ["1", "2"])
    assert tracker.champion_version() == "1"
    assert run_train(tmp_path / "a", tracker, registry, regularisation=1.0)["model_version"] == "3"

    # The database outlives the files: naming a version that cannot be loaded would only move the failure to serving.
    shutil.rmtree(tmp_path / "artifacts")
    assert run_train(tmp_path / "a", tracker, registry)["model_version"] == "4"
    assert restore(tracker, first) is False
    assert restore(tracker, again | {"model_version": "4"}) is True


def test_restore_makes_the_model_of_another_data_set_champion_again(
    tmp_path: Path, tracker: Tracker, registry: FeatureRegistry
) -> None:
    first = run_train(write_sets(tmp_path / "a"), tracker, registry)
    run_train(write_sets(tmp_path / "b", seed=2), tracker, registry)
    assert restore(tracker, first) is True
    assert tracker.champion_version() == "1"


def test_the_gate_refuses_a_worse_version_unless_forced(
    tmp_path: Path, tracker: Tracker, registry: FeatureRegistry
) -> None:
    with pytest.raises(NotFoundError, match="valid: none"):
        promote(tracker, "1")
    worse = run_train(write_sets(tmp_path / "a", signal=0.2), tracker, registry)
    better = run_train(write_sets(tmp_path / "b", signal=2.0), tracker, registry)
    assert better["auc"]["pit_heldout"] > worse["auc"]["pit_heldout"] + 0.1
    with pytest.raises(NotPromotedError, match="version 1 is worse than the champion, version 2"):
        promote(tracker, "1")
    assert tracker.champion_version() == "2"
    forced = promote(tracker, "1", force=True)
    assert (forced.before, forced.after, forced.auc_after) == ("2", "1", worse["auc"]["pit_heldout"])
    assert promote(tracker, "2").auc_after == better["auc"]["pit_heldout"]
    assert tracker.champion_version() == "2"
    with pytest.raises(NotFoundError, match="'7'; valid: 1, 2"):
        promote(tracker, "7")


def test_a_training_that_fails_leaves_a_failed_run_and_no_champion(tmp_path: Path, tracker: Tracker) -> None:
    class Broken(Exception):
        pass

    with pytest.raises(Broken), tracker.run("point-in-time", {"seed": 1}, {}):
        raise Broken
    (run,) = tracker.client.search_runs([tracker.experiment_id()])
    assert run.info.status == "FAILED"
    assert tracker.champion_version() is None


@pytest.mark.parametrize("uri", ["postgresql+psycopg2://u:secret@127.0.0.1:1/x", "http://127.0.0.1:1"])
def test_a_tracking_store_that_does_not_answer_is_one_line_at_once(tmp_path: Path, uri: str) -> None:
    with pytest.raises(UnavailableError, match=r"does not answer.*next: predictflow up") as caught:
        Tracker(uri, tmp_path).experiment_id()
    assert "secret" not in caught.value.message


def test_a_missing_database_is_told_at_once(tmp_path: Path, mlflow_url: str) -> None:
    with pytest.raises(UnavailableError, match="does not exist"):
        Tracker(mlflow_url.rpartition("/")[0] + "/nothing", tmp_path).experiment_id()


def test_the_check_loads_any_registered_version_and_knows_which_are_gone(tmp_path: Path, mlflow_url: str) -> None:
    """As `predictflow check` does for logged predictions: an older version too, whoever is champion now."""
    import pandas as pd

    from predictflow.predictions import mlflow_models

    tracker = Tracker(mlflow_url, tmp_path / "artifacts")
    frame = pd.DataFrame({"charges": np.arange(40.0), "payment": ["cash", "card"] * 20})
    versions, fitted = [], []
    for flipped in (False, True):
        model = make_model(["charges"], ["payment"], TrainParams(seed=1))
        model.fit(frame, [int((i > 20) != flipped) for i in range(40)])
        with tracker.run("point-in-time", {"seed": 1}, {}) as run_id:
            versions.append(tracker.register(run_id, model, ["charges"], FEATURES, {}))
        fitted.append(model)
    tracker.set_champion(versions[1])
    load = mlflow_models(Tracker(mlflow_url, tmp_path / "artifacts"))
    for version, model in zip(versions, fitted, strict=True):
        assert np.array_equal(load(MODEL_NAME, version).predict_proba(frame), model.predict_proba(frame))
    assert load(MODEL_NAME, "99") is None
    assert load("nobody", "1") is None
    shutil.rmtree(tmp_path / "artifacts")
    with pytest.raises(UnavailableError, match="version 1 cannot be loaded"):
        load(MODEL_NAME, versions[0])
