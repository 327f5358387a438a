"""Each fault of Feast's own offline stores as one named test: the stock store is shown to have it, ours not to.

The stock half is asserted too, so that a Feast upgrade which mends a fault fails here and the claim is withdrawn.
The numbers are those of docs/performance.md, "What stock Feast gets wrong".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from point_in_time_oracle import as_of, feast_store, write_rows

T0 = datetime(2024, 3, 1, tzinfo=UTC)
NS = int(T0.timestamp()) * 1_000_000_000
DAY = 86_400 * 1_000_000_000
OURS, FILE, DUCKDB = "ours", "file", "duckdb"
COLUMNS = {"driver": pa.int64(), "rate": pa.float64()}

Make = Callable[..., Any]


def at(days: float) -> datetime:
    return T0 + timedelta(days=days)


def row(driver: Any, day: float, rate: float, created: float | None = None, **more: Any) -> dict[str, Any]:
    event, known = (NS + round(d * DAY / 1000) * 1000 for d in (day, day if created is None else created))
    return {"driver": driver, "rate": rate, "event": event, "created": known, **more}


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """`make(kind, rows)`: a FeatureStore of that kind over one Parquet file, with a view `stats` of `driver`."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64

    def build(
        kind: str,
        rows: Sequence[dict[str, Any]],
        *,
        name: str = "stats",
        keys: Sequence[str] = ("driver",),
        feature: str = "rate",
        columns: dict[str, pa.DataType] | None = None,
        unit: str = "us",
        directory: bool = False,
        more: Sequence[Any] = (),
        **config: Any,
    ) -> Any:
        place = tmp_path / kind / (name if directory else f"{name}.parquet")
        file = place / "a.parquet" if directory else place
        write_rows(file, rows, columns or {**COLUMNS, feature: pa.float64()}, unit=unit)
        entities = [Entity(name=k, join_keys=[k], value_type=ValueType.INT64) for k in keys]
        source = FileSource(
            name=f"{name}_source",
            path=str(place),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )
        view = FeatureView(
            name=name,
            entities=entities,
            ttl=timedelta(days=2),
            schema=[Field(name=feature, dtype=Float64)],
            source=source,
        )
        return _store(tmp_path / kind, kind, [*entities, view, *more], **config)

    return build


def _store(directory: Path, kind: str, objects: Sequence[Any], **config: Any) -> Any:
    from feast import FeatureStore, RepoConfig

    if kind == OURS and not config:
        return feast_store(directory, objects)
    offline = {"type": "feature_store.offline_store.PredictFlowOfflineStore"} if kind == OURS else {"type": kind}
    settings: dict[str, Any] = {
        "project": "test",
        "provider": "local",
        "registry": str(directory / "registry.db"),
        "online_store": {"type": "sqlite", "path": str(directory / "online.db")},
        "offline_store": offline,
        "entity_key_serialization_version": 3,
        "repo_path": directory,
    }
    store = FeatureStore(config=RepoConfig(**{**settings, **config}))
    store.apply(list(objects))
    return store


def ask(store: Any, entities: Any, features: Sequence[str] = ("stats:rate",), **kwargs: Any) -> pa.Table:
    return store.get_historical_features(entity_df=entities, features=list(features), **kwargs).to_arrow()


def rates(store: Any, entities: Any, **kwargs: Any) -> list[Any]:
    values: list[Any] = ask(store, entities, **kwargs).column("rate").to_pylist()
    return values


def versions(drivers: int, each: int) -> tuple[list[dict[str, Any]], dict[int, float]]:
    """Shuffled rows, `each` versions of one event per driver, and the rate of each driver's newest version."""
    rng = np.random.default_rng(5)
    order = rng.permutation(drivers * each)
    rows = [row(int(n % drivers), (n % drivers) / 50, float(n), created=1 + n / 1e5) for n in order.tolist()]
    newest: dict[int, float] = {}
    for k in range(drivers):
        best = as_of(rows, {"driver": k}, NS + 10 * DAY)
        assert best is not None
        newest[k] = best["rate"]
    return rows, newest


def latest(store: Any, start: datetime, end: datetime, keys: Sequence[str] = ("driver",)) -> pa.Table:
    view = store.get_feature_view("stats")
    pull = store._get_provider().offline_store.pull_latest_from_table_or_query
    job = pull(store.config, view.batch_source, list(keys), ["rate"], "event_timestamp", "created", start, end)
    return job.to_arrow()


