"""Writes Parquet so that a reader never sees half a file, and the same rows always give the same bytes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError

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


@contextmanager
def appearing(path: Path) -> Iterator[Path]:
    """A temporary name to write to; afterwards what was written is durable and at `path`, or, after a failure, nothing is.

    A file of that name is replaced atomically. DataError when the disk is full or the place cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as f:
            os.fsync(f.fileno())
        temporary.replace(path)
    except OSError as e:
        raise DataError(f"{path} cannot be written: {e}", next_step="free some space, then run it again") from e
    finally:
        temporary.unlink(missing_ok=True)


def publish(table: pa.Table, path: Path) -> int:
    """Writes `table` to `path` so that it appears whole or not at all; returns the bytes written.

    Safe to run twice: the same rows give the same bytes.
    """
    with appearing(path) as temporary:
        write(table, temporary)
        return temporary.stat().st_size


def publish_stream(tables: Iterable[pa.Table], path: Path) -> int:
    """Writes tables of one schema to `path`, one at a time, atomically; returns the rows. At least one table is needed.

    A failure leaves neither a file nor a part of one. DataError when the disk is full or the place cannot be written.
    """
    rows = 0
    with appearing(path) as temporary, ExitStack() as stack:
        writer = None
        for table in tables:
            if writer is None:
                writer = stack.enter_context(pq.ParquetWriter(temporary, table.schema, compression="zstd"))
            writer.write_table(table.cast(writer.schema), row_group_size=ROW_GROUP_ROWS)
            rows += table.num_rows
    return rows


def content_name(table: pa.Table, prefix: str) -> str:
    """A file name made from the rows, so that writing the same batch twice makes one file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.combine_chunks())
    return f"{prefix}-{hashlib.sha256(sink.getvalue()).hexdigest()[:24]}.parquet"
