"""History of a view from raw tables: runs the view's SELECT over a time range and publishes sorted Parquet files.

The SELECT is the `predictflow.sql` tag of the view's source, over relations named after the raw files
(`accounts.parquet` is `accounts`). `created` comes out of it, the newest of the inputs', never the clock of the run.
Rows land in one file per calendar month of event_timestamp, sorted by (key, event_timestamp, created). A rerun replaces the rows of its own range only,
with the same bytes for the same input.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from feature_store.backfill_plan import Column, Plan, plan_of
from feature_store.clock import to_micros
from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.point_in_time.engine import EngineSettings, connect, ident, reading, text
from feature_store.point_in_time.publish import publish, serialised_size
from feature_store.point_in_time.source import is_uri

if TYPE_CHECKING:
    from feast import FeatureView

SAMPLE_ROWS = 20_000
MONTH = re.compile(r"\d{4}-\d{2}")


@dataclass(frozen=True)
class BackfillResult:
    """What a backfill did (or, for a dry run, would do). `bytes` of a dry run is an estimate from a sample."""

    view: str
    table: str
    path: str
    rows: int
    files: int
    bytes: int
    seconds: float
    start: datetime | None
    end: datetime | None
    known_by: datetime | None
    dry_run: bool
    inputs: tuple[str, ...]
    """The raw columns that the table was made from, as `table.column`."""

    @property
    def edges(self) -> list[tuple[tuple[str, str], tuple[str, str]]]:
        """Lineage of the table, from each raw column, for `FeatureRegistry.record_lineage`."""
        return [(("column", column), ("table", self.table)) for column in self.inputs]

    def to_json(self) -> dict[str, object]:
        """As a JSON-able object; times are ISO 8601."""
        plain = {k: v.isoformat() if isinstance(v, datetime) else v for k, v in asdict(self).items()}
        return {**plain, "inputs": list(self.inputs), "seconds": round(self.seconds, 3)}


def backfill(
    view: FeatureView,
    *,
    raw_dir: str | Path,
    offline_path: str | Path,
    start: datetime | None = None,
    end: datetime | None = None,
    known_by: datetime | None = None,
    dry_run: bool = False,
    progress: Callable[[int], object] | None = None,
    engine: EngineSettings | None = None,
) -> BackfillResult:
    """Writes the view's rows with `start <= event_timestamp < end` and `created <= known_by`; None: no bound.

    Safe to run twice; files are published atomically, one calendar month after the other, so after an interruption
    run it again. `progress` is told the rows of each month. Raises DataError naming file, table or column.
    """
    started = time.monotonic()
    plan = plan_of(view)
    place = _place(plan, offline_path)
    tables = raw_tables(raw_dir)
    with ExitStack() as stack:
        con = stack.enter_context(connect(engine or EngineSettings()))
        _load(con, plan, tables, start, end, known_by)
        months = con.execute("SELECT _month, count(*) FROM _rows GROUP BY 1 ORDER BY 1").fetchall()
        rows = sum(n for _, n in months)
        if dry_run:
            files, size = len(months), _estimate(con, plan, rows)
        else:
            files, size = _publish(con, plan, place, start, end, months, progress)
    return BackfillResult(
        view=plan.view,
        table=plan.path,
        path=str(place),
        rows=rows,
        files=files,
        bytes=size,
        seconds=time.monotonic() - started,
        start=start,
        end=end,
        known_by=known_by,
        dry_run=dry_run,
        inputs=plan.inputs,
    )


def raw_tables(raw_dir: str | Path) -> dict[str, Path]:
    """Table name to file for every `*.parquet` in the raw directory; NotFoundError when there is none."""
    directory = Path(raw_dir)
    tables = {p.stem: p for p in sorted(directory.glob("*.parquet")) if not p.name.startswith(".")}
    if not tables:
        raise NotFoundError("no raw tables (*.parquet) in", value=str(directory), next_step="predictflow data")
    return tables


def _place(plan: Plan, offline_path: str | Path) -> Path:
    path = plan.path if Path(plan.path).is_absolute() or is_uri(plan.path) else str(Path(offline_path) / plan.path)
    if is_uri(path) or is_uri(str(offline_path)):
        raise UsageError(f"{plan.view}: backfill writes to local directories only", value=path)
    if path.endswith(".parquet"):
        raise UsageError(f"{plan.view}: backfill needs a source path that is a directory", value=path)
    return Path(path)


def _load(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    tables: Mapping[str, Path],
    start: datetime | None,
    end: datetime | None,
    known_by: datetime | None,
) -> None:
    """Creates `_rows`: the wanted rows in the view's columns and types, with `_month`."""
    used = _tables_of(plan, tables)
    for name in used:
        with reading(f"raw table {tables[name]}"):
            con.execute(f"CREATE TEMP VIEW {ident(name)} AS SELECT * FROM read_parquet({text(str(tables[name]))})")
    with reading(f"{plan.view}: SELECT of backfill"):
        described = con.execute(f"DESCRIBE {plan.sql}").fetchall()
    found = {str(r[0]): str(r[1]) for r in described}
    selected = ", ".join(f"{_value(plan, c, found)} AS {ident(c.name)}" for c in plan.columns)
    kept = [
        f"{ident(column)} {operator} make_timestamptz({to_micros(bound)})"
        for column, operator, bound in (
            (plan.timestamp, ">=", start),
            (plan.timestamp, "<", end),
            (plan.created, "<=", known_by),
        )
        if bound is not None and column is not None
    ]
    with reading(f"{plan.view}: backfill from {', '.join(str(tables[n]) for n in used)}"):
        con.execute(
            f"CREATE TEMP TABLE _rows AS SELECT *, date_trunc('month', {ident(plan.timestamp)}) AS _month "
            f"FROM ({plan.wrap(f'SELECT {selected} FROM ({plan.sql})')}) WHERE {' AND '.join(kept) or 'true'}"
        )
    for column in plan.required:
        row = con.execute(f"SELECT count(*) FROM _rows WHERE {ident(column)} IS NULL").fetchone()
        if row and row[0]:
            raise DataError(f"{plan.view}: {row[0]} row(s) of {', '.join(used)} have no {column}")