def test_trap_1_file_store_drops_entity_rows_whose_only_candidates_are_expired_or_in_the_future(make: Make) -> None:
    rows = [row(1, 0, 1.0), row(2, 9, 2.0), row(3, 4, 3.0)]
    entities = pd.DataFrame({"driver": [1, 2, 3, 4], "event_timestamp": [at(5)] * 4})
    assert sorted(ask(make(FILE, rows), entities).column("driver").to_pylist()) == [3, 4]
    ours = ask(make(OURS, rows), entities)
    assert ours.column("driver").to_pylist() == [1, 2, 3, 4]
    assert ours.column("rate").to_pylist() == [None, None, 3.0, None]


def test_trap_1_the_dropped_row_takes_the_values_of_the_other_view_with_it(make: Make, tmp_path: Path) -> None:
    def both(kind: str) -> pa.Table:
        make(kind, [row(1, 4, 7.0, rank=5.0)], name="other", feature="rank")
        other = make(kind, [row(1, 4, 7.0, rank=5.0)], name="other", feature="rank").get_feature_view("other")
        store = make(kind, [row(1, 0, 1.0)], more=[other])
        entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(5)]})
        return ask(store, entities, ["other:rank", "stats:rate"])

    assert both(FILE).num_rows == 0
    assert both(OURS).select(["rank", "rate"]).to_pylist() == [{"rank": 5.0, "rate": None}]


def test_trap_2_file_store_collapses_entity_rows_equal_in_key_and_time(make: Make) -> None:
    rows = [row(1, 0, 1.0)]
    entities = pd.DataFrame({"driver": [1, 1, 1], "event_timestamp": [at(1)] * 3, "label": [7, 8, 7]})
    assert ask(make(FILE, rows), entities).num_rows == 1
    ours = ask(make(OURS, rows), entities)
    assert ours.select(["label", "rate"]).to_pylist() == [{"label": x, "rate": 1.0} for x in (7, 8, 7)]


def test_trap_3_file_store_does_not_give_the_newest_created_among_equal_times(make: Make) -> None:
    rows, newest = versions(29, 50)
    entities = pd.DataFrame({"driver": range(29), "event_timestamp": [at(1.5)] * 29})
    stock = ask(make(FILE, rows), entities)
    assert dict(zip(stock["driver"].to_pylist(), stock["rate"].to_pylist(), strict=True)) != newest
    assert rates(make(OURS, rows), entities) == list(newest.values())


def test_trap_3b_file_store_pulls_stale_versions_for_materialisation(make: Make) -> None:
    rows, newest = versions(40, 30)

    def pulled(kind: str) -> dict[int, float]:
        table = latest(make(kind, rows), at(0), at(2))
        return dict(sorted(zip(table["driver"].to_pylist(), table["rate"].to_pylist(), strict=True)))

    assert pulled(FILE) != newest
    assert pulled(OURS) == newest


def test_trap_3b_file_store_returns_too_few_rows_for_views_with_different_keys(make: Make) -> None:
    places = [row(None, 1, 0.0, place=p, rank=float(p)) for p in (1, 2)]
    columns = {"place": pa.int64(), "rank": pa.float64()}
    entities = pd.DataFrame({"driver": [1, 1], "place": [1, 2], "event_timestamp": [at(1.5)] * 2})

    def both(kind: str) -> pa.Table:
        first = make(kind, places, name="where", keys=["place"], feature="rank", columns=columns)
        more = [first.get_feature_view("where"), first.get_entity("place")]
        return ask(make(kind, [row(1, 1, 1.0)], more=more), entities, ["stats:rate", "where:rank"])

    assert both(FILE).num_rows == 1
    assert both(OURS).select(["rate", "rank"]).to_pylist() == [{"rate": 1.0, "rank": 1.0}, {"rate": 1.0, "rank": 2.0}]


def test_trap_3b_in_the_file_store_a_null_key_matches_a_null_key(make: Make) -> None:
    rows = [row(None, 1, 9.0), row(1, 1, 1.0)]
    entities = pd.DataFrame({"driver": pd.array([None, 1], "Int64"), "event_timestamp": [at(1.5)] * 2})
    stock = entities.astype({"driver": "float64"})  # the file store reads an integer key with nulls as float
    assert sorted(rates(make(FILE, rows), stock)) == [1.0, 9.0]
    assert rates(make(OURS, rows), entities) == [None, 1.0]


