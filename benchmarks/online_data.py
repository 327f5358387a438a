"""The online bench's feature repository: three views with 50 features on one key, written by stock Feast, read by both sides."""

from __future__ import annotations

import base64
import json
import sys
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feast import FeatureStore

KEY = "driver_id"
WIDTHS = {"trips": 20, "ratings": 15, "payments": 15}
STOCK, OURS = "stock", "ours"
MODEL = "bench-model"
_KINDS = ("double", "int", "double", "string", "bool")
SHAPES = {"1x10": (1, "ten"), "1x50": (1, "fifty"), "100x50": (100, "fifty")}
"""Rows per request and feature service by the name of the shape."""


@dataclass(frozen=True)
class Servers:
    """The private servers of a run."""

    postgres_url: str
    mlflow_url: str
    redis_port: int


def feature_names(view: str) -> list[str]:
    return [f"{view}_{i}_{_KINDS[i % len(_KINDS)]}" for i in range(WIDTHS[view])]


def write_repositories(root: Path, servers: Servers, our_yaml: str) -> None:
    """Two feature_store.yaml on one registry and one Redis, which differ in their stores only."""
    stock = f"""\
project: bench
provider: local
registry: {{registry_type: sql, path: "{servers.postgres_url}", cache_mode: thread, cache_ttl_seconds: 300}}
online_store: {{type: redis, connection_string: "127.0.0.1:{servers.redis_port}"}}
offline_store: {{type: file}}
entity_key_serialization_version: 3
"""
    for side, text in ((STOCK, stock), (OURS, our_yaml.replace("project: predictflow", "project: bench"))):
        (root / side).mkdir()
        (root / side / "feature_store.yaml").write_text(text)


def apply_and_write(root: Path, keys: int) -> None:
    """Applies the definitions and writes every view's rows, both with stock Feast."""
    import numpy as np
    import pandas as pd
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
    from feast.types import Bool, Float64, Int64, String

    types = dict(zip(_KINDS, (Float64, Int64, Float64, String, Bool)))
    driver = Entity(name="driver", join_keys=[KEY], value_type=ValueType.INT64)
    now = datetime.now(UTC)
    views = {}
    for view in WIDTHS:
        source = FileSource(
            name=f"{view}_source",
            path=str(root / f"{view}.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )
        schema = [Field(name=n, dtype=types[n.rpartition("_")[2]]) for n in feature_names(view)]
        views[view] = FeatureView(name=view, entities=[driver], ttl=timedelta(days=30), schema=schema, source=source)
    ten = FeatureService(name="ten", features=[views["trips"][feature_names("trips")[:10]]])
    fifty = FeatureService(name="fifty", features=list(views.values()))
    store = FeatureStore(repo_path=str(root / STOCK))
    store.apply([driver, *views.values(), ten, fifty])
    store.refresh_registry()
    rng = np.random.default_rng(7)
    for view in WIDTHS:
        columns: dict[str, Any] = {KEY: np.arange(keys), "event_timestamp": now, "created": now}
        for name in feature_names(view):
            match name.rpartition("_")[2]:
                case "double":
                    columns[name] = rng.normal(0, 1000, keys)
                case "int":
                    columns[name] = rng.integers(-(2**40), 2**40, keys)
                case "string":
                    columns[name] = np.array([f"text-{v:x}" for v in rng.integers(0, 2**32, keys)], dtype=object)
                case "bool":
                    columns[name] = rng.integers(0, 2, keys).astype(bool)
        store.write_to_online_store(view, pd.DataFrame(columns))


def batches(shape: str, keys: int, count: int = 50) -> list[list[int]]:
    """The keys of `count` requests of a shape, the same in every run."""
    import random

    rng = random.Random(11)
    rows = SHAPES[shape][0]
    return [[rng.randrange(keys) for _ in range(rows)] for _ in range(count)]


def rest_bodies(shape: str, keys: int) -> list[str]:
    """Base64 bodies that Feast's route and ours both take."""
    service = SHAPES[shape][1]
    bodies = [json.dumps({"feature_service": service, "entities": {KEY: batch}}) for batch in batches(shape, keys)]
    return [base64.b64encode(b.encode()).decode() for b in bodies]


def predict_bodies(keys: int) -> list[str]:
    bodies = [json.dumps({"entities": {KEY: batch}}) for batch in batches("1x10", keys)]
    return [base64.b64encode(b.encode()).decode() for b in bodies]


def grpc_bodies(shape: str, keys: int) -> list[str]:
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
    from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value

    out = []
    for batch in batches(shape, keys):
        values = RepeatedValue(val=[Value(int64_val=key) for key in batch])
        request = GetOnlineFeaturesRequest(feature_service=SHAPES[shape][1], entities={KEY: values})
        out.append(base64.b64encode(request.SerializeToString()).decode())
    return out


def train(tracking_url: str, artifacts: Path) -> None:
    """Registers a small pipeline on the service `ten` as champion of MODEL. Its quality does not matter here."""
    import mlflow
    import numpy as np
    import pandas as pd
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    numbers = [n for n in feature_names("trips")[:10] if not n.endswith("string")]
    rng = np.random.default_rng(3)
    frame = pd.DataFrame({n: rng.normal(size=200) for n in numbers})
    pipeline = make_pipeline(SimpleImputer(), LogisticRegression()).fit(frame, (frame[numbers[0]] > 0).astype(int))
    mlflow.set_tracking_uri(tracking_url)
    mlflow.create_experiment("bench", artifact_location=artifacts.as_uri())
    mlflow.set_experiment("bench")
    with mlflow.start_run():
        info = mlflow.sklearn.log_model(
            pipeline,
            name="model",
            registered_model_name=MODEL,
            serialization_format="cloudpickle",
            pip_requirements=["scikit-learn"],
        )
    client = mlflow.MlflowClient()
    version = str(info.registered_model_version)
    client.set_model_version_tag(MODEL, version, "feature_service", "ten")
    client.set_registered_model_alias(MODEL, "champion", version)


def prepare_sdk(name: str, case: dict[str, Any]) -> tuple[Any, Any]:
    """A contender for `benchmarks.harness`: `case["calls"]` calls of get_online_features, each timed."""
    import time

    from feast import FeatureStore

    store: FeatureStore = FeatureStore(repo_path=str(Path(case["root"]) / name))
    service = store.get_feature_service(SHAPES[case["shape"]][1])
    requests = [{KEY: batch} for batch in batches(case["shape"], case["keys"])]
    store.get_online_features(service, requests[0])

    def run() -> tuple[list[float], dict[str, Any]]:
        taken = []
        for i in range(case["calls"]):
            began = time.perf_counter()
            answer = store.get_online_features(service, requests[i % len(requests)])
            taken.append(time.perf_counter() - began)
        return taken, answer.to_dict()

    def describe(result: tuple[list[float], dict[str, Any]]) -> dict[str, Any]:
        taken, answer = result
        return {"latencies": taken, "answer": answer}

    return run, describe


prepare = prepare_sdk

if __name__ == "__main__":  # in a process of its own, beside what else must be prepared
    from predictflow.local.mlflow_database import prepare_mlflow

    prepare_mlflow(sys.argv[1])
    train(sys.argv[1], Path(sys.argv[2]))
