"""The raw directory that every source delivers: schemas, rejects, summary, the check of all of it, and its publication.

Every time is `timestamp[us, UTC]`; the period is half-open, `start <= time < end`. `cut` is where history ends: rows with
`created <= cut` are history, events with `created > cut` the live stream.
"""

from __future__ import annotations

import json
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from pathlib import Path
from types import TracebackType

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.errors import DataError, PredictFlowError, UsageError

TIME = pa.timestamp("us", tz="UTC")


def _required(name: str, kind: pa.DataType) -> pa.Field:
    return pa.field(name, kind, nullable=False)


SCHEMAS: Mapping[str, pa.Schema] = {
    "accounts": pa.schema(
        [
            _required("customer_id", pa.string()),
            _required("event_timestamp", TIME),
            _required("created", TIME),
            _required("joined_at", TIME),
            ("monthly_charges", pa.float64()),
            ("contract_months", pa.int64()),
            ("payment_method", pa.string()),
        ]
    ),
    "events": pa.schema(
        [
            _required("event_id", pa.string()),
            _required("customer_id", pa.string()),
            _required("event_type", pa.string()),
            _required("event_timestamp", TIME),
            _required("created", TIME),
            _required("quantity", pa.int64()),
            _required("amount_cents", pa.int64()),
        ]
    ),
    "labels": pa.schema(
        [
            _required("customer_id", pa.string()),
            _required("event_timestamp", TIME),
            _required("churned", pa.int8()),
            ("best_probability", pa.float64()),
        ]
    ),
}
"""The three tables; a column not marked as required may hold nulls."""

REJECTS = "rejects.jsonl"
SUMMARY = "summary.json"
TIMES = ("start", "cut", "end", "train_until", "future_from")
FILES = frozenset({*(f"{name}.parquet" for name in SCHEMAS), REJECTS, SUMMARY})


@dataclass(frozen=True)
class Summary:
    """What `summary.json` says about a raw directory. Times are UTC; the horizon is that of the churn label."""

    dataset: str
    customers: int
    events: int
    rejected_by_reason: Mapping[str, int]
    start: datetime
    cut: datetime
    end: datetime
    horizon_days: int
    train_until: datetime
    future_from: datetime

    def __post_init__(self) -> None:
        for name in TIMES:
            if getattr(self, name).tzinfo is None:
                raise DataError(f"summary.{name} has no time zone", value=str(getattr(self, name)))

    @property
    def rejected(self) -> int:
        return sum(self.rejected_by_reason.values())

    def to_json(self) -> str:
        times = {name: getattr(self, name).isoformat() for name in TIMES}
        document = {
            "dataset": self.dataset,
            "rows": {"customers": self.customers, "events": self.events, "rejected": self.rejected},
            "rejected_by_reason": dict(sorted(self.rejected_by_reason.items())),
            "horizon_days": self.horizon_days,
            **times,
        }
        return json.dumps(document, indent=2) + "\n"

    @classmethod
    def read(cls, raw_dir: Path) -> Summary:
        """The summary of a published raw directory; DataError when it is missing or not one of ours."""
        path = raw_dir / SUMMARY
        try:
            d = json.loads(path.read_text(encoding="utf-8"))
            times = {k: datetime.fromisoformat(d[k]) for k in TIMES}
            return cls(
                dataset=d["dataset"],
                customers=d["rows"]["customers"],
                events=d["rows"]["events"],
                rejected_by_reason=d["rejected_by_reason"],
                horizon_days=d["horizon_days"],
                **times,
            )
        except FileNotFoundError:
            next_step = f"predictflow data --out {raw_dir}"
            raise DataError("no raw data: a file is missing", value=str(path), next_step=next_step) from None
        except (OSError, ValueError, KeyError, TypeError) as e:
            raise DataError(f"summary of the raw data cannot be read ({e})", value=str(path)) from e


class Rejects:
    """Writes `rejects.jsonl`, one object per rejected line, and counts the reasons. Use as a context manager."""

    def __init__(self, raw_dir: Path) -> None:
        self.by_reason: Counter[str] = Counter()
        self._file = (raw_dir / REJECTS).open("w", encoding="utf-8")
        self._quote = json.encoder.encode_basestring

    def add(self, line: int, reason: str, raw: str) -> None:
        self.by_reason[reason] += 1
        self._file.write(f'{{"line": {line}, "reason": {self._quote(reason)}, "raw": {self._quote(raw)}}}\n')

    def __enter__(self) -> Rejects:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None) -> None:
        self._file.close()


def write_table(raw_dir: Path, name: str, columns: Mapping[str, object]) -> None:
    """Writes `<name>.parquet` from columns (arrays, by name; times as int64 microseconds or timestamps).

    Events are sorted by (created, event_id), the others by (event_timestamp, customer_id, created). DataError for a missing or
    unknown column and for values that do not fit the schema.
    """
    schema = SCHEMAS[name]
    if set(columns) != set(schema.names):
        missing = sorted(set(schema.names) ^ set(columns))
        raise DataError(f"table {name}: missing or unknown columns", value=missing, valid=schema.names)
    try:
        arrays = [_as(columns[field.name], field.type) for field in schema]
        table = pa.Table.from_arrays(arrays, schema=schema)
    except (pa.ArrowInvalid, pa.ArrowTypeError, pa.ArrowNotImplementedError) as e:
        raise DataError(f"table {name}: {e}") from e
    _refuse_nulls(name, table)
    keys = ("created", "event_id") if name == "events" else ("event_timestamp", "customer_id", "created")
    table = table.sort_by([(k, "ascending") for k in keys if k in schema.names])
    pq.write_table(table, raw_dir / f"{name}.parquet", compression="zstd", row_group_size=1 << 17)


