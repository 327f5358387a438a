"""Push: whose functions run, what is written of a request, and what is refused before anything is. No server."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_source import PushSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Json, String, UnixTimestamp, Uuid

from feature_store.erasure_list import ErasureList
from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.proto_rows import batches_of_rows
from feature_store.table_rows import batches_of_table
from feature_store.view_plan import OnDemandViewError
from feature_store.write_layout import WriteLayout
from serving.grpc_push import StoreWriter
from serving.historical import Historical
from serving.push import Pusher
from serving.push_columns import feast_rows, is_columnar, table_of

NOW = datetime(2026, 1, 10, tzinfo=UTC)
EVENT = datetime(2026, 1, 9, tzinfo=UTC)

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)


class Written(Pusher):
    """A pusher whose rows are kept here, as they were about to be written."""

    def __init__(self, store: FeatureStore) -> None:
        super().__init__(store, lambda: NOW)
        self.online: list[tuple[str, Any]] = []
        self.offline: list[tuple[str, Any]] = []

    def _prepared(self, view: FeatureView, table: Any) -> Callable[[], object]:
        super()._prepared(view, table)  # refuses what cannot be stored
        return lambda: self.online.append((view.name, table))

    def _offline_write(self, view: FeatureView, table: Any) -> None:
        self.offline.append((view.name, table))


@pytest.fixture
def store(tmp_path: Path) -> FeatureStore:
    def source(name: str) -> FileSource:
        return FileSource(
            name=name,
            path=f"{name}.parquet",
            timestamp_field="at",
            created_timestamp_column="known",
            field_mapping={"cust": "customer_id", "amt": "amount", "ts": "at"},
        )

    view = FeatureView(
        name="pushed",
        entities=[customer],
        schema=[
            Field(name="amount", dtype=Float64),
            Field(name="since", dtype=UnixTimestamp),
            Field(name="blob", dtype=Bytes),
            Field(name="n", dtype=Int64),
        ],
        source=PushSource(name="pushes", batch_source=source("pushed")),
    )
    documents = FeatureView(
        name="documents", entities=[customer], schema=[Field(name="doc", dtype=Json)], source=source("documents")
    )

    @on_demand_feature_view(sources=[view], schema=[Field(name="more", dtype=Float64)], mode="python")
    def more(inputs: Any) -> Any:
        return {"more": inputs["amount"]}

    store = FeatureStore(
        config=RepoConfig(
            project="unit",
            provider="local",
            registry=str(tmp_path / "registry.db"),
            online_store={
                "type": "feature_store.online_store.PredictFlowOnlineStore",
                "connection_string": "redis://127.0.0.1:1/0",
            },
            offline_store={
                "type": "feature_store.offline_store.PredictFlowOfflineStore",
                "path": str(tmp_path / "offline"),
            },
            entity_key_serialization_version=3,
        )
    )
    store.apply([customer, view, documents, more])
    store.refresh_registry()
    return store


def row(**more: object) -> dict[str, Sequence[object]]:
    columns: dict[str, object] = {
        "customer_id": "C1",
        "amount": 1.5,
        "since": None,
        "blob": None,
        "n": 1,
        "event_timestamp": EVENT.isoformat(),
    }
    return {name: [value] for name, value in {**columns, **more}.items()}


def test_a_row_over_grpc_is_what_it_is_over_rest(store: FeatureStore) -> None:
    """By the source's names and in types that JSON lacks; `created` is the clock's."""
    pusher = Written(store)
    values: Mapping[str, object] = {
        "cust": "C1",
        "amt": 1.5,
        "since": EVENT,
        "blob": b"\x00\xff",
        "n": "7",
        "ts": EVENT.isoformat(),
    }
    writer = StoreWriter(store, pusher.push)
    writer.push("pushes", values, "online_and_offline")
    writer.write("pushed", values)

    names = {"since": EVENT.isoformat(), "blob": "AP8=", "n": 7}
    pusher.push("pushed", None, row(**names), "online")
    ((_, over_source), (_, by_name), (_, over_rest)) = pusher.online
    assert over_source == by_name == over_rest
    (found,) = over_rest.to_pylist()
    assert (found["event_timestamp"], found["created"]) == (EVENT, NOW)
    assert found["blob"] == b"\x00\xff"
    assert [name for name, _ in pusher.offline] == ["pushed"]
    with pytest.raises(UsageError, match="one and the same"):
        writer.write("pushed", {**values, "amount": 1.0})


def test_an_erased_entity_does_not_come_back(store: FeatureStore, tmp_path: Path) -> None:
    pusher = Written(store)
    listed = ErasureList(tmp_path / "offline")
    columns = {name: [*values, *values] for name, values in row().items()} | {"customer_id": ["C1", "C2"]}
    assert pusher.push("pushed", None, columns, "online_and_offline").rows == 2
    listed.add("customer_id", "C1", NOW)
    assert pusher.push("pushed", None, columns, "online_and_offline").rows == 1
    listed.add("customer_id", "C2", NOW)
    assert pusher.push("pushed", None, columns, "online_and_offline").rows == 0
    keys = [table.column("customer_id").to_pylist() for _, table in pusher.online]
    assert keys == [["C1", "C2"], ["C2"]]
    assert [table.column("customer_id").to_pylist() for _, table in pusher.offline] == [["C1", "C2"], ["C2"]]


KINDS = [
    Bool,
    Bytes,
    Float32,
    Float64,
    Int32,
    Int64,
    Json,
    String,
    UnixTimestamp,
    Array(Float64),
    Array(Int64),
    Array(String),
]
COLUMNS: list[Sequence[object]] = [
    [True, None],
    ["AP8=", ""],
    [1.5, "NaN"],
    [None, -0.0],
    [-1, 0],
    [2**63 - 1, None],
    ['{"a": 1}', None],
    ["ü" * 40, ""],
    [EVENT.isoformat(), None],
    [[1.0, 2.5], []],
    [[1, -2], None],
    [["a", "b"], None],
]


@pytest.mark.parametrize("repeated", [1, 100])
def test_a_table_is_written_as_feasts_rows_are(store: FeatureStore, repeated: int) -> None:
    """Byte for byte, few rows and many; and rows of types that Arrow has no form of go as Feast's."""
    view = FeatureView(
        name="all",
        entities=[customer],
        schema=[Field(name=f"f{i}", dtype=kind) for i, kind in enumerate(KINDS)],
        source=FileSource(name="all", path="all.parquet", timestamp_field="at", created_timestamp_column="known"),
    )
    other = FeatureView(
        name="uuid", entities=[customer], schema=[Field(name="f", dtype=Uuid)], source=view.batch_source
    )
    store.apply([view, other])
    view = store.get_feature_view("all")
    columns: dict[str, Sequence[object]] = {f"f{i}": [*values] * repeated for i, values in enumerate(COLUMNS)}
    columns |= {"customer_id": [f"C{i}" for i in range(2 * repeated)], "at": [EVENT.isoformat()] * (2 * repeated)}
    table = table_of(view, columns, NOW)
    assert is_columnar(view)
    assert not is_columnar(store.get_feature_view("uuid"))

    layout = WriteLayout(store.config, view)
    names = [{"event_timestamp": "at", "created": "known"}.get(n, n) for n in table.column_names]
    _, by_table = batches_of_table(layout, table.rename_columns(names), None)
    _, by_rows = batches_of_rows(layout, feast_rows(view, table), None)
    assert [b.calls() for b in by_table] == [b.calls() for b in by_rows]


