"""A stock Feast client (`online_store: {type: remote}`) against our server, and Feast's push over HTTP."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import requests
from serving_platform import NOW, SERVICE, Platform, serving

from serving.access import add_key

ACCOUNT = {"tenure_months": 3.25, "monthly_charges": 0.1 + 0.2, "contract_months": 2**53 + 1, "payment_method": "card"}
TYPES = {
    "a_bytes": "Bytes",
    "a_string": "String",
    "an_int32": "Int32",
    "an_int64": "Int64",
    "a_float": "Float32",
    "a_double": "Float64",
    "a_bool": "Bool",
    "a_time": "UnixTimestamp",
    "strings": "Array(String)",
    "ints": "Array(Int64)",
    "doubles": "Array(Float64)",
    "bools": "Array(Bool)",
    "a_map": "Map",
    "a_json": "Json",
}


@pytest.fixture(scope="module")
def views(platform: Platform) -> Iterator[None]:
    """Two more views: one per Feast type, and one with a push source."""
    import feast.types
    from feast import FeatureView, Field, FileSource, PushSource

    from features.entities import customer

    def source(name: str) -> FileSource:
        return FileSource(name=name, path=name, timestamp_field="event_timestamp", created_timestamp_column="created")

    def field(name: str, text: str) -> Field:
        return Field(name=name, dtype=eval(text, vars(feast.types)))

    typed = FeatureView(
        name="typed",
        entities=[customer],
        schema=[field(n, t) for n, t in TYPES.items()],
        source=source("typed_source"),
        ttl=timedelta(days=30),
    )
    pushed = FeatureView(
        name="pushed",
        entities=[customer],
        schema=[Field(name="score", dtype=feast.types.Float64)],
        source=PushSource(name="scores", batch_source=source("scores_batch")),
        ttl=timedelta(days=30),
    )
    platform.store.apply([typed, pushed], partial=True)
    platform.store.refresh_registry()
    yield
    for name in ("typed", "pushed"):
        platform.store.delete_feature_view(name)


@pytest.fixture(scope="module")
def url(platform: Platform, views: None) -> Iterator[str]:
    with serving(platform.settings, models=()) as address:
        yield address


def stock(platform: Platform, directory: Path, url: str, **more: Any) -> Any:
    """A FeatureStore as a user of stock Feast has it: the registry, and a remote online store."""
    from feast import FeatureStore

    directory.mkdir(exist_ok=True)
    config = {
        "project": "predictflow",
        "provider": "local",
        "registry": {"registry_type": "sql", "path": platform.settings.postgres_url, "cache_ttl_seconds": 60},
        "online_store": {"type": "remote", "path": url},
        "entity_key_serialization_version": 3,
        **more,
    }
    (directory / "feature_store.yaml").write_text(json.dumps(config))
    return FeatureStore(repo_path=str(directory))


@pytest.fixture
def client(platform: Platform, url: str, tmp_path: Path) -> Any:
    return stock(platform, tmp_path / "client", url)


@pytest.mark.parametrize("full_names", [False, True])
def test_a_stock_client_reads_what_our_store_reads(platform: Platform, client: Any, full_names: bool) -> None:
    rows = [{"customer_id": c} for c in ("C1", "C2", "C9")]
    wanted = {"entity_rows": rows, "full_feature_names": full_names}

    theirs = client.get_online_features(features=client.get_feature_service(SERVICE), **wanted)
    ours = platform.store.get_online_features(features=platform.store.get_feature_service(SERVICE), **wanted)

    assert theirs.to_dict() == ours.to_dict()
    statuses = [list(r.statuses) for r in theirs.proto.results]
    assert statuses == [list(r.statuses) for r in ours.proto.results]
    assert any(3 in s for s in statuses)  # NOT_FOUND
    assert any(4 in s for s in statuses)  # OUTSIDE_MAX_AGE


def test_a_stock_client_reads_features_by_reference_and_ignores_other_columns(client: Any) -> None:
    answer = client.get_online_features(
        features=["churn_features:monthly_charges"], entity_rows=[{"customer_id": "C1", "note": "x"}]
    ).to_dict()
    assert answer == {"customer_id": ["C1"], "monthly_charges": [0.1 + 0.2]}


def test_a_stock_client_writes_and_the_newest_row_stays(platform: Platform, client: Any) -> None:
    def write(charges: float, age: timedelta, created: timedelta | None = None) -> None:
        row = {**ACCOUNT, "customer_id": "W1", "monthly_charges": charges, "event_timestamp": NOW - age}
        row["created"] = NOW - created if created is not None else None
        client.write_to_online_store("churn_features", pd.DataFrame([row]).astype({"created": "datetime64[us, UTC]"}))

    def read() -> dict[str, Any]:
        features = [f"churn_features:{name}" for name in ACCOUNT]
        return platform.store.get_online_features(features=features, entity_rows=[{"customer_id": "W1"}]).to_dict()

    write(1.0, timedelta(days=2))
    write(2.0, timedelta(days=3))
    assert read()["monthly_charges"] == [1.0]
    write(3.0, timedelta(days=2), created=timedelta(0))
    assert read() == {"customer_id": ["W1"], **{k: [v] for k, v in {**ACCOUNT, "monthly_charges": 3.0}.items()}}


def test_every_type_that_a_stock_client_can_send_arrives(platform: Platform, client: Any) -> None:
    values = {
        "a_string": "é",
        "an_int32": -(2**31),
        "an_int64": 2**63 - 1,
        "a_float": 0.5,
        "a_double": 0.1 + 0.2,
        "a_bool": True,
        "a_time": NOW.replace(microsecond=0),
        "strings": ["a", ""],
        "ints": [1, 2**53 + 1],
        "doubles": [0.1, 2.0],
        "bools": [True, False],
        "a_map": {"k": "v", "n": 1},
        "a_json": '{"x": [1, 2]}',
    }
    frame = pd.DataFrame([{"customer_id": "T1", "event_timestamp": NOW, "created": NOW, "a_bytes": None, **values}])
    client.write_to_online_store("typed", frame)

    features = [f"typed:{name}" for name in values]
    held = platform.store.get_online_features(features=features, entity_rows=[{"customer_id": "T1"}]).to_dict()
    times = held.pop("a_time")
    assert [pd.Timestamp(t).tz_convert("UTC") for t in times] == [values.pop("a_time")]
    assert held.pop("a_json") == [json.loads(values.pop("a_json"))]
    assert held == {"customer_id": ["T1"], **{k: [v] for k, v in values.items()}}


@pytest.mark.parametrize("to", ["online", "online_and_offline", "offline"])
def test_push_writes_to_the_stores_that_it_names(platform: Platform, url: str, to: str) -> None:
    body = {
        "push_source_name": "scores",
        "df": {"customer_id": [to], "event_timestamp": [(NOW - timedelta(hours=1)).isoformat()], "score": [1.5]},
        "to": to,
    }
    assert requests.post(f"{url}/push", json=body, timeout=20).status_code == 200

    online = platform.store.get_online_features(features=["pushed:score"], entity_rows=[{"customer_id": to}]).to_dict()
    assert online["score"] == [1.5 if "online" in to else None]
    history = requests.post(
        f"{url}/api/v1/features/historical",
        json={"features": ["pushed:score"], "entities": {"customer_id": [to], "event_timestamp": [NOW.isoformat()]}},
        timeout=30,
    )
    if to == "online":  # nothing was ever written offline: the parametrised order has this one first
        assert history.status_code in (200, 404)
    else:
        assert history.json()["columns"]["score"] == [1.5]


def test_errors_reach_a_stock_client_in_the_servers_words(platform: Platform, client: Any, url: str) -> None:
    from feast.errors import FeastError

    with pytest.raises(FeastError, match="customer_id"):
        client.get_online_features(features=["churn_features:tenure_months"], entity_rows=[{"customer_id": 17}])
    answer = requests.post(
        f"{url}/get-online-features", json={"feature_service": "nope", "entities": {"customer_id": ["C1"]}}, timeout=10
    )
    assert answer.status_code == 404
    said = json.loads(answer.json())
    assert said["class"] == "FeastObjectNotFoundException"
    assert SERVICE in said["message"]
    columns = {"customer_id": ["C1"], "event_timestamp": [NOW.isoformat()], "events_7d": [1]}
    windowed = requests.post(
        f"{url}/write-to-online-store",
        json={"feature_view_name": "customer_behavior", "df": columns},
        timeout=10,
    )
    assert windowed.status_code == 400
    assert "stream" in windowed.json()


def test_health_answers_as_feasts_own(url: str) -> None:
    answer = requests.get(f"{url}/health", timeout=10)
    assert (answer.status_code, answer.content) == (200, b"")


def test_a_stock_client_carries_an_api_key_as_its_token(platform: Platform, tmp_path: Path, views: None) -> None:
    from feast.errors import FeastError

    keys = tmp_path / "keys"
    reader = add_key(keys, "reader", ["read"])
    rows = [{"customer_id": "C1"}]
    with serving(platform.settings, models=(), api_keys=keys) as address:
        known = stock(platform, tmp_path / "known", address, auth={"type": "oidc", "token": reader})
        features = ["churn_features:contract_months"]
        assert known.get_online_features(features=features, entity_rows=rows).to_dict()["contract_months"] == [1]
        frame = pd.DataFrame([{**ACCOUNT, "customer_id": "C1", "event_timestamp": NOW, "created": NOW}])
        with pytest.raises(FeastError, match="scope"):
            known.write_to_online_store("churn_features", frame)
        stranger = stock(platform, tmp_path / "stranger", address)
        with pytest.raises(FeastError, match="API key"):
            stranger.get_online_features(features=features, entity_rows=rows)
