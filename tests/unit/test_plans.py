"""Read plans of a server: what makes them new, what is tried again, which are kept."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.protos.feast.core.Registry_pb2 import Registry
from feast.types import Bytes, Float64, UnixTimestamp

from serving import plans as plans_module
from serving.columns import ColumnError
from serving.plans import Plans

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
account = FeatureView(
    name="account",
    entities=[customer],
    schema=[Field(name=f"f{i}", dtype=Float64) for i in range(4)],
    source=FileSource(name="s", path="s.parquet", timestamp_field="event_timestamp"),
)


device = Entity(name="device", join_keys=["k"], value_type=ValueType.BYTES)
day = Entity(name="day", join_keys=["d"], value_type=ValueType.UNIX_TIMESTAMP)
readings = FeatureView(
    name="readings",
    entities=[device, day],
    schema=[Field(name="k", dtype=Bytes), Field(name="d", dtype=UnixTimestamp), Field(name="r", dtype=Float64)],
    source=FileSource(name="t", path="t.parquet", timestamp_field="event_timestamp"),
)


@pytest.fixture
def plans(tmp_path: Path) -> Plans:
    config = RepoConfig(
        project="unit",
        provider="local",
        registry=str(tmp_path / "registry.db"),
        online_store={
            "type": "feature_store.online_store.PredictFlowOnlineStore",
            "connection_string": "redis://127.0.0.1:1/0",
        },
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    services = [FeatureService(name=n, features=[account[["f0"]]]) for n in ("one", "two")]
    store.apply([customer, account, device, day, readings, *services])
    return Plans(store, lambda plan: plan)  # type: ignore[arg-type,return-value]  # nothing is read


def test_a_service_that_did_not_compile_is_tried_again(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled: list[str] = []
    compile_one, fails = plans._compile, True

    def sometimes(asked: Any, full_names: bool, service: Any = None) -> Any:
        compiled.append(asked)
        if asked == "two" and fails:
            raise RuntimeError("not now")
        return compile_one(asked, full_names, service)

    monkeypatch.setattr(plans, "_compile", sometimes)
    assert plans.refresh()
    assert plans.cached("one", False) is not None
    assert plans.cached("two", False) is None
    first = plans.cached("one", False)
    compiled.clear()
    assert not plans.refresh()
    fails = False
    assert not plans.refresh()
    assert plans.cached("two", False) is not None
    assert plans.cached("one", False) is first
    assert compiled == ["two", "two"]
    assert not plans.refresh()
    assert compiled == ["two", "two"]


def test_a_service_that_never_compiled_since_the_start_is_named_and_not_ready(
    plans: Plans, monkeypatch: pytest.MonkeyPatch
) -> None:
    compile_one, fail = plans._compile, {"two"}

    def sometimes(asked: Any, full_names: bool, service: Any = None) -> Any:
        if asked in fail:
            raise RuntimeError("not now")
        return compile_one(asked, full_names, service)

    monkeypatch.setattr(plans, "_compile", sometimes)
    plans.refresh()
    assert plans.check() == (False, "feature services: one; do not compile: two")
    fail.clear()
    plans.refresh()
    assert plans.check() == (True, "feature services: one, two")

    fail.update(("one", "three"))  # a running server does not take all of its services down with one
    plans._store.apply([FeatureService(name="three", features=[account[["f1"]]])])
    plans.refresh()
    assert plans.check() == (True, "feature services: one, two; do not compile: one, three")


def test_a_changed_stream_view_makes_plans_new(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Registry()

    def seen() -> str:
        monkeypatch.setattr(plans._store.registry, "proto", lambda: held)
        return plans._read_fingerprint()

    empty = seen()
    view = held.stream_feature_views.add()
    view.spec.project = "another"
    assert seen() == empty
    view.spec.project = "unit"
    with_view = seen()
    assert with_view != empty
    view.spec.ttl.seconds = 9
    assert seen() != with_view


def test_a_new_version_and_a_changed_label_view_make_plans_new(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    held = Registry()

    def seen() -> str:
        monkeypatch.setattr(plans._store.registry, "proto", lambda: held)
        return plans._read_fingerprint()

    view = held.feature_views.add()
    view.spec.project = "unit"
    first = seen()
    view.meta.last_updated_timestamp.seconds = 9
    assert seen() == first
    view.meta.current_version_number = 2  # its rows have another name
    second = seen()
    assert second != first
    held.label_views.add().spec.project = "unit"
    assert seen() != second


def test_join_keys_that_come_as_texts_are_those_that_python_reads(plans: Plans) -> None:
    made = plans.get(("readings:r", "account:f0"), False)
    key, time = b"\x00\xff", datetime(2026, 1, 1, tzinfo=UTC)
    rows: list[dict[str, object]] = [
        {"k": "AP8=", "d": text, "customer_id": "AP8="} for text in ("2026-01-01T00:00:00Z", "2026-01-01", time, None)
    ]
    with pytest.raises(ColumnError, match="column d, row 1: not a value of type UNIX_TIMESTAMP"):
        made.keyed([dict(row) for row in rows])
    with pytest.raises(ColumnError, match="column k, row 0: not a value of type BYTES"):
        made.keyed([{"k": "no base64", "d": None}])
    del rows[1]
    wanted = [{"k": key, "d": d, "customer_id": "AP8="} for d in (time, time, None)]
    assert made.keyed(rows) == wanted
    plan: Any = made.reader  # of these tests
    assert len(plan.requests(rows)) == 2 * 3
    assert made.keyed([{"d": None}]) == [{"d": None}]  # what is missing is told by the reader
    assert made.json is None
    plain = plans.get(("account:f0",), False)
    assert (plain.texts, plain.json is None) == ({}, False)


def test_the_plans_in_use_are_kept(plans: Plans, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plans_module, "OTHER_PLANS", 2)
    used, *others = [(f"account:f{i}",) for i in range(4)]
    plans.get(used, False)
    for other in others:
        assert plans.cached(used, False) is not None
        plans.get(other, False)
    assert plans.cached(used, False) is not None
    assert plans.cached(others[0], False) is None