@pytest.mark.parametrize("keys", [["a", "a"], ["a", "b"]])
def test_a_number_that_does_not_fit_is_refused_whether_or_not_its_key_repeats(
    store: FeatureStore, keys: list[str]
) -> None:
    source = FileSource(name="ints", path="ints.parquet", timestamp_field="at")
    view = FeatureView(name="ints", entities=[customer], schema=[Field(name="n", dtype=Int64)], source=source)
    store.apply([view])
    layout = WriteLayout(store.config, store.get_feature_view("ints"))
    table = pa.table({"customer_id": keys, "n": [1.0, 2.5], "at": pa.array([EVENT, EVENT], pa.timestamp("us", "UTC"))})
    with pytest.raises(DataError, match="n"):
        list(batches_of_table(layout, table, None)[1])


def test_rows_of_protos_are_cut_at_two_megabytes(store: FeatureStore) -> None:
    source = FileSource(name="texts", path="texts.parquet", timestamp_field="at")
    view = FeatureView(name="texts", entities=[customer], schema=[Field(name="s", dtype=String)], source=source)
    store.apply([view])
    layout = WriteLayout(store.config, store.get_feature_view("texts"))
    rows: list[Any] = [
        (
            EntityKey(join_keys=["customer_id"], entity_values=[Value(string_val=f"C{i}")]),
            {"s": Value(string_val="x" * 900_000)},
            EVENT,
            None,
        )
        for i in range(5)
    ]
    _, batches = batches_of_rows(layout, rows, None)
    assert [len(batch.keys) for batch in batches] == [2, 2, 1]


