"""Fetches wide columns of chosen stored rows: each row group that holds one is read once, the wanted columns only.

A place is `file << 40 | row`: the index into the source's files, and the position in that file. Every file is brought from
its own stored types to the declared ones, so a change of type between files never passes through a common type that
would lose digits, and what does not fit is refused with the name of the file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import unquote

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError
from feature_store.point_in_time.engine import ident, reading, text
from feature_store.point_in_time.request import Feature
from feature_store.point_in_time.slots import Ints
from feature_store.point_in_time.source import ParquetSource, open_parquet, reading_file
from feature_store.point_in_time.types import as_declared, as_stored, sql_type_of

SHIFT = 40
ROW_MASK = (1 << SHIFT) - 1
READ_AHEAD = 3
CONVERT_ROWS = 262_144


@dataclass(frozen=True)
class Column:
    """A column to fetch: `source` in the files, `output` in the result, converted by `expression(file, stored)`."""

    source: str
    output: str
    arrow: pa.DataType | None
    expression: Callable[[str, str], str]


def feature_columns(con: duckdb.DuckDBPyConnection, source: ParquetSource, features: Sequence[Feature]) -> list[Column]:
    """The features as declared; DataError for one that no file holds."""
    columns = []
    for f in features:
        source.require(f.source, f"feature {f.name}")
        target = sql_type_of(f.dtype)

        def expression(file: str, stored: str, f: Feature = f) -> str:
            return as_declared(ident(f.source), stored, f.dtype, f"{source.label}: {file}: feature {f.name}")

        columns.append(Column(f.source, f.output, _arrow_type(con, target) if target else None, expression))
    return columns


def stored_columns(con: duckdb.DuckDBPyConnection, source: ParquetSource, names: Sequence[str]) -> list[Column]:
    """Columns in the common type of all files, as they are stored."""
    columns = []
    for name in names:
        target = source.require(name, "the request")

        def expression(file: str, stored: str, name: str = name, target: str = target) -> str:
            return as_stored(ident(name), stored, target, f"{source.label}: {file}: column {name}")

        columns.append(Column(name, name, _arrow_type(con, target), expression))
    return columns


def fetch(con: duckdb.DuckDBPyConnection, source: ParquetSource, places: Ints, columns: Sequence[Column]) -> pa.Table:
    """One row per place, in their order; a place of -1 gives nulls."""
    order = np.argsort(places, kind="stable")
    order = order[np.searchsorted(places[order], 0) :]
    parts: list[list[pa.ChunkedArray]] = [[] for _ in columns]
    for piece in _pieces(con, source, places[order], columns):
        for part, values in zip(parts, piece.columns, strict=True):
            part.append(values)
    back = np.full(len(places), -1, np.int64)
    back[order] = np.arange(len(order))
    index = pa.array(back, mask=back < 0)
    result: dict[str, Any] = {}
    for column, part in zip(columns, parts, strict=True):
        whole = _whole(part, column)
        part.clear()  # one column at a time exists twice
        result[column.output] = whole.take(index) if len(whole) else pa.nulls(len(places), whole.type)
    return pa.table(result)


def _whole(parts: list[pa.ChunkedArray], column: Column) -> pa.Array:
    """The parts as one array; without a declared type, of the widest type that they have."""
    if column.arrow is not None:
        chunks = [c.cast(column.arrow) if c.type != column.arrow else c for p in parts for c in p.chunks]
        return pa.concat_arrays(chunks) if chunks else pa.array([], column.arrow)
    tables = [pa.table({"v": p}) for p in parts]
    if not tables:
        return pa.nulls(0)
    return pa.concat_tables(tables, promote_options="permissive").column("v").combine_chunks()


def _pieces(
    con: duckdb.DuckDBPyConnection, source: ParquetSource, places: Ints, columns: Sequence[Column]
) -> Iterator[pa.Table]:
    """The rows of sorted `places` (repeats allowed), in their order, in the columns' result types."""
    start = 0
    while start < len(places):
        number = int(places[start] >> SHIFT)
        end = int(np.searchsorted(places, (number + 1) << SHIFT))
        file, rows = source.files[number], places[start:end] & ROW_MASK
        with reading_file(source.label, file):
            yield from _file_pieces(con, source, file, rows, columns)
        start = end


