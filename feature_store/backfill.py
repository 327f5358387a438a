"""History of a view from raw tables: runs the view's SELECT over a time range and publishes sorted Parquet files.

The SELECT is the `predictflow.sql` tag of the view's source, over relations named after the raw files
(`accounts.parquet` is `accounts`). `created` comes out of it, the newest of the inputs', never the clock of the run.
Rows land in one file per calendar month of event_timestamp, bucketed and sorted (`point_in_time/layout.py`). A run has
an identity made from all that its result depends on; months that it has published are not computed again.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from feature_store.backfill_chunks import Table
from feature_store.backfill_plan import Plan, plan_of
from feature_store.backfill_raw import Month, Range, fingerprint, load, tables_of
from feature_store.backfill_state import BackfillState, MemoryState, Published, Run
from feature_store.clock import from_micros, to_micros
from feature_store.durable import BusyError, locked
from feature_store.erasure_list import ErasureList, not_erased
from feature_store.errors import DataError, PredictFlowError, UsageError
from feature_store.point_in_time.engine import EngineSettings, connect
from feature_store.point_in_time.source import is_uri
from feature_store.published import locks_of, table_lock

if TYPE_CHECKING:
    from feast import FeatureView

MOST_WORKERS = 4
LOCK_SECONDS = 600.0


@dataclass(frozen=True)
class BackfillResult:
    """What a backfill did (or, for a dry run, would do). `bytes` of a dry run is an estimate from a sample.

    `rows`: of the run, whether computed now or found done; `skipped`: chunks found done, of `chunks`.
    """

    view: str
    table: str
    path: str
    run_id: str
    rows: int
    files: int
    bytes: int
    chunks: int
    skipped: int
    seconds: float
    range: Range
    dry_run: bool
    inputs: tuple[str, ...]
    """The raw columns that the table was made from, as `table.column`."""

    @property
    def edges(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """Lineage of the table, from each raw column, for `FeatureRegistry.record_lineage`."""
        return [(("column", column), ("table", self.table)) for column in self.inputs]

    def to_json(self) -> dict[str, object]:
        """As a JSON-able object; times are ISO 8601."""
        plain = {k: v for k, v in vars(self).items() if k != "range"}
        return {**plain, **self.range.to_json(), "inputs": list(self.inputs), "seconds": round(self.seconds, 3)}


def backfill(
    view: FeatureView,
    *,
    raw_dir: str | Path,
    offline_path: str | Path,
    start: datetime | None = None,
    end: datetime | None = None,
    known_by: datetime | None = None,
    known_after: datetime | None = None,
    dry_run: bool = False,
    workers: int | None = None,
    progress: Callable[[int], object] | None = None,
    planned: Callable[[int], object] | None = None,
    state: BackfillState | None = None,
    engine: EngineSettings | None = None,
) -> BackfillResult:
    """Writes the view's rows with `start <= event_timestamp < end` and `known_after < created <= known_by`; None: no bound.

    Stored rows in that range are replaced, others stay. Each month is published atomically and then recorded in `state`;
    after an interruption the same call goes on where it was. Safe to run twice (same bytes) and at once. `workers` months
    are written at a time (default: one per core, at most 4). `planned` is told the rows to write, `progress` those of each
    month written. DataError names file, table or column; StorageError a file that could not be written; BusyError: again.
    """
    started = time.monotonic()
    if workers is not None and workers < 1:
        raise UsageError("workers must be at least 1", value=workers)
    wanted = Range(start, end, known_by, known_after)
    plan = plan_of(view)
    if known_after is not None and plan.created is None:
        raise UsageError(f"{plan.view}: known_after needs a source with a created_timestamp_column")
    erasures = ErasureList(offline_path)
    listed = [(column, key, erasures.digests_of(key)) for column, key in plan.keys]
    table = Table(plan, place_of(plan, offline_path), tables_of(plan, raw_dir), tuple(not_erased(listed)))
    if plan.definition is not None:
        _refuse_what_the_stream_logged(table.place, plan.view, known_by)
    job = _Job(table, wanted, erasures, state or MemoryState(), _run(table, wanted))
    with ExitStack() as stack:
        con = stack.enter_context(connect(engine or EngineSettings()))
        if dry_run:
            months = load(con, plan, table.raw, wanted, list(table.not_erased), ())
            rows = sum(m.rows for m in months)
            done, skipped, size = dict.fromkeys((m.name for m in months), None), 0, table.estimate(con, rows)
        else:
            results, skipped = job.run(con, workers or min(os.cpu_count() or 1, MOST_WORKERS), progress, planned)
            rows = sum(r.rows for r in results.values())
            done = {name: None for name, r in results.items() if r.files}
            size = sum((table.place / f).stat().st_size for r in results.values() for f in r.files)
    return BackfillResult(
        view=plan.view,
        table=plan.path,
        path=str(table.place),
        run_id=job.record.run_id,
        rows=rows,
        files=len(done),
        bytes=size,
        chunks=len(done) if dry_run else len(results),
        skipped=skipped,
        seconds=time.monotonic() - started,
        range=wanted,
        dry_run=dry_run,
        inputs=plan.inputs,
    )


def _refuse_what_the_stream_logged(table: Path, view: str, known_by: datetime | None) -> None:
    """History that reaches into the stream's log would count its events twice: DataError."""
    import duckdb

    files = [str(p) for p in (table / "stream").rglob("*.parquet") if p.name[0] != "."]
    if not files:
        return
    with duckdb.connect() as con:
        con.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
        # What sync recognised as history's own (`duplicate`) is not counted by it.
        found = con.execute(
            "SELECT min(epoch_us(created)) FROM read_parquet(?, union_by_name => true) WHERE _dropped IS NULL", [files]
        )
        first = found.fetchall()[0][0]
    if first is not None and (known_by is None or to_micros(known_by) >= first):
        raise DataError(
            f"{view}: the stream has logged events since {from_micros(first).isoformat()}, which this history would count again",
            value=None if known_by is None else known_by.isoformat(),
            next_step="--known-by before that time, or `predictflow windows bootstrap --rewind --known-by TIME --yes` to forget the stream",
        )


