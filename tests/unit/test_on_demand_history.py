"""On-demand features of historical rows: the online function, over what each row's time knew, at once or in slices. No server."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from feast import FeatureStore, OnDemandFeatureView

from feature_store.errors import DataError, UsageError
from feature_store.view_plan import OnDemandViewError
from serving.historical import Historical

T = datetime(2026, 1, 10, tzinfo=UTC)
DAY = timedelta(days=1)
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
            "more": [None if n is None else n + 1 for n in inputs["n" if "n" in inputs else "account__n"]],
            "text": [str(c) for c in inputs.get("customer_id", inputs["n"] if "n" in inputs else [])],
        }

    @on_demand_feature_view(
        sources=[account], schema=[Field(name="less", dtype=Int64)], mode="python", singleton=True
    )
    def by_row(inputs):
        return {"less": inputs["n"] - 1}

    @on_demand_feature_view(sources=[asked], schema=[Field(name="twice", dtype=Float64)], mode="python")
    def of_request(inputs):
        return {"twice": [2 * f for f in inputs["factor"]]}

    @on_demand_feature_view(sources=[account], schema=[Field(name="square", dtype=Int64)])
    def narrow(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"square": inputs["i"] * inputs["i"]})

    service = FeatureService(name="service", features=[by_dict[["more"]], account[["charges"]], by_frame])
"""
VIEWS = ("customer", "account", "by_frame", "by_dict", "by_row", "narrow", "of_request", "service")


@pytest.fixture
def store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FeatureStore]:
    name = f"defined_{abs(hash(str(tmp_path)))}"  # modules of one name are imported once per process
    (tmp_path / f"{name}.py").write_text(textwrap.dedent(DEFINITIONS))
    (tmp_path / "feature_store.yaml").write_text(
        f"""
project: unit
provider: local
registry: {tmp_path}/registry.db
online_store:
  type: feature_store.online_store.PredictFlowOnlineStore
  connection_string: redis://127.0.0.1:1/0
offline_store:
  type: feature_store.offline_store.PredictFlowOfflineStore
  path: {tmp_path}
entity_key_serialization_version: 3
"""
    )
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    times = pa.array([T - 2 * DAY, T, T], pa.timestamp("us", "UTC"))
    pq.write_table(
        pa.table(
            {
                "customer_id": ["C1", "C1", "C2"],
                "event_timestamp": times,
                "charges": [1.5, 2.5, 4.0],
                "n": [1, 3, 7],
                "i": [0, 100_000, 2],
            }
        ),
        tmp_path / "s.parquet",
    )
    store = FeatureStore(repo_path=str(tmp_path))
    store.apply([getattr(importlib.import_module(name), n) for n in VIEWS])
    yield store
    sys.modules.pop(name, None)


ENTITIES = {
    "customer_id": ["C1", "C1", "C2", "C3"],
    "event_timestamp": [t.isoformat() for t in (T - DAY, T, T, T)],
    "factor": [2, 2, 0.5, 1],
}


def rows(
    store: FeatureStore, asked: Any, full: bool = False, slice_rows: int | None = None, **entities: Any
) -> pa.Table:
    historical = Historical(store)
    wanted = historical.wanted(asked, {**ENTITIES, **entities}, False, full)
    table = pa.concat_tables(list(historical.tables(wanted, slice_rows)))
    assert table.column_names == [*ENTITIES, *wanted.feature_names]
    return table


@pytest.mark.parametrize("slice_rows", [None, 1, 3])
def test_each_row_is_computed_from_what_its_time_knew(store: FeatureStore, slice_rows: int | None) -> None:
    table = rows(store, "service", slice_rows=slice_rows)
    assert table.column_names[-3:] == ["more", "charges", "product"]
    assert table.column("more").to_pylist() == [2, 4, 8, None]
    assert table.column("charges").to_pylist() == [1.5, 2.5, 4.0, None]
    assert table.column("product").to_pylist() == [3.0, 5.0, 2.0, None]
    assert table.schema.field("more").type == pa.int64()


def test_inputs_are_read_for_it_and_names_are_prefixed(store: FeatureStore) -> None:
    table = rows(store, ("by_frame:product", "by_dict:text"), full=True)
    assert table.column_names[-2:] == ["by_frame__product", "by_dict__text"]
    assert table.column("by_frame__product").to_pylist() == [3.0, 5.0, 2.0, None]
    assert table.column("by_dict__text").to_pylist() == ENTITIES["customer_id"]


def test_an_input_of_the_request_alone_needs_no_reading(store: FeatureStore) -> None:
    assert rows(store, ("of_request:twice",), slice_rows=3).column("twice").to_pylist() == [4.0, 4.0, 1.0, 2.0]


def test_an_input_of_the_request_is_demanded_and_typed(store: FeatureStore) -> None:
    historical = Historical(store)
    without = {name: values for name, values in ENTITIES.items() if name != "factor"}
    with pytest.raises(UsageError, match=r"missing.*factor"):
        historical.wanted(("by_frame:product",), without, False, False)
    with pytest.raises(UsageError, match="column factor, row 0: not a value of type DOUBLE"):
        historical.wanted(("by_frame:product",), {**ENTITIES, "factor": ["x"] * 4}, False, False)


def test_the_functions_fault_is_told_under_its_name(store: FeatureStore) -> None:
    with pytest.raises(DataError, match="on-demand feature view by_row failed"):
        rows(store, ("by_row:less",))
    known = {name: values[:3] for name, values in ENTITIES.items()}
    assert rows(store, ("by_row:less",), **known).column("less").to_pylist() == [0, 2, 6]


def test_no_function_comes_out_of_the_registry_unless_that_is_allowed(
    store: FeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    restored = OnDemandFeatureView._parse_transformation_from_proto.__func__  # type: ignore[attr-defined]  # a classmethod
    taken: list[str] = []

    def watch(cls: type, proto: Any, skip_udf: bool = False) -> Any:
        if not skip_udf:
            taken.append(proto.spec.name)
        return restored(cls, proto, skip_udf)

    monkeypatch.setattr(OnDemandFeatureView, "_parse_transformation_from_proto", classmethod(watch))
    assert rows(store, ("by_dict:more",)).num_rows == 4
    assert taken == []

    (path,) = tmp_path.glob("defined_*.py")
    path.unlink()
    with pytest.raises(OnDemandViewError, match="not in the checkout"):
        rows(store, ("by_dict:more",))
    assert taken == []
    store.config.online_store.pickled_functions = "run"
    assert rows(store, ("by_dict:more",)).column("more").to_pylist() == [2, 4, 8, None]
    assert set(taken) == {"by_dict"}


def test_a_function_of_frames_is_given_wide_numbers(store: FeatureStore) -> None:
    """Int32 is widened here, and in an online read: see test_on_demand_read."""
    path = Path(str(store.repo_path)) / "s.parquet"
    table = pq.read_table(path)
    i = table.schema.get_field_index("i")
    pq.write_table(table.set_column(i, "i", table.column("i").cast(pa.int32())), path)
    known = {name: values[:3] for name, values in ENTITIES.items()}  # no null among them
    assert rows(store, ("narrow:square",), **known).column("square").to_pylist() == [0, 10_000_000_000, 4]
    assert rows(store, ("narrow:square",)).column("square").to_pylist() == [0, 10_000_000_000, 4, None]
