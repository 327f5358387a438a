"""A view's Parquet files: where they are, which columns they hold, and the SQL that reads them.

Files are listed by us, not globbed by the engine: names that begin with `.` or `_` are unfinished or foreign and never
read. Columns are united by name, so a feature added later reads as null from older files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlparse

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.log_merges import merged_files
from feature_store.point_in_time.engine import ident, reading, text
from feature_store.point_in_time.remote import copy_in
from feature_store.point_in_time.types import kind
from feature_store.published import counting

if TYPE_CHECKING:
    from feast import RepoConfig

ROW = ("file_index", "file_row_number")
"""The engine's virtual columns that name one stored row: index into the list of files, and position in the file."""


@dataclass(frozen=True)
class ParquetSource:
    """Readable Parquet: `label` names it in messages, `columns` maps each column to its DuckDB type."""

    label: str
    files: tuple[str, ...]
    columns: dict[str, str]

    @property
    def relation(self) -> str:
        """The SQL table function over all files."""
        return relation(self.files)

    def require(self, column: str, what: str) -> str:
        """The DuckDB type of `column`; DataError when no file holds it."""
        if column not in self.columns:
            raise DataError(f"{self.label}: no file holds the column of {what}", value=column, valid=self.columns)
        return self.columns[column]

    def require_time(self, column: str, what: str) -> str:
        """The DuckDB type of a time column; DataError when it is missing or no time."""
        sql_type = self.require(column, what)
        if kind(sql_type) != "time":
            raise DataError(f"{self.label}: {what} {column!r} is no timestamp", value=sql_type)
        return sql_type


def resolve(config: RepoConfig, path: str) -> str:
    """The place of a source path: URIs and absolute paths stay, relative ones are below `offline_store.path`."""
    if is_uri(path) or Path(path).is_absolute():
        return path
    base = getattr(config.offline_store, "path", None) or ""
    if is_uri(base):
        return f"{base.rstrip('/')}/{path}"
    return str(Path(config.repo_path or ".") / base / path)


def is_uri(path: str) -> bool:
    """Whether `path` names a remote place such as `s3://bucket/key`."""
    parsed = urlparse(path)
    return bool(parsed.scheme and parsed.netloc) and " " not in path


def parquet_files(place: str) -> tuple[str, ...]:
    """All finished Parquet files at `place` (a local file, directory or glob), sorted by name; empty when none."""
    path = Path(place)
    if path.is_file():
        return (str(path),)
    if path.is_dir():
        merged = merged_files(path)
        below = counting(path, lambda: [p for p in path.rglob("*.parquet") if p.is_file() and not _hidden(p, path)])
        return tuple(sorted(str(p) for p in below if p not in merged))
    if any(c in place for c in "*?["):
        root = Path(path.anchor) if path.is_absolute() else Path()
        found = root.glob(str(path.relative_to(path.anchor)))
        return tuple(sorted(f for match in found for f in parquet_files(str(match))))
    return ()


def read_files(con: duckdb.DuckDBPyConnection, place: str, label: str) -> tuple[str, ...]:
    """`parquet_files` of a local place, or of the local copy of a remote one, which lasts as long as the connection."""
    if not is_uri(place):
        return parquet_files(place)
    if "*" in place or "?" in place:
        raise UsageError(f"{label}: a remote place has no wildcards", value=place, next_step="name its directory")
    spill = con.execute("SELECT current_setting('temp_directory')").fetchall()[0][0]
    return parquet_files(str(copy_in(place, Path(spill), label)))


def open_source(con: duckdb.DuckDBPyConnection, label: str, places: Sequence[str], next_step: str) -> ParquetSource:
    """The source over every file at `places`; NotFoundError naming `label`, the first place and `next_step` if none."""
    files = tuple(f for place in places for f in read_files(con, place, label))
    if not files:
        raise NotFoundError(f"{label}: no Parquet files", value=places[0], next_step=next_step)
    source = ParquetSource(f"{label} ({places[0]})", files, {})
    with scanning(source, []):
        rows = con.execute(f"DESCRIBE SELECT * FROM {source.relation}").fetchall()
    return replace(source, columns={str(r[0]): str(r[1]) for r in rows})


def open_parquet(file: str, label: str, metadata: pq.FileMetaData | None = None) -> pq.ParquetFile:
    """The opened file; DataError naming it when it is missing, or no whole Parquet file."""
    with reading_file(label, file):
        return pq.ParquetFile(file, metadata=metadata, page_checksum_verification=True)