def place_of(plan: Plan, offline_path: str | Path) -> Path:
    """The local directory of the plan's table; UsageError for a URI or a single file."""
    path = plan.path if Path(plan.path).is_absolute() or is_uri(plan.path) else str(Path(offline_path) / plan.path)
    if is_uri(path) or is_uri(str(offline_path)):
        raise UsageError(f"{plan.view}: backfill writes to local directories only", value=path)
    if path.endswith(".parquet"):
        raise UsageError(f"{plan.view}: backfill needs a source path that is a directory", value=path)
    return Path(path)


def _run(table: Table, wanted: Range) -> Run:
    """The run's identity: definition, content of the raw files, range, erasures, place."""
    plan = table.plan
    depends = [plan.hash, fingerprint(table.raw), wanted.to_json(), table.not_erased, str(table.place.absolute())]
    digest = hashlib.sha256(json.dumps(depends, sort_keys=True).encode()).hexdigest()
    return Run(f"backfill-{digest[:16]}", plan.view, plan.hash, wanted.start, wanted.end, wanted.known_by)


@dataclass(frozen=True)
class _Job:
    table: Table
    wanted: Range
    erasures: ErasureList
    state: BackfillState
    record: Run

    def run(
        self,
        con: duckdb.DuckDBPyConnection,
        workers: int,
        progress: Callable[[int], object] | None,
        planned: Callable[[int], object] | None,
    ) -> tuple[dict[str, Published], int]:
        """All chunks: result by month, and how many were found done."""
        before = self.state.open(self.record)
        standing = {_month(n): result for n, result in before.chunks.items()}
        standing = {m: r for m, r in standing.items() if self.table.stands(m, r)}
        results = {m.name: r for m, r in standing.items()}
        try:
            if not (before.done and self._complete(before.chunks, results)):
                months = self._months(con, standing)
                if planned:
                    planned(sum(m.rows for m in months))
                if months:
                    self.table.prepare()
                results |= self._all(con, months, workers, progress)
        except BaseException:
            self.state.close(self.record, done=False)
            raise
        self.state.close(self.record, done=True)
        return dict(sorted(results.items())), len(standing)

    def _complete(self, recorded: Mapping[int, Published], standing: Mapping[str, Published]) -> bool:
        """Whether all that a finished run recorded still stands, and no other run has added a month to its range."""
        others = (Month(name) for name in self.table.stored() if name not in standing)
        return len(standing) == len(recorded) and not any(m.overlaps(self.wanted) for m in others)

    def _months(self, con: duckdb.DuckDBPyConnection, done: dict[Month, Published]) -> list[Month]:
        """What is to be written: months with rows, and stored ones that may lose theirs."""
        table, wanted = self.table, self.wanted
        months = {m.name: m for m in load(con, table.plan, table.raw, wanted, list(table.not_erased), done)}
        finished = {m.name for m in done}
        for name in table.stored():
            month = Month(name)
            other = name not in months and name not in finished and month.overlaps(wanted)
            if other and table.outdated(con, month, wanted):
                months[name] = month
        return [months[name] for name in sorted(months)]

    def _all(
        self,
        con: duckdb.DuckDBPyConnection,
        months: list[Month],
        workers: int,
        progress: Callable[[int], object] | None,
    ) -> dict[str, Published]:
        results: dict[str, Published] = {}
        failed, reporting = threading.Event(), threading.Lock()

        def one(month: Month) -> None:
            if failed.is_set():
                return
            cursor = con.cursor()
            try:
                cursor.execute("SET TimeZone = 'UTC'")
                results[month.name] = self._one(cursor, month)
            except BaseException:
                failed.set()
                raise
            finally:
                cursor.close()
            if progress:
                with reporting:
                    progress(month.rows)

        with ThreadPoolExecutor(max_workers=workers, thread_name_prefix="backfill") as pool:
            futures = [pool.submit(one, month) for month in months]
            try:
                wait(futures, return_when=FIRST_EXCEPTION)
            finally:
                pool.shutdown(wait=True, cancel_futures=True)
            for future in futures:
                if not future.cancelled():
                    future.result()
        return results

    def _one(self, con: duckdb.DuckDBPyConnection, month: Month) -> Published:
        place = self.table.place
        with (
            locked(table_lock(place), shared=True, seconds=LOCK_SECONDS),
            locked(locks_of(place) / month.name, seconds=LOCK_SECONDS),
        ):
            meanwhile = self.state.finished(self.record, month.number)
            if meanwhile and self.table.stands(month, meanwhile):
                return meanwhile
            listed = [(column, key, self.erasures.digests_of(key)) for column, key in self.table.plan.keys]
            if tuple(not_erased(listed)) != self.table.not_erased:
                raise BusyError(
                    f"{self.record.view}: an entity was erased while this ran", next_step="run the same command again"
                )
            self.state.start(self.record, month.number, month.first, month.after)
            try:
                result = self.table.write(con, month, self.wanted)
            except PredictFlowError as e:
                self.state.fail(self.record, month.number, e.message)
                raise
            self.state.finish(self.record, month.number, result)
            return result


def _month(number: int) -> Month:
    return Month(f"{number // 12:04}-{number % 12 + 1:02}")
