"""The Python client gives the same values, of the same types, over REST and over gRPC."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from uuid import UUID

import feast.types as feast
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value

from serving.client import FeatureClient, OnlineFeatures
from tests.integration.grpc_support import serving, serving_rest

NOW = datetime.now(UTC).replace(microsecond=0)
SECONDS = int(NOW.timestamp())
ID = "5b0b8ad0-7d4e-4c8b-9d5e-6f1f6a0f8a11"
HELD = {"a": Value(int64_val=1), "b": Value(string_val="x")}
NULL: dict[str, Any] = {}
CASES: dict[str, tuple[Any, list[dict[str, Any]], list[Any]]] = {
    "double": (
        feast.Float64,
        [{"double_val": v} for v in (0.1 + 0.2, math.nan, -math.inf)],
        [0.1 + 0.2, math.nan, -math.inf],
    ),
    "whole": (feast.Float64, [{"double_val": v} for v in (1.0, 2.0, -0.0)], [1.0, 2.0, -0.0]),
    "holes": (feast.Float64, [{"double_val": math.nan}, NULL, {"double_val": 1.5}], [math.nan, None, 1.5]),
    "float": (feast.Float32, [{"float_val": v} for v in (0.5, math.inf, math.nan)], [0.5, math.inf, math.nan]),
    "int64": (feast.Int64, [{"int64_val": v} for v in (2**63 - 1, -(2**53) - 1, 0)], [2**63 - 1, -(2**53) - 1, 0]),
    "int32": (feast.Int32, [{"int32_val": 7}, NULL, {"int32_val": -7}], [7, None, -7]),
    "text": (feast.String, [{"string_val": v} for v in ("NaN", "", "AP8=")], ["NaN", "", "AP8="]),
    "flag": (feast.Bool, [{"bool_val": True}, NULL, {"bool_val": False}], [True, None, False]),
    "raw": (feast.Bytes, [{"bytes_val": v} for v in (b"\x00\xff", b"", b"NaN")], [b"\x00\xff", b"", b"NaN"]),
    "since": (
        feast.UnixTimestamp,
        [{"unix_timestamp_val": SECONDS}, NULL, {"unix_timestamp_val": 0}],
        [NOW, None, datetime(1970, 1, 1, tzinfo=UTC)],
    ),
    "doubles": (
        feast.Array(feast.Float64),
        [{"double_list_val": {"val": [1.0, math.nan, math.inf]}}, NULL, {"double_list_val": {}}],
        [[1.0, math.nan, math.inf], None, []],
    ),
    "times": (
        feast.Array(feast.UnixTimestamp),
        [{"unix_timestamp_list_val": {"val": [SECONDS]}}, NULL, NULL],
        [[NOW], None, None],
    ),
    "blobs": (feast.Array(feast.Bytes), [{"bytes_list_val": {"val": [b"\xff"]}}, NULL, NULL], [[b"\xff"], None, None]),
    "words": (feast.Array(feast.String), [{"string_list_val": {"val": ["NaN"]}}, NULL, NULL], [["NaN"], None, None]),
    "numbers": (feast.Set(feast.Int64), [{"int64_set_val": {"val": [1, 2]}}, NULL, NULL], [{1, 2}, None, None]),
    "uuid": (feast.Uuid, [{"uuid_val": ID}, NULL, NULL], [UUID(ID), None, None]),
    "price": (feast.Decimal, [{"decimal_val": "1.10"}, NULL, NULL], [Decimal("1.10"), None, None]),
    "map": (feast.Map, [{"map_val": {"val": HELD}}, NULL, NULL], [{"a": 1, "b": "x"}, None, None]),
    "json": (feast.Json, [{"json_val": '{"a": [1, null]}'}, NULL, NULL], [{"a": [1, None]}, None, None]),
}
"""Feature: its type, what is stored, and what the client gives: of C1, C2 and C3."""
DTYPES = {
    "double": "float64",
    "whole": "float64",
    "holes": "float64",
    "float": "float64",
    "int64": "int64",
    "int32": "Int64",
    "text": "object",
    "flag": "boolean",
    "raw": "object",
    "since": "datetime64[us, UTC]",
    "doubles": "object",
}


@dataclass
class Urls:
    grpc: str
    hot: str
    framework: str


def _view(home: Path, name: str, key: Entity, fields: dict[str, Any]) -> FeatureView:
    return FeatureView(
        name=name,
        entities=[key],
        ttl=timedelta(0),
        schema=[Field(name=n, dtype=t) for n, t in fields.items()],
        source=FileSource(name=name, path=str(home / f"{name}.parquet"), timestamp_field="event_timestamp"),
    )


@pytest.fixture(scope="module")
def urls(redis_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Urls]:
    import redis

    home = tmp_path_factory.mktemp("transports")
    url = f"redis://{redis_server}/511"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    store = FeatureStore(
        config=RepoConfig(
            project="shop",
            provider="local",
            registry=str(home / "registry.db"),
            online_store={
                "type": "feature_store.online_store.PredictFlowOnlineStore",
                "connection_string": url,
            },
            entity_key_serialization_version=3,
        )
    )
    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    device = Entity(name="device", join_keys=["device_id"], value_type=ValueType.BYTES)
    every = _view(home, "every", customer, {name: kind for name, (kind, _, _) in CASES.items()})
    devices = _view(home, "devices", device, {"level": feast.Float64})
    store.apply([customer, device, every, devices, FeatureService(name="all", features=[every])])
    rows: list[Any] = []
    for i in range(3):
        key = EntityKey(join_keys=["customer_id"], entity_values=[Value(string_val=f"C{i + 1}")])
        rows.append((key, {name: Value(**stored[i]) for name, (_, stored, _) in CASES.items()}, NOW, NOW))
    provider = store._get_provider()
    provider.online_write_batch(store.config, every, rows, None)
    key = EntityKey(join_keys=["device_id"], entity_values=[Value(bytes_val=b"\x00\xff")])
    provider.online_write_batch(store.config, devices, [(key, {"level": Value(double_val=math.nan)}, NOW, NOW)], None)
    repo: Any = SimpleNamespace(store=store, redis_url=url)
    with (
        serving(repo) as (address, server),
        serving_rest(server, True) as hot,
        serving_rest(server, False) as framework,
    ):
        yield Urls(f"grpc://{address}", hot, framework)


def _read(url: str, entities: dict[str, Any], **asked: Any) -> OnlineFeatures:
    with FeatureClient(url) as client:
        return client.get_online_features(entities, **asked)


def _typed(value: Any) -> Any:
    """A value with the types of all that it holds; floats by their bits, as NaN equals nothing."""
    if isinstance(value, list):
        return [_typed(v) for v in value]
    if isinstance(value, float):
        return "float", value.hex()
    return type(value).__name__, value


@pytest.mark.parametrize("transport", ["grpc", "hot", "framework"])
def test_values_are_pythons_own_of_the_declared_types_over_every_transport(urls: Urls, transport: str) -> None:
    customers = {"customer_id": ["C1", "C2", "C3", "C9"]}
    answer = _read(getattr(urls, transport), customers, feature_service="all")
    for name, (_, _, wanted) in CASES.items():
        got = [_typed(row.values[name]) for row in answer.rows]
        assert got == [_typed(v) for v in [*wanted, None]], name
    assert answer.rows[0].values["since"].utcoffset() == timedelta(0)
    over_grpc = _read(urls.grpc, customers, feature_service="all")
    assert answer.feature_types == over_grpc.feature_types
    assert [(r.entity, r.statuses, r.event_timestamps) for r in answer.rows] == [
        (r.entity, r.statuses, r.event_timestamps) for r in over_grpc.rows
    ]


@pytest.mark.parametrize("transport", ["grpc", "hot", "framework"])
def test_frames_have_the_dtypes_of_the_types(urls: Urls, transport: str) -> None:
    answer = _read(getattr(urls, transport), {"customer_id": ["C1", "C2", "C3"]}, feature_service="all")
    frame = answer.to_df()
    assert {name: str(frame[name].dtype) for name in DTYPES} == DTYPES
    assert frame["int64"].tolist() == [2**63 - 1, -(2**53) - 1, 0]
    assert frame["int32"].isna().tolist() == [False, True, False]
    assert frame["holes"].isna().tolist() == [True, True, False]
    assert frame["since"].isna().tolist() == [False, True, False]


@pytest.mark.parametrize("transport", ["grpc", "hot", "framework"])
def test_a_key_of_bytes_comes_back_as_bytes(urls: Urls, transport: str) -> None:
    (row,) = _read(getattr(urls, transport), {"device_id": [b"\x00\xff"]}, features=["devices:level"]).rows
    assert row.entity == {"device_id": b"\x00\xff"}
    assert _typed(row.values["level"]) == ("float", "nan")