def _as(values: object, kind: pa.DataType) -> pa.Array:
    array = values if isinstance(values, pa.Array | pa.ChunkedArray) else pa.array(values)
    if isinstance(array, pa.ChunkedArray):
        array = array.combine_chunks()
    return array if array.type == kind else array.cast(kind)


def _refuse_nulls(name: str, table: pa.Table) -> None:
    for field in SCHEMAS[name]:
        if not field.nullable and table[field.name].null_count:
            raise DataError(f"table {name}: nulls in a required column", value=field.name)


def check(raw_dir: Path, summary: Summary) -> None:
    """DataError when the files of `raw_dir` break the contract: the one gate before any source's data is published."""
    tables = {}
    for name, schema in SCHEMAS.items():
        path = raw_dir / f"{name}.parquet"
        if not path.exists():
            raise DataError(f"source {summary.dataset} did not write a file of the contract", value=path.name)
        table = pq.read_table(path)
        wrong = [f"{f.name}: {f.type}" for f in schema if f.name not in table.schema.names or table.schema.field(f.name).type != f.type]  # fmt: skip
        if wrong or len(table.schema) != len(schema):
            raise DataError(f"{path.name}: columns differ from the contract", value=wrong or table.schema.names)
        _refuse_nulls(name, table)
        if not table.num_rows:
            raise DataError(f"source {summary.dataset} delivered no rows", value=path.name)
        if pc.min(table["event_timestamp"]).as_py() < summary.start or pc.max(table["event_timestamp"]).as_py() >= summary.end:  # fmt: skip
            raise DataError(f"{path.name}: event_timestamp outside of start <= time < end")
        if "created" in table.schema.names and pc.any(pc.less(table["created"], table["event_timestamp"])).as_py():
            raise DataError(f"{path.name}: created before event_timestamp")
        tables[name] = table
    events, labels = tables["events"], tables["labels"]
    if pc.count_distinct(events["event_id"]).as_py() != events.num_rows:
        raise DataError("events.parquet: event_id is not unique")
    if pc.any(pc.less(events["created"][1:], events["created"][:-1])).as_py():
        raise DataError("events.parquet: not sorted by created")
    if pc.max(labels["event_timestamp"]).as_py() > summary.cut - timedelta(days=summary.horizon_days):
        raise DataError("labels.parquet: a label is not known at the cut (event_timestamp + horizon > cut)")
    if summary.future_from < summary.train_until + timedelta(days=summary.horizon_days):
        raise DataError("future_from is earlier than train_until + horizon: the future would overlap with training")


def publish(out: Path, write: Callable[[Path], Summary]) -> Summary:
    """Runs `write` on a fresh directory beside `out`, checks the result, and moves it into place as a whole.

    Whatever fails, `out` stays as it was and nothing half-written is left. Safe to run again: an earlier raw directory
    is replaced. UsageError when `out` holds anything else, which we would not delete.
    """
    out = Path(os.path.realpath(out))
    try:
        return _publish(out, write)
    except OSError as e:
        raise PredictFlowError(
            f"the output directory cannot be written ({e.strerror or e})",
            value=str(out),
            next_step="pass --out a directory you may write, with space left",
        ) from e


def _publish(out: Path, write: Callable[[Path], Summary]) -> Summary:
    _refuse_foreign(out)
    _sweep(out)
    with _beside(out, "partial") as fresh:
        fresh.mkdir(parents=True)
        summary = write(fresh)
        if not (fresh / REJECTS).exists():
            (fresh / REJECTS).touch()
        check(fresh, summary)
        (fresh / SUMMARY).write_text(summary.to_json(), encoding="utf-8")
        with _beside(out, "old") as old:
            if out.exists():
                out.rename(old)
            try:
                fresh.rename(out)
            except BaseException:
                if old.exists():
                    old.rename(out)
                raise
    return summary


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise UsageError("the output is a file, not a directory", value=str(out))
    foreign = sorted(p.name for p in out.iterdir() if p.name not in FILES) if out.exists() else []
    if foreign:
        raise UsageError(
            f"the output directory holds other files ({', '.join(foreign[:3])}{', ...' if foreign[3:] else ''})",
            value=str(out),
            next_step="pass --out a new directory, or one that an earlier run wrote",
        )


def _sweep(out: Path) -> None:
    """Removes what a killed run left beside `out`; that of a run which is still alive stays."""
    for left in out.parent.glob(f".{out.name}.*.*"):
        pid = left.name.split(".")[-2]
        if pid.isdigit() and not _alive(int(pid)):
            shutil.rmtree(left, ignore_errors=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def _beside(out: Path, suffix: str) -> Iterator[Path]:
    """A hidden path beside `out` (same file system, so that a rename is atomic); removed in the end if it still exists."""
    path = out.parent / f".{out.name}.{os.getpid()}.{suffix}"
    shutil.rmtree(path, ignore_errors=True)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
