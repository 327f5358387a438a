"""Labels and summary: what may not be trained on is refused with one clear line."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.errors import DataError, NotFoundError, PredictFlowError
from training.raw import RawSummary, read_labels

CUT = datetime(2025, 9, 20, tzinfo=UTC)
SUMMARY: dict[str, Any] = {
    "dataset": "telco",
    "cut": "2025-09-20T00:00:00Z",
    "horizon_days": 30,
    "train_until": "2025-06-18T00:00:00+00:00",
    "future_from": "2025-07-23T00:00:00",
}
TIME = pa.timestamp("us", tz="UTC")


def write(raw: Path, labels: dict[str, pa.Array] | None = None, **summary: Any) -> Path:
    raw.mkdir(exist_ok=True)
    (raw / "summary.json").write_text(json.dumps(SUMMARY | summary))
    good = {
        "customer_id": pa.array(["A", "B"]),
        "event_timestamp": pa.array([CUT - timedelta(days=30), CUT - timedelta(days=60)], TIME),
        "churned": pa.array([0, 1], pa.int8()),
        "best_probability": pa.array([0.25, None]),
    }
    pq.write_table(
        pa.table({k: v for k, v in (good | (labels or {})).items() if v is not None}), raw / "labels.parquet"
    )
    return raw


def test_labels_up_to_a_horizon_before_the_cut_are_read(tmp_path: Path) -> None:
    raw = write(tmp_path)
    summary = RawSummary.read(raw)
    assert summary.future_from == datetime(2025, 7, 23, tzinfo=UTC)  # naive times are UTC
    assert read_labels(raw, summary).num_rows == 2


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        ({"event_timestamp": pa.array([CUT - timedelta(days=30, microseconds=-1)] * 2, TIME)}, "not known at the cut"),
        ({"churned": pa.array([0, None], pa.int8())}, "1 rows without churned"),
        ({"churned": pa.array([0, 2], pa.int8())}, "neither 0 nor 1: 2"),
        ({"customer_id": pa.array(["A", None])}, "1 rows without customer_id"),
        ({"event_timestamp": pa.array([CUT - timedelta(days=40), None], TIME)}, "1 rows without event_timestamp"),
        ({"event_timestamp": pa.array(["2025-01-01", "2025-01-02"])}, "not a UTC timestamp: 'string'"),
        ({"best_probability": None}, "lack a column: 'best_probability'"),
    ],
)
def test_unusable_labels_are_refused(tmp_path: Path, labels: dict[str, Any], message: str) -> None:
    raw = write(tmp_path, labels)
    with pytest.raises(DataError, match=message):
        read_labels(raw, RawSummary.read(raw))


def test_labels_without_rows_are_refused(tmp_path: Path) -> None:
    raw = write(tmp_path)
    pq.write_table(pq.read_table(raw / "labels.parquet").slice(0, 0), raw / "labels.parquet")
    with pytest.raises(DataError, match="no rows"):
        read_labels(raw, RawSummary.read(raw))


def test_an_unreadable_labels_file_is_named(tmp_path: Path) -> None:
    raw = write(tmp_path)
    (raw / "labels.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"labels\.parquet cannot be read"):
        read_labels(raw, RawSummary.read(raw))


def test_missing_files_are_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFoundError, match=r"no summary\.json"):
        RawSummary.read(tmp_path)
    write(tmp_path)
    (tmp_path / "labels.parquet").unlink()
    with pytest.raises(NotFoundError, match=r"no labels\.parquet"):
        read_labels(tmp_path, RawSummary.read(tmp_path))


@pytest.mark.parametrize("change", [{"cut": "yesterday"}, {"horizon_days": None}])
def test_a_summary_that_does_not_parse_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    with pytest.raises(DataError, match="does not parse"):
        RawSummary.read(write(tmp_path, **change))


@pytest.mark.parametrize("text", ["{", '{"dataset": "telco"}'])
def test_a_summary_that_is_no_summary_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "summary.json").write_text(text)
    with pytest.raises(PredictFlowError, match=r"not JSON|lacks a field: 'cut'"):
        RawSummary.read(tmp_path)