@contextmanager
def reading_file(label: str, what: str) -> Iterator[None]:
    """Turns Arrow's errors into one DataError line that names the file (and whatever else `what` says)."""
    try:
        yield
    except FileNotFoundError as e:
        raise DataError(f"{label}: a file went missing while it was read", value=what, next_step="run it again") from e
    except (pa.ArrowException, OSError) as e:
        first = (str(e).splitlines() or [type(e).__name__])[0]
        raise DataError(
            f"{label}: {what} is damaged: {first}", next_step="delete the file and backfill its range again"
        ) from e


def require_same_kind(source: ParquetSource, columns: Sequence[str | None]) -> None:
    """DataError naming file and column when a join key or time changes its kind from file to file.

    Widths may differ. Between kinds there is no common type that keeps every value.
    """
    if len(source.files) < 2:
        return
    first: dict[str, tuple[str, str]] = {}
    for file in source.files:
        schema = open_parquet(file, source.label).schema_arrow
        for column in columns:
            if column is None or column not in schema.names:
                continue
            found = arrow_kind(schema.field(column).type)
            known, where = first.setdefault(column, (found, file))
            if found != known:
                raise DataError(
                    f"{source.label}: column {column} is {found} in {file}, but {known} in {where}",
                    next_step="rewrite one of the files with the type of the other",
                )


def arrow_kind(arrow: pa.DataType) -> str:
    """The family of an Arrow type, as `types.kind` gives it for DuckDB's."""
    if pa.types.is_dictionary(arrow):
        return arrow_kind(arrow.value_type)
    return (
        "integer" if pa.types.is_integer(arrow)
        else "string" if pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow)
        else "bytes" if pa.types.is_binary(arrow) or pa.types.is_large_binary(arrow)
        else "bool" if pa.types.is_boolean(arrow)
        else "time" if pa.types.is_timestamp(arrow) or pa.types.is_date(arrow)
        else "number" if pa.types.is_floating(arrow) or pa.types.is_decimal(arrow)
        else str(arrow)
    )  # fmt: skip


@contextmanager
def scanning(source: ParquetSource, columns: Sequence[str | None]) -> Iterator[None]:
    """`reading` for a scan of these columns: after a failure the damaged file, row group and column are looked for."""
    with scanning_all(source.label, [(source, columns)]):
        yield


@contextmanager
def scanning_all(what: str, scans: Sequence[tuple[ParquetSource, Sequence[str | None]]]) -> Iterator[None]:
    """`scanning` for one query, called `what`, over several sources and their columns."""
    try:
        with reading(what):
            yield
    except DataError as e:
        if isinstance(e.__cause__, duckdb.Error) and not isinstance(e.__cause__, duckdb.OutOfMemoryException):
            for source, columns in scans:
                blame(source, [c for c in columns if c])
        raise


def blame(source: ParquetSource, columns: Sequence[str]) -> None:
    """DataError naming the first file, row group and column that cannot be read or hold a time out of range; else returns.

    Called after a scan failed: the engine's own message often leaves out where.
    """
    for file in source.files:
        opened = open_parquet(file, source.label)
        for group in range(opened.metadata.num_row_groups):
            for column in columns:
                if column in opened.schema_arrow.names:
                    place = f"{file} (row group {group}, column {column})"
                    with reading_file(source.label, place):
                        values = opened.read_row_group(group, columns=[column], use_threads=False).column(0)
                    if pa.types.is_timestamp(values.type) and values.type.unit in ("s", "ms"):
                        try:
                            values.cast(pa.timestamp("us", values.type.tz))  # what the engine compares in
                        except pa.ArrowInvalid as e:
                            raise DataError(
                                f"{source.label}: {place}: a time out of range: {e}", next_step="correct that row"
                            ) from e


def file_path(source: Any) -> str:
    """The path of a Feast FileSource; DataError for a source of another kind."""
    path = getattr(source, "path", None)
    if not isinstance(path, str) or not path:
        raise DataError("not a file source", value=type(source).__name__, next_step="use feast.FileSource(path=...)")
    return path


def relation(files: Sequence[str]) -> str:
    """The SQL table function over Parquet files, their columns united by name."""
    return f"read_parquet([{', '.join(text(f) for f in files)}], union_by_name = true)"


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith((".", "_")) for part in _parts(path, root))


def _parts(path: Path, root: Path) -> Iterator[str]:
    yield from path.relative_to(root).parts


def quoted(columns: Sequence[str]) -> str:
    """Column names as an SQL list."""
    return ", ".join(ident(c) for c in columns)
