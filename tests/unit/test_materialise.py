"""The batch engine: latest row per key in chunks, exact integers, late rows picked up by incremental runs."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from point_in_time_oracle import feast_store

from feature_store.errors import DataError
from feature_store.materialise import PredictFlowEngineConfig

T0 = datetime(2025, 1, 1, tzinfo=UTC)
BIG = 2**53 + 1
ENGINE = "feature_store.materialise.PredictFlowEngine"


def _write(path: Path, rows: list[tuple[int, int, int, int | None]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    times = [pa.array([T0 + timedelta(hours=r[i] or 0) for r in rows], pa.timestamp("us", "UTC")) for i in (1, 2)]
    keys, values = pa.array([r[0] for r in rows], pa.int64()), pa.array([r[3] for r in rows], pa.int64())
    pq.write_table(pa.table({"k": keys, "event_timestamp": times[0], "created": times[1], "v": values}), path)


@pytest.fixture
def store(tmp_path: Path) -> Any:
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Int64

    source = FileSource(
        name="s", path="s", timestamp_field="event_timestamp", created_timestamp_column="created"
    )  # fmt: skip
    entity = Entity(name="k", join_keys=["k"], value_type=ValueType.INT64)
    view = FeatureView(
        name="view", entities=[entity], ttl=timedelta(0), schema=[Field(name="k", dtype=Int64), Field(name="v", dtype=Int64)], source=source
    )  # fmt: skip
    return feast_store(tmp_path, [entity, source, view], batch_engine={"type": ENGINE, "chunk_rows": 3})


def _online(store: Any, keys: list[int]) -> list[int | None]:
    answer = store.get_online_features(features=["view:v"], entity_rows=[{"k": k} for k in keys])
    return list(answer.to_dict()["v"])


def test_the_latest_row_of_every_key_arrives_in_chunks_and_integers_keep_their_digits(
    store: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [(k, h, h, BIG + 10 * k + h) for k in range(8) for h in (1, 2, 3)] + [(8, 1, 1, None), (0, 99, 99, 1)]
    _write(tmp_path / "offline/s/a.parquet", rows)
    written: list[int] = []
    provider = store._get_provider()
    real = provider.online_store.online_write_batch

    def counted(config: Any, view: Any, data: Any, progress: Any) -> None:
        written.append(len(data))
        real(config, view, data, progress)

    monkeypatch.setattr(provider.batch_engine.online_store, "online_write_batch", counted)
    store.materialize(T0, T0 + timedelta(hours=10))
    assert written == [3, 3, 3]
    assert _online(store, list(range(9))) == [*(BIG + 10 * k + 3 for k in range(8)), None]


def test_an_incremental_run_also_takes_rows_that_became_known_since_the_last(store: Any, tmp_path: Path) -> None:
    _write(tmp_path / "offline/s/a.parquet", [(1, 1, 1, 10), (2, 1, 1, 20), (3, 5, 5, 30)])
    store.materialize(T0, T0 + timedelta(hours=4))
    assert _online(store, [1, 2, 3, 4]) == [10, 20, None, None]
    # key 2: a correction of a time already done; key 4: a first row, late
    _write(tmp_path / "offline/s/b.parquet", [(2, 2, 6, 22), (4, 3, 7, 40)])
    store.materialize_incremental(T0 + timedelta(hours=8))
    assert _online(store, [1, 2, 3, 4]) == [10, 22, 30, 40]


def test_a_range_of_ones_own_choice_is_taken_as_it_is(store: Any, tmp_path: Path) -> None:
    _write(tmp_path / "offline/s/a.parquet", [(1, 1, 9, 10), (2, 6, 6, 20)])
    store.materialize(T0 + timedelta(hours=5), T0 + timedelta(hours=10))
    assert _online(store, [1, 2]) == [None, 20]


def test_a_view_without_files_is_an_error_that_names_it(store: Any) -> None:
    from feature_store.errors import NotFoundError

    with pytest.raises(NotFoundError, match="feature view view: no Parquet files"):
        store.materialize(T0, T0 + timedelta(hours=1))


def test_a_damaged_file_is_named_and_the_range_is_not_recorded_as_done(store: Any, tmp_path: Path) -> None:
    path = tmp_path / "offline/s/a.parquet"
    _write(path, [(1, 1, 1, 10)])
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"a\.parquet"):
        store.materialize(T0, T0 + timedelta(hours=4))
    assert store.get_feature_view("view").materialization_intervals == []


def test_the_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="chunk_rows"):
        PredictFlowEngineConfig(chunk_rows=0)
