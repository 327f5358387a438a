"""The contenders of the offline bench, each the thing a user would run: stock Feast, hand-written queries, and ours.

A task is `join` (a training set over three views) or `latest` (the newest row per key of one view, what
materialisation reads). All get the entity rows in memory and give the result in memory.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from benchmarks.offline_data import CREATED, KEY, SPAN, START, TIME, TTL, WIDTHS, features

STOCK_FILE, STOCK_DUCKDB = "Feast file", "Feast duckdb"
ASOF, RANGE, POLARS = "DuckDB ASOF", "DuckDB range join", "Polars join_asof"
BY_HAND = (ASOF, RANGE, POLARS)
ARG_MAX, POLARS_LATEST = "DuckDB arg_max", "Polars group_by"
BY_HAND_LATEST = (ARG_MAX, POLARS_LATEST)
OURS, OURS_LAYOUT = "ours", "ours, our layout"
ON_LAYOUT = " on our layout"
LATEST_VIEW = "profile"

Run = Callable[[], pa.Table]


def prepare(name: str, case: Mapping[str, Any]) -> tuple[Run, Callable[[pa.Table], dict[str, Any]]]:
    """The contender's run, and the description of its result that is compared: rows, column sums, sampled rows."""
    root = Path(case["root"])
    on_layout = name == OURS_LAYOUT or name.endswith(ON_LAYOUT)
    places = {v: str(root / "layout" / v) if on_layout else str(root / "plain" / f"{v}.parquet") for v in WIDTHS}
    bare = name.removesuffix(ON_LAYOUT)
    task = case["task"]
    if bare in (STOCK_FILE, STOCK_DUCKDB, OURS, OURS_LAYOUT):
        run = _feast(bare, places, root, case)
    elif task == "join":
        run = {ASOF: _duckdb_join, RANGE: _duckdb_join, POLARS: _polars_join}[bare](
            places, Path(case["entities"]), bare
        )
    else:
        run = {ARG_MAX: _duckdb_latest, POLARS_LATEST: _polars_latest}[bare](places)
    identity = "row_id" if task == "join" else KEY
    sample = pa.array(case["sample"], pa.int64())

    def describe(table: pa.Table) -> dict[str, Any]:
        names = [f for v in WIDTHS for f in features(v) if f in table.column_names]
        numbers = [f for f in names if not pa.types.is_string(table.column(f).type) and not f.endswith("_0")]
        chosen = table.filter(pc.is_in(table.column(identity), sample)).select([identity, *names])
        rows = sorted(chosen.to_pylist(), key=lambda r: r[identity])
        return {
            "rows": table.num_rows,
            "sums": {f: pc.sum(table.column(f)).as_py() for f in numbers},
            "sample": rows,
        }

    return run, describe


def _feast(name: str, places: Mapping[str, str], root: Path, case: Mapping[str, Any]) -> Run:
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64, Int64, String

    kind = {STOCK_FILE: "file", STOCK_DUCKDB: "duckdb"}.get(name, "feature_store.offline_store.PredictFlowOfflineStore")
    home = tempfile.mkdtemp(dir=root)
    config = RepoConfig(
        project="bench",
        provider="local",
        registry=f"{home}/registry.db",
        online_store={"type": "sqlite", "path": f"{home}/online.db"},
        offline_store={"type": kind},
        entity_key_serialization_version=3,
        repo_path=Path(home),
    )
    store = FeatureStore(config=config)
    customer = Entity(name="customer", join_keys=[KEY], value_type=ValueType.INT64)
    views = [
        FeatureView(
            name=view,
            entities=[customer],
            ttl=TTL,
            schema=[
                Field(name=f, dtype=String if j == 0 else Int64 if j == 1 else Float64)
                for j, f in enumerate(features(view))
            ],
            source=FileSource(
                name=f"{view}_source", path=place, timestamp_field=TIME, created_timestamp_column=CREATED
            ),
        )
        for view, place in places.items()
    ]
    store.apply([customer, *views])
    if case["task"] == "join":
        entities = pq.read_table(case["entities"]).to_pandas()
        wanted = [f"{v}:{f}" for v in places for f in features(v)]

        def joined() -> pa.Table:
            return store.get_historical_features(entity_df=entities, features=wanted).to_arrow()

        return joined

    source = store.get_feature_view(LATEST_VIEW).batch_source
    assert source is not None
    offline = store._get_provider().offline_store

    def latest() -> pa.Table:
        job = offline.pull_latest_from_table_or_query(
            config, source, [KEY], features(LATEST_VIEW), TIME, CREATED, START, START + SPAN + timedelta(days=1)
        )
        table: pa.Table = job.to_arrow()
        return table

    return latest


