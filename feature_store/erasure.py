"""Erases one entity from the offline store: every Parquet file that holds it is rewritten without it, each by one rename.

The entity goes on the erasure list first, so that no backfill brings it back; then the files follow: row views, event
history and stream logs, datasets served below the offline store's path. An interrupted erasure is run again.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.durable import BusyError, locked, sync_directory, writing
from feature_store.erasure_list import ErasureList
from feature_store.errors import DataError, UsageError
from feature_store.point_in_time.engine import EngineSettings, connect, ident, reading, text
from feature_store.point_in_time.layout import FOOTER, read_layout, write_chunk
from feature_store.point_in_time.publish import publish
from feature_store.point_in_time.source import file_path, is_uri
from feature_store.point_in_time.types import kind, sql_type_of
from feature_store.published import FILE as LIST
from feature_store.published import change, compacted, table_lock
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureView

PASSES = 3
"""Sync may merge log files while they are rewritten; what it carried over is found by the next pass."""


@dataclass(frozen=True)
class Held:
    """A file that holds the entity: how many of its rows are the entity's."""

    path: Path
    column: str
    rows: int
    of: int


@dataclass(frozen=True)
class Erasure:
    """What an erasure did, or for a dry run would do. `files`: those that held the entity."""

    join_key: str
    files: tuple[Held, ...]
    dry_run: bool

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files)

    def to_json(self) -> dict[str, object]:
        """As a JSON-able object, without the entity's key."""
        files = [{"path": str(f.path), "rows": f.rows, "of": f.of} for f in self.files]
        return {"join_key": self.join_key, "rows": self.rows, "files": files, "dry_run": self.dry_run}


def erase(
    join_key: str,
    value: str | int,
    *,
    offline_path: str | Path,
    views: Iterable[FeatureView],
    at: datetime,
    dry_run: bool = False,
    engine: EngineSettings | None = None,
) -> Erasure:
    """Lists the entity as erased at `at` and rewrites the files that hold it, in the views' tables and below `offline_path`.

    Rows are matched by the views' own column of the join key, elsewhere by a column named as the join key. Safe to repeat,
    beside readers (each sees a file with or without it) and beside backfill. DataError names a file that cannot be read;
    BusyError when sync keeps writing the entity's events: stop it, or let its topic forget them first.
    """
    if is_uri(str(offline_path)):
        raise UsageError("only a local offline store can be erased from", value=str(offline_path))
    root, views = Path(offline_path), list(views)
    tables, listed_as = _tables(join_key, root, views), _listed_as(join_key, value, views)
    with connect(engine or EngineSettings()) as con:
        held = _held(con, join_key, value, root, tables)
        if dry_run:
            return Erasure(join_key, tuple(held), True)
        ErasureList(root).add(join_key, listed_as, at)
        erased: dict[Path, Held] = {}
        for _ in range(PASSES):
            with ExitStack() as stack:
                for table in sorted(tables):
                    stack.enter_context(locked(table_lock(table)))
                held = _held(con, join_key, value, root, tables)
                for file in held:
                    _rewrite(con, file, value)
                    erased.setdefault(file.path, file)
            if not held:
                return Erasure(join_key, tuple(erased[p] for p in sorted(erased)), False)
    if _still(join_key, value, root, tables, engine):
        raise BusyError("the entity's rows came back while they were erased", next_step="stop sync, then run it again")
    return Erasure(join_key, tuple(erased[p] for p in sorted(erased)), False)


def _listed_as(join_key: str, value: str | int, views: Iterable[FeatureView]) -> str:
    """The value as an entity's column spells it: `01` is 1 where keys are whole numbers, and itself where they are text."""
    types = {sql_type_of(c.dtype) for v in views for c in v.entity_columns if c.name == join_key}
    try:
        return str(int(value)) if types and types <= {"INTEGER", "BIGINT"} else str(value)
    except ValueError as e:
        raise UsageError(f"keys {join_key} are whole numbers", value=value) from e


def _still(
    join_key: str, value: str | int, root: Path, tables: Mapping[Path, str], engine: EngineSettings | None
) -> bool:
    with connect(engine or EngineSettings()) as con:
        return bool(_held(con, join_key, value, root, tables))


