"""On-demand feature views in an online read: what they are given, what comes back, and whose functions run. No server."""

from __future__ import annotations

import importlib
import linecache
import pickle
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from feast import FeatureStore, PushSource
from feast.protos.feast.types.Value_pb2 import Value

from feature_store.clock import to_micros
from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.read_plan import OnlineRow, ReadPlan
from feature_store.redis_layout import (
    encode_pair,
    encode_timestamp,
    feature_field,
    nanos_of,
    pair_field,
    timestamp_field,
)
from feature_store.view_plan import OnDemandViewError
from serving.catalogue import FeatureCatalogue
from serving.metrics import Metrics
from serving.plans import Plans

T = datetime(2026, 1, 10, tzinfo=UTC)
DEFINITIONS = """
    import pandas as pd
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64, Int32, Int64, String

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    account = FeatureView(
        name="account", entities=[customer],
        schema=[Field(name="charges", dtype=Float64), Field(name="n", dtype=Int64), Field(name="i", dtype=Int32)],
        source=FileSource(name="s", path="s.parquet", timestamp_field="event_timestamp"),
    )
    asked = RequestSource(name="asked", schema=[Field(name="factor", dtype=Float64)])

    @on_demand_feature_view(sources=[account, asked], schema=[Field(name="product", dtype=Float64)])
    def by_frame(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"product": inputs["charges"] * inputs["factor"]})

    @on_demand_feature_view(
        sources=[account], schema=[Field(name="more", dtype=Int64), Field(name="text", dtype=String)], mode="python"
    )
    def by_dict(inputs):
        return {
            "more": [None if n is None else n + 1 for n in inputs["n"]],
            "text": [str(c) for c in inputs.get("customer_id", inputs["n"])],  # Feast infers without join keys
        }

    @on_demand_feature_view(
        sources=[account], schema=[Field(name="less", dtype=Int64)], mode="python", singleton=True
    )
    def by_row(inputs):
        return {"less": inputs["n"] - 1}

    @on_demand_feature_view(sources=[account], schema=[Field(name="square", dtype=Int64)])
    def narrow(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"square": inputs["i"] * inputs["i"]})

    service = FeatureService(name="service", features=[account[["n"]], by_frame, by_dict[["more"]]])
"""


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A Feast repository whose module has a name of its own: modules of one name are imported once per process."""
    name = f"defined_{abs(hash(str(tmp_path)))}"
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(DEFINITIONS))
    (tmp_path / "feature_store.yaml").write_text(
        f"""
project: unit
provider: local
registry: {tmp_path}/registry.db
online_store:
  type: feature_store.online_store.PredictFlowOnlineStore
  connection_string: redis://127.0.0.1:1/0
