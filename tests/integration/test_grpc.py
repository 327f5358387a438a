"""The gRPC server over a real socket, spoken to with the stubs that Feast generates from its own protos."""

from __future__ import annotations

import random
import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import grpc
import pytest
from feast.protos.feast.serving import GrpcServer_pb2 as server_pb2
from feast.protos.feast.serving import ServingService_pb2 as pb2
from feast.protos.feast.serving.GrpcServer_pb2_grpc import GrpcFeatureServerStub
from feast.protos.feast.serving.ServingService_pb2_grpc import ServingServiceStub
from feast.protos.feast.types.Value_pb2 import Null, RepeatedValue, StringList, Value
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from feature_store.errors import PredictFlowError, UsageError
from serving.access import ApiKey
from serving.grpc_calls import client_of
from serving.grpc_push import StoreWriter
from serving.grpc_server import SPARE_RPCS
from serving.limits import Gate
from tests.integration.grpc_support import NOW, Repo, serving

Code = grpc.StatusCode


@pytest.fixture(scope="module")
def repo(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Repo:
    import redis

    url = f"redis://{redis_server}/511"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return Repo(tmp_path_factory.mktemp("grpc"), url)


@pytest.fixture(scope="module")
def address(repo: Repo) -> Iterator[str]:
    with serving(repo) as (address, _):
        yield address


@pytest.fixture(scope="module")
def channel(address: str) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(address) as channel:
        yield channel


def strings(*values: str) -> RepeatedValue:
    return RepeatedValue(val=[Value(string_val=v) for v in values])


def request(*customers: str, **fields: Any) -> pb2.GetOnlineFeaturesRequest:
    if "features" not in fields:
        fields.setdefault("feature_service", "all")
    return pb2.GetOnlineFeaturesRequest(entities={"customer_id": strings(*customers)}, **fields)


def refused(call: Any, *args: Any, **kwargs: Any) -> grpc.RpcError:
    with pytest.raises(grpc.RpcError) as e:
        call(*args, timeout=10, **kwargs)
    return e.value


def test_both_services_answer_as_the_sdk_does(repo: Repo, channel: grpc.Channel) -> None:
    customers = ["C1", "C2", "C3", "C9", "C1"]
    sdk = repo.store.get_online_features(repo.store.get_feature_service("all"), {"customer_id": list(customers)}).proto
    for stub in (GrpcFeatureServerStub(channel), ServingServiceStub(channel)):
        answer = stub.GetOnlineFeatures(request(*customers), timeout=10)
        assert answer == sdk
    assert {s for vector in sdk.results for s in vector.statuses} == {1, 2, 3, 4}, "the case covers every status"


def test_references_full_names_and_versions(channel: grpc.Channel) -> None:
    features = pb2.FeatureList(val=["visits:visits", "account:plan"])
    answer = GrpcFeatureServerStub(channel).GetOnlineFeatures(
        request("C1", features=features, full_feature_names=True, include_feature_view_version_metadata=True),
        timeout=10,
    )
    assert list(answer.metadata.feature_names.val) == ["customer_id", "visits__visits", "account__plan"]
    assert [m.name for m in answer.metadata.feature_view_metadata] == ["visits", "account"]
    assert answer.results[1].values[0].int64_val == -(2**53) - 1
    assert answer.results[1].event_timestamps[0].ToDatetime().replace(tzinfo=NOW.tzinfo) == NOW


def test_info_health_and_reflection(channel: grpc.Channel) -> None:
    assert ServingServiceStub(channel).GetFeastServingInfo(pb2.GetFeastServingInfoRequest(), timeout=10).version
    health = health_pb2_grpc.HealthStub(channel)
    for service in ("", "GrpcFeatureServer", "feast.serving.ServingService"):
        checked = health.Check(health_pb2.HealthCheckRequest(service=service), timeout=10)
        assert checked.status == health_pb2.HealthCheckResponse.SERVING
    asked = reflection_pb2.ServerReflectionRequest(file_containing_symbol="GrpcFeatureServer")
    (answer,) = reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([asked]), timeout=10)
    assert answer.file_descriptor_response.file_descriptor_proto


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        (request("C1", feature_service="alll"), Code.NOT_FOUND, "did you mean 'all'"),
        (request("C1", features=pb2.FeatureList(val=["account:no"])), Code.NOT_FOUND, "account"),
        (request("C1", features=pb2.FeatureList(val=["nonsense"])), Code.INVALID_ARGUMENT, "view:feature"),
        (request("C1", features=pb2.FeatureList(val=["account:plan"] * 9)), Code.INVALID_ARGUMENT, "limit 8"),
        (request(*["C1"] * 121), Code.INVALID_ARGUMENT, "limit 120"),
        (request(), Code.INVALID_ARGUMENT, "at least one value"),
        (pb2.GetOnlineFeaturesRequest(entities={"customer_id": strings("C1")}), Code.INVALID_ARGUMENT, "neither"),
        (pb2.GetOnlineFeaturesRequest(feature_service="all"), Code.INVALID_ARGUMENT, "entities"),
        (
            pb2.GetOnlineFeaturesRequest(feature_service="all", entities={"x": strings("C1")}),
            Code.INVALID_ARGUMENT,
            "x",
        ),
        (
            pb2.GetOnlineFeaturesRequest(
                feature_service="all",
                entities={"customer_id": RepeatedValue(val=[Value(string_list_val=StringList(val=["C1"]))])},
            ),
            Code.INVALID_ARGUMENT,
            "scalar",
        ),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_errors_are_statuses_with_the_message(channel: grpc.Channel, asked: Any, code: Code, said: str) -> None:
    error = refused(GrpcFeatureServerStub(channel).GetOnlineFeatures, asked, metadata=(("x-request-id", "r-1"),))
    assert error.code() == code
    assert said in error.details()
    assert dict(error.trailing_metadata())["x-request-id"] == "r-1"


