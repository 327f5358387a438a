"""Reads what training needs of a raw directory: the labels, and the summary with its time limits."""

from __future__ import annotations

import json
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.errors import DataError, NotFoundError

if TYPE_CHECKING:
    import pyarrow as pa

KEY, TIME, LABEL, BEST = "customer_id", "event_timestamp", "churned", "best_probability"
NEXT = "predictflow data --help"


@dataclass(frozen=True)
class RawSummary:
    """The part of summary.json that training uses; times are UTC."""

    dataset: str
    cut: datetime
    horizon: timedelta
    train_until: datetime
    future_from: datetime

    @classmethod
    def read(cls, raw_dir: Path) -> RawSummary:
        """From `<raw>/summary.json`; NotFoundError without the file, DataError for a missing or unreadable field."""
        path = Path(raw_dir) / "summary.json"
        if not path.is_file():
            raise NotFoundError("no summary.json in the raw directory", value=str(raw_dir), next_step=NEXT)
        try:
            data = json.loads(path.read_text())
        except ValueError as e:
            raise DataError(f"{path} is not JSON ({e})", next_step=NEXT) from e
        try:
            return cls(
                dataset=str(data["dataset"]),
                cut=_utc(data["cut"]),
                horizon=timedelta(days=float(data["horizon_days"])),
                train_until=_utc(data["train_until"]),
                future_from=_utc(data["future_from"]),
            )
        except KeyError as e:
            raise DataError(f"{path} lacks a field", value=e.args[0], next_step=NEXT) from e
        except (TypeError, ValueError) as e:
            raise DataError(f"{path} has a field that does not parse ({e})", next_step=NEXT) from e


def read_labels(raw_dir: Path, summary: RawSummary) -> pa.Table:
    """`<raw>/labels.parquet`: customer_id, event_timestamp (t), churned int8, best_probability double? (null: unknown).

    DataError for missing columns, no rows, null keys or times, a label other than 0 and 1, and a label that the cut
    does not know yet (t + horizon > cut): such a row would train the model on a guess.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = Path(raw_dir) / "labels.parquet"
    if not path.is_file():
        raise NotFoundError("no labels.parquet in the raw directory", value=str(raw_dir), next_step=NEXT)
    try:
        labels = pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as e:
        raise DataError(f"{path} cannot be read ({str(e).splitlines()[0]})", next_step=NEXT) from e
    check_labels(labels, summary)
    return labels


def check_labels(labels: pa.Table, summary: RawSummary) -> None:
    """Raise DataError unless every row of `labels` is usable (see read_labels)."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for name in (KEY, TIME, LABEL, BEST):
        if name not in labels.column_names:
            raise DataError("labels lack a column", value=name, valid=labels.column_names, next_step=NEXT)
    if labels.num_rows == 0:
        raise DataError("labels have no rows", next_step=NEXT)
    if not pa.types.is_timestamp(labels.schema.field(TIME).type) or labels.schema.field(TIME).type.tz is None:
        raise DataError("labels' event_timestamp is not a UTC timestamp", value=str(labels.schema.field(TIME).type))
    for name in (KEY, TIME, LABEL):
        if labels.column(name).null_count:
            raise DataError(f"labels have {labels.column(name).null_count} rows without {name}", next_step=NEXT)
    wrong = labels.filter(pc.invert(pc.is_in(labels[LABEL], value_set=pa.array([0, 1], labels[LABEL].type))))
    if wrong.num_rows:
        raise DataError("a label is neither 0 nor 1", value=wrong[LABEL][0].as_py(), next_step=NEXT)
    latest = pc.max(labels[TIME]).as_py()
    if latest + summary.horizon > summary.cut:
        raise DataError(
            f"a label at {latest.isoformat()} is not known at the cut {summary.cut.isoformat()}: "
            f"its horizon of {summary.horizon.days} days ends later",
            next_step=NEXT,
        )


def _utc(text: str) -> datetime:
    parsed = datetime.fromisoformat(text)
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)