entity_key_serialization_version: 3
"""
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    yield tmp_path
    sys.modules.pop(name, None)


@pytest.fixture
def store(repo: Path) -> FeatureStore:
    (path,) = repo.glob("defined_*.py")
    module = importlib.import_module(path.stem)
    store = FeatureStore(repo_path=str(repo))
    names = ("customer", "account", "asked", "by_frame", "by_dict", "by_row", "narrow", "service")
    store.apply([getattr(module, n) for n in names if n != "asked"])
    return store


def read(plan: ReadPlan, *entities: dict[str, Any]) -> list[OnlineRow]:
    """Rows of C1 (charges 2.5, n 3); any other customer was never written."""
    values = {"charges": Value(double_val=2.5), "n": Value(int64_val=3), "i": Value(int32_val=100_000)}
    key = plan.requests([{**entities[0], "customer_id": "C1"}])[0][0]
    times = {
        timestamp_field("account"): encode_timestamp(nanos_of(T)),
        pair_field("account"): encode_pair(nanos_of(T), None),
    }
    held = {key: times | {feature_field("account", n): v.SerializeToString() for n, v in values.items()}}
    replies = [[held.get(k, {}).get(f) for f in fields] for k, fields in plan.requests(entities)]
    return plan.decode(entities, replies, to_micros(T)).rows


def test_only_what_was_asked_for_comes_back_and_inputs_are_read_for_it(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, store.get_feature_service("service"))
    assert plan.feature_names == ["n", "product", "more"]
    assert sorted(plan.join_keys) == ["customer_id", "factor"]
    seen, unknown = read(plan, {"customer_id": "C1", "factor": 2}, {"customer_id": "C9", "factor": 2})
    assert seen.values == {"n": 3, "product": 5.0, "more": 4}
    assert set(seen.statuses.values()) == {"PRESENT"}
    assert unknown.values == {"n": None, "product": None, "more": None}
    assert unknown.statuses == {"n": "NOT_FOUND", "product": "NULL_VALUE", "more": "NULL_VALUE"}
    assert seen.event_timestamps == {"n": T, "product": None, "more": None}


def test_python_mode_sees_join_keys_and_full_names_are_prefixed(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["by_dict:text", "by_dict:more"], full_feature_names=True)
    (row,) = read(plan, {"customer_id": "C1"})
    assert row.values == {"by_dict__text": "C1", "by_dict__more": 4}


def test_a_function_of_one_row_is_called_per_row_and_its_fault_is_told_under_its_name(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["by_row:less"])
    assert [r.values for r in read(plan, {"customer_id": "C1"}, {"customer_id": "C1"})] == [{"less": 2}] * 2
    with pytest.raises(DataError, match="by_row failed"):
        read(plan, {"customer_id": "C9"})


def test_an_input_of_the_request_is_demanded(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["by_frame:product"])
    with pytest.raises(UsageError, match="factor is missing"):
        plan.requests([{"customer_id": "C1"}])


def test_undecoded_answers_hold_feasts_protobuf_values(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["by_dict:more"])
    entities = [{"customer_id": "C9"}]
    replies = [[None] * len(fields) for _, fields in plan.requests(entities)]
    assert plan.at(replies, to_micros(T), entities)[1][0][0].cells == [("NULL_VALUE", None)]
    with pytest.raises(OnDemandViewError):
        plan.at(replies, to_micros(T))


def test_a_function_changed_since_the_apply_is_not_run(store: FeatureStore, repo: Path) -> None:
    (path,) = repo.glob("defined_*.py")
    path.write_text(path.read_text().replace("n + 1", "n + 2"))
    sys.modules.pop(path.stem)
    importlib.invalidate_caches()
    linecache.clearcache()
    for cached in (repo / "__pycache__").glob("*"):
        cached.unlink()  # the change may fall into the second that the cache's time stamp holds
    with pytest.raises(OnDemandViewError, match="not the applied one"):
        ReadPlan.compile(store, ["by_dict:more"])


def changed(store: FeatureStore, path: Path, old: str, new: str) -> None:
    """As `feast apply` in another process, after the checkout was changed: this one has the old modules."""
    text = path.read_text().replace(old, new)
    path.write_text(text)
    other = path.with_name(f"{path.stem}_other.py")
    other.write_text(text)
    module = importlib.import_module(other.stem)
    other.unlink()
    store.apply([getattr(module, n) for n in ("customer", "account", "by_frame", "by_dict", "service")])


def test_a_running_process_takes_up_a_function_that_was_changed_and_applied(store: FeatureStore, repo: Path) -> None:
    (path,) = repo.glob("defined_*.py")
    helper = path.with_name(f"{path.stem}_helper.py")
    helper.write_text("STEP = 1\n")
    path.write_text(path.read_text() + f"\nfrom {helper.stem} import STEP\n")
    sys.modules.pop(path.stem)
    plan = ReadPlan.compile(store, ["by_dict:more"])
    assert read(plan, {"customer_id": "C1"})[0].values == {"more": 4}

    helper.write_text("STEP = 5\n")
    changed(store, path, "n + 1", "n + STEP")
    assert read(ReadPlan.compile(store, ["by_dict:more"]), {"customer_id": "C1"})[0].values == {"more": 8}


def test_a_changed_module_that_cannot_be_imported_is_told_and_the_others_stay(store: FeatureStore, repo: Path) -> None:
    (path,) = repo.glob("defined_*.py")
    ReadPlan.compile(store, ["by_dict:more"])
    before = sys.modules[path.stem]
    changed(store, path, "n + 1", "n + 2")
    text = path.read_text()
    path.write_text(text + "\n1 / 0\n")
    with pytest.raises(OnDemandViewError, match=r"cannot be imported.*ZeroDivisionError"):
        ReadPlan.compile(store, ["by_dict:more"])
    assert sys.modules[path.stem] is before
    path.write_text(text)
    assert read(ReadPlan.compile(store, ["by_dict:more"]), {"customer_id": "C1"})[0].values == {"more": 5}


def test_a_server_does_not_go_on_with_a_function_that_is_not_applied_any_more(store: FeatureStore, repo: Path) -> None:
    (path,) = repo.glob("defined_*.py")
    metrics = Metrics()
    plans = Plans(store, lambda plan: SimpleNamespace(plan=plan), metrics)  # type: ignore[arg-type,return-value]
    plans.refresh()
    text = path.read_text()
    served = plans.cached("service", False)
    assert served is not None
    assert served.inputs == {"factor"}

    changed(store, path, "n + 1", "n + 2")
    path.write_text(text)  # the server's own checkout was not changed
    plans.refresh()
    assert plans.cached("service", False) is None
    with pytest.raises(OnDemandViewError, match="not the applied one"):
        plans.get("service", False)
    failures = 'predictflow_refresh_failures_total{what="plan"}'
    assert f"{failures} 1.0" in metrics.expose().decode()
    plans.refresh()
    assert f"{failures} 2.0" in metrics.expose().decode()

    path.write_text(text.replace("n + 1", "n + 2"))
    plans.refresh()
    again = plans.cached("service", False)
    assert again is not None
    values = read(again.reader.plan, {"customer_id": "C1", "factor": 2.0})[0].values
    assert values == {"n": 3, "product": 5.0, "more": 5}


def test_the_catalogue_shows_on_demand_views_and_what_they_take_from_the_request(store: FeatureStore) -> None:
    catalogue = FeatureCatalogue(store)
    kinds = {view.name: view.kind for view in catalogue.all().views}
    on_demand = dict.fromkeys(("by_dict", "by_frame", "by_row", "narrow"), "on_demand")
    assert kinds == {"account": "feature", **on_demand}
    view = catalogue.view("by_frame")
    assert [(f.name, f.type) for f in view.features] == [("product", "Float64")]
    assert [(i.name, i.type) for i in view.request] == [("factor", "Float64")]
    assert (view.join_keys, view.ttl_seconds, view.windowed) == (["customer_id"], None, False)
    assert catalogue.view("by_dict").request == catalogue.view("account").request == []


def test_the_registrys_pickled_functions_run_only_where_that_is_allowed(
    store: FeatureStore, repo: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import dill

    (path,) = repo.glob("defined_*.py")
    path.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(dill, "loads", lambda *_, **__: pytest.fail("a pickled function was loaded"))
        with pytest.raises(OnDemandViewError, match="PREDICTFLOW_ALLOW_PICKLED_FUNCTIONS"):
            ReadPlan.compile(store, ["by_dict:more"])
    monkeypatch.setattr(store.config.online_store, "pickled_functions", "run")
    (row,) = read(ReadPlan.compile(store, ["by_dict:more"]), {"customer_id": "C1"})
    assert row.values == {"more": 4}


def test_no_read_unpickles_what_the_registry_holds(store: FeatureStore, tmp_path: Path) -> None:
    harm = tmp_path / "ran"

    class Harm:
        def __reduce__(self) -> Any:
            return Path.touch, (harm,)

    body = pickle.dumps(Harm())
    push = PushSource(name="p", batch_source=store.get_feature_view("account").batch_source)
    registry: Any = store.registry
    message = registry._get_registry_proto(project="unit", allow_cache=True)
    for view in message.on_demand_feature_views:
        view.spec.feature_transformation.user_defined_function.body = body
    (account,) = message.feature_views
    stream = message.stream_feature_views.add()
    stream.spec.name, stream.spec.project = "flow", "unit"
    stream.spec.user_defined_function.body = body
    stream.spec.user_defined_function.name = "f"
    stream.spec.features.append(account.spec.features[0])
    stream.spec.batch_source.CopyFrom(account.spec.batch_source)
    stream.spec.stream_source.CopyFrom(push.to_proto())
    account.spec.feature_transformation.user_defined_function.body = body

    with pytest.raises(NotFoundError) as told:
        ReadPlan.compile(store, ["nothing:n"])
    assert told.value.valid == ["account", "by_dict", "by_frame", "by_row", "flow", "narrow"]
    assert ReadPlan.compile(store, ["account:n", "flow:charges", "by_dict:more"]).feature_names[0] == "n"

    assert FeatureCatalogue(store).view("flow").kind == "stream"
    registry.enable_online_versioning = True
    for kind, view in (("feature_view", account), ("stream_feature_view", stream)):
        message.feature_view_version_history.records.add(
            feature_view_name=view.spec.name,
            project_id="unit",
            version_number=2,
            feature_view_type=kind,
            feature_view_proto=view.SerializeToString(),
        )
    plan = ReadPlan.compile(store, ["account@v2:n", "flow@v2:charges"])
    assert [v.version for v in plan.view_plans] == [2, 2]
    with pytest.raises(NotFoundError, match="account@v3"):
        ReadPlan.compile(store, ["account@v3:n"])
    assert not harm.exists()


def test_a_function_of_frames_is_given_wide_numbers(store: FeatureStore) -> None:
    """Int32 is widened here, and in history: see test_on_demand_history."""
    plan = ReadPlan.compile(store, ["narrow:square"])
    assert read(plan, {"customer_id": "C1"})[0].values["square"] == 10_000_000_000
