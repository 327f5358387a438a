"""Our provider beside Feast's own, on a real Redis: the same frames, the same bytes; what is refused; when Feast's way is taken."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_source import PushSource
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Map, String, UnixTimestamp
from google.protobuf.timestamp_pb2 import Timestamp

from feature_store.errors import DataError, UnavailableError
from feature_store.online_store import PredictFlowOnlineStore

OURS, FEASTS = "feature_store.provider.PredictFlowProvider", "local"
T = datetime(2026, 1, 2, 3, 4, 5, 678_901, tzinfo=UTC)
TYPES = {
    "i32": Int32, "i64": Int64, "f32": Float32, "f64": Float64, "text": String, "data": Bytes, "flag": Bool,
    "at": UnixTimestamp, "doubles": Array(Float64),
}  # fmt: skip

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
branch = Entity(name="branch", join_keys=["branch_id"], value_type=ValueType.INT64)


def _source(home: Path, name: str, **options: Any) -> FileSource:
    path = str(home / f"{name}.parquet")
    return FileSource(
        name=name, path=path, timestamp_field="event_timestamp", created_timestamp_column="created", **options
    )


def _store(home: Path, url: str, provider: str) -> FeatureStore:
    fields = [Field(name=name, dtype=dtype) for name, dtype in TYPES.items()]
    views = [
        FeatureView(name="all", entities=[customer], ttl=timedelta(0), schema=fields, source=_source(home, "all")),
        FeatureView(
            name="two", entities=[customer, branch], schema=[Field(name="n", dtype=Int64)],
            source=PushSource(name="pushed", batch_source=_source(home, "two")), ttl=timedelta(0),
        ),
        FeatureView(
            name="mapped", entities=[customer], schema=[Field(name="n", dtype=Int64)], ttl=timedelta(0),
            source=_source(home, "mapped", field_mapping={"raw_n": "n"}),
        ),
        FeatureView(
            name="maps", entities=[customer], schema=[Field(name="m", dtype=Map)], ttl=timedelta(0),
            source=_source(home, "maps"),
        ),
    ]  # fmt: skip
    home.mkdir(exist_ok=True)
    store = FeatureStore(
        config=RepoConfig(
            project="shop",
            provider=provider,
            registry=str(home / "registry.db"),
            online_store={"type": "feature_store.online_store.PredictFlowOnlineStore", "connection_string": url},
            entity_key_serialization_version=3,
        )
    )
    store.apply([customer, branch, *views])
    return store


def _all(rows: int, **columns: Any) -> pd.DataFrame:
    """A frame of view `all`: every column set, but for what `columns` replaces."""
    made: dict[str, Any] = {
        "customer_id": [f"C{i}" for i in range(rows)],
        "i32": np.arange(rows, dtype=np.int32),
        "i64": np.arange(rows) * 2**40 - 3,
        "f32": (np.arange(rows) / 3).astype(np.float32),
        "f64": np.arange(rows) / 7,
        "text": [f"t{i}" for i in range(rows)],
        "data": [bytes([i % 256]) for i in range(rows)],
        "flag": np.arange(rows) % 2 == 0,
        "at": pd.date_range(T, periods=rows, freq="h"),
        "doubles": [[i / 3, 1.0] for i in range(rows)],
        "event_timestamp": pd.date_range(T, periods=rows, freq="s"),
        "created": T + timedelta(days=1),
    }
    return pd.DataFrame({**made, **columns})


def _none(values: Any) -> list[Any]:
    return [None, *list(values)[1:]]


FRAMES: dict[str, tuple[str, pd.DataFrame]] = {
    "one row": ("all", _all(1)),
    "some rows": ("all", _all(20)),
    "many rows": ("all", _all(400)),
    "integers with gaps are floats": ("all", _all(3, i64=[1.0, np.nan, 3.0], i32=[np.nan, 2.0, 3.0])),
    "nulls": ("all", _all(3, **{n: _none(_all(3)[n]) for n in ("i32", "f64", "text", "flag", "doubles")})),
    "many rows with nulls": ("all", _all(300, **{n: _none(_all(300)[n]) for n in ("i64", "f32", "text", "data")})),
    "naive times": ("all", _all(2, event_timestamp=pd.to_datetime(["2026-01-01", "2026-01-02"]), at=pd.to_datetime(["2026-01-01 01:02:03", "1969-12-31 00:00:00"]))),
    "categories": ("all", _all(3, text=pd.Categorical(["a", "b", "a"]))),
    "arrow types": ("all", _all(3).convert_dtypes(dtype_backend="pyarrow").assign(doubles=_all(3)["doubles"])),
    "extra columns": ("all", _all(3, other=["x", "y", None])),
    "in pieces": ("all", pd.concat([_all(3), _all(3, customer_id=["D1", "D2", "D3"])])),
    "a named index": ("two", pd.DataFrame({"branch_id": [1, 2], "n": [3, 4], "event_timestamp": T, "created": T}, index=pd.Index(["a", "b"], name="customer_id"))),
    "keys of two parts": ("two", pd.DataFrame({"branch_id": np.arange(200), "customer_id": "x", "n": 1, "event_timestamp": T, "created": T})),
    "a mapped column": ("mapped", pd.DataFrame({"customer_id": ["a"], "n": [5], "event_timestamp": T, "created": T})),
    "a key twice": ("two", pd.DataFrame({"branch_id": [1, 1, 1], "customer_id": "x", "n": [1, 2, 3], "event_timestamp": [T, T + timedelta(1), T], "created": T + timedelta(1)})),
    "maps go Feast's way": ("maps", pd.DataFrame({"customer_id": ["a"], "m": [{"x": 1}], "event_timestamp": T, "created": T})),
}  # fmt: skip


def _held(url: str) -> dict[bytes, dict[bytes, bytes]]:
    with redis.Redis.from_url(url) as client:
        return {key: client.hgetall(key) for key in client.scan_iter()}


@pytest.mark.parametrize("case", FRAMES)
def test_a_frame_is_the_same_in_redis_as_by_feasts_own_provider(case: str, tmp_path: Path, redis_url: str) -> None:
    view, frame = FRAMES[case]
    found = []
    for provider in (FEASTS, OURS):
        _store(tmp_path / provider, redis_url, provider).write_to_online_store(view, frame.copy())
        found.append(_held(redis_url))
        with redis.Redis.from_url(redis_url) as client:
            client.flushdb()
    assert found[1] == found[0]
    assert len(found[0]) == len(set(frame.reset_index()[["customer_id"] + ["branch_id"] * (view == "two")].itertuples(index=False)))  # fmt: skip


def test_unlike_feasts_a_missing_time_is_null_and_nanoseconds_are_kept(tmp_path: Path, redis_url: str) -> None:
    store = _store(tmp_path / "s", redis_url, OURS)
    event = pd.Timestamp("2026-01-01T00:00:00.123456789Z")
    store.write_to_online_store("all", _all(2, at=pd.to_datetime([T, None]), event_timestamp=event, created=event))
    response = store.get_online_features(["all:at"], {"customer_id": ["C0", "C1"]})
    assert response.to_dict()["at"] == [T.replace(microsecond=0), None]
    (key,) = (k for k in _held(redis_url) if b"C1" in k)
    times = Timestamp.FromString(_held(redis_url)[key][b"_ts:all"])
    assert times.nanos == 123_456_789


def test_pushes_and_async_writes_take_the_same_way(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = _store(tmp_path / "s", redis_url, OURS)
    monkeypatch.setattr("feast.utils._convert_arrow_to_proto", _no_protos)
    monkeypatch.setattr("feast.infra.passthrough_provider._convert_arrow_to_proto", _no_protos)
    frame = pd.DataFrame({"branch_id": [1], "customer_id": ["x"], "n": [1], "event_timestamp": [T], "created": [T]})
    store.push("pushed", frame)
    asyncio.run(store.write_to_online_store_async("two", frame.assign(n=2, branch_id=2)))
    read = store.get_online_features(["two:n"], {"customer_id": ["x", "x"], "branch_id": [1, 2]}).to_dict()
    assert read["n"] == [1, 2]


def _no_protos(*_: object) -> None:
    raise AssertionError("a proto for each cell")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"i64": [1, "x", 3]}, "column i64 holds values of several types"),
        ({"i64": [1.5, 2.0, 3.0]}, "feature i64 must be INT64"),
        ({"customer_id": ["a", None, "b"]}, "has no join key customer_id"),
        ({"event_timestamp": [T, None, T]}, "has no event_timestamp"),
        ({"event_timestamp": [T, T + timedelta(days=36_500), T]}, "after the clock"),
    ],
)
def test_a_frame_that_cannot_be_kept_is_refused_whole(
    change: dict[str, Any], message: str, tmp_path: Path, redis_url: str
) -> None:
    store = _store(tmp_path / "s", redis_url, OURS)
    with pytest.raises(DataError, match=message):
        store.write_to_online_store("all", _all(3, **change))
    assert _held(redis_url) == {}


def test_a_frame_without_a_column_names_it(tmp_path: Path, redis_url: str) -> None:
    store = _store(tmp_path / "s", redis_url, OURS)
    with pytest.raises(DataError, match="the rows lack a column"):
        store.write_to_online_store("all", _all(2).drop(columns="event_timestamp"))


def test_a_redis_that_is_away_is_one_clear_error(
    tmp_path: Path, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("feature_store.redis_writer.BUDGET_SECONDS", 0.1)
    store = _store(tmp_path / "s", redis_url, OURS)
    store.config.online_store.connection_string = "redis://127.0.0.1:1/0"
    with pytest.raises(UnavailableError):
        store.write_to_online_store("all", _all(1))


class CountingOnlineStore(PredictFlowOnlineStore):
    """Writes in a way of its own."""

    rows = 0

    def online_write_batch(self, config: Any, table: Any, data: Any, progress: Any) -> None:
        CountingOnlineStore.rows += len(data)


@pytest.mark.parametrize("made", [CountingOnlineStore])
def test_a_store_that_writes_in_its_own_way_gets_its_rows(made: Any, tmp_path: Path, redis_url: str) -> None:
    store = _store(tmp_path / "s", redis_url, OURS)
    provider: Any = store._get_provider()
    provider._online_store = made()
    store.write_to_online_store("all", _all(4))
    assert made.rows == 4
