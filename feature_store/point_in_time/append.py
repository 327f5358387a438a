"""Appends rows to a source as a new Parquet file, and writes a result to a new place; both atomically."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError, UsageError
from feature_store.point_in_time.publish import content_name, publish, publish_stream
from feature_store.point_in_time.source import is_uri


def append_rows(place: str, table: pa.Table, label: str, expected: Mapping[str, Any] | None) -> None:
    """Adds `table` to the directory `place` as one file named after its content: safe to run twice.

    A source that is one file is rewritten with the rows added, since it has no room for another. `expected` maps each
    needed column to its Feast type (None: a time); a missing column is a DataError, and so is one too many.
    """
    if is_uri(place):
        raise UsageError(f"{label}: appending to a remote path is not supported yet", value=place)
    if expected is not None:
        missing = [c for c in expected if c not in table.column_names]
        if missing:
            raise DataError(f"{label}: rows lack a column", value=missing[0], valid=expected)
    if table.num_rows == 0:
        return
    path = Path(place)
    if path.suffix != ".parquet" or path.is_dir():
        publish(table, path / content_name(table, "append"))
        return
    if path.is_file():
        stored = pq.read_table(path)
        unknown = [c for c in table.column_names if c not in stored.column_names]
        if unknown:
            raise DataError(f"{label}: {path} has no such column", value=unknown[0], valid=stored.column_names)
        try:
            table = pa.concat_tables([stored, table.select(stored.column_names).cast(stored.schema)])
        except (KeyError, pa.ArrowInvalid, pa.ArrowNotImplementedError) as e:
            raise DataError(f"{label}: rows do not fit {path}: {e}") from e
    publish(table, path)


def write_new(tables: Callable[[], Iterable[pa.Table]], place: Path, allow_overwrite: bool) -> int:
    """Writes `tables()`, one after the other, to `place`: a `.parquet` file or a directory; returns the rows.

    Feast's own error when the place is taken. The place appears whole, or, after a failure, stays as it was.
    """
    from feast.errors import SavedDatasetLocationAlreadyExists

    if place.exists() and not allow_overwrite:
        raise SavedDatasetLocationAlreadyExists(location=str(place))
    if place.suffix == ".parquet":
        return publish_stream(tables(), place)
    temporary = place.with_name(f".{place.name}.{os.getpid()}.tmp")
    try:
        rows = publish_stream(tables(), temporary / "data.parquet")
        if place.is_dir():
            shutil.rmtree(place)
        temporary.rename(place)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return rows
