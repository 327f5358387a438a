"""Merges the small files that appends leave in a row view's directory into one laid-out file per month.

Readers see the old files or the new ones, never both or neither: `published.py` says which count, in one rename. Values
stay the same: of rows with the same key, event_timestamp and created, joins take the later place, so exactly that row is
kept; compacted files sort after backfill's months and before what is appended next. Backfill's own files are left alone,
and so is any file of another name: its owner may write it again.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb

from feature_store.backfill_plan import row_layout
from feature_store.durable import locked, sync_directory, writing
from feature_store.errors import UsageError
from feature_store.point_in_time.engine import EngineSettings, connect, ident, reading, text
from feature_store.point_in_time.layout import Layout, create_layout, write_chunk
from feature_store.point_in_time.source import file_path, is_uri
from feature_store.point_in_time.types import ns_per_tick, ticks
from feature_store.published import APPENDED, COMPACTED, Compacted, change, compacted, table_lock
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureView


@dataclass(frozen=True)
class CompactionResult:
    """`absorbed` files became `written` ones; `shadowed` rows, which no join could reach, were left out.

    `skipped`: files whose column types differ from the others', which would change values.
    """

    view: str
    path: str
    absorbed: int
    written: int
    rows: int
    shadowed: int
    skipped: tuple[str, ...]
    seconds: float
    dry_run: bool

    def to_json(self) -> dict[str, object]:
        """As a JSON-able object."""
        return {**vars(self), "skipped": list(self.skipped), "seconds": round(self.seconds, 3)}


def compact(
    view: FeatureView,
    *,
    offline_path: str | Path,
    at_least: int = 2,
    dry_run: bool = False,
    progress: Callable[[int], object] | None = None,
    engine: EngineSettings | None = None,
) -> CompactionResult:
    """Compacts the appended files of a row view, if there are `at_least` so many; removes what an earlier one replaced.

    Safe to run twice, at once, beside readers and appends, and to kill. UsageError for a windowed view: sync compacts its
    log. DataError names a file that cannot be read; StorageError one that cannot be written; nothing has changed then.
    """
    started = time.monotonic()
    if definition_of(view) is not None:
        raise UsageError("a windowed view has no files to compact: sync compacts its log", value=view.name)
    layout, table = row_layout(view), _table(view, offline_path)
    result = CompactionResult(view.name, str(table), 0, 0, 0, 0, (), 0.0, dry_run)
    if not table.is_dir():
        return result
    with locked(table_lock(table)), connect(engine or EngineSettings()) as con:
        now = compacted(table)
        if not dry_run:
            _sweep(table, now)
        appended = sorted(p for p in table.glob("*.parquet") if APPENDED.fullmatch(p.name) and now.counts(p.name))
        absorbed, skipped, types = _alike(con, view.name, [table / f for f in sorted(now.files)], appended)
        result = replace(result, skipped=tuple(p.name for p in skipped), seconds=time.monotonic() - started)
        if len(absorbed) < at_least:
            return result
        written: dict[str, str | None] = {}
        month_of = _month_sql(layout, types)
        for month in _months(con, f"{view.name} ({table})", absorbed, month_of):
            before = next((f for f in sorted(now.files) if _month_of(f) == month), None)
            rows = _Rows(view.name, [*([table / before] if before else []), *absorbed], month, month_of, layout)
            total, kept = rows.count(con)
            result = replace(result, rows=result.rows + kept, shadowed=result.shadowed + total - kept)
            written[rows.name] = before
            if not dry_run:
                create_layout(table, layout)
                with writing(table / f"{rows.name}.parquet"):
                    write_chunk(con, f"({rows.sql})", table, rows.name, layout)
            if progress:
                progress(kept)
        if not dry_run:
            sync_directory(table)
            renewed = {f for f in written.values() if f}
            files = {f"{name}.parquet" for name in written} | (now.files - renewed)
            change(table, files, {p.name for p in absorbed})
    return replace(result, absorbed=len(absorbed), written=len(written), seconds=time.monotonic() - started)


@dataclass(frozen=True)
class _Rows:
    """The rows of one month in some files, later files over earlier ones."""

    view: str
    files: list[Path]
    month: str
    month_of: str
    layout: Layout

    @property
    def name(self) -> str:
        """Of the chunk: made from what goes into it, so that an interrupted compaction writes the same name again."""
        digest = hashlib.sha256("\n".join(p.name for p in self.files).encode()).hexdigest()
        return f"added-{self.month}-{digest[:16]}"

    @property
    def sql(self) -> str:
        time, keys = ident(self.layout.timestamp), [ident(k) for k in self.layout.keys]
        created = f"coalesce({ident(self.layout.created)}, {time})" if self.layout.created else time
        unmatched = " OR ".join(f"{c} IS NULL" for c in [time, *keys])
        return (
            f"SELECT * FROM {_relation(self.files)} WHERE {self.month_of} = '{self.month}' "
            f"QUALIFY row_number() OVER (PARTITION BY {', '.join([*keys, time, created])} "
            f"ORDER BY file_index DESC, file_row_number DESC) = 1 OR {unmatched}"
        )

    def count(self, con: duckdb.DuckDBPyConnection) -> tuple[int, int]:
        """Rows in the files, and rows that a join can reach."""
        everything = f"SELECT count(*) FROM {_relation(self.files)} WHERE {self.month_of} = '{self.month}'"
        with reading(f"{self.view}: {self.files[0].parent}, month {self.month}"):
            (total,) = con.execute(everything).fetchall()[0]
            (kept,) = con.execute(f"SELECT count(*) FROM ({self.sql})").fetchall()[0]
        return int(total), int(kept)


def _months(con: duckdb.DuckDBPyConnection, label: str, files: list[Path], month_of: str) -> list[str]:
    with reading(label):
        found = con.execute(f"SELECT DISTINCT {month_of} FROM {_relation(files)} ORDER BY 1").fetchall()
    return [str(month) for (month,) in found]


def _alike(
    con: duckdb.DuckDBPyConnection, view: str, standing: list[Path], appended: list[Path]
) -> tuple[list[Path], list[Path], dict[str, str]]:
    """Appended files whose columns have the types of those before them, the others, and the types. Column sets may differ."""
    types: dict[str, str] = {}
    alike, others = [], []
    for path in [*standing, *appended]:
        with reading(f"{view}: {path}"):
            found = con.execute(f"DESCRIBE SELECT * FROM {_relation([path])}").fetchall()
        columns = {str(r[0]): str(r[1]) for r in found}
        if any(types.get(c, t) != t for c, t in columns.items()):
            others.append(path)
            continue
        types |= columns
        alike.append(path)
    return [p for p in alike if p in set(appended)], [p for p in others if p in set(appended)], types


def _sweep(table: Path, now: Compacted) -> None:
    """Removes what no reader counts any more: replaced files, and those of an interrupted compaction."""
    for path in table.glob("*.parquet"):
        if not now.counts(path.name):
            path.unlink(missing_ok=True)
    for left in table.glob(".added-*.tmp"):
        left.unlink(missing_ok=True)


def _table(view: FeatureView, offline_path: str | Path) -> Path:
    path = file_path(view.batch_source)
    if is_uri(path) or is_uri(str(offline_path)):
        raise UsageError(f"{view.name}: only local directories are compacted", value=path)
    return Path(path) if Path(path).is_absolute() else Path(offline_path) / path


def _relation(files: list[Path]) -> str:
    return f"read_parquet([{', '.join(text(str(f)) for f in files)}], union_by_name = true)"


def _month_sql(layout: Layout, types: Mapping[str, str]) -> str:
    column, sql_type = ident(layout.timestamp), types[layout.timestamp]
    per_us = 1000 // ns_per_tick(sql_type)
    return f"coalesce(strftime(make_timestamp({ticks(column, sql_type)} // {per_us}), '%Y-%m'), 'none')"


def _month_of(name: str) -> str:
    match = COMPACTED.fullmatch(name)
    return match["month"] if match else ""
