"""The Python client over gRPC, blocking and on an event loop, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import grpc
import numpy as np
import pandas as pd
import pytest

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.client import AsyncFeatureClient, FeatureClient
from serving.limits import Gate
from tests.integration.grpc_support import NOW, Repo, serving


@pytest.fixture(scope="module")
def repo(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    import redis

    url = f"redis://{redis_server}/510"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return Repo(tmp_path_factory.mktemp("client"), url)


@pytest.fixture(scope="module")
def url(repo: Repo) -> Iterator[str]:
    with serving(repo) as (address, _):
        yield f"grpc://{address}"


def test_features_are_those_of_the_sdk(repo: Repo, url: str) -> None:
    customers = ["C1", "C2", "C3", "C9"]
    service = repo.store.get_feature_service("all")
    want = repo.store.get_online_features(service, [{"customer_id": c} for c in customers]).to_dict()
    with FeatureClient(url) as client:
        answer = client.get_online_features({"customer_id": customers}, feature_service="all")

    async def on_a_loop() -> object:
        async with AsyncFeatureClient(url) as client:
            return await client.get_online_features({"customer_id": customers}, feature_service="all")

    assert asyncio.run(on_a_loop()) == answer
    assert {n: [r.values[n] for r in answer.rows] for n in answer.feature_names} == {
        n: v for n, v in want.items() if n != "customer_id"
    }
    first = answer.rows[0]
    assert first.entity == {"customer_id": "C1"}
    assert first.event_timestamps["plan"] == NOW
    assert [r.statuses["plan"] for r in answer.rows] == ["PRESENT", "PRESENT", "OUTSIDE_MAX_AGE", "NOT_FOUND"]
    assert list(answer.to_df().columns) == ["customer_id", *answer.feature_names]


def test_pushed_rows_are_read_back(url: str) -> None:
    rows = {
        "customer_id": ["G1", "G2"],
        "charges": [1.25, None],
        "plan": ["a", "b"],
        "since": [NOW - timedelta(days=1), NOW],
        "tags": [["x"], ["y", "z"]],
        "active": [True, False],
        "event_timestamp": [NOW, NOW],
    }
    with FeatureClient(url) as client:
        assert client.push(rows, push_source="account_push", to="online").rows == 2
        assert (
            client.push(
                {"customer_id": ["G1"], "visits": [3], "event_timestamp": [NOW]}, feature_view="visits", to="online"
            ).rows
            == 1
        )
        answer = client.get_online_features(
            {"customer_id": ["G1", "G2"]}, features=["account:charges", "visits:visits"]
        )
    assert answer.rows[0].event_timestamps == {"charges": NOW, "visits": NOW}, "microseconds arrive"
    assert [row.values for row in answer.rows] == [{"charges": 1.25, "visits": 3}, {"charges": None, "visits": None}]


def test_numpy_and_pandas_values_are_sent(url: str) -> None:
    rows = pd.DataFrame(
        {
            "customer_id": ["N1", "N2", "N3"],
            "charges": np.array([1.5, np.nan, np.inf]),
            "plan": pd.Series(["a", pd.NA, "c"], dtype="string"),
            "since": pd.Series([NOW, pd.NaT, NOW]),
            "tags": [np.array(["x"]), ["y"], None],
            "active": pd.Series([True, None, False], dtype="boolean"),
            "event_timestamp": pd.Series([pd.Timestamp(NOW) + pd.Timedelta(1, "ns")] * 3),
        }
    )
    with FeatureClient(url) as client:
        assert client.push(rows, push_source="account_push", to="online").rows == 3  # type: ignore[arg-type]
        answer = client.get_online_features({"customer_id": rows["customer_id"]}, feature_service="all")
        with pytest.raises(UsageError, match=r"column tags: values that cannot be sent over gRPC: .*'str'"):
            client.push({**dict(rows), "tags": [["x"], "y", 1]}, push_source="account_push", to="online")
    assert str([row.values["charges"] for row in answer.rows]) == "[1.5, None, inf]", "the store keeps no NaN"
    assert [row.values["plan"] for row in answer.rows] == ["a", None, "c"]
    assert [row.values["tags"] for row in answer.rows] == [["x"], ["y"], None]
    assert [row.values["active"] for row in answer.rows] == [True, None, False]
    assert answer.rows[0].event_timestamps["charges"] == NOW


def test_errors_are_the_same_kinds_as_over_rest(repo: Repo, url: str) -> None:
    slept: list[float] = []
    with FeatureClient(url, sleep=slept.append) as client:
        with pytest.raises(NotFoundError, match="did you mean 'all'"):
            client.get_online_features({"customer_id": ["C1"]}, feature_service="al")
        with pytest.raises(UsageError, match="join key"):
            client.get_online_features({"x": ["C1"]}, feature_service="all")
        with pytest.raises(UsageError, match="not offered over gRPC"):
            client.predict("m", {"customer_id": ["C1"]})
    assert slept == []
    with (
        serving(repo, Gate(None, 0)) as (address, _),
        FeatureClient(f"grpc://{address}", retries=1, sleep=slept.append) as client,
        pytest.raises(UnavailableError) as raised,
    ):
        client.get_online_features({"customer_id": ["C1"]}, feature_service="all")
    assert raised.value.code == "overloaded"
    assert len(slept) == 1
    assert slept[0] >= 1, "the server's Retry-After is honoured"
    with (
        FeatureClient("grpc://127.0.0.1:1", retries=1, sleep=slept.append) as client,
        pytest.raises(UnavailableError, match="predictflow serve"),
    ):
        client.get_online_features({"customer_id": ["C1"]}, feature_service="all")


def test_what_grpc_itself_refuses_as_too_many_is_tried_again_and_a_message_too_large_is_not(repo: Repo) -> None:
    from concurrent.futures import ThreadPoolExecutor

    slept: list[float] = []
    full = grpc.server(ThreadPoolExecutor(1), maximum_concurrent_rpcs=0)
    methods = {"GetOnlineFeatures": grpc.unary_unary_rpc_method_handler(lambda request, _: request)}
    full.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("feast.serving.ServingService", methods),))
    port = full.add_insecure_port("127.0.0.1:0")
    full.start()
    with (
        FeatureClient(f"grpc://127.0.0.1:{port}", retries=2, sleep=slept.append) as client,
        pytest.raises(UnavailableError, match="Concurrent RPC limit") as raised,
    ):
        client.get_online_features({"customer_id": ["C1"]}, feature_service="all")
    full.stop(None).wait()
    assert (raised.value.code, len(slept)) == ("resource_exhausted", 2)
    slept.clear()
    with (
        serving(repo, request_bytes=1000) as (address, _),
        FeatureClient(f"grpc://{address}", sleep=slept.append) as client,
        pytest.raises(PredictFlowError, match="larger than max"),
    ):
        client.get_online_features({"customer_id": ["C" * 2000]}, feature_service="all")
    assert slept == []


def test_tls_trusts_the_given_file_only(repo: Repo, tmp_path: Path) -> None:
    import subprocess

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(repo, tls=(key.read_bytes(), certificate.read_bytes())) as (address, _):
        with FeatureClient(f"grpcs://{address}", ca_file=certificate) as client:
            assert client.get_online_features({"customer_id": ["C1"]}, feature_service="all").rows
        with FeatureClient(f"grpcs://{address}", retries=0) as client, pytest.raises(UnavailableError):
            client.get_online_features({"customer_id": ["C1"]}, feature_service="all")
