"""The REST server on a real Postgres registry, Redis, MLflow model and (served log) Kafka, over a real socket."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path
from typing import Any

import pytest
import requests
from serving_platform import MODEL, NOW, SERVICE, Platform, answers, serving, train, wait_until

from feature_store.errors import NotFoundError, UnavailableError
from feature_store.registry import FeatureRegistry
from predictflow.local.ports import HOST, free_port
from serving import schemas
from serving.client import FeatureClient


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


def test_promotion_under_load_swaps_the_model_without_a_failed_request(
    url: str, platform: Platform, model: Path, feature_names: list[str]
) -> None:
    before = FeatureClient(url).predict(MODEL, {"customer_id": ["C9"]})
    failed: list[object] = []
    seen: list[list[str]] = [[] for _ in range(4)]
    stop = threading.Event()

    def ask(versions: list[str]) -> None:
        body = {"entities": {"customer_id": ["C1", "C9"]}}
        with requests.Session() as session:
            while not stop.is_set():
                try:
                    answer = session.post(f"{url}/api/v1/predict/{MODEL}", json=body, timeout=30)
                except requests.RequestException as e:  # a dropped connection is a failed request too
                    failed.append(e)
                    continue
                if answer.ok:
                    versions.append(answer.json()["version"])
                else:
                    failed.append(answer.text)

    asking = [threading.Thread(target=ask, args=(versions,)) for versions in seen]
    for thread in asking:
        thread.start()
    try:
        version = train(platform.settings.need("mlflow_tracking_uri"), model, feature_names, 5)
        wait_until(lambda: all(versions and versions[-1] == version for versions in seen))
    finally:
        stop.set()
        for thread in asking:
            thread.join()

    after = FeatureClient(url).predict(MODEL, {"customer_id": ["C9"]})
    assert failed == []
    for versions in seen:
        assert list(dict.fromkeys(versions)) == [before.version, version]  # both, and never back
        assert sorted(versions, key=int) == versions
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


@pytest.mark.parametrize("at", [None, NOW])
def test_metrics_tell_latency_by_service_and_age_by_view(url: str, at: datetime | None) -> None:
    """The short way of a request, and the other."""
    names = {
        "reads": f'predictflow_service_seconds_count{{route="/api/v1/features/online",service="{SERVICE}"}}',
        "rows": 'predictflow_feature_age_seconds_count{view="churn_features"}',
        "age": 'predictflow_feature_age_seconds_sum{view="churn_features"}',
        "windowed": 'predictflow_feature_age_seconds_sum{view="customer_behavior"}',
    }

    def told() -> dict[str, float]:
        found = dict(
            line.rsplit(" ", 1) for line in metrics(url).splitlines() if line.startswith(tuple(names.values()))
        )
        return {name: float(found.get(line, 0)) for name, line in names.items()}

    body: dict[str, Any] = {"feature_service": SERVICE, "entities": {"customer_id": ["C1", "C9"]}}
    online(url, body)
    time.sleep(0.2)  # ages are told of at most ten requests a second
    before = told()
    assert online(url, body if at is None else {**body, "at": at.isoformat()}).ok

    day = 86_400.0
    assert {n: v - before[n] for n, v in told().items()} == {"reads": 1, "rows": 1, "age": 2 * day, "windowed": 3 * day}


def test_metrics_tell_the_routes_of_a_service_apart(url: str) -> None:
    entities, at = {"customer_id": ["C1"]}, NOW.isoformat()
    predict, feast = "/api/v1/predict/{model}", "/get-online-features"
    asked: list[tuple[str, dict[str, Any]]] = [
        (predict, {"entities": entities}),
        (predict, {"entities": entities, "at": at}),  # the other way than the first
        (feast, {"feature_service": SERVICE, "entities": entities}),
    ]

    def told(route: str) -> float:
        line = f'predictflow_service_seconds_count{{route="{route}",service="{SERVICE}"}} '
        return sum(float(m.removeprefix(line)) for m in metrics(url).splitlines() if m.startswith(line))

    before = {route: told(route) for route, _ in asked}
    for route, body in asked:
        path = route.format(model=MODEL)
        assert requests.post(url + path, json=body, timeout=30).ok, path

    assert {route: told(route) - n for route, n in before.items()} == {predict: 2, feast: 1}


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


def test_several_workers_share_both_ports_and_metrics_over_tls(platform: Platform, tmp_path: Path) -> None:
    port, feast_port = free_port(), free_port()
    cert, key = self_signed(tmp_path)
    command = [sys.executable, "-m", "predictflow.cli", "serve", "--no-served-log", "--no-model", "--workers", "2"]
    command += ["--tls-cert", str(cert), "--tls-key", str(key), "--feast-port", str(feast_port)]
    address = f"https://{HOST}:{port}"
    grpc_port = free_port()
    command += ["--grpc-port", str(grpc_port)]
    server = subprocess.Popen([*command, "--port", str(port)], stderr=subprocess.PIPE, text=True)
    try:
        wait_until(lambda: server.poll() is not None or answers(f"{address}/readyz", verify=str(cert)), 250)
        body = {"feature_service": SERVICE, "entities": {"customer_id": ["C9"]}}
        for _ in range(10):
            assert online(address, body, verify=str(cert)).ok
        line = 'predictflow_served_rows_total{service="churn_v1"} 10.0'
        assert line in requests.get(f"{address}/metrics", timeout=10, verify=str(cert)).text
        feast = f"https://{HOST}:{feast_port}/get-online-features"
        assert requests.post(feast, json=body, timeout=10, verify=str(cert)).ok
        with pytest.raises(requests.ConnectionError):
            requests.get(f"http://{HOST}:{port}/healthz", timeout=10)
        assert {grpc_charges(grpc_port, cert) for _ in range(10)} == {0.1 + 0.2}
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


def self_signed(directory: Path) -> tuple[Path, Path]:
    """A certificate for this machine's loopback address, and its key."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "predictflow test")])
    now = datetime.now(UTC)
    built = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address(HOST))]), critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    certificate, private = directory / "cert.pem", directory / "key.pem"
    certificate.write_bytes(built.public_bytes(serialization.Encoding.PEM))
    private.write_bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )
    return certificate, private


def grpc_charges(port: int, cert: Path) -> float:
    """monthly_charges of C1, over a connection of its own: any worker may take it."""
    import grpc
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesRequest
    from feast.protos.feast.serving.ServingService_pb2_grpc import ServingServiceStub
    from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value

    request = GetOnlineFeaturesRequest(
        feature_service=SERVICE, entities={"customer_id": RepeatedValue(val=[Value(string_val="C1")])}
    )
    trusted = grpc.ssl_channel_credentials(cert.read_bytes())
    own = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(f"{HOST}:{port}", trusted, options=own) as channel:
        answer = ServingServiceStub(channel).GetOnlineFeatures(request, timeout=20)
    names = list(answer.metadata.feature_names.val)
    return float(answer.results[names.index("monthly_charges")].values[0].double_val)
