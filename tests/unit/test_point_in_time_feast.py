"""Retrieval through the ordinary Feast API: one named test per trap of stock Feast, and the ways to ask."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from point_in_time_oracle import feast_store, time_array, write_rows

from feature_store.errors import PredictFlowError

T0 = datetime(2024, 3, 1, tzinfo=UTC)
DAY = 86_400 * 1_000_000_000
NS = int(T0.timestamp()) * 1_000_000_000


def at(days: float) -> datetime:
    return T0 + timedelta(days=days)


def row(k: Any, day: float, value: Any, created: float | None = None) -> dict[str, Any]:
    event = NS + int(day * DAY)
    return {
        "driver": k,
        "rate": value,
        "event": event,
        "created": event if created is None else NS + int(created * DAY),
    }


COLUMNS = {"driver": pa.int64(), "rate": pa.float64()}


@pytest.fixture
def make(tmp_path: Path) -> Any:
    """Makes a store over one view `stats` of entity driver with `rate`, from rows, and gives a retrieval function."""
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float32, Float64, Int64, String, UnixTimestamp

    types = {"f64": Float64, "f32": Float32, "i64": Int64, "time": UnixTimestamp, "string": String}

    def build(
        rows: Sequence[dict[str, Any]],
        *,
        ttl: timedelta = timedelta(days=2),
        dtype: str = "f64",
        unit: str = "us",
        tz: str | None = "UTC",
        columns: dict[str, pa.DataType] | None = None,
        path: str = "stats",
        more: Sequence[Any] = (),
        **source: Any,
    ) -> Any:
        place = tmp_path / "offline" / path
        write_rows(
            place if path.endswith(".parquet") else place / "a.parquet", rows, columns or COLUMNS, unit=unit, tz=tz
        )
        driver = Entity(name="driver", join_keys=["driver"], value_type=ValueType.INT64)
        stats = FeatureView(
            name="stats",
            entities=[driver],
            ttl=ttl,
            schema=[Field(name="rate", dtype=types[dtype])],
            source=FileSource(
                name="stats_source",
                path=path,
                timestamp_field="event_timestamp",
                created_timestamp_column="created",
                **source,
            ),
        )
        return feast_store(tmp_path, [driver, stats, *more])

    return build


def rates(store: Any, entities: Any, **kwargs: Any) -> list[Any]:
    job = store.get_historical_features(entity_df=entities, features=["stats:rate"], **kwargs)
    return job.to_arrow().column("rate").to_pylist()


def test_trap_1_a_row_whose_only_candidates_are_expired_or_in_the_future_comes_back_with_null(make: Any) -> None:
    store = make([row(1, 0, 1.0), row(2, 9, 2.0), row(3, 4, 3.0)])
    entities = pd.DataFrame({"driver": [1, 2, 3, 4], "event_timestamp": [at(5)] * 4, "label": list("abcd")})
    table = store.get_historical_features(entity_df=entities, features=["stats:rate"]).to_arrow()
    assert table.column("rate").to_pylist() == [None, None, 3.0, None]
    assert table.column("label").to_pylist() == list("abcd")


def test_trap_2_duplicate_entity_rows_are_kept(make: Any) -> None:
    store = make([row(1, 0, 1.0)])
    entities = pd.DataFrame({"driver": [1, 1, 1], "event_timestamp": [at(1)] * 3, "label": [7, 8, 7]})
    table = store.get_historical_features(entity_df=entities, features=["stats:rate"]).to_arrow()
    assert table.column("label").to_pylist() == [7, 8, 7]
    assert table.column("rate").to_pylist() == [1.0] * 3


def test_trap_3_the_newest_created_wins_every_tie(make: Any) -> None:
    rng = np.random.default_rng(5)
    rows = [row(k, 1, float(c), created=1 + c) for k in range(29) for c in rng.permutation(50)]
    store = make(rows)
    entities = pd.DataFrame({"driver": range(29), "event_timestamp": [at(2)] * 29})
    assert rates(store, entities) == [49.0] * 29


def test_trap_3b_pull_latest_gives_the_newest_version_of_every_key_and_no_null_keys(make: Any) -> None:
    rng = np.random.default_rng(6)
    versions = [(k, d, c) for k in range(40) for d in range(4) for c in range(3)]
    rows = [row(k, d, 100.0 * d + c, created=d + c) for k, d, c in rng.permutation(versions)]
    store = make([*rows, row(None, 3, -1.0)])
    view = store.get_feature_view("stats")
    job = store._get_provider().offline_store.pull_latest_from_table_or_query(
        store.config, view.batch_source, ["driver"], ["rate"], "event_timestamp", "created", at(0), at(2.5)
    )
    table = job.to_arrow()
    assert sorted(table.column("driver").to_pylist()) == list(range(40))
    assert set(table.column("rate").to_pylist()) == {202.0}
    assert [f.name for f in table.schema] == ["driver", "rate", "event_timestamp", "created"]


def test_trap_4_row_order_is_kept(make: Any) -> None:
    store = make([row(k, 0, float(k)) for k in range(50)])
    order = np.random.default_rng(1).permutation(50)
    entities = pd.DataFrame({"driver": order, "event_timestamp": [at(1 + (i % 3) / 10) for i in range(50)]})
    frame = store.get_historical_features(entity_df=entities, features=["stats:rate"]).to_df()
    assert frame["driver"].tolist() == order.tolist()
    assert frame["rate"].tolist() == [float(k) for k in order]


def test_trap_5_rows_created_later_are_seen_only_without_as_known(make: Any) -> None:
    store = make([row(1, 0, 1.0), row(1, 1, 2.0, created=5)])
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1.5)]})
    assert rates(store, entities) == [2.0]
    assert rates(store, entities, filter_by_created_timestamp=True) == [1.0]


def test_trap_6_sql_text_as_entity_df_over_a_data_source_by_name(make: Any) -> None:
    store = make([row(1, 0, 1.0), row(2, 0, 2.0)])
    sql = (
        "WITH chosen AS (SELECT driver, event_timestamp + INTERVAL 1 DAY AS event_timestamp FROM stats_source) "
        "SELECT * FROM chosen ORDER BY driver DESC"
    )
    assert rates(store, sql) == [2.0, 1.0]
    with pytest.raises(PredictFlowError, match="no data source of this name: 'absent'; valid: stats_source"):
        rates(store, "SELECT * FROM absent")
    with pytest.raises(PredictFlowError, match="one SELECT"):
        rates(store, "DROP TABLE stats_source")


def test_trap_7_start_and_end_give_one_row_per_known_key_at_end(make: Any) -> None:
    store = make([row(1, 0, 1.0), row(1, 1, 1.5), row(2, 1, 2.0), row(3, 8, 3.0), row(None, 1, 9.0)])
    job = store.get_historical_features(features=["stats:rate"], start_date=at(0), end_date=at(2))
    assert job.to_arrow().to_pylist() == [
        {"driver": 1, "event_timestamp": at(2), "rate": 1.5},
        {"driver": 2, "event_timestamp": at(2), "rate": 2.0},
    ]


def test_trap_7_an_entity_column_named_like_a_feature_stays_and_the_feature_comes_under_its_full_name(
    make: Any,
) -> None:
    store = make([row(1, 0, 1.0)])
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1)], "rate": [77.0]})
    table = store.get_historical_features(entity_df=entities, features=["stats:rate"]).to_arrow()
    assert table.select(["rate", "stats__rate"]).to_pylist() == [{"rate": 77.0, "stats__rate": 1.0}]


def test_trap_7_nanoseconds_are_compared_without_rounding(make: Any) -> None:
    rows = [row(1, 0, 1.0), {**row(1, 0, 2.0), "event": NS + 400}]
    store = make(rows, unit="ns")
    times = [pd.Timestamp(NS + d, unit="ns", tz="UTC") for d in (0, 399, 400, 401)]
    entities = pd.DataFrame({"driver": [1] * 4, "event_timestamp": times})
    assert rates(store, entities) == [1.0, 1.0, 2.0, 2.0]
    view = store.get_feature_view("stats")
    latest = store._get_provider().offline_store.pull_latest_from_table_or_query(
        store.config, view.batch_source, ["driver"], ["rate"], "event_timestamp", "created", at(0), at(1)
    )
    assert latest.to_arrow().column("rate").to_pylist() == [2.0]


def test_ttl_is_inclusive_to_the_nanosecond(make: Any) -> None:
    store = make([row(1, 0, 1.0)], ttl=timedelta(days=2), unit="ns")
    ends = [pd.Timestamp(NS + 2 * DAY + d, unit="ns", tz="UTC") for d in (-1, 0, 1)]
    assert rates(store, pd.DataFrame({"driver": [1] * 3, "event_timestamp": ends})) == [1.0, 1.0, None]


def test_trap_7_a_feature_name_that_ends_in_y(tmp_path: Path) -> None:
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Int64

    write_rows(tmp_path / "offline/d/a.parquet", [{"k": 1, "x_y": 3, "event": NS, "created": NS}],
               {"k": pa.int64(), "x_y": pa.int64()})  # fmt: skip
    k = Entity(name="k", join_keys=["k"], value_type=ValueType.INT64)
    view = FeatureView(name="v", entities=[k], schema=[Field(name="x_y", dtype=Int64)],
                       source=FileSource(path="d", timestamp_field="event_timestamp"))  # fmt: skip
    store = feast_store(tmp_path, [k, view])
    entities = pa.table({"k": [1], "event_timestamp": time_array([NS])})
    assert store.get_historical_features(entity_df=entities, features=["v:x_y"]).to_arrow()["x_y"].to_pylist() == [3]


def test_trap_8_a_chunked_result_loses_no_row_on_the_way_to_the_online_store(make: Any) -> None:
    store = make([row(k, 0, float(k)) for k in range(30)], ttl=timedelta(0))
    for extra in range(3):
        store.write_to_offline_store(
            "stats",
            pd.DataFrame({"driver": range(100 * extra + 100, 100 * extra + 130), "rate": 5.0,
                          "event_timestamp": at(1), "created": at(1)}),
        )  # fmt: skip
    store.materialize(at(-1), at(2))
    rows = [{"driver": k} for k in [*range(30), *(100 * e + 100 + i for e in range(3) for i in range(30))]]
    online = store.get_online_features(features=["stats:rate"], entity_rows=rows).to_dict()["rate"]
    assert online == [float(k) for k in range(30)] + [5.0] * 90


def test_trap_13_a_write_appends_a_file_once_and_leaves_the_others_alone(make: Any, tmp_path: Path) -> None:
    store = make([row(1, 0, 1.0)])
    first = (tmp_path / "offline/stats/a.parquet").stat()
    frame = pd.DataFrame({"driver": [1], "rate": [4.0], "event_timestamp": [at(1)], "created": [at(1)]})
    for _ in range(2):
        store.write_to_offline_store("stats", frame)
    files = sorted(p.name for p in (tmp_path / "offline/stats").iterdir())
    assert len(files) == 2
    assert (tmp_path / "offline/stats/a.parquet").stat().st_mtime_ns == first.st_mtime_ns
    assert rates(store, pd.DataFrame({"driver": [1], "event_timestamp": [at(2)]})) == [4.0]


def test_a_write_to_a_single_file_source_adds_the_rows_to_it(make: Any) -> None:
    store = make([row(1, 0, 1.0)], path="one.parquet")
    store.write_to_offline_store(
        "stats", pd.DataFrame({"driver": [2], "rate": [4.0], "event_timestamp": [at(1)], "created": [at(1)]})
    )
    assert rates(store, pd.DataFrame({"driver": [1, 2], "event_timestamp": [at(1.5)] * 2})) == [1.0, 4.0]


@pytest.mark.parametrize("unit", ["ms", "us", "ns"])
@pytest.mark.parametrize("tz", [None, "UTC", "America/New_York"])
@pytest.mark.parametrize("stored_tz", [None, "UTC"])
def test_times_of_any_unit_and_zone_meet(make: Any, unit: str, tz: str | None, stored_tz: str | None) -> None:
    store = make([row(1, 0, 1.0), row(1, 1, 2.0)], tz=stored_tz)
    entities = pa.table({"driver": [1, 1], "event_timestamp": time_array([NS + DAY - 1_000_000, NS + DAY], unit, tz)})
    table = store.get_historical_features(entity_df=entities, features=["stats:rate"]).to_arrow()
    assert table.column("rate").to_pylist() == [1.0, 2.0]
    assert table.schema.field("event_timestamp").type == pa.timestamp(unit, "UTC")


def test_key_widths_may_differ_but_kinds_may_not(make: Any) -> None:
    store = make([row(1, 0, 1.0)])
    for column in (pa.array([1, None], pa.int16()), pa.array([1, None], pa.uint32()), pa.array([1.0, None])):
        entities = pa.table({"driver": column, "event_timestamp": time_array([NS, NS])})
        assert rates(store, entities) == [1.0, None]
    for wrong in (pa.array(["1"]), pa.array([1.5]), pa.array([True])):
        entities = pa.table({"driver": wrong, "event_timestamp": time_array([NS])})
        with pytest.raises(PredictFlowError, match="join key driver"):
            rates(store, entities)
    nothing = pa.table({"driver": pa.nulls(1), "event_timestamp": time_array([NS])})
    assert rates(store, nothing) == [None]


def test_values_come_back_in_the_declared_type(make: Any) -> None:
    store = make([row(1, 0, 0.1)], dtype="f32")
    table = store.get_historical_features(
        entity_df=pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]}), features=["stats:rate"]
    ).to_arrow()
    assert table.schema.field("rate").type == pa.float32()
    assert table.column("rate").to_pylist() == [float(np.float32(0.1))]


def test_unix_timestamps_come_back_in_whole_seconds(make: Any) -> None:
    columns = {"driver": pa.int64(), "rate": pa.timestamp("us", "UTC")}
    store = make([row(1, 0, at(0.5) + timedelta(microseconds=7))], dtype="time", columns=columns)
    assert rates(store, pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]})) == [at(0.5)]


def test_whole_floats_are_integers_and_others_are_refused(make: Any) -> None:
    store = make([row(1, 0, 3.0), row(2, 0, None), row(3, 0, 3.5)], dtype="i64")
    assert rates(store, pd.DataFrame({"driver": [1, 2], "event_timestamp": [at(1)] * 2})) == [3, None]
    with pytest.raises(PredictFlowError, match=r"feature rate: not a whole number: 3\.5"):
        rates(store, pd.DataFrame({"driver": [3], "event_timestamp": [at(1)]}))
    text = make([row(1, 0, "x")], dtype="i64", columns={"driver": pa.int64(), "rate": pa.string()})
    with pytest.raises(PredictFlowError, match="stored as VARCHAR, which does not fit the declared type: 'Int64'"):
        rates(text, pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]}))


def test_entity_rows_from_a_parquet_file_a_directory_and_arrow(make: Any, tmp_path: Path) -> None:
    store = make([row(1, 0, 1.0), row(2, 0, 2.0)])
    table = pa.table({"driver": [2, 1], "event_timestamp": time_array([NS + 1000, NS + 1000])})
    (tmp_path / "asked").mkdir()
    pq.write_table(table, tmp_path / "asked" / "rows.parquet")
    for entities in (table, str(tmp_path / "asked" / "rows.parquet"), str(tmp_path / "asked"), tmp_path / "asked"):
        assert rates(store, entities) == [2.0, 1.0]
    with pytest.raises(PredictFlowError, match="entity_df: no Parquet files"):
        rates(store, str(tmp_path / "absent.parquet"))


def test_several_views_keys_maps_aliases_and_on_demand_views_in_one_retrieval(tmp_path: Path) -> None:
    from feast import Entity, FeatureService, FeatureView, Field, FileSource, RequestSource, ValueType
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64, Int64, String

    places = [
        {"place": 1, "temp": 10.0, "event": NS, "created": NS},
        {"place": 2, "temp": 20.0, "event": NS, "created": NS},
    ]
    write_rows(tmp_path / "offline/weather/a.parquet", places, {"place": pa.int32(), "temp": pa.float64()})
    pairs = [{"who": "x", "place": 2, "n": 5, "event": NS, "created": NS}]
    write_rows(tmp_path / "offline/visits/y=1/a.parquet", pairs,
               {"who": pa.string(), "place": pa.int64(), "n": pa.int64()})  # fmt: skip
    place = Entity(name="place", join_keys=["place_id"], value_type=ValueType.INT64)
    who = Entity(name="who", join_keys=["who"], value_type=ValueType.STRING)
    weather = FeatureView(
        name="weather", entities=[place], ttl=timedelta(days=1),
        schema=[Field(name="place_id", dtype=Int64), Field(name="degrees", dtype=Float64)],
        source=FileSource(name="w", path="weather", timestamp_field="event_timestamp",
                          field_mapping={"temp": "degrees", "place": "place_id"}),
    )  # fmt: skip
    visits = FeatureView(
        name="visits", entities=[who, place], ttl=timedelta(days=9),
        schema=[Field(name="n", dtype=Int64), Field(name="who", dtype=String), Field(name="place_id", dtype=Int64)],
        source=FileSource(name="p", path="visits", timestamp_field="event_timestamp",
                          created_timestamp_column="created", field_mapping={"place": "place_id"}),
    )  # fmt: skip

    @on_demand_feature_view(
        sources=[weather, RequestSource(name="asked", schema=[Field(name="plus", dtype=Float64)])],
        schema=[Field(name="warmer", dtype=Float64)],
        mode="pandas",
    )
    def warm(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"warmer": inputs["degrees"] + inputs["plus"]})

    home = weather.with_name("home").with_join_key_map({"place_id": "home_id"})
    service = FeatureService(name="both", features=[home, visits, warm])
    store = feast_store(tmp_path, [place, who, weather, visits, warm, service])
    entities = pd.DataFrame(
        {"who": ["x", "y", None], "place_id": [2, 2, 1], "home_id": [1, 9, 2], "plus": [0.5, 0.5, 0.5],
         "event_timestamp": [at(0.5), at(0.5), at(3)]}
    )  # fmt: skip
    table = store.get_historical_features(entity_df=entities, features=service, full_feature_names=True).to_arrow()
    assert table.column("home__degrees").to_pylist() == [10.0, None, None]
    assert table.column("weather__degrees").to_pylist() == [20.0, 20.0, None]
    assert table.column("visits__n").to_pylist() == [5, None, None]
    assert table.column("warm__warmer").to_pylist()[:2] == [20.5, 20.5]


def test_a_saved_dataset_holds_the_result_and_is_not_overwritten_unasked(make: Any) -> None:
    from feast.errors import SavedDatasetLocationAlreadyExists
    from feast.infra.offline_stores.file_source import SavedDatasetFileStorage

    store = make([row(1, 0, 1.0), row(2, 0, 2.0)])
    entities = pd.DataFrame({"driver": [2, 1, 5], "event_timestamp": [at(1), at(1.5), at(2)]})
    job = store.get_historical_features(entity_df=entities, features=["stats:rate"])
    storage = SavedDatasetFileStorage(path="saved/set.parquet")
    saved = store.create_saved_dataset(from_=job, name="set", storage=storage)
    assert saved.to_df()["rate"].tolist()[:2] == [2.0, 1.0]
    assert len(store.get_saved_dataset("set").to_df()) == 3
    with pytest.raises(SavedDatasetLocationAlreadyExists):
        store.create_saved_dataset(from_=job, name="again", storage=storage)
    store.create_saved_dataset(from_=job, name="again", storage=storage, allow_overwrite=True)


def test_a_view_without_entities_gives_its_latest_row_to_everybody(tmp_path: Path) -> None:
    from feast import FeatureView, Field, FileSource
    from feast.types import Int64

    rows = [{"v": 1, "event": NS, "created": NS}, {"v": 2, "event": NS + DAY, "created": NS}]
    write_rows(tmp_path / "offline/all/a.parquet", rows, {"v": pa.int64()})
    view = FeatureView(name="everyone", entities=[], schema=[Field(name="v", dtype=Int64)],
                       source=FileSource(name="s", path="all", timestamp_field="event_timestamp"))  # fmt: skip
    store = feast_store(tmp_path, [view])
    entities = pa.table({"event_timestamp": time_array([NS - 1000, NS, NS + 2 * DAY])})
    table = store.get_historical_features(entity_df=entities, features=["everyone:v"]).to_arrow()
    assert table.column("v").to_pylist() == [None, 1, 2]
    store.materialize(at(-1), at(2))
    assert store.get_online_features(features=["everyone:v"], entity_rows=[{"__dummy_id": ""}]).to_dict()["v"] == [2]


@pytest.mark.parametrize(
    ("entities", "message"),
    [
        (pd.DataFrame({"event_timestamp": [at(1)]}), "lack the join key: 'driver'"),
        (pd.DataFrame({"driver": [1]}), "no column event_timestamp"),
        (pd.DataFrame({"driver": [1, 2], "event_timestamp": [at(1), None]}), "missing in 1 row"),
        (pd.DataFrame({"driver": [1], "event_timestamp": ["yesterday"]}), "no timestamp"),
        (pa.table({"driver": [1], "event_timestamp": pa.array([2**60], pa.timestamp("us"))}), "outside of 1677"),
        (42, "unknown type: 'int'"),
        ("SELECT 1 +", "neither a path nor SQL"),
    ],
)
def test_bad_entity_rows_are_one_clear_line(make: Any, entities: Any, message: str) -> None:
    store = make([row(1, 0, 1.0)])
    store.config.coerce_tz_aware = False  # Feast would raise its own errors first
    with pytest.raises(PredictFlowError, match=message) as caught:
        rates(store, entities)
    assert "\n" not in caught.value.message


def test_bad_sources_are_one_clear_line_naming_the_file(make: Any, tmp_path: Path) -> None:
    store = make([row(1, 0, 1.0)])
    entities = pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]})
    file = tmp_path / "offline/stats/a.parquet"
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(PredictFlowError, match=r"feature view stats .*a\.parquet") as caught:
        rates(store, entities)
    assert "\n" not in caught.value.message
    file.unlink()
    with pytest.raises(PredictFlowError, match=r"offline/stats.*next: predictflow backfill stats"):
        rates(store, entities)
    pq.write_table(pa.table({"driver": [1], "event_timestamp": time_array([NS]), "created": time_array([NS])}), file)
    with pytest.raises(PredictFlowError, match="no file holds the column of feature rate: 'rate'"):
        rates(store, entities)
    write_rows(file.with_name("b.parquet"), [row(1, 0, 1.0)], COLUMNS)
    assert rates(store, entities) == [1.0]  # a feature added later is null in older files


def test_files_that_are_not_finished_are_not_read(make: Any, tmp_path: Path) -> None:
    store = make([row(1, 0, 1.0)])
    for name in (".tmp.parquet", "_half.parquet"):
        (tmp_path / "offline/stats" / name).write_bytes(b"half")
    assert rates(store, pd.DataFrame({"driver": [1], "event_timestamp": [at(1)]})) == [1.0]


def test_an_unset_variable_in_the_store_path_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PredictFlowError, match="PREDICTFLOW_OFFLINE"):
        feast_store(tmp_path, [], path="${PREDICTFLOW_OFFLINE}")
