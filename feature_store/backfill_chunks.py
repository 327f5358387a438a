"""One chunk of a backfill: a month's file, published by one rename, beside the rows of it that other runs wrote."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.backfill_plan import Plan
from feature_store.backfill_raw import Month, Range, reading_raw, sha256_of
from feature_store.backfill_state import Published
from feature_store.durable import sync_directory, writing
from feature_store.point_in_time.engine import ident, reading, text
from feature_store.point_in_time.layout import create_layout, write_chunk, writer_options
from feature_store.point_in_time.publish import publish, serialised_size

MONTH = re.compile(r"\d{4}-\d{2}")
SAMPLE_ROWS = 20_000


@dataclass(frozen=True)
class Table:
    """Where a plan's files stand and how they are written. `raw` names the inputs in messages."""

    plan: Plan
    place: Path
    raw: dict[str, Path]
    not_erased: tuple[str, ...]

    @property
    def directory(self) -> Path:
        """Of the month files: the table's own, or `history/` of an event log."""
        return self.place / self.plan.directory

    def prepare(self) -> None:
        """Makes the directory and, for a row view, its `_layout.json`. Safe to run twice and at once."""
        with writing(self.directory):
            self.directory.mkdir(parents=True, exist_ok=True)
            if self.plan.layout:
                create_layout(self.directory, self.plan.layout)

    def file_of(self, month: Month) -> Path:
        """The month's file."""
        return self.directory / f"{month.name}.parquet"

    def stored(self) -> list[str]:
        """Months that have a file of ours, by name. What others appended has other names."""
        return sorted(p.stem for p in self.directory.glob("*.parquet") if MONTH.fullmatch(p.stem))

    def sweep(self, month: Month) -> None:
        """Removes unfinished files of the month that a killed process left; the caller holds the chunk's lock."""
        for left in self.directory.glob(f".{month.name}.parquet.*.tmp"):
            left.unlink(missing_ok=True)

    def write(self, con: duckdb.DuckDBPyConnection, month: Month, wanted: Range) -> Published:
        """Publishes the month's file: the rows of `_rows`, and stored rows outside of the range. Same rows, same bytes.

        Without any row the file goes. On an error nothing has changed.
        """
        path = self.file_of(month)
        self.sweep(month)
        columns = ", ".join(ident(c) for c in self.plan.stored)
        parts = [f"SELECT {columns} FROM _rows WHERE {month.within(self.plan.timestamp)}"] if month.rows else []
        kept = wanted.kept(self.plan)
        if kept != "false" and path.is_file():
            where = " AND ".join([f"({kept})", *self.not_erased])
            parts.append(f"SELECT {columns} FROM {self._stored_rows(con, path)} WHERE {where}")
        with reading_raw(self.plan, self.raw), writing(path):
            if not parts:
                path.unlink(missing_ok=True)
            elif self.plan.layout:
                write_chunk(con, f"({' UNION ALL '.join(parts)})", self.directory, month.name, self.plan.layout)
            else:
                self._write_log(con, f"SELECT * FROM ({' UNION ALL '.join(parts)}) ORDER BY {self.plan.order}", path)
            sync_directory(self.directory)
        if not path.is_file():
            return Published(month.rows, (), ())
        return Published(month.rows, (path.relative_to(self.place).as_posix(),), (sha256_of(path),))

    def _stored_rows(self, con: duckdb.DuckDBPyConnection, path: Path) -> str:
        """SQL for the rows of a published file in the view's present types; a column it lacks is null."""
        relation = f"read_parquet({text(str(path))})"
        with reading(f"{self.plan.view}: {path}"):
            found = {str(r[0]): str(r[1]) for r in con.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()}
        values = []
        declared = {c.name: c for c in self.plan.columns}
        for name in self.plan.stored:
            if name not in found and name in declared:
                values.append(f"{declared[name].null} AS {ident(name)}")
            elif name in declared:
                value = declared[name].read(found[name], f"{self.plan.view}: {path}, column {name}")
                values.append(f"{value} AS {ident(name)}")
            else:
                values.append(ident(name))
        return f"(SELECT {', '.join(values)} FROM {relation})"

    def stands(self, month: Month, result: Published) -> bool:
        """Whether the month's file is exactly what was recorded; recorded without a file: there is none."""
        path = self.file_of(month)
        if not result.files:
            return not path.exists()
        return path.is_file() and result.sha256 == (sha256_of(path),)

    def outdated(self, con: duckdb.DuckDBPyConnection, month: Month, wanted: Range) -> bool:
        """Whether a month for which the run has no rows holds rows that it replaces."""
        path = self.file_of(month)
        with reading(f"{self.plan.view}: {path}"):
            replaced = f"SELECT 1 FROM read_parquet({text(str(path))}) WHERE NOT ({wanted.kept(self.plan)}) LIMIT 1"
            return bool(con.execute(replaced).fetchall())

    def estimate(self, con: duckdb.DuckDBPyConnection, rows: int) -> int:
        """About how many bytes so many rows of `_rows` take, from a sample."""
        columns = ", ".join(ident(c) for c in self.plan.stored)
        with reading_raw(self.plan, self.raw):
            sample = con.sql(f"SELECT {columns} FROM _rows LIMIT {SAMPLE_ROWS}").to_arrow_table()
        return _size(self.plan, sample) * rows // sample.num_rows if sample.num_rows else 0

    def _write_log(self, con: duckdb.DuckDBPyConnection, query: str, path: Path) -> None:
        rows = con.sql(query).to_arrow_table()
        if rows.num_rows:
            publish(rows, path)
        else:
            path.unlink(missing_ok=True)


def _size(plan: Plan, sample: pa.Table) -> int:
    if plan.layout is None:
        return serialised_size(sample)
    ordered = sample.sort_by([(c, "ascending") for c in plan.layout.order])
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(sink, ordered.schema, **writer_options(ordered.schema, plan.layout)) as writer:
        writer.write_table(ordered)
    return int(sink.getvalue().size)
