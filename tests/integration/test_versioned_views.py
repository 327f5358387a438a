"""Views whose versions have rows of their own (`enable_online_feature_view_versioning`), on a real Redis."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path

import mmh3
import pandas as pd
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, RequestSource, ValueType
from feast.data_source import PushSource
from feast.labeling.label_view import LabelView
from feast.on_demand_feature_view import on_demand_feature_view
from feast.types import Int64

from feature_store.errors import DefinitionError
from feature_store.online_sweep import sweep

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
COLLIDING = ("f59196", "f114301")
"""Of a view v: alike as v_v1, not as v."""
DAY = timedelta(days=1)


def source(home: Path, name: str) -> FileSource:
    return FileSource(
        name=name,
        path=str(home / f"{name}.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )


def view(home: Path, *features: str, name: str = "v", ttl: timedelta = DAY, version: str = "latest") -> FeatureView:
    schema = [Field(name=n, dtype=Int64) for n in features]
    return FeatureView(
        name=name, entities=[customer], ttl=ttl, schema=schema, source=source(home, name), version=version
    )


@pytest.fixture
def store(tmp_path: Path, redis_url: str) -> FeatureStore:
    online = {"type": "feature_store.online_store.PredictFlowOnlineStore", "connection_string": redis_url}
    registry = {"path": str(tmp_path / "registry.db"), "enable_online_feature_view_versioning": True}
    return FeatureStore(
        config=RepoConfig(
            project="shop",
            provider="local",
            registry=registry,
            online_store=online,
            entity_key_serialization_version=3,
        )
    )


def same_field(one: str, other: str) -> tuple[str, str]:
    """A feature of each of two views with one Redis field."""
    seen = {mmh3.hash(f"{one}:f{i}", signed=False): f"f{i}" for i in range(200_000)}
    return next((seen[h], f"f{i}") for i in range(200_000) if (h := mmh3.hash(f"{other}:f{i}", signed=False)) in seen)


def test_colliding_fields_are_looked_for_under_the_names_that_are_stored(store: FeatureStore, tmp_path: Path) -> None:
    assert mmh3.hash(f"v_v1:{COLLIDING[0]}") == mmh3.hash(f"v_v1:{COLLIDING[1]}")
    with pytest.raises(DefinitionError, match="v_v1:"):
        store.apply([customer, view(tmp_path, *COLLIDING, version="v1")])
    store.apply([customer, view(tmp_path, COLLIDING[0])])
    with pytest.raises(DefinitionError, match="v_v1:f59196 and v_v1:f114301 have the same Redis field"):
        store.apply([view(tmp_path, *COLLIDING)])
    store.apply([view(tmp_path, COLLIDING[0], "n")])
    store.apply([view(tmp_path, COLLIDING[0], "n", "m")])
    store.apply([view(tmp_path, *COLLIDING)])  # as v_v2 and v_v3 they differ


def test_label_views_and_written_on_demand_views_of_earlier_applies_are_looked_at(
    store: FeatureStore, tmp_path: Path
) -> None:
    of_labels, of_rows = same_field("labels", "rows")
    of_sums, of_more = same_field("sums", "more")
    push = PushSource(name="labels_push", batch_source=source(tmp_path, "labels"))
    labels = LabelView(
        name="labels",
        entities=[customer],
        source=push,
        schema=[Field(name="labeler", dtype=Int64), Field(name=of_labels, dtype=Int64)],
    )
    asked = RequestSource(name="asked", schema=[Field(name="n", dtype=Int64)])

    @on_demand_feature_view(
        sources=[asked],
        entities=[customer],
        schema=[Field(name=of_sums, dtype=Int64)],
        mode="pandas",
        write_to_online_store=True,
    )
    def sums(frame: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({of_sums: frame["n"]})

    store.apply([customer, labels, sums])
    with pytest.raises(DefinitionError, match=f"rows:{of_rows} and labels:{of_labels}"):
        store.apply([view(tmp_path, of_rows, name="rows")])
    with pytest.raises(DefinitionError, match=f"more:{of_more} and sums:{of_sums}"):
        store.apply([view(tmp_path, of_more, name="more")])


def test_every_version_is_swept_by_its_own_ttl_and_dropped_with_the_view(
    store: FeatureStore, tmp_path: Path, redis_url: str
) -> None:
    at = datetime(2026, 1, 9, tzinfo=UTC)
    row = pd.DataFrame({"customer_id": ["C"], "n": [1], "m": [2], "event_timestamp": [at - 2 * DAY], "created": [at]})
    versions = [view(tmp_path, "n"), view(tmp_path, "n", "m", ttl=9 * DAY), view(tmp_path, "n", "m", "o")]
    for v in versions:
        store.apply([customer, v])
        names = ["customer_id", "event_timestamp", "created", *(f.name for f in v.features)]
        store.write_to_online_store("v", row.assign(o=[3])[names])
    with redis.Redis.from_url(redis_url) as client:

        def times() -> set[bytes]:
            return {f for key in client.scan_iter() for f in client.hkeys(key) if f.startswith(b"_ts:")}

        assert times() == {b"_ts:v", b"_ts:v_v1", b"_ts:v_v2"}
        (swept,) = sweep(store, at, pause=lambda _: None)
        assert (swept.looked_at, swept.removed) == (3, 2)
        assert times() == {b"_ts:v_v1"}
        store.write_to_online_store("v", row.assign(o=[3]))
        store.apply([], objects_to_delete=[store.get_feature_view("v")], partial=False)
        assert client.keys() == []
