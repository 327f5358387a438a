"""The raw side of a backfill: which files its SELECT reads, what they hold, and the wanted rows as relation `_rows`."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.backfill_plan import Column, Plan
from feature_store.clock import to_micros
from feature_store.errors import DataError, NotFoundError
from feature_store.point_in_time.engine import ident, reading, text
from feature_store.windows.plan import NOT_FINITE

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Range:
    """What a backfill covers: `start <= event_timestamp < end` and `known_after < created <= known_by`; None: no bound."""

    start: datetime | None = None
    end: datetime | None = None
    known_by: datetime | None = None
    known_after: datetime | None = None

    def inside(self, plan: Plan) -> str:
        """SQL condition of the rows that the range covers."""
        return _all(_bounds(plan, self, (">=", "<", "<=", ">")))

    def kept(self, plan: Plan) -> str:
        """SQL condition of stored rows that a run over the range leaves alone. `known_by` keeps nothing: what is newer
        than a run may know was not known in its history."""
        bounded = Range(self.start, self.end, None, self.known_after)
        return " OR ".join(_bounds(plan, bounded, ("<", ">=", ">", "<="))) or "false"

    def to_json(self) -> dict[str, str | None]:
        """The bounds as ISO 8601."""
        return {k: v.isoformat() if v else None for k, v in vars(self).items()}


@dataclass(frozen=True)
class Month:
    """A chunk of a backfill: a calendar month (UTC) of event time, and how many rows of the run fall into it."""

    name: str
    rows: int = 0

    @property
    def first(self) -> datetime:
        return datetime.strptime(self.name + "-01", "%Y-%m-%d").replace(tzinfo=UTC)

    @property
    def after(self) -> datetime:
        return self.first.replace(year=self.first.year + self.first.month // 12, month=self.first.month % 12 + 1)

    @property
    def number(self) -> int:
        """Months since the year 0: the same whatever else a run covers."""
        return self.first.year * 12 + self.first.month - 1

    def overlaps(self, wanted: Range) -> bool:
        """Whether the month has a time of the range."""
        return (wanted.end is None or self.first < wanted.end) and (wanted.start is None or self.after > wanted.start)

    def within(self, column: str) -> str:
        """SQL condition of the times in the month."""
        return (
            f"{ident(column)} >= make_timestamptz({to_micros(self.first)}) "
            f"AND {ident(column)} < make_timestamptz({to_micros(self.after)})"
        )


def raw_tables(raw_dir: str | Path) -> dict[str, Path]:
    """Table name to file for every `*.parquet` in the raw directory; NotFoundError when there is none."""
    directory = Path(raw_dir)
    tables = {p.stem: p for p in sorted(directory.glob("*.parquet")) if not p.name.startswith(".")}
    if not tables:
        raise NotFoundError("no raw tables (*.parquet) in", value=str(directory), next_step="predictflow data")
    return tables


def tables_of(plan: Plan, raw_dir: str | Path) -> dict[str, Path]:
    """The raw tables that the plan's SELECT reads; DataError for one that is not there."""
    tables = raw_tables(raw_dir)
    for name in plan.tables:
        if name not in tables:
            raise DataError(
                f"{plan.view}: no raw table of this name", value=name, valid=tables, next_step="predictflow data"
            )
    return {name: tables[name] for name in plan.tables}


