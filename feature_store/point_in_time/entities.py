"""Entity rows: what features are asked for, as DataFrame, Arrow table, Parquet path or SQL text over the data sources.

The caller's columns are kept as they came and never pass through the engine; only join keys and times do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import duckdb
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.point_in_time.engine import ident, reading, text
from feature_store.point_in_time.source import is_uri, open_source, read_files

if TYPE_CHECKING:
    import pandas as pd

EVENT_TIMESTAMP = "event_timestamp"


@dataclass(frozen=True)
class EntityRows:
    """The caller's rows in their order; `t_ns` is each row's time in nanoseconds since the epoch."""

    table: pa.Table
    timestamp: str
    t_ns: pa.Array

    @property
    def keys(self) -> list[str]:
        return [c for c in self.table.column_names if c != self.timestamp]


def entity_rows(table: pa.Table) -> EntityRows:
    """Checks the rows and brings their time column to UTC (naive is UTC), keeping its unit.

    The time column is `event_timestamp`, or the only timestamp there is. DataError for a missing, null or
    out-of-range time and for two columns of one name.
    """
    table = table.replace_schema_metadata(None)
    for name in table.column_names:
        if table.column_names.count(name) > 1:
            raise DataError("entity rows: two columns of one name", value=name)
    timestamp = _timestamp_column(table)
    column = table.column(timestamp)
    if column.null_count:
        row = pc.index(column.is_null(), True).as_py()
        raise DataError(f"entity rows: {timestamp} is missing in {column.null_count} row(s), first in row", value=row)
    if pa.types.is_date(column.type):
        column = column.cast(pa.timestamp("s"))
    try:
        if column.type.tz is None:
            column = pc.assume_timezone(column, "UTC")
        else:
            column = column.cast(pa.timestamp(column.type.unit, "UTC"))
        t_ns = column.cast(pa.timestamp("ns", "UTC")).cast(pa.int64()).combine_chunks()
    except pa.ArrowInvalid as e:
        raise DataError(f"entity rows: {timestamp} outside of 1677-09-21 to 2262-04-11: {e}") from e
    table = table.set_column(table.column_names.index(timestamp), timestamp, column)
    return EntityRows(table, timestamp, t_ns)


def from_pandas(frame: pd.DataFrame) -> pa.Table:
    """A DataFrame as Arrow; DataError naming the column that mixes types."""
    try:
        return pa.Table.from_pandas(frame, preserve_index=False)
    except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
        raise DataError(f"entity rows: a column holds values of several types: {e}") from e


def is_path(query: str) -> bool:
    """Whether an entity_df string is a path: it ends in .parquet, or names a directory or URI. Any other is SQL."""
    stripped = query.strip()
    return stripped.endswith(".parquet") or is_uri(stripped) or ("\n" not in stripped and _is_dir(stripped))


def _is_dir(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except OSError:  # longer than a path may be: it is SQL
        return False


def from_path(con: duckdb.DuckDBPyConnection, path: str) -> pa.Table:
    """Entity rows of a Parquet file or directory, in file order."""
    source = open_source(con, "entity_df", [path.strip()], "pass an existing Parquet file or directory")
    with reading(source.label):
        return con.sql(f"SELECT * FROM {source.relation}").to_arrow_table()


def from_sql(con: duckdb.DuckDBPyConnection, query: str, places: Mapping[str, str]) -> pa.Table:
    """The rows of DuckDB SQL over data sources by name; `places` maps each source's name to its path.

    Only ever called with SQL of the process's own user: SQL can read any file the process can.
    """
    for name in _tables(query):
        if name not in places:
            raise NotFoundError("entity_df: no data source of this name", value=name, valid=places)
        files = read_files(con, places[name], f"entity_df: source {name}")
        if not files:
            raise NotFoundError(f"entity_df: source {name} has no Parquet files", value=places[name])
        listed = ", ".join(text(f) for f in files)
        with reading(f"entity_df: source {name}"):
            con.execute(
                f"CREATE OR REPLACE TEMP VIEW {ident(name)} AS "
                f"SELECT * FROM read_parquet([{listed}], union_by_name = true)"
            )
    with reading("entity_df"):
        return con.sql(query).to_arrow_table()


def _tables(query: str) -> list[str]:
    import sqlglot
    from sqlglot import exp

    try:
        statements = [s for s in sqlglot.parse(query, dialect="duckdb") if s is not None]
    except sqlglot.errors.SqlglotError as e:
        raise UsageError(f"entity_df is neither a path nor SQL: {str(e).splitlines()[0]}", value=query[:80]) from e
    if len(statements) != 1 or not isinstance(statements[0], exp.Query):
        raise UsageError("entity_df must be one SELECT, or a path", value=query[:80])
    local = {cte.alias for cte in statements[0].find_all(exp.CTE)}
    tables = (t for t in statements[0].find_all(exp.Table) if isinstance(t.this, exp.Identifier))
    return sorted({t.name for t in tables} - local)


def _timestamp_column(table: pa.Table) -> str:
    times = [f.name for f in table.schema if pa.types.is_timestamp(f.type) or pa.types.is_date(f.type)]
    if EVENT_TIMESTAMP in table.column_names:
        if EVENT_TIMESTAMP not in times:
            found = table.schema.field(EVENT_TIMESTAMP).type
            raise DataError(f"entity rows: {EVENT_TIMESTAMP} is no timestamp", value=str(found))
        return EVENT_TIMESTAMP
    if len(times) != 1:
        raise DataError(f"entity rows: no column {EVENT_TIMESTAMP}", value=table.column_names, valid=times)
    return times[0]