def test_what_no_row_can_be_made_of_is_refused_before_anything_is_written(
    store: FeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    import feast.type_map

    def broken(*_: object) -> None:
        raise ValueError("no such value")

    monkeypatch.setattr(feast.type_map, "python_values_to_proto_values", broken)
    pusher = Written(store)
    columns = {"customer_id": ["C1"], "doc": [json.dumps({"a": 1})], "event_timestamp": [EVENT.isoformat()]}
    with pytest.raises(UsageError, match="feature doc must be JSON"):
        pusher.push("documents", None, columns, "online_and_offline")
    assert pusher.offline == []


def test_no_function_is_taken_out_of_the_registry(store: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from feast.on_demand_feature_view import OnDemandFeatureView

    def refuse(_cls: type, _proto: object, skip_udf: bool = False) -> None:
        assert skip_udf, "a function was taken out of the registry"

    monkeypatch.setattr(OnDemandFeatureView, "_parse_transformation_from_proto", classmethod(refuse))
    pusher = Written(store)
    writer = StoreWriter(store, pusher.push)
    for call in (
        lambda: pusher.push("nope", None, row(), "online"),
        lambda: pusher.push(None, "nope", row(), "online"),
        lambda: writer.write("nope", {}),
        lambda: writer.push("nope", {}, "online"),
    ):
        with pytest.raises(NotFoundError, match="nope") as e:
            call()
        assert e.value.valid in (["documents", "more", "pushed"], ["pushes"])
    for call in (lambda: pusher.push("more", None, row(), "online"), lambda: writer.write("more", {})):
        with pytest.raises(UsageError, match="of this kind"):
            call()
    pusher.push(None, "pushes", row(), "online")

    Pusher(store, lambda: NOW).push("pushed", None, row(), "offline")
    historical = Historical(store)
    entities = {"customer_id": ["C1"], "event_timestamp": [NOW.isoformat()]}
    wanted = historical.wanted(("pushed:amount",), entities, False, False)
    assert historical.table(wanted).column("amount").to_pylist() == [1.5]
    with pytest.raises(OnDemandViewError, match="more"):
        historical.wanted(("pushed:amount", "more:more"), entities, False, False)


def test_slow_pushes_leave_other_threads_alone(store: FeatureStore) -> None:
    """More of them at a time than the loop's own executor has threads."""
    go = threading.Event()

    class Slow(Written):
        def _prepared(self, view: FeatureView, table: Any) -> Callable[[], object]:
            assert go.wait(20)
            return super()._prepared(view, table)

    async def both() -> None:
        loop = asyncio.get_running_loop()
        loop.set_default_executor(ThreadPoolExecutor(1))
        pushes = [asyncio.create_task(slow.apush("pushed", None, row(), "online")) for _ in range(8)]
        await asyncio.wait_for(asyncio.to_thread(int), 10)
        go.set()
        await asyncio.gather(*pushes)

    slow = Slow(store)
    asyncio.run(both())
    assert len(slow.online) == 8