def test_a_null_key_finds_nothing(channel: grpc.Channel) -> None:
    nothing = RepeatedValue(val=[Value(null_val=Null.NULL), Value()])
    asked = pb2.GetOnlineFeaturesRequest(feature_service="all", entities={"customer_id": nothing})
    answer = GrpcFeatureServerStub(channel).GetOnlineFeatures(asked, timeout=10)
    assert {s for vector in answer.results[1:] for s in vector.statuses} == {3}


def test_pushes_and_writes_are_read_back(repo: Repo, channel: grpc.Channel) -> None:
    stub = GrpcFeatureServerStub(channel)
    now = Value(unix_timestamp_val=int(NOW.timestamp()))
    typed = {
        "customer_id": Value(string_val="P1"),
        "charges": Value(double_val=2.5),
        "plan": Value(null_val=Null.NULL),
        "since": now,
        "tags": Value(string_list_val=StringList(val=["a", "b"])),
        "active": Value(bool_val=True),
        "event_timestamp": now,
    }
    pushed = server_pb2.PushRequest(typed_features=typed, stream_feature_view="account_push", to="online")
    assert stub.Push(pushed, timeout=20).status
    row = {"customer_id": "P1", "visits": "7", "event_timestamp": NOW.isoformat()}
    assert stub.WriteToOnlineStore(
        server_pb2.WriteToOnlineStoreRequest(features=row, feature_view_name="visits"), timeout=20
    ).status
    answer = stub.GetOnlineFeatures(request("P1"), timeout=10)
    got = dict(zip(answer.metadata.feature_names.val, answer.results))
    assert got["charges"].values[0].double_val == 2.5
    assert got["plan"].statuses[0] == pb2.FieldStatus.NULL_VALUE
    assert list(got["tags"].values[0].string_list_val.val) == ["a", "b"]
    assert got["visits"].values[0].int64_val == 7