def _duckdb_join(places: Mapping[str, str], asked: Path, how: str) -> Run:
    """Match on keys and times alone, then fetch the wide columns of the matched rows once."""
    import duckdb

    entities = pq.read_table(asked)
    low = f"e.{TIME} - INTERVAL {TTL.days} DAY"
    place = "file_index AS f, file_row_number AS p"

    def match(view: str) -> str:
        narrow = f"(SELECT {KEY}, {TIME}, {CREATED}, {place} FROM {_relation(places[view])})"
        if how == ASOF:
            return (
                f"SELECT e.row_id, n.f, n.p FROM e ASOF JOIN {narrow} n ON e.{KEY} = n.{KEY} "
                f"AND e.{TIME} >= n.{TIME} WHERE n.{TIME} >= {low}"
            )
        return (
            f"SELECT e.row_id, n.f, n.p FROM e JOIN {narrow} n ON e.{KEY} = n.{KEY} AND n.{TIME} <= e.{TIME} "
            f"AND n.{TIME} >= {low} "
            f"QUALIFY row_number() OVER (PARTITION BY e.row_id ORDER BY n.{TIME} DESC, n.{CREATED} DESC) = 1"
        )

    def run() -> pa.Table:
        with duckdb.connect() as con:
            con.register("e", entities)
            joins = []
            for view in places:
                con.execute(f"CREATE TEMP TABLE m_{view} AS {match(view)}")
                columns = ", ".join(f"w.{f}" for f in features(view))
                joins.append(
                    f"LEFT JOIN (SELECT m.row_id, {columns} FROM {_relation(places[view])} w JOIN m_{view} m "
                    f"ON w.file_index = m.f AND w.file_row_number = m.p) {view} ON {view}.row_id = e.row_id"
                )
            wanted = ", ".join(f for v in places for f in features(v))
            return con.sql(f"SELECT e.*, {wanted} FROM e {' '.join(joins)} ORDER BY e.row_id").to_arrow_table()

    return run


def _polars_join(places: Mapping[str, str], asked_rows: Path, _: str) -> Run:
    import polars as pl

    entities = pl.read_parquet(asked_rows)

    def run() -> pa.Table:
        asked = entities.select("row_id", KEY, TIME).sort(TIME)
        parts = [entities]
        for view, place in places.items():
            scan = pl.scan_parquet(_glob(place), row_index_name="_at")
            narrow = scan.select("_at", KEY, TIME, CREATED).sort(TIME, CREATED).collect()  # of equal times the newest
            found = asked.join_asof(narrow, on=TIME, by=KEY, tolerance=TTL, check_sortedness=False).sort("row_id")
            wide = pl.scan_parquet(_glob(place)).select(features(view)).collect()
            parts.append(wide.select(pl.all().gather(found.get_column("_at"))))
        return pl.concat(parts, how="horizontal").to_arrow()

    return run


def _duckdb_latest(places: Mapping[str, str]) -> Run:
    import duckdb

    relation = _relation(places[LATEST_VIEW])
    wanted = ", ".join(f"w.{c}" for c in (KEY, *features(LATEST_VIEW), TIME, CREATED))

    def run() -> pa.Table:
        with duckdb.connect() as con:
            con.execute(
                f"CREATE TEMP TABLE m AS SELECT arg_max((file_index, file_row_number), ({TIME}, {CREATED})) AS at "
                f"FROM {relation} GROUP BY {KEY}"
            )
            return con.sql(
                f"SELECT {wanted} FROM {relation} w JOIN m ON w.file_index = m.at[1] AND w.file_row_number = m.at[2]"
            ).to_arrow_table()

    return run


def _polars_latest(places: Mapping[str, str]) -> Run:
    import polars as pl

    place = _glob(places[LATEST_VIEW])

    def run() -> pa.Table:
        narrow = pl.scan_parquet(place, row_index_name="_at").select("_at", KEY, TIME, CREATED).collect()
        at = narrow.sort(TIME, CREATED).group_by(KEY).agg(pl.col("_at").last()).get_column("_at")
        wide = pl.scan_parquet(place).select(KEY, *features(LATEST_VIEW), TIME, CREATED).collect()
        return wide.select(pl.all().gather(at)).to_arrow()

    return run


def _relation(place: str) -> str:
    return f"read_parquet('{_glob(place)}')"


def _glob(place: str) -> str:
    return place if place.endswith(".parquet") else f"{place}/*.parquet"
