"""Writes Parquet so that a reader never sees half a file, and the same rows always give the same bytes."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

ROW_GROUP_ROWS = 122_880


def write(table: pa.Table, target: Path | pa.NativeFile) -> None:
    """Parquet with fixed options, in one chunk and one thread: page bounds must not depend on the engine's batches."""
    pq.write_table(
        table.replace_schema_metadata(None).combine_chunks(),
        target,
        row_group_size=ROW_GROUP_ROWS,
        compression="zstd",
    )


def serialised_size(table: pa.Table) -> int:
    """How many bytes `table` takes as Parquet."""
    sink = pa.BufferOutputStream()
    write(table, sink)
    return int(sink.getvalue().size)


def publish(table: pa.Table, path: Path) -> int:
    """Writes `table` to `path` under a temporary name, makes it durable, then renames; returns the bytes written.

    Safe to run twice: the same rows give the same bytes. A file of that name is replaced atomically.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(table, temporary)
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        size = temporary.stat().st_size
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    return size


def content_name(table: pa.Table, prefix: str) -> str:
    """A file name made from the rows, so that writing the same batch twice makes one file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return f"{prefix}-{hashlib.sha256(sink.getvalue()).hexdigest()[:24]}.parquet"