def _file_pieces(
    con: duckdb.DuckDBPyConnection, source: ParquetSource, file: str, rows: Ints, columns: Sequence[Column]
) -> Iterator[pa.Table]:
    opened = open_parquet(file, source.label)
    there = opened.schema_arrow
    names = list(dict.fromkeys(c.source for c in columns if c.source in there.names))
    types = _duckdb_types(con, there, names)
    selects, plain = {}, True
    for c in columns:
        if c.source in types:
            expression = c.expression(file, types[c.source])
            plain = plain and expression == f"CAST({ident(c.source)} AS {types[c.source]})"
        else:
            expression, plain = _absent(c, source, file), False
        selects[c.output] = f"{expression} AS {ident(c.output)}"
    held: list[pa.Table] = []
    for table in _read(opened, file, source.label, rows, names):
        if plain:
            yield pa.Table.from_arrays([table.column(c.source) for c in columns], [c.output for c in columns])
            continue
        held.append(table)
        if sum(t.num_rows for t in held) >= CONVERT_ROWS:
            yield _converted(con, held, selects, source.label, file)
            held = []
    if held:
        yield _converted(con, held, selects, source.label, file)


def _read(opened: pq.ParquetFile, file: str, label: str, rows: Ints, names: list[str]) -> Iterator[pa.Table]:
    """The chosen rows of each row group; decoding runs ahead in other threads."""
    metadata = opened.metadata
    bounds = np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])
    cuts = np.searchsorted(rows, bounds)
    wanted = [g for g in range(metadata.num_row_groups) if cuts[g + 1] > cuts[g]]

    def load(group: int) -> pa.Table:
        chosen = rows[cuts[group] : cuts[group + 1]] - bounds[group]
        if not names:
            return pa.table({"_": pa.nulls(len(chosen))})
        # a reader of its own: one reader's file position is shared by its threads
        table = open_parquet(file, label, metadata).read_row_group(group, columns=names, use_threads=False)
        if len(chosen) == table.num_rows and chosen[0] == 0 and (np.diff(chosen) == 1).all():
            return table
        return table.combine_chunks().take(pa.array(chosen))

    with ThreadPoolExecutor(2, thread_name_prefix="fetch") as pool:
        ahead = [pool.submit(load, g) for g in wanted[:READ_AHEAD]]
        for i, group in enumerate(wanted):
            if i + READ_AHEAD < len(wanted):
                ahead.append(pool.submit(load, wanted[i + READ_AHEAD]))
            with reading_file(label, f"{file} (row group {group})"):
                yield ahead.pop(0).result()


def _converted(
    con: duckdb.DuckDBPyConnection, held: list[pa.Table], selects: Mapping[str, str], label: str, file: str
) -> pa.Table:
    con.register("_piece", pa.concat_tables(held))
    try:
        return _selected(con, selects, f"{label}: {file}")
    except DataError:
        for column, select in selects.items():  # the engine does not say which column it could not convert
            _selected(con, {column: select}, f"{label}: {file}: column {column}")
        raise
    finally:
        con.unregister("_piece")


def _selected(con: duckdb.DuckDBPyConnection, selects: Mapping[str, str], what: str) -> pa.Table:
    with reading(what):
        return con.sql(f"SELECT {', '.join(selects.values())} FROM _piece").to_arrow_table()


def _absent(column: Column, source: ParquetSource, file: str) -> str:
    """A column that the file lacks: the value that its directory names, or null (added after this file was written)."""
    stored = source.columns[column.source]
    for part in file.split("/")[:-1]:
        name, _, value = part.partition("=")
        if name == column.source and value and value != "__HIVE_DEFAULT_PARTITION__":
            constant = f"(SELECT CAST({text(unquote(value))} AS {stored}) AS {ident(column.source)})"
            return f"(SELECT {column.expression(file, stored)} FROM {constant})"
    nothing = f"(SELECT CAST(NULL AS {stored}) AS {ident(column.source)})"
    return f"(SELECT {column.expression(file, stored)} FROM {nothing})"


def _arrow_type(con: duckdb.DuckDBPyConnection, sql_type: str) -> pa.DataType:
    return con.sql(f"SELECT CAST(NULL AS {sql_type}) AS v").to_arrow_table().schema.field("v").type


def _duckdb_types(con: duckdb.DuckDBPyConnection, schema: pa.Schema, names: list[str]) -> dict[str, str]:
    """The engine's types of Arrow columns, as a piece of the file would have them."""
    if not names:
        return {}
    con.register("_schema", pa.schema([schema.field(n) for n in names]).empty_table())
    try:
        return {str(r[0]): str(r[1]) for r in con.execute("DESCRIBE SELECT * FROM _schema").fetchall()}
    finally:
        con.unregister("_schema")
