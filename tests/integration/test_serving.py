"""The REST server on a real Postgres registry, Redis, MLflow model and (served log) Kafka, over a real socket."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
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
from feature_store.errors import NotFoundError, UnavailableError
from feature_store.registry import FeatureRegistry
from predictflow.local import postgres, redis
from predictflow.local.ports import HOST, free_port
from predictflow.local.processes import Watched
from predictflow.settings import Settings
from serving import schemas
from serving.client import FeatureClient

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

    from predictflow.cli_serve import ServeOptions, build_app

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
    from feature_store.windows.state import EntityState, Event
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
        state = EntityState.empty(window.definition)
        state.apply(
            window.definition,
            [
                Event(
                    to_micros(NOW - timedelta(days=age)),
                    0,
                    offset,
                    to_micros(NOW),
                    {"event_type": "usage", "quantity": 3, "amount_cents": 2**53 + 1},
                    f"e{offset}",
                )
                for offset, age in enumerate([20, 3])
            ],
        )
        window.write({("C1",): state})
        window.set_clock(to_micros(NOW))
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


@pytest.fixture(scope="module")
def url(platform: Platform, model: Path) -> Iterator[str]:
    with serving(platform.settings, model_seconds=0.5) as address:
        wait_until(lambda: requests.get(f"{address}/readyz", timeout=5).ok)
        yield address


def online(url: str, body: dict[str, Any], **kwargs: Any) -> requests.Response:
    return requests.post(f"{url}/api/v1/features/online", json=body, timeout=10, **kwargs)


def test_features_come_with_statuses_times_and_offsets(url: str) -> None:
    answer = online(url, {"feature_service": SERVICE, "entities": {"customer_id": ["C1", "C2", "C9"]}})

    assert answer.status_code == 200
    body = schemas.OnlineResponse.model_validate(answer.json())
    seen, expired, unknown = body.rows
    assert (body.t, body.feature_service) == (NOW, SERVICE)
    assert list(seen.values) == body.feature_names
    assert seen.values["monthly_charges"] == 0.1 + 0.2
    assert seen.values["contract_months"] == 1
    assert (seen.values["events_7d"], seen.values["events_30d"]) == (1, 2)
    assert seen.values["spend_cents_30d"] == 2 * (2**53 + 1)
    assert seen.event_timestamps["events_7d"] == NOW - timedelta(days=3)
    assert seen.event_timestamps["monthly_charges"] == NOW - timedelta(days=2)
    assert seen.offsets == {"customer_behavior": {"0": 1}}
    assert expired.statuses["tenure_months"] == "OUTSIDE_MAX_AGE"
    assert expired.values["tenure_months"] is None
    assert set(unknown.statuses.values()) == {"NOT_FOUND"}
    assert set(unknown.values.values()) == {None}


def test_a_later_time_sees_events_leave_their_window(url: str) -> None:
    later = (NOW + timedelta(days=5)).replace(tzinfo=None).isoformat()

    body = online(url, {"feature_service": SERVICE, "entities": {"customer_id": ["C1"]}, "at": later}).json()

    assert datetime.fromisoformat(body["t"]) == NOW + timedelta(days=5)
    assert body["rows"][0]["values"]["events_7d"] == 0
    assert body["rows"][0]["statuses"]["quantity_7d"] == "NULL_VALUE"


@pytest.mark.parametrize(
    ("change", "status", "code", "says"),
    [
        ({"at": "2026-02-01T00:00:00Z"}, 400, "at_too_early", "2026-02-01"),
        ({"feature_service": "churn_v2"}, 404, "not_found", "churn_v2"),
        ({"feature_service": None, "features": ["churn_features:tenure"]}, 404, "not_found", "tenure"),
        ({"feature_service": None, "features": ["tenure"]}, 400, "usage", "tenure"),
        ({"features": ["churn_features:tenure_months"]}, 400, "usage", "either"),
        ({"entities": {"customer": ["C1"]}}, 400, "usage", "customer_id"),
        ({"entities": {"customer_id": [17]}}, 400, "usage", "17"),
        ({"entities": {"customer_id": []}}, 400, "usage", "customer_id"),
        ({"entities": {"customer_id": ["C1"] * 51}}, 413, "too_many_rows", "50"),
        ({"entities": {"customer_id": "C1"}}, 422, "invalid_body", "customer_id"),
        ({"entities": {"customer_id": [2**63]}}, 422, "invalid_body", "customer_id"),
        ({"at": 17}, 422, "invalid_body", "at"),
        ({"att": "2026-02-01T00:00:00Z"}, 422, "invalid_body", "att"),
    ],
)
def test_a_bad_request_is_told_what_is_wrong(
    url: str, change: dict[str, Any], status: int, code: str, says: str
) -> None:
    body = {"feature_service": SERVICE, "entities": {"customer_id": ["C1"]}, **change}

    answer = online(url, {k: v for k, v in body.items() if v is not None})

    error = schemas.ErrorResponse.model_validate(answer.json()).error
    assert (answer.status_code, error.code) == (status, code)
    assert says in error.message


@pytest.mark.parametrize("content", [b"{", b"[" * 100_000, b"NaN", b'{"entities": {"customer_id": [NaN]}}', b"\xff"])
def test_a_malformed_body_is_refused_in_the_one_error_shape(url: str, content: bytes) -> None:
    headers = {"content-type": "application/json"}

    answer = requests.post(f"{url}/api/v1/features/online", data=content, headers=headers, timeout=10)

    assert answer.status_code in (400, 422)
    assert schemas.ErrorResponse.model_validate(answer.json()).error.code


def test_a_prediction_is_the_models_own(url: str, platform: Platform, model: Path, feature_names: list[str]) -> None:
    import mlflow

    client = FeatureClient(url)
    answer = client.predict(MODEL, {"customer_id": ["C1", "C9"]})

    mlflow.set_registry_uri(platform.settings.need("mlflow_tracking_uri"))
    pipeline = mlflow.sklearn.load_model(f"models:/{MODEL}/{answer.version}")
    frame = answer.to_df()
    assert list(frame.columns) == ["customer_id", *feature_names, "probability"]
    expected = pipeline.predict_proba(frame[feature_names].astype({"payment_method": object}).fillna(float("nan")))[
        :, 1
    ]
    assert frame["probability"].tolist() == pytest.approx(expected.tolist(), abs=1e-12)
    assert answer.feature_service == SERVICE
    assert [p.statuses["events_7d"] for p in answer.predictions] == ["PRESENT", "NOT_FOUND"]


def test_an_unknown_model_names_the_command_that_makes_one(url: str) -> None:
    with pytest.raises(NotFoundError, match=r"no-such-model.*predictflow train"):
        FeatureClient(url).predict("no-such-model", {"customer_id": ["C1"]})


def test_promotion_swaps_the_model_without_a_failed_request(
    url: str, platform: Platform, model: Path, feature_names: list[str]
) -> None:
    before = FeatureClient(url).predict(MODEL, {"customer_id": ["C9"]})
    failed: list[object] = []
    versions: list[str] = []
    stop = threading.Event()

    def ask() -> None:
        with requests.Session() as session:
            while not stop.is_set():
                body = {"entities": {"customer_id": ["C1"]}}
                answer = session.post(f"{url}/api/v1/predict/{MODEL}", json=body, timeout=30)
                if answer.ok:
                    versions.append(answer.json()["version"])
                else:
                    failed.append(answer.text)
                time.sleep(0.02)

    asking = threading.Thread(target=ask)
    asking.start()
    try:
        version = train(platform.settings.need("mlflow_tracking_uri"), model, feature_names, 5)
        wait_until(lambda: versions and versions[-1] == version)
    finally:
        stop.set()
        asking.join()

    after = FeatureClient(url).predict(MODEL, {"customer_id": ["C9"]})
    assert failed == []
    assert after.predictions[0].probability != before.predictions[0].probability
    assert f'predictflow_model_loaded{{model="{MODEL}",version="{version}"}} 1.0' in metrics(url)
    assert f'predictflow_model_loaded{{model="{MODEL}",version="{before.version}"}} 0.0' in metrics(url)


def test_a_champion_that_cannot_be_served_leaves_the_old_one(
    url: str, platform: Platform, model: Path, feature_names: list[str]
) -> None:
    import mlflow

    served = FeatureClient(url).predict(MODEL, {"customer_id": ["C1"]}).version
    uri = platform.settings.need("mlflow_tracking_uri")
    untagged = train(uri, model, feature_names, 1, promote=False)
    needs_more = train(uri, model, [*feature_names, "not_in_service"], 1, promote=False)
    client = mlflow.MlflowClient(uri, uri)
    client.delete_model_version_tag(MODEL, untagged, "feature_service")
    try:
        for broken, reason in ((untagged, "no tag"), (needs_more, "lacks")):
            client.set_registered_model_alias(MODEL, "champion", broken)
            wait_until(lambda reason=reason: reason in requests.get(f"{url}/readyz", timeout=5).text)
            assert FeatureClient(url).predict(MODEL, {"customer_id": ["C1"]}).version == served
    finally:
        client.set_registered_model_alias(MODEL, "champion", served)
    wait_until(lambda: "lacks" not in requests.get(f"{url}/readyz", timeout=5).text)


def test_a_withdrawn_model_is_no_longer_served_and_comes_back(url: str, platform: Platform, model: Path) -> None:
    import mlflow

    version = FeatureClient(url).predict(MODEL, {"customer_id": ["C1"]}).version
    uri = platform.settings.need("mlflow_tracking_uri")
    client = mlflow.MlflowClient(uri, uri)
    address, body = f"{url}/api/v1/predict/{MODEL}", {"entities": {"customer_id": ["C1"]}}
    client.delete_registered_model_alias(MODEL, "champion")
    try:
        wait_until(lambda: requests.post(address, json=body, timeout=10).status_code == 404)
        assert requests.get(f"{url}/readyz", timeout=5).status_code == 503
    finally:
        client.set_registered_model_alias(MODEL, "champion", version)
    wait_until(lambda: requests.post(address, json=body, timeout=10).ok)


def test_the_model_is_recorded_upstream_of_its_endpoint(url: str, platform: Platform) -> None:
    version = FeatureClient(url).predict(MODEL, {"customer_id": ["C1"]}).version

    def recorded() -> list[str]:
        with FeatureRegistry(platform.settings.need("postgres_url")) as registry:
            steps = registry.upstream(("endpoint", f"POST /api/v1/predict/{MODEL}"), 1)
        return [str(step.edge.source) for step in steps]

    wait_until(lambda: f"model_version:{MODEL}/{version}" in recorded())


def test_the_catalogue_tells_what_a_feature_means(url: str) -> None:
    catalogue = FeatureClient(url).catalogue()
    views = {v.name: v for v in catalogue.views}

    assert views["churn_features"].ttl_seconds == timedelta(days=30).total_seconds()
    assert views["customer_behavior"].topic == "customer-events"
    assert "window_state" not in [f.name for f in views["customer_behavior"].features]
    spend = next(f for f in views["customer_behavior"].features if f.name == "spend_cents_30d")
    assert (spend.type, spend.unit) == ("Int64", "cents")
    one = requests.get(f"{url}/api/v1/features/churn_features", timeout=10).json()
    assert schemas.ViewInfo.model_validate(one) == views["churn_features"]
    assert requests.get(f"{url}/api/v1/features/churn", timeout=10).status_code == 404


def test_every_answer_carries_the_request_id(url: str) -> None:
    given = requests.get(f"{url}/healthz", headers={"X-Request-Id": "mine-1"}, timeout=10)
    unusable = requests.get(f"{url}/nowhere", headers={"X-Request-Id": "not good"}, timeout=10)

    assert given.headers["X-Request-Id"] == "mine-1"
    assert unusable.status_code == 404
    assert unusable.headers["X-Request-Id"] not in ("", "not good")
    assert unusable.json()["error"]["code"] == "not_found"


def test_metrics_count_statuses_by_view(url: str) -> None:
    def missing() -> float:
        line = 'predictflow_feature_status_total{status="NOT_FOUND",view="churn_features"} '
        found = [m.removeprefix(line) for m in metrics(url).splitlines() if m.startswith(line)]
        return float(found[0]) if found else 0.0

    before = missing()
    online(url, {"features": ["churn_features:tenure_months"], "entities": {"customer_id": ["C8", "C9"]}})

    assert missing() == before + 2
    assert 'route="/api/v1/features/online",status="200"' in metrics(url)


def test_a_redis_that_is_down_is_a_503_and_coming_back_needs_no_restart(url: str, platform: Platform) -> None:
    body = {"feature_service": SERVICE, "entities": {"customer_id": ["C1"]}}
    good = online(url, body).json()

    platform.stop_redis()
    try:
        answer = online(url, body)
        ready = requests.get(f"{url}/readyz", timeout=10)
        alive = requests.get(f"{url}/healthz", timeout=10)
        with pytest.raises(UnavailableError, match="Redis"):
            FeatureClient(url, retries=1).predict(MODEL, {"customer_id": ["C1"]})
    finally:
        platform.start_redis()

    assert (answer.status_code, answer.json()["error"]["code"]) == (503, "unavailable")
    assert int(answer.headers["Retry-After"]) >= 1
    assert ready.status_code == 503
    assert ready.json()["checks"]["redis"]["ok"] is False
    assert alive.ok
    again = online(url, body)
    assert again.status_code == 200
    assert again.json() == good
    assert requests.get(f"{url}/readyz", timeout=10).ok


def test_a_newly_applied_feature_service_is_served_without_a_restart(platform: Platform) -> None:
    from feast import FeatureService

    with serving(platform.settings, models=(), registry_seconds=0.5) as address:
        body = {"feature_service": "account_only", "entities": {"customer_id": ["C1"]}}
        assert online(address, body).status_code == 404
        view = platform.store.get_feature_view("churn_features")
        platform.store.apply([FeatureService(name="account_only", features=[view[["tenure_months"]]])], partial=True)
        try:
            wait_until(lambda: online(address, body).status_code == 200)
            assert online(address, body).json()["feature_names"] == ["tenure_months"]
        finally:
            platform.store.delete_feature_service("account_only")
        wait_until(lambda: online(address, body).status_code == 404)


def test_an_unreachable_kafka_costs_the_log_and_no_request(platform: Platform) -> None:
    with serving(platform.settings, served_log=True, models=()) as address:
        started = time.monotonic()
        for _ in range(5):
            assert online(address, {"feature_service": SERVICE, "entities": {"customer_id": ["C1"]}}).ok
        assert time.monotonic() - started < 20  # far below message.timeout.ms: nothing waited for the broker


@pytest.mark.kafka
def test_the_served_log_says_what_was_served(
    platform: Platform, model: Path, kafka_bootstrap: str, topic_prefix: str
) -> None:
    topic = f"{topic_prefix}predictflow-served"
    settings = replace(platform.settings, kafka_bootstrap_servers=kafka_bootstrap, served_topic=topic)
    with serving(settings, served_log=True) as address:
        client = FeatureClient(address)
        read = client.get_online_features(
            {"customer_id": ["C1", "C2"]}, feature_service=SERVICE, request_id="features-1"
        )
        predicted = client.predict(MODEL, {"customer_id": ["C1"]}, request_id="predict-1")
        assert 'predictflow_served_log_dropped_total{reason="queue_full"}' not in metrics(address)
    # The server has stopped, and flushed.
    records = {(r["request_id"], key): r for key, r in consume(kafka_bootstrap, topic, 3)}

    one = records["features-1", "C1"]
    assert datetime.fromisoformat(one["t"]) == read.t == NOW
    assert datetime.fromisoformat(one["served_at"]).tzinfo is not None
    assert (one["project"], one["feature_service"], one["entity"]) == ("predictflow", SERVICE, {"customer_id": "C1"})
    assert {n: f["value"] for n, f in one["features"].items()} == read.rows[0].values
    assert {n: f["status"] for n, f in one["features"].items()} == read.rows[0].statuses
    charges = one["features"]["monthly_charges"]
    assert (charges["view"], charges["feature"]) == ("churn_features", "monthly_charges")
    account, behaviour = one["views"]["churn_features"], one["views"]["customer_behavior"]
    assert datetime.fromisoformat(account["event_timestamp"]) == NOW - timedelta(days=2)
    assert datetime.fromisoformat(account["created"]) == NOW - timedelta(days=1)
    assert (account["offsets"], account["visible_at"]) == (None, None)
    assert behaviour["offsets"] == {"0": 1}
    assert datetime.fromisoformat(behaviour["visible_at"]) == NOW
    assert (one["model"], one["version"], one["probability"]) == (None, None, None)
    assert records["features-1", "C2"]["features"]["tenure_months"]["status"] == "OUTSIDE_MAX_AGE"
    prediction = records["predict-1", "C1"]
    assert (prediction["model"], prediction["version"]) == (MODEL, predicted.version)
    assert prediction["probability"] == predicted.predictions[0].probability


def metrics(url: str) -> str:
    return requests.get(f"{url}/metrics", timeout=10).text


def consume(bootstrap: str, topic: str, count: int) -> list[tuple[str, dict[str, Any]]]:
    from confluent_kafka import Consumer

    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": topic, "auto.offset.reset": "earliest"})
    consumer.subscribe([topic])
    got: list[tuple[str, dict[str, Any]]] = []

    def enough() -> bool:
        message = consumer.poll(0.2)
        if message is not None and message.error() is None:
            got.append((message.key().decode(), json.loads(message.value())))
        return len(got) >= count

    try:
        wait_until(enough)
    finally:
        consumer.close()
    return got


def test_the_command_serves_drains_on_sigterm_and_reports_a_busy_port(platform: Platform) -> None:
    env = {**os.environ, "PYTHONUNBUFFERED": "1"}
    command = [
        sys.executable,
        "-m",
        "predictflow.cli",
        "serve",
        "--no-served-log",
        "--no-model",
        "--grpc-port",
        "0",
        "--port",
    ]
    port = free_port()
    address = f"http://{HOST}:{port}"
    server = subprocess.Popen([*command, str(port)], env=env, stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: server.poll() is not None or answers(f"{address}/readyz"), 150)
        busy = subprocess.run([*command, str(port)], env=env, capture_output=True, text=True, timeout=120)
        answer = online(address, {"feature_service": SERVICE, "entities": {"customer_id": ["C1"]}})
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=30)
    finally:
        if server.poll() is None:
            server.kill()

    assert answer.ok, log
    assert server.returncode == 0, log
    lines = [json.loads(line) for line in log.splitlines() if line.startswith("{")]
    mine = next(line for line in lines if line.get("path") == "/api/v1/features/online")
    assert mine["request_id"] == answer.headers["X-Request-Id"]
    assert mine["status"] == 200
    assert busy.returncode == 1
    assert busy.stderr.count("\n") == 1
    assert f"{HOST}:{port}" in busy.stderr
    assert "--port" in busy.stderr


def test_several_workers_share_port_and_metrics(platform: Platform) -> None:
    port = free_port()
    command = [sys.executable, "-m", "predictflow.cli", "serve", "--no-served-log", "--no-model", "--workers", "2"]
    grpc_port = free_port()
    command += ["--grpc-port", str(grpc_port)]
    address = f"http://{HOST}:{port}"
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: server.poll() is not None or answers(f"{address}/readyz"), 150)
        for _ in range(10):
            assert online(address, {"feature_service": SERVICE, "entities": {"customer_id": ["C9"]}}).ok
        line = 'predictflow_served_rows_total{service="churn_v1"} 10.0'
        assert line in metrics(address)
        assert {grpc_charges(grpc_port) for _ in range(10)} == {0.1 + 0.2}
        busy = subprocess.run([*command, "--port", "0"], capture_output=True, text=True, timeout=120)
        assert busy.returncode == 1
        assert f"{HOST}:{grpc_port}" in busy.stderr
        assert "--grpc-port" in busy.stderr
        server.send_signal(signal.SIGTERM)
        _, log = server.communicate(timeout=60)
    finally:
        if server.poll() is None:
            server.kill()
    assert server.returncode == 0, log


def grpc_charges(port: int) -> float:
    """monthly_charges of C1, over a connection of its own: any worker may take it."""
    import grpc
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
    from feast.protos.feast.serving.ServingService_pb2_grpc import ServingServiceStub
    from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value

    request = GetOnlineFeaturesRequest(
        feature_service=SERVICE, entities={"customer_id": RepeatedValue(val=[Value(string_val="C1")])}
    )
    with grpc.insecure_channel(f"{HOST}:{port}", options=[("grpc.use_local_subchannel_pool", 1)]) as channel:
        answer = ServingServiceStub(channel).GetOnlineFeatures(request, timeout=20)
    names = list(answer.metadata.feature_names.val)
    return float(answer.results[names.index("monthly_charges")].values[0].double_val)


def answers(url: str) -> bool:
    try:
        return requests.get(url, timeout=2).ok
    except (requests.ConnectionError, requests.Timeout):  # it listens before it answers
        return False