def fingerprint(tables: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each raw file, in hex: reading them costs little beside sorting what they hold."""
    return {name: sha256_of(path) for name, path in sorted(tables.items())}


def sha256_of(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; DataError when it cannot be read."""
    try:
        with path.open("rb") as f:
            return hashlib.file_digest(f, "sha256").hexdigest()
    except OSError as e:
        raise DataError(f"cannot read {path}: {e.strerror}") from e


def load(
    con: duckdb.DuckDBPyConnection,
    plan: Plan,
    tables: Mapping[str, Path],
    wanted: Range,
    not_erased: list[str],
    done: Iterable[Month],
) -> list[Month]:
    """Creates `_rows`, the wanted rows of the months not `done` in the view's columns and types; those months in order.

    A SELECT that works row by row stays a view, read month by month; any other is computed once and spills to disk.
    DataError naming file and column for what does not fit; nothing has been written by then.
    """
    for name, path in tables.items():
        with reading_raw(plan, {name: path}):
            con.execute(f"CREATE VIEW {ident(name)} AS SELECT * FROM read_parquet({text(str(path))})")
    with reading(f"{plan.view}: SELECT of backfill"):
        described = con.execute(f"DESCRIBE {plan.sql}").fetchall()
    found = {str(r[0]): str(r[1]) for r in described}
    selected = ", ".join(f"{_value(plan, c, found)} AS {ident(c.name)}" for c in plan.columns)
    conditions = [wanted.inside(plan), *not_erased, *(f"NOT ({m.within(plan.timestamp)})" for m in done)]
    missing = " OR ".join(f"{ident(c)} IS NULL" for c in plan.required)
    stored = "VIEW" if plan.row_by_row else "TABLE"
    nulls = "".join(f", count(*) - count({ident(c)})" for c in plan.required)
    if plan.definition is not None:
        nulls += f", count(*) FILTER (WHERE _dropped = '{NOT_FINITE}')"
    with reading_raw(plan, tables):
        con.execute(
            f"CREATE {stored} _rows AS SELECT * FROM ({plan.wrap(f'SELECT {selected} FROM ({plan.sql})')}) "
            f"WHERE ({_all(conditions)}) OR {missing}"
        )
        counted = con.execute(
            f"SELECT strftime(date_trunc('month', {ident(plan.timestamp)}), '%Y-%m') AS _month, count(*){nulls} "
            "FROM _rows GROUP BY 1 ORDER BY 1"
        ).fetchall()
    for i, column in enumerate(plan.required, start=2):
        lacking = sum(row[i] for row in counted)
        if lacking:
            files = ", ".join(map(str, tables.values()))
            raise DataError(f"{plan.view}: {lacking} row(s) of {', '.join(tables)} have no {column} ({files})")
    if plan.definition is not None and (left_out := sum(row[-1] for row in counted)):
        log.warning(
            "%s: %d event(s) of %s hold a NaN or an infinity: they are marked %s and count for nothing",
            plan.view, left_out, ", ".join(map(str, tables.values())), NOT_FINITE,
        )  # fmt: skip
    return [Month(row[0], row[1]) for row in counted]


@contextmanager
def reading_raw(plan: Plan, tables: Mapping[str, Path]) -> Iterator[None]:
    """Errors of a query over raw tables in our words; where a file is damaged, with its row group and column."""
    try:
        with reading(f"{plan.view}: backfill from {', '.join(map(str, tables.values()))}"):
            yield
    except DataError as e:
        if isinstance(e.__cause__, OSError):  # what could not be written says nothing about what was read
            raise
        for path in tables.values():
            damage = damage_of(path)
            if damage:
                raise DataError(f"{plan.view}: {damage}", next_step="fetch the raw data again") from None
        raise


def damage_of(path: Path) -> str | None:
    """What makes a Parquet file unreadable: file, row group and column, and the reason; None for a sound file."""
    try:
        with pq.ParquetFile(path) as file:
            for group in range(file.metadata.num_row_groups):
                for column in file.schema_arrow.names:
                    try:
                        file.read_row_group(group, columns=[column])
                    except (pa.ArrowException, OSError) as e:
                        return f"raw file {path}, row group {group}, column {column} cannot be read: {_line(e)}"
    except (pa.ArrowException, OSError) as e:
        return f"raw file {path} cannot be read: {_line(e)}"
    return None


def _value(plan: Plan, column: Column, found: Mapping[str, str]) -> str:
    if column.name not in found:
        raise DataError(f"{plan.view}: the SELECT of backfill gives no column", value=column.name, valid=found)
    return column.read(found[column.name], f"{plan.view}: column {column.name}")


def _bounds(plan: Plan, wanted: Range, operators: tuple[str, str, str, str]) -> list[str]:
    columns = (plan.timestamp, plan.timestamp, plan.created, plan.created)
    bounds = (wanted.start, wanted.end, wanted.known_by, wanted.known_after)
    return [
        f"{ident(column)} {operator} make_timestamptz({to_micros(bound)})"
        for column, operator, bound in zip(columns, operators, bounds, strict=True)
        if bound is not None and column is not None
    ]


def _all(conditions: list[str]) -> str:
    return " AND ".join(conditions) or "true"


def _line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