def _tables_of(plan: Plan, tables: Mapping[str, Path]) -> list[str]:
    for name in plan.tables:
        if name not in tables:
            raise DataError(
                f"{plan.view}: no raw table of this name", value=name, valid=tables, next_step="predictflow data"
            )
    return list(plan.tables)


def _value(plan: Plan, column: Column, found: Mapping[str, str]) -> str:
    if column.name not in found:
        raise DataError(f"{plan.view}: the SELECT of backfill gives no column", value=column.name, valid=found)
    return column.read(found[column.name], f"{plan.view}: column {column.name}")


def _publish(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    place: Path,
    start: datetime | None,
    end: datetime | None,
    months: list[tuple[Any, int]],
    progress: Callable[[int], object] | None,
) -> tuple[int, int]:
    """Writes each month's file, keeping rows of an earlier run outside of [start, end); returns files and bytes."""
    written = size = 0
    names = {f"{m.astimezone(UTC):%Y-%m}": (m, n) for m, n in months}
    # Only our own files: what offline_write_batch appended has another name and stays.
    stale = {p.stem for p in place.joinpath(plan.directory).glob("*.parquet") if MONTH.fullmatch(p.stem)}
    for name in sorted(names | dict.fromkeys(n for n in stale if _overlaps(n, start, end))):
        month, count = names.get(name, (None, 0))
        path = place / plan.directory / f"{name}.parquet"
        table = _month_rows(con, plan, path, month, start, end)
        if table.num_rows:
            size += publish(table, path)
            written += 1
        else:
            path.unlink(missing_ok=True)
        if progress:
            progress(count)
    return written, size


def _month_rows(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    path: Path,
    month: object,
    start: datetime | None,
    end: datetime | None,
) -> pa.Table:
    columns = ", ".join(ident(c) for c in plan.stored)
    parts = [f"SELECT {columns} FROM _rows WHERE _month = $month"]
    outside = [
        f"{ident(plan.timestamp)} {operator} make_timestamptz({to_micros(bound)})"
        for operator, bound in (("<", start), (">=", end))
        if bound is not None
    ]
    if path.is_file() and outside:
        parts.append(f"SELECT {columns} FROM read_parquet({text(str(path))}) WHERE {' OR '.join(outside)}")
    with reading(f"{plan.view}: {path}"):
        query = f"SELECT * FROM ({' UNION ALL '.join(parts)}) ORDER BY {plan.order}"
        return con.sql(query, params={"month": month}).to_arrow_table()


def _overlaps(month: str, start: datetime | None, end: datetime | None) -> bool:
    """Whether the calendar month `YYYY-MM` has a time in [start, end)."""
    first = datetime.strptime(month + "-01", "%Y-%m-%d").replace(tzinfo=UTC)
    after = first.replace(year=first.year + first.month // 12, month=first.month % 12 + 1)
    return (end is None or first < end) and (start is None or after > start)


def _estimate(con: duckdb.DuckDBPyConnection, plan: Plan, rows: int) -> int:
    columns = ", ".join(ident(c) for c in plan.stored)
    sample = con.sql(f"SELECT {columns} FROM _rows LIMIT {SAMPLE_ROWS}").to_arrow_table()
    return serialised_size(sample) * rows // sample.num_rows if sample.num_rows else 0