def test_trap_4_file_store_does_not_keep_the_order_of_the_entity_rows(make: Make) -> None:
    rows = [row(k, 1, float(k)) for k in range(50)]
    order = np.random.default_rng(1).permutation(50)
    entities = pd.DataFrame({"driver": order, "event_timestamp": [at(1.5 + (i % 3) / 10) for i in range(50)]})
    assert ask(make(FILE, rows), entities).column("driver").to_pylist() != order.tolist()
    ours = ask(make(OURS, rows), entities)
    assert ours.column("driver").to_pylist() == order.tolist()
    assert ours.column("rate").to_pylist() == [float(k) for k in order]


@pytest.mark.parametrize("kind", [FILE, DUCKDB])
def test_trap_5_stock_training_sets_see_rows_created_later_and_ours_do_not(make: Make, kind: str) -> None:
    from feast import FeatureService

    from training.dataset import build_training_set

    rows = [row(1, 0, 1.0), row(1, 1, 2.0, created=5)]
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1.5)]})
    assert rates(make(kind, rows), entities) == [2.0]
    store = make(OURS, rows)
    store.apply([FeatureService(name="svc", features=[store.get_feature_view("stats")])])
    table = build_training_set(store, pa.Table.from_pandas(entities, preserve_index=False), "svc")
    assert table.column("rate").to_pylist() == [1.0]


@pytest.mark.parametrize("kind", [FILE, DUCKDB])
def test_trap_6_stock_stores_do_not_take_sql_as_entity_rows(make: Make, kind: str) -> None:
    rows = [row(1, 0, 1.0), row(2, 0, 2.0)]
    sql = "SELECT driver, event_timestamp + INTERVAL 1 DAY AS event_timestamp FROM stats_source ORDER BY driver DESC"
    with pytest.raises((ValueError, AttributeError, TypeError)):
        ask(make(kind, rows), sql)
    assert rates(make(OURS, rows), sql) == [2.0, 1.0]


def test_trap_7_duckdb_store_has_no_retrieval_by_start_and_end(make: Make) -> None:
    rows = [row(1, 0, 1.0), row(1, 1, 1.5), row(2, 1, 2.0), row(3, 8, 3.0)]
    asked = {"features": ["stats:rate"], "start_date": at(0), "end_date": at(2)}
    with pytest.raises(TypeError):
        make(DUCKDB, rows).get_historical_features(**asked)
    table = make(OURS, rows).get_historical_features(**asked).to_arrow()
    assert table.select(["driver", "rate"]).to_pylist() == [{"driver": 1, "rate": 1.5}, {"driver": 2, "rate": 2.0}]


def test_trap_7_duckdb_store_fails_on_an_entity_column_named_like_a_feature(make: Make) -> None:
    rows = [row(1, 0, 1.0)]
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1)], "rate": [77.0]})
    with pytest.raises(Exception, match=r"(?i)rate|column"):
        ask(make(DUCKDB, rows), entities)
    ours = ask(make(OURS, rows), entities)
    assert ours.select(["rate", "stats__rate"]).to_pylist() == [{"rate": 77.0, "stats__rate": 1.0}]


def test_trap_7_duckdb_store_leaks_a_value_from_half_a_microsecond_ahead(make: Make) -> None:
    rows = [row(1, -1, 1.0), {**row(1, 0, 2.0), "event": NS + 400}]
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [T0]})
    assert rates(make(DUCKDB, rows, unit="ns"), entities) == [2.0]
    assert rates(make(OURS, rows, unit="ns"), entities) == [1.0]


def test_trap_7_duckdb_store_cannot_pull_the_latest_rows_of_nanosecond_files(make: Make) -> None:
    rows = [row(1, 0, 1.0), {**row(1, 0, 2.0), "event": NS + 1}]
    with pytest.raises(Exception, match=r"(?i)timestamp"):
        latest(make(DUCKDB, rows, unit="ns"), at(-1), at(1))
    assert latest(make(OURS, rows, unit="ns"), at(-1), at(1)).column("rate").to_pylist() == [2.0]


def test_trap_7_duckdb_store_loses_features_whose_name_ends_in_y(make: Make) -> None:
    rows = [row(1, 0, 1.0, rate_y=3.0)]
    columns = {"driver": pa.int64(), "rate_y": pa.float64()}
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]})
    with pytest.raises(Exception, match="rate_y"):
        ask(make(DUCKDB, rows, feature="rate_y", columns=columns), entities, ["stats:rate_y"])
    ours = ask(make(OURS, rows, feature="rate_y", columns=columns), entities, ["stats:rate_y"])
    assert ours.column("rate_y").to_pylist() == [3.0]


