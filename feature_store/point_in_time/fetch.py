"""Fetches wide columns of chosen stored rows: each row group that holds one is read once, the wanted columns only.

A place is `file << 40 | row`: the index into the source's files, and the position in that file. Every file is brought from
its own stored types to the declared ones, so a change of type between files never passes through a common type that
would lose digits, and what does not fit is refused with the name of the file.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any
from urllib.parse import unquote

import duckdb
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError
from feature_store.point_in_time.engine import give_back, ident, reading, text
from feature_store.point_in_time.layout import FOOTER
from feature_store.point_in_time.request import Feature
from feature_store.point_in_time.slots import Ints
from feature_store.point_in_time.source import ParquetSource, open_parquet, reading_file, relation, scanning
from feature_store.point_in_time.types import as_declared, as_stored, sql_type_of

SHIFT = 40
ROW_MASK = (1 << SHIFT) - 1
READ_AHEAD = 3
CONVERT_ROWS = 262_144
BATCH_ROWS = 122_880
BY_ENGINE_ROWS = 1_000
"""Fewer wanted rows of a file than this are read by Arrow, which needs no query for them."""


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
    distinct, which = np.unique(places, return_inverse=True)
    absent = int(np.searchsorted(distinct, 0))
    parts: list[list[pa.ChunkedArray]] = [[] for _ in columns]
    numbers = [np.array([], np.int64)]
    for number, piece in _pieces(con, source, distinct[absent:], columns):
        numbers.append(number)
        for part, values in zip(parts, piece.columns, strict=True):
            part.append(values)
    give_back(con)  # before the rows exist twice
    back = np.full(len(distinct), -1, np.int64)
    order = np.concatenate(numbers) + absent
    back[order] = np.arange(len(order))
    back = back[which]
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
) -> Iterator[tuple[Ints, pa.Table]]:
    """The rows of the distinct, sorted `places` in the columns' result types, and of each row the place's number."""
    start = 0
    while start < len(places):
        number = int(places[start] >> SHIFT)
        end = int(np.searchsorted(places, (number + 1) << SHIFT))
        file, rows = source.files[number], places[start:end] & ROW_MASK
        with reading_file(source.label, file):
            for numbers, table in _file_pieces(con, source, file, rows, columns):
                yield numbers + start, table
        start = end


def _file_pieces(
    con: duckdb.DuckDBPyConnection, source: ParquetSource, file: str, rows: Ints, columns: Sequence[Column]
) -> Iterator[tuple[Ints, pa.Table]]:
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
    if _suits_engine(opened.metadata, rows) and _engine_types(con, source, file, names) == types:
        yield from _by_engine(con, source, file, rows, selects, names)
        return
    start = 0
    held: list[pa.Table] = []
    for table in _read(opened, file, source.label, rows, names):
        if plain:
            held.append(pa.Table.from_arrays([table.column(c.source) for c in columns], [c.output for c in columns]))
        else:
            held.append(table)
            if sum(t.num_rows for t in held) < CONVERT_ROWS and start + sum(t.num_rows for t in held) < len(rows):
                continue
            held = [_converted(con, held, selects, source.label, file)]
        piece = held.pop()
        yield np.arange(start, start + piece.num_rows), piece
        start += piece.num_rows


def _suits_engine(metadata: pq.FileMetaData, rows: Ints) -> bool:
    """Whether the engine reads these rows of a file faster than Arrow: many rows, spread over most of their row groups.

    It skips values that no row wants, and decodes Snappy in half the time. It does not look at page checksums, so the
    files that we write with them are read by Arrow, which is as fast there.
    """
    if len(rows) < BY_ENGINE_ROWS or FOOTER in (metadata.metadata or {}):
        return False
    bounds = np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])
    groups = np.searchsorted(bounds, rows, side="right")
    return 2 * len(np.unique(groups)) > groups[-1] - groups[0]


def _engine_types(
    con: duckdb.DuckDBPyConnection, source: ParquetSource, file: str, names: Sequence[str]
) -> dict[str, str]:
    found = source.columns
    if len(source.files) > 1:
        with scanning(replace(source, files=(file,)), []):
            rows = con.execute(f"DESCRIBE SELECT * FROM {relation([file])}").fetchall()
        found = {str(r[0]): str(r[1]) for r in rows}
    return {n: found[n] for n in names if n in found}


def _by_engine(
    con: duckdb.DuckDBPyConnection,
    source: ParquetSource,
    file: str,
    rows: Ints,
    selects: Mapping[str, str],
    names: Sequence[str],
) -> Iterator[tuple[Ints, pa.Table]]:
    con.register("_wanted", pa.table({"_number": np.arange(len(rows)), "_row": rows}))
    wide = "".join(f", f.{ident(n)}" for n in names)
    piece = f"(SELECT w._number{wide} FROM {relation([file])} f JOIN _wanted w ON f.file_row_number = w._row) AS _piece"
    what = f"{source.label}: {file}"
    con.execute(
        "SET preserve_insertion_order = false"
    )  # rows carry their number, and need not be held to keep in order
    try:
        with (
            scanning(replace(source, files=(file,)), names),
            con.sql(f"SELECT _number, {', '.join(selects.values())} FROM {piece}").to_arrow_reader(BATCH_ROWS) as found,
        ):
            for batch in found:
                table = pa.Table.from_batches([batch])
                yield table.column(0).to_numpy(), table.remove_column(0)
    except DataError as e:
        if not isinstance(e.__cause__, duckdb.ConversionException | duckdb.OutOfRangeException):
            raise
        for column, select in selects.items():  # the engine does not say which column it could not convert
            _selected(con, {column: select}, f"{what}: column {column}", piece)
        raise
    finally:
        con.execute("RESET preserve_insertion_order")
        con.unregister("_wanted")


def _read(opened: pq.ParquetFile, file: str, label: str, rows: Ints, names: list[str]) -> Iterator[pa.Table]:
    """The chosen rows of each row group; decoding runs ahead in other threads."""
    metadata = opened.metadata
    bounds = np.cumsum([0, *(metadata.row_group(i).num_rows for i in range(metadata.num_row_groups))])
    cuts = np.searchsorted(rows, bounds)
    wanted = [g for g in range(metadata.num_row_groups) if cuts[g + 1] > cuts[g]]

    mine = threading.local()

    def load(group: int) -> pa.Table:
        chosen = rows[cuts[group] : cuts[group + 1]] - bounds[group]
        if not names:
            return pa.table({"_": pa.nulls(len(chosen))})
        if not hasattr(mine, "reader"):  # threads would move each other's position in the file
            mine.reader = open_parquet(file, label, metadata)
        table = mine.reader.read_row_group(group, columns=names, use_threads=False)
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


def _selected(con: duckdb.DuckDBPyConnection, selects: Mapping[str, str], what: str, piece: str = "_piece") -> pa.Table:
    with reading(what):
        return con.sql(f"SELECT {', '.join(selects.values())} FROM {piece}").to_arrow_table()


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


_ARROW: dict[str, pa.DataType] = {}
"""Of the engine's types, in UTC as every connection is: to ask costs a query, and a training set has many columns."""


def _arrow_type(con: duckdb.DuckDBPyConnection, sql_type: str) -> pa.DataType:
    if sql_type not in _ARROW:
        nothing = con.sql(f"SELECT CAST(NULL AS {sql_type}) AS v").to_arrow_table()
        _ARROW[sql_type] = nothing.schema.field("v").type
    return _ARROW[sql_type]


def _duckdb_types(con: duckdb.DuckDBPyConnection, schema: pa.Schema, names: list[str]) -> dict[str, str]:
    """The engine's types of Arrow columns, as a piece of the file would have them."""
    if not names:
        return {}
    con.register("_schema", pa.schema([schema.field(n) for n in names]).empty_table())
    try:
        return {str(r[0]): str(r[1]) for r in con.execute("DESCRIBE SELECT * FROM _schema").fetchall()}
    finally:
        con.unregister("_schema")