def _tables(join_key: str, root: Path, views: Iterable[FeatureView]) -> dict[Path, str]:
    """Place of each view's table that has the join key -> its column there."""
    tables = {}
    for view in views:
        if join_key not in view.join_keys or view.batch_source is None:
            continue
        path = file_path(view.batch_source)
        if is_uri(path):
            raise UsageError(f"{view.name}: only local files can be erased from", value=path)
        back = {mapped: raw for raw, mapped in (view.batch_source.field_mapping or {}).items()}
        column = join_key if definition_of(view) else back.get(join_key, join_key)
        tables[root / path] = column
    return tables


def _held(
    con: duckdb.DuckDBPyConnection, join_key: str, value: str | int, root: Path, tables: Mapping[Path, str]
) -> list[Held]:
    """Every file with rows of the entity, also those that no reader counts any more, by path."""
    places = [root, *(t for t in tables if not t.is_relative_to(root))]
    below = {f for place in places for f in ([place] if place.is_file() else place.rglob("*.parquet"))}
    files = sorted(f for f in below if f.is_file())
    held = []
    for path in files:
        table = next((t for t in tables if path == t or t in path.parents), None)
        column = tables[table] if table else join_key
        try:
            with reading(f"{path}"):
                described = con.execute(f"DESCRIBE SELECT * FROM read_parquet({text(str(path))})").fetchall()
        except DataError:
            if path.exists():
                raise
            continue  # merged into another file meanwhile, which the next pass finds
        types = {str(r[0]): str(r[1]) for r in described}
        if column not in types:
            if table:
                raise DataError(f"{path} lacks the column of join key {join_key}", value=column, valid=types)
            continue
        match = _match(column, types[column], value)
        if match is None:
            continue
        with reading(f"{path}, column {column}"):
            found = con.execute(
                f"SELECT count(*) FILTER ({match}), count(*) FROM read_parquet({text(str(path))})"
            ).fetchall()
        if found[0][0]:
            held.append(Held(path, column, *found[0]))
    return held


def _match(column: str, stored: str, value: str | int) -> str | None:
    """SQL condition of the entity's rows; None where the column cannot hold the value."""
    family = kind(stored)
    if family == "integer":
        try:
            return f"{ident(column)} = {int(value)}"
        except ValueError:
            return None
    as_text = ident(column) if family == "string" else f"CAST({ident(column)} AS VARCHAR)"
    return f"{as_text} = {text(str(value))}"


def _rewrite(con: duckdb.DuckDBPyConnection, file: Held, value: str | int) -> None:
    """Replaces the file by one without the entity, in its own layout; one without rows goes, unless it is all there is."""
    path = file.path
    try:
        with pq.ParquetFile(path) as parquet:
            laid_out = FOOTER in (parquet.metadata.metadata or {})
            stored = parquet.schema_arrow
    except FileNotFoundError:
        return  # sync merged it into another file, which the next pass finds
    except (pa.ArrowException, OSError) as e:
        raise DataError(f"{path} cannot be read: {e}") from e
    types = {
        str(r[0]): str(r[1]) for r in con.execute(f"DESCRIBE SELECT * FROM read_parquet({text(str(path))})").fetchall()
    }
    match = _match(file.column, types[file.column], value)
    kept = f"SELECT * FROM read_parquet({text(str(path))}) WHERE ({match}) IS NOT TRUE"
    layout = read_layout(path.parent) if laid_out else None
    with writing(path), reading(str(path)):
        if file.rows == file.of and any(p != path for p in path.parent.glob("*.parquet")):
            _unlist(path)
            path.unlink(missing_ok=True)
        elif layout and file.rows < file.of:
            write_chunk(con, f"({kept})", path.parent, path.stem, layout)
        else:
            # By row number, so that rows stay in their order and columns in their stored types.
            wanted = con.sql(
                f"SELECT file_row_number FROM read_parquet({text(str(path))}, file_row_number = true) "
                f"WHERE ({match}) IS NOT TRUE ORDER BY 1"
            ).fetchnumpy()["file_row_number"]
            with pq.ParquetFile(path) as parquet:
                rows = parquet.read().take(pa.array(wanted))
            publish(rows.cast(stored), path)
        sync_directory(path.parent)


def _unlist(path: Path) -> None:
    """Takes a compacted file off its table's list before it goes."""
    table = path.parent
    if (table / LIST).is_file():
        now = compacted(table)
        if path.name in now.files:
            change(table, now.files - {path.name}, now.replaced)
