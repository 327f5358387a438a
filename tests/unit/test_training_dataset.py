"""Training sets through Feast: the labels' rows untouched, each feature as it was known at the row's own time."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.errors import DataError, DefinitionError, NotFoundError
from training.dataset import (
    LEAKY,
    POINT_IN_TIME,
    TrainingSet,
    build_both,
    build_leaky_set,
    build_training_set,
    content_hash,
    lineage_of,
)

T0 = datetime(2025, 1, 1, tzinfo=UTC)
TIME = pa.timestamp("us", tz="UTC")
CUT = T0 + timedelta(days=40)
# (customer, day of the event, day it became known, charges, plan)
ROWS = [
    ("A", 0, 0, 10.0, "basic"),
    ("A", 5, 9, 11.0, "basic"),  # known four days late
    ("A", 35, 35, 90.0, "gold"),
    ("B", 0, 0, 20.0, None),
    ("B", 0, 6, 21.0, None),  # a correction
]


def day(n: float) -> datetime:
    return T0 + timedelta(days=n)


def label_table(rows: list[tuple[str, float, int]], **more: Any) -> pa.Table:
    return pa.table(
        {
            "customer_id": [r[0] for r in rows],
            "event_timestamp": pa.array([day(r[1]) for r in rows], TIME),
            "churned": pa.array([r[2] for r in rows], pa.int8()),
            "best_probability": pa.array([None] * len(rows), pa.float64()),
            **more,
        }
    )


LABELS = [("B", 7, 1), ("A", 7, 0), ("A", 10, 0), ("A", 7, 1), ("C", 7, 0), ("B", 3, 0)]


def make_store(home: Path, offline_store: dict[str, str], path: str) -> Any:
    """A real Feast store over the rows above, with a service `churn` of charges and plan."""
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.data_format import ParquetFormat
    from feast.types import Float64, String

    (home / "offline" / "account").mkdir(parents=True)
    pq.write_table(
        pa.table(
            {
                "customer_id": [r[0] for r in ROWS],
                "event_timestamp": pa.array([day(r[1]) for r in ROWS], TIME),
                "created": pa.array([day(r[2]) for r in ROWS], TIME),
                "charges": [r[3] for r in ROWS],
                "plan": [r[4] for r in ROWS],
            }
        ),
        home / "offline" / "account" / "a.parquet",
    )
    config = RepoConfig(
        project="training_test",
        provider="local",
        registry=str(home / "registry.db"),
        online_store={"type": "sqlite", "path": str(home / "online.db")},
        offline_store=offline_store,
        entity_key_serialization_version=3,
    )
    store = FeatureStore(config=config)
    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    view = FeatureView(
        name="account",
        entities=[customer],
        ttl=timedelta(days=30),
        schema=[Field(name="plan", dtype=String), Field(name="charges", dtype=Float64)],
        source=FileSource(
            name="account_source",
            path=path,
            file_format=ParquetFormat(),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        ),
    )
    store.apply([customer, view, FeatureService(name="churn", features=[view[["charges", "plan"]]])])
    return store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Any:
    home = tmp_path_factory.mktemp("store")
    ours = "feature_store.offline_store.PredictFlowOfflineStore"
    return make_store(home, {"type": ours, "path": str(home / "offline")}, "account")


def test_rows_keep_their_order_duplicates_and_columns_and_get_what_was_known(store: Any) -> None:
    labels = label_table(LABELS, note=pa.array(["x", "y", "z", "y2", "w", "v"]))
    table = build_training_set(store, labels, "churn")
    assert table.select(labels.column_names).equals(labels)
    assert table.column_names == [*labels.column_names, "charges", "plan"]
    assert table["charges"].to_pylist() == [21.0, 10.0, 11.0, 10.0, None, 20.0]
    assert table["plan"].to_pylist() == [None, "basic", "basic", "basic", None, None]


def test_without_as_known_a_late_value_counts_from_its_event_time(store: Any) -> None:
    table = build_training_set(store, label_table(LABELS), "churn", as_known=False)
    assert table["charges"].to_pylist() == [21.0, 11.0, 11.0, 11.0, None, 21.0]


def test_the_leaky_set_gives_every_row_of_a_customer_the_value_at_the_cut(store: Any) -> None:
    labels = label_table(LABELS)
    table = build_leaky_set(store, labels, "churn", CUT)
    assert table.select(labels.column_names).equals(labels)
    # B's account is older than the view's ttl by then: silence is what gives the churner away.
    assert table["charges"].to_pylist() == [None, 90.0, 90.0, 90.0, None, None]


def test_both_sets_are_named_by_their_content(store: Any) -> None:
    labels = label_table(LABELS)
    sets = build_both(store, labels, "telco", "churn", CUT)
    again = build_both(store, labels, "telco", "churn", CUT)
    assert {v: s.name for v, s in sets.items()} == {v: s.name for v, s in again.items()}
    assert sets[POINT_IN_TIME].name.startswith("telco/point_in_time@")
    other = build_both(store, labels.slice(1), "telco", "churn", CUT)
    assert not {s.name for s in sets.values()} & {s.name for s in other.values()}
    assert lineage_of([sets[LEAKY]]) == [(("feature_service", "churn"), ("training_set", sets[LEAKY].name))]


def test_a_saved_set_comes_back_with_its_description(store: Any, tmp_path: Path) -> None:
    made = build_both(store, label_table(LABELS), "telco", "churn", CUT)[POINT_IN_TIME]
    made.save(tmp_path / "deep" / "set.parquet")
    first = (tmp_path / "deep" / "set.parquet").read_bytes()
    made.save(tmp_path / "deep" / "set.parquet")
    assert (tmp_path / "deep" / "set.parquet").read_bytes() == first  # else DVC would see new data on every run
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["set.parquet"]
    loaded = TrainingSet.load(tmp_path / "deep" / "set.parquet")
    assert loaded.table.replace_schema_metadata(None).equals(made.table.replace_schema_metadata(None))
    assert (loaded.name, loaded.features, loaded.as_known) == (made.name, ("charges", "plan"), True)


def test_the_content_hash_sees_values_and_types_but_not_chunks() -> None:
    table = pa.table({"a": [1, 2, None], "b": ["x", None, "z"]})
    chunked = pa.concat_tables([table.slice(0, 1), table.slice(1)])
    assert content_hash(chunked) == content_hash(table)
    for other in (
        table.slice(1),
        table.take(pa.array([1, 0, 2])),
        table.rename_columns(["a", "c"]),
        table.set_column(0, "a", pa.array([1.0, 2.0, None])),
        table.set_column(1, "b", pa.array(["x", "", "z"])),
    ):
        assert content_hash(other) != content_hash(table)


def test_an_unknown_service_names_the_valid_ones_and_the_next_command(store: Any) -> None:
    with pytest.raises(NotFoundError, match=r"'churm'; valid: churn; did you mean 'churn'\?; next: feast apply"):
        build_training_set(store, label_table(LABELS), "churm")


def test_unusable_label_tables_are_refused(store: Any) -> None:
    with pytest.raises(DataError, match="no rows"):
        build_training_set(store, label_table([]), "churn")
    with pytest.raises(DataError, match="lack a column: 'customer_id'"):
        build_training_set(store, label_table(LABELS).drop_columns(["customer_id"]), "churn")
    clash = label_table(LABELS, plan=pa.array(["p"] * len(LABELS)))
    with pytest.raises(DefinitionError, match="name of a feature: 'plan'"):
        build_training_set(store, clash, "churn")


def test_a_store_that_loses_rows_is_refused(tmp_path: Path) -> None:
    """Stock Feast's file store drops and reorders rows; labels must not slip beside other rows' features."""
    stock = make_store(tmp_path, {"type": "dask"}, str(tmp_path / "offline" / "account"))
    labels = label_table([("A", 7, 0), ("A", -1, 1), ("B", 7, 1)])
    with pytest.raises(DataError, match=r"returned 2 rows for 3.*PredictFlowOfflineStore"):
        build_training_set(stock, labels, "churn", as_known=False)


@pytest.mark.parametrize("content", [None, b"PAR1", "plain"])
def test_a_file_that_is_no_training_set_is_refused(tmp_path: Path, content: Any) -> None:
    path = tmp_path / "x.parquet"
    if content == "plain":
        pq.write_table(pa.table({"a": [1]}), path)
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(NotFoundError if content is None else DataError):
        TrainingSet.load(path)
