"""A real project to serve in tests: Postgres registry, Redis of its own, a customer's rows and events, an MLflow model.

The fixtures are module-scoped, and known to every integration test through conftest.py.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import requests

from feature_store.clock import to_micros
from predictflow.local import postgres, redis
from predictflow.local.ports import HOST, free_port
from predictflow.local.processes import Watched
from predictflow.settings import Settings
from tests.window_states import states_of

ROOT = Path(__file__).parents[2]
NOW = datetime(2026, 3, 1, 12, 0, 0, 250_000, tzinfo=UTC)
MODEL = "churn-predictor"
SERVICE = "churn_v1"


@dataclass
class Platform:
    """A project with two customers: C1 has an account and events, C2 an account that expired, C9 nothing."""

    settings: Settings
    watched: Watched
    redis_home: Path
    redis_port: int
    redis_pid: int
    store: Any

    def stop_redis(self) -> None:
        os.kill(self.redis_pid, signal.SIGKILL)
        wait_until(lambda: not redis.answers_ping(HOST, self.redis_port))

    def start_redis(self) -> None:
        log = self.redis_home.with_suffix(".log")
        redis.start(self.watched, self.redis_home, self.redis_port, log, durable=True)
        import redis as client

        with client.Redis(port=self.redis_port) as connection:
            self.redis_pid = int(connection.info("server")["process_id"])


def wait_until(condition: Callable[[], object], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


@contextmanager
def serving(settings: Settings, **options: Any) -> Iterator[str]:
    """The product's own application behind uvicorn, in a thread of this process."""
    import uvicorn

    from predictflow.serve_wiring import ServeOptions, build_app

    root = logging.getLogger()
    before = list(root.handlers), root.level
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        chosen = replace(ServeOptions(served_log=False, models=(MODEL,), max_rows=50, workers=1), **options)
        config = uvicorn.Config(
            build_app(settings, chosen), log_config=None, access_log=False, lifespan="on", timeout_graceful_shutdown=5
        )
        server = uvicorn.Server(config)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            wait_until(lambda: server.started or not thread.is_alive())
            yield f"http://{HOST}:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(20)
            root.handlers[:], root.level = before[0], before[1]


def train(mlflow_url: str, artifacts: Path, feature_names: list[str], bias: float, promote: bool = True) -> str:
    """Registers a small real pipeline; returns its version. `bias` shifts its probabilities."""
    import mlflow
    import numpy as np
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline, make_pipeline
    from sklearn.preprocessing import OneHotEncoder

    numbers = [f for f in feature_names if f != "payment_method"]
    frame = pd.DataFrame({f: np.linspace(0, 10, 40) for f in numbers})
    frame["payment_method"] = np.array(["card", "cash"] * 20, dtype=object)
    frame = frame[feature_names]
    prepare = ColumnTransformer(
        [
            ("numbers", SimpleImputer(), numbers),
            (
                "words",
                make_pipeline(
                    SimpleImputer(strategy="constant", fill_value="?"), OneHotEncoder(handle_unknown="ignore")
                ),
                ["payment_method"],
            ),
        ]
    )
    pipeline = Pipeline([("prepare", prepare), ("model", LogisticRegression(max_iter=200))])
    pipeline.fit(frame, (np.arange(40) > 20 + bias).astype(int))
    mlflow.set_tracking_uri(mlflow_url)
    mlflow.set_registry_uri(mlflow_url)
    if mlflow.get_experiment_by_name("serving-test") is None:
        mlflow.create_experiment("serving-test", artifact_location=artifacts.as_uri())
    mlflow.set_experiment("serving-test")
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
    client.set_model_version_tag(MODEL, version, "feature_service", SERVICE)
    if promote:
        client.set_registered_model_alias(MODEL, "champion", version)
    return version


@pytest.fixture(scope="module")
def platform(
    postgres_server: str, _mlflow_template: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Platform]:
    from feature_store.window_store import WindowStore
    from predictflow.wiring import feast_store

    home = tmp_path_factory.mktemp("serving")
    database = f"serving_{os.getpid()}"
    postgres.create_database(postgres_server, database, template=_mlflow_template)
    repo = home / "repo"
    repo.mkdir()
    shutil.copy(ROOT / "feature_store.yaml", repo)
    (home / "offline").mkdir()
    port = free_port()
    url = f"{postgres_server.rpartition('/')[0]}/{database}"
    environment = {
        "POSTGRES_URL": url,
        "REDIS_URL": f"redis://{HOST}:{port}/0",
        "PREDICTFLOW_OFFLINE": str(home / "offline"),
        "PREDICTFLOW_CLOCK": "replay",
        "PREDICTFLOW_HOME": str(home / "home"),
        "PREDICTFLOW_REPO": str(repo),
        "MLFLOW_TRACKING_URI": url,
        "KAFKA_BOOTSTRAP_SERVERS": f"{HOST}:{free_port()}",
    }
    with pytest.MonkeyPatch.context() as patch, Watched() as watched:
        patch.syspath_prepend(str(ROOT))
        for name, value in environment.items():
            patch.setenv(name, value)
        settings = Settings.from_environ(environment)
        made = Platform(settings, watched, home / "redis", port, 0, None)
        made.start_redis()
        from features.behavioral_features import customer_behavior
        from features.customer_features import churn_features
        from features.entities import customer
        from features.services import churn_v1

        store = made.store = feast_store(settings)
        store.apply([customer, churn_features, customer_behavior, churn_v1])
        store.refresh_registry()
        account = {"tenure_months": 12.1, "contract_months": 1, "payment_method": "card"}
        rows = [
            {"customer_id": "C1", "event_timestamp": NOW - timedelta(days=2), "monthly_charges": 0.1 + 0.2, **account},
            {"customer_id": "C2", "event_timestamp": NOW - timedelta(days=31), "monthly_charges": 5.0, **account},
        ]
        frame = pd.DataFrame(rows).assign(created=NOW - timedelta(days=1))
        store.write_to_online_store("churn_features", frame)
        window = WindowStore(store, store.get_feature_view("customer_behavior"))
        cells = {"event_type": "usage", "quantity": 3, "amount_cents": 2**53 + 1}
        states = states_of(window.definition, [(NOW - timedelta(days=age), cells) for age in (20, 3)], NOW)
        window.write([("C1",)], states)
        window.clock.set(to_micros(NOW))
        yield made
    postgres.drop_database(postgres_server, database)


@pytest.fixture(scope="module")
def feature_names(platform: Platform) -> list[str]:
    service = platform.store.get_feature_service(SERVICE)
    return [f.name for p in service.feature_view_projections for f in p.features]


@pytest.fixture(scope="module")
def model(platform: Platform, feature_names: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Version 1 is the champion; returns where artifacts go."""
    artifacts = tmp_path_factory.mktemp("artifacts")
    train(platform.settings.need("mlflow_tracking_uri"), artifacts, feature_names, 0)
    return artifacts


def answers(url: str, **options: Any) -> bool:
    try:
        return requests.get(url, timeout=2, **options).ok
    except (requests.ConnectionError, requests.Timeout):  # it listens before it answers
        return False