def test_trap_7_duckdb_store_does_not_read_a_directory_without_a_declared_format(make: Make) -> None:
    rows = [row(1, 0, 1.0)]
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]})
    with pytest.raises(Exception, match="NoneType"):
        ask(make(DUCKDB, rows, directory=True), entities)
    assert rates(make(OURS, rows, directory=True), entities) == [1.0]


def test_trap_8_a_table_of_two_chunks_loses_rows_on_the_way_to_the_online_store(make: Make) -> None:
    from feast.utils import _convert_arrow_to_proto
    from feast.value_type import ValueType

    rows = [row(k, 1, float(k)) for k in range(30)]
    store = make(OURS, rows[:20], directory=True)
    view = store.get_feature_view("stats")
    file = Path(view.batch_source.path) / "a.parquet"
    write_rows(file.with_name("b.parquet"), rows[20:], COLUMNS)
    chunked = pa.concat_tables([pq.read_table(file), pq.read_table(file.with_name("b.parquet"))])
    assert chunked.column("rate").num_chunks > 1
    assert len(_convert_arrow_to_proto(chunked, view, {"driver": ValueType.INT64})) < 30
    job = store._get_provider().offline_store.pull_all_from_table_or_query(
        store.config, view.batch_source, ["driver"], ["rate"], "event_timestamp", "created", at(0), at(2)
    )
    assert len(_convert_arrow_to_proto(job.to_arrow(), view, {"driver": ValueType.INT64})) == 30


@pytest.mark.parametrize("kind", [FILE, DUCKDB])
def test_trap_13_a_stock_write_rewrites_the_whole_file_and_ours_adds_one(make: Make, kind: str) -> None:
    rows = [row(1, 0, 1.0)]
    frame = pd.DataFrame({"driver": [1], "rate": [4.0], "event_timestamp": [at(1)], "created": [at(1)]})
    stock, ours = make(kind, rows), make(OURS, rows, directory=True)
    table = Path(stock.get_feature_view("stats").batch_source.path)
    old = table.read_bytes()
    stock.write_to_offline_store("stats", frame)
    assert table.read_bytes() != old
    assert pq.read_metadata(table).num_rows == 2
    first = Path(ours.get_feature_view("stats").batch_source.path) / "a.parquet"
    state = (first.stat().st_ino, first.stat().st_mtime_ns, first.read_bytes())
    ours.write_to_offline_store("stats", frame)
    assert (first.stat().st_ino, first.stat().st_mtime_ns, first.read_bytes()) == state
    assert len(list(first.parent.glob("*.parquet"))) == 2
    assert rates(ours, pd.DataFrame({"driver": [1], "event_timestamp": [at(2)]})) == [4.0]


def test_trap_14_stock_materialize_loads_every_version_of_the_range_at_once_and_ours_goes_by_chunks_of_latest_rows(
    make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    from feast.infra.compute_engines.local.nodes import LocalSourceReadNode
    from feast.infra.online_stores.sqlite import SqliteOnlineStore

    rows, newest = versions(40, 30)
    loaded: list[int] = []
    read, write = LocalSourceReadNode.execute, SqliteOnlineStore.online_write_batch

    def counted_read(self: Any, context: Any) -> Any:
        value = read(self, context)
        loaded.append(value.data.num_rows)
        return value

    def counted_write(self: Any, config: Any, table: Any, data: Any, progress: Any) -> None:
        loaded.append(len(data))
        write(self, config, table, data, progress)

    monkeypatch.setattr(LocalSourceReadNode, "execute", counted_read)
    make(FILE, rows).materialize(at(-1), at(2))
    assert loaded == [len(rows)]

    loaded.clear()
    monkeypatch.setattr(SqliteOnlineStore, "online_write_batch", counted_write)
    engine = {"type": "feature_store.materialise.PredictFlowEngine", "chunk_rows": 15}
    ours = make(OURS, rows, batch_engine=engine)
    ours.materialize(at(-1), at(2))
    assert loaded == [15, 15, 10]
    found = ours.get_online_features(features=["stats:rate"], entity_rows=[{"driver": k} for k in newest])
    assert found.to_dict()["rate"] == list(newest.values())