@pytest.mark.parametrize(
    ("asked", "code", "said"),
    [
        ({"features": {"customer_id": "P"}, "stream_feature_view": "no", "to": "online"}, Code.NOT_FOUND, "account_push"),
        ({"features": {"a": "b"}, "stream_feature_view": "account_push", "to": "x"}, Code.INVALID_ARGUMENT, "online"),
        ({"features": {"a": "b"}, "stream_feature_view": "account_push", "to": "online"}, Code.INVALID_ARGUMENT, "no such column"),
        ({"features": {"customer_id": "P"}, "stream_feature_view": "account_push", "to": "online"}, Code.INVALID_ARGUMENT, "missing"),
        ({"features": {"charges": "lots"}, "stream_feature_view": "account_push", "to": "online"}, Code.INVALID_ARGUMENT, "lots"),
        ({"features": {"tags": "a"}, "stream_feature_view": "account_push", "to": "online"}, Code.INVALID_ARGUMENT, "typed"),
        ({"stream_feature_view": "account_push", "to": "online"}, Code.INVALID_ARGUMENT, "empty"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)  # fmt: skip
def test_bad_pushes_are_refused(channel: grpc.Channel, asked: Any, code: Code, said: str) -> None:
    error = refused(GrpcFeatureServerStub(channel).Push, server_pb2.PushRequest(**asked))
    assert error.code() == code
    assert said in error.details()


def test_a_windowed_view_is_not_pushed_to(channel: grpc.Channel) -> None:
    asked = server_pb2.WriteToOnlineStoreRequest(features={"customer_id": "C1"}, feature_view_name="behavior")
    error = refused(GrpcFeatureServerStub(channel).WriteToOnlineStore, asked)
    assert (error.code(), "come from its stream" in error.details()) == (Code.INVALID_ARGUMENT, True)


METHODS = (
    "/feast.serving.ServingService/GetOnlineFeatures",
    "/feast.serving.ServingService/GetFeastServingInfo",
    "/GrpcFeatureServer/GetOnlineFeatures",
    "/GrpcFeatureServer/Push",
    "/GrpcFeatureServer/WriteToOnlineStore",
)
GROUND = (Code.INVALID_ARGUMENT, Code.NOT_FOUND)


def test_malformed_messages_get_a_status_and_kill_nothing(channel: grpc.Channel) -> None:
    rng = random.Random(4)
    seeds = [
        request("C1", "C2").SerializeToString(),
        request("C1", features=pb2.FeatureList(val=["account:plan"])).SerializeToString(),
        server_pb2.PushRequest(
            features={"a": "b"}, stream_feature_view="account_push", to="online"
        ).SerializeToString(),
    ]
    for _ in range(400):
        body = bytearray(rng.choice(seeds))
        for _ in range(rng.randint(1, 4)):
            match rng.randrange(4):
                case 0:
                    body[rng.randrange(len(body))] ^= 1 << rng.randrange(8)
                case 1:
                    del body[rng.randrange(len(body)) :]
                case 2:
                    body[rng.randrange(len(body) + 1) :] += rng.randbytes(rng.randrange(20))
                case 3:
                    body = bytearray(rng.randbytes(rng.randrange(60)))
            body = body or bytearray(b"\x0a")
        try:
            channel.unary_unary(rng.choice(METHODS))(bytes(body), timeout=10)
        except grpc.RpcError as e:
            assert e.code() in GROUND, (bytes(body), e.code(), e.details())  # noqa: PT017  # an answer is right too
    assert GrpcFeatureServerStub(channel).GetOnlineFeatures(request("C1"), timeout=10).results


def test_malformed_frames_kill_nothing(address: str, channel: grpc.Channel) -> None:
    rng = random.Random(5)
    preface = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\x00\x00\x00\x04\x00\x00\x00\x00\x00"
    host, _, port = address.partition(":")
    for i in range(60):
        with socket.create_connection((host, int(port)), 5) as raw:
            raw.sendall((preface if i % 2 else b"") + rng.randbytes(rng.randrange(200)))
    assert GrpcFeatureServerStub(channel).GetOnlineFeatures(request("C1"), timeout=10).results


def test_a_request_over_the_byte_limit_is_refused(repo: Repo) -> None:
    with serving(repo, request_bytes=1000) as (address, _), grpc.insecure_channel(address) as channel:
        error = refused(GrpcFeatureServerStub(channel).GetOnlineFeatures, request("C" * 2000))
        assert error.code() == Code.RESOURCE_EXHAUSTED


def test_metrics_tell_latency_and_age(repo: Repo) -> None:
    with serving(repo) as (address, server), grpc.insecure_channel(address) as channel:
        asked = request("C1", "C2", features=pb2.FeatureList(val=["visits:visits"]))
        GrpcFeatureServerStub(channel).GetOnlineFeatures(asked, timeout=10)
        told = server._online._metrics.expose().decode().splitlines()
    route = 'route="grpc:GrpcFeatureServer/GetOnlineFeatures"'
    assert f'predictflow_service_seconds_count{{{route},service=""}} 1.0' in told
    assert 'predictflow_feature_age_seconds_count{view="visits"} 1.0' in told
    (age,) = [float(line.split()[1]) for line in told if line.startswith("predictflow_feature_age_seconds_sum")]
    assert abs(age - (datetime.now(UTC) - NOW).total_seconds()) < 120


def test_metrics_tell_the_two_services_apart(repo: Repo) -> None:
    with serving(repo) as (address, server), grpc.insecure_channel(address) as channel:
        for _ in range(2):
            ServingServiceStub(channel).GetOnlineFeatures(request("C1"), timeout=10)
        GrpcFeatureServerStub(channel).GetOnlineFeatures(request("C1"), timeout=10)
        told = server._online._metrics.expose().decode().splitlines()
    for service, n in (("ServingService", 2.0), ("GrpcFeatureServer", 1.0)):
        route = f'route="grpc:{service}/GetOnlineFeatures"'
        assert f'predictflow_service_seconds_count{{{route},service="all"}} {n}' in told
        assert f'predictflow_request_seconds_count{{method="GRPC",{route},status="OK"}} {n}' in told


class KeyGate(Gate):
    """Knows one key, which may read."""

    def judge(self, caller: Any, headers: Any, scope_needed: str) -> PredictFlowError | None:
        error = UsageError("unknown API key")
        error.code = "unauthorized"
        if headers.get(b"x-api-key") != b"secret":
            return error
        error.code = "forbidden"
        return None if scope_needed == "read" else error


def test_keys_and_slots_are_the_gates(repo: Repo) -> None:
    with serving(repo, KeyGate()) as (address, _), grpc.insecure_channel(address) as channel:
        stub, key = GrpcFeatureServerStub(channel), (("x-api-key", "secret"),)
        assert refused(stub.GetOnlineFeatures, request("C1")).code() == Code.UNAUTHENTICATED
        assert stub.GetOnlineFeatures(request("C1"), timeout=10, metadata=key).results
        pushed = server_pb2.PushRequest(features={"a": "b"}, stream_feature_view="account_push", to="online")
        assert refused(stub.Push, pushed, metadata=key).code() == Code.PERMISSION_DENIED
    with serving(repo, Gate(None, 0)) as (address, _), grpc.insecure_channel(address) as channel:
        error = refused(GrpcFeatureServerStub(channel).GetOnlineFeatures, request("C1"))
        assert error.code() == Code.RESOURCE_EXHAUSTED
        assert dict(error.trailing_metadata())["retry-after"] == "1"


def slow(server: Any, seconds: float) -> threading.Event:
    """Makes the server's reads take that long, before the read itself; the event is set when one began."""
    import asyncio

    began = threading.Event()
    fast = server._online.stored

    async def stored(*args: Any) -> Any:
        began.set()
        await asyncio.sleep(seconds)
        return await fast(*args)

    server._online.stored = stored
    return began


def test_calls_beyond_the_bound_are_refused_before_the_gate_sees_them(repo: Repo) -> None:
    gate = Gate(None, 8)
    gate.concurrent = 1 - SPARE_RPCS  # what the server is told at its start
    with serving(repo, gate) as (address, server), grpc.insecure_channel(address) as channel:
        gate.concurrent = 8
        began = slow(server, 1)
        stub = GrpcFeatureServerStub(channel)
        first = stub.GetOnlineFeatures.future(request("C1"), timeout=20)
        assert began.wait(10)
        error = refused(stub.GetOnlineFeatures, request("C1"))
        assert (error.code(), gate.busy) == (Code.RESOURCE_EXHAUSTED, 1)
        assert error.trailing_metadata() == ()
        assert first.result(20).results


def test_the_time_budget_and_the_clients_deadline_end_a_request(repo: Repo) -> None:
    with serving(repo, seconds=0.2) as (address, server), grpc.insecure_channel(address) as channel:
        slow(server, 30)
        assert refused(GrpcFeatureServerStub(channel).GetOnlineFeatures, request("C1")).code() == Code.DEADLINE_EXCEEDED
    gate = Gate(None, 1)
    with serving(repo, gate) as (address, server), grpc.insecure_channel(address) as channel:
        slow(server, 30)
        with pytest.raises(grpc.RpcError) as e:
            GrpcFeatureServerStub(channel).GetOnlineFeatures(request("C1"), timeout=0.2)
        assert e.value.code() == Code.DEADLINE_EXCEEDED
        deadline = time.monotonic() + 10
        while gate.busy:  # its slot comes back as soon as nobody waits for the answer any more
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_stopping_server_finishes_what_is_under_way(repo: Repo) -> None:
    with serving(repo) as (address, server):
        began = slow(server, 0.5)
        channel = grpc.insecure_channel(address)
        call = GrpcFeatureServerStub(channel).GetOnlineFeatures.future(request("C1"), timeout=20)
        assert began.wait(10)
    assert call.result(20).results
    channel.close()


def test_tls(repo: Repo, tmp_path: Path) -> None:
    import subprocess

    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=localhost", "-days", "2",
         "-addext", "subjectAltName=DNS:localhost,IP:127.0.0.1", "-keyout", str(key), "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    with serving(repo, tls=(key.read_bytes(), certificate.read_bytes())) as (address, _):
        trusted = grpc.ssl_channel_credentials(certificate.read_bytes())
        with grpc.secure_channel(address, trusted) as channel:
            assert GrpcFeatureServerStub(channel).GetOnlineFeatures(request("C1"), timeout=10).results
        with grpc.insecure_channel(address) as channel:
            assert refused(GrpcFeatureServerStub(channel).GetOnlineFeatures, request("C1")).code() == Code.UNAVAILABLE


def test_a_row_goes_by_our_names_and_in_its_own_types(repo: Repo) -> None:
    """`created` is left to the push, which knows what clock the rows are under."""
    pushed: list[Any] = []
    writer = StoreWriter(repo.store, lambda *what: pushed.append(what))
    writer.write("visits", {"customer_id": "C1", "visits": "3", "event_timestamp": "2026-01-01T00:00:00.000001Z"})
    ((view, source, columns, to),) = pushed
    assert (view, source, to) == ("visits", None, "online")
    assert columns["visits"] == [3]
    assert columns["event_timestamp"][0].microsecond == 1
    assert "created" not in columns


def test_a_value_that_no_python_value_stands_for_is_the_requests_fault(channel: grpc.Channel) -> None:
    asked = server_pb2.WriteToOnlineStoreRequest(
        typed_features={"event_timestamp": Value(unix_timestamp_val=2**62)}, feature_view_name="visits"
    )
    error = refused(GrpcFeatureServerStub(channel).WriteToOnlineStore, asked)
    assert (error.code(), "event_timestamp" in error.details()) == (Code.INVALID_ARGUMENT, True)


def test_an_access_line_names_client_and_key(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    class Named(Gate):
        def caller(self, headers: Any) -> ApiKey | None:
            return ApiKey("reader", frozenset({"read"}), b"")

    caplog.set_level("INFO", "predictflow.access")
    with serving(repo, Named()) as (address, _), grpc.insecure_channel(address) as channel:
        GrpcFeatureServerStub(channel).GetOnlineFeatures(request("C1"), timeout=10)
    # The server that other tests share may still log a request of theirs.
    lines = [vars(r) for r in caplog.records if r.name == "predictflow.access"]
    assert [line["client"] for line in lines if line.get("key") == "reader"] == ["127.0.0.1"]


@pytest.mark.parametrize(
    ("peer", "client"),
    [("ipv4:10.0.0.1:5", "10.0.0.1"), ("ipv6:%5B::1%5D:5", "::1"), ("unix:", None), ("", None)],
)
def test_a_peer_is_told_by_its_address(peer: str, client: str | None) -> None:
    assert client_of(peer) == client
