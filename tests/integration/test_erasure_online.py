"""An entity erased from the online store is gone from views of every kind, and no write of Feast's brings it back."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_source import PushSource
from feast.labeling.label_view import LabelView
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Int64, String

from feature_store.erasure_list import ErasureList
from feature_store.erasure_online import erase_online
from feature_store.errors import UnavailableError

T = datetime(2026, 1, 1, 12, tzinfo=UTC)
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.INT64)


def store_on(home: Path, redis_url: str, provider: str = "local") -> FeatureStore:
    return FeatureStore(
        config=RepoConfig(
            project="shop",
            provider=provider,
            registry=str(home / "registry.db"),
            online_store={
                "type": "feature_store.online_store.PredictFlowOnlineStore",
                "connection_string": redis_url,
                "expired_values": "keep",
            },
            offline_store={
                "type": "feature_store.offline_store.PredictFlowOfflineStore",
                "path": str(home / "offline"),
            },
            entity_key_serialization_version=3,
        )
    )


def source(home: Path, name: str) -> FileSource:
    return FileSource(name=name, path=str(home / f"{name}.parquet"), timestamp_field="event_timestamp")


@pytest.fixture(params=["local", "feature_store.provider.PredictFlowProvider"])
def store(tmp_path: Path, redis_url: str, request: pytest.FixtureRequest) -> FeatureStore:
    store = store_on(tmp_path, redis_url, request.param)
    visits = FeatureView(
        name="visits",
        entities=[customer, shop],
        ttl=timedelta(0),
        schema=[Field(name="n", dtype=Int64)],
        source=PushSource(name="visits_push", batch_source=source(tmp_path, "visits")),
    )
    labels = LabelView(
        name="labels",
        entities=[shop],
        source=PushSource(name="labels_push", batch_source=source(tmp_path, "labels")),
        schema=[Field(name="labeler", dtype=String), Field(name="good", dtype=Int64)],
    )
    store.apply([customer, shop, visits, labels])
    return store


def visits_of(*shops: int) -> pd.DataFrame:
    n = len(shops)
    return pd.DataFrame({"customer_id": ["C"] * n, "shop_id": shops, "n": shops, "event_timestamp": [T] * n})


def read(store: FeatureStore, *shops: int) -> list[Any]:
    rows = [{"customer_id": "C", "shop_id": s} for s in shops]
    return list(store.get_online_features(["visits:n"], rows).to_dict()["n"])


def test_views_of_every_kind_and_keys_of_one_number_are_erased(store: FeatureStore, redis_url: str) -> None:
    store.write_to_online_store("visits", visits_of(1, 2))
    key = EntityKey(join_keys=["shop_id"], entity_values=[Value(int64_val=1)])
    online: Any = store._get_provider().online_store
    online.online_write_batch(
        store.config, store.get_label_view("labels"), [(key, {"good": Value(int64_val=1)}, T, T)], None
    )
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 3
        assert erase_online(store, store.get_entity("shop"), "01", dry_run=True) == 2
        assert erase_online(store, store.get_entity("shop"), "01", dry_run=False) == 2
        assert client.dbsize() == 1
    assert read(store, 1, 2) == [None, 2]


def test_what_feast_writes_of_an_erased_entity_stays_out(store: FeatureStore, tmp_path: Path) -> None:
    erased = ErasureList(tmp_path / "offline")
    (tmp_path / "offline").mkdir(exist_ok=True)
    erased.add("shop_id", 1, T)
    store.write_to_online_store("visits", visits_of(1, 2))
    assert read(store, 1, 2) == [None, 2]
    store.push("visits_push", visits_of(1, 3))
    assert read(store, 1, 3) == [None, 3]
    asyncio.run(store.write_to_online_store_async("visits", visits_of(1, 4)))
    assert read(store, 1, 4) == [None, 4]
    erased.add("shop_id", 5, T)
    store.write_to_online_store("visits", visits_of(5))
    assert read(store, 5) == [None]


def test_without_redis_nothing_is_erased_and_the_error_says_so(store: FeatureStore, tmp_path: Path) -> None:
    store.apply([], objects_to_delete=[store.get_feature_view("visits")], partial=False)
    away = store_on(tmp_path, "redis://127.0.0.1:1/0")
    for dry_run in (True, False):
        with pytest.raises(UnavailableError, match=r"Redis at 127\.0\.0\.1:1 \(REDIS_URL\) does not answer"):
            erase_online(away, away.get_entity("shop"), "1", dry_run)
