"""All rows of a range, and the latest row per key: what materialisation reads.

Latest is the greatest (event_timestamp, created), found on keys and times alone; the wide columns are fetched once.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

import duckdb
import pyarrow as pa

from feature_store.clock import to_micros
from feature_store.point_in_time.engine import ident, reading
from feature_store.point_in_time.narrow import narrow
from feature_store.point_in_time.source import ParquetSource, open_source
from feature_store.point_in_time.types import ns_per_tick, time_literal


@dataclass(frozen=True)
class Pull:
    """A range of a source's rows; column names are the source's own. Both ends are inclusive; None: open."""

    label: str
    place: str
    next_step: str
    keys: tuple[str, ...]
    features: tuple[str, ...]
    timestamp: str
    created: str | None
    start: datetime | None
    end: datetime | None

    @property
    def columns(self) -> list[str]:
        extra = [self.created] if self.created else []
        return list(dict.fromkeys([*self.keys, *self.features, self.timestamp, *extra]))


def pull_all(con: duckdb.DuckDBPyConnection, pull: Pull) -> pa.Table:
    """Every row of the range, with the columns of `pull` (all columns when it names no features), in file order."""
    source = open_source(con, pull.label, [pull.place], pull.next_step)
    columns = pull.columns if pull.features else list(source.columns)
    with reading(source.label):
        where = _range(source, pull)
        return con.sql(f"SELECT {_select(source, columns, '')} FROM {source.relation} WHERE {where}").to_arrow_table()


def pull_latest(con: duckdb.DuckDBPyConnection, pull: Pull) -> pa.Table:
    """The latest row per key of the range; rows with a null key belong to no entity and are left out."""
    source = open_source(con, pull.label, [pull.place], pull.next_step)
    columns = pull.columns if pull.features else list(source.columns)
    with reading(source.label):
        rows = narrow(source, pull.keys, pull.timestamp, pull.created)
        conditions = [_range(source, pull), *(f"{ident(k)} IS NOT NULL" for k in pull.keys)]
        partition = ", ".join(f"_k{i}" for i in range(len(pull.keys))) or "true"
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE _latest AS SELECT _file, _pos FROM ({rows.sql} WHERE {' AND '.join(conditions)}) "
            f"QUALIFY row_number() OVER (PARTITION BY {partition} ORDER BY {rows.NEWEST_FIRST}) = 1"
        )
        return con.sql(
            f"SELECT {_select(source, columns, 'f.')} FROM {source.relation} f "
            "JOIN _latest m ON f.file_index = m._file AND f.file_row_number = m._pos"
        ).to_arrow_table()


def _select(source: ParquetSource, columns: Sequence[str], prefix: str) -> str:
    for column in columns:
        source.require(column, "the request")
    return ", ".join(prefix + ident(c) for c in columns)


def _range(source: ParquetSource, pull: Pull) -> str:
    sql_type = source.require_time(pull.timestamp, "event timestamp")
    per_tick = ns_per_tick(sql_type)
    conditions = []
    for operator, bound in ((">=", pull.start), ("<=", pull.end)):
        if bound is not None:
            tick = to_micros(bound) * 1000 // per_tick
            conditions.append(f"{ident(pull.timestamp)} {operator} {time_literal(tick, sql_type)}")
    return " AND ".join(conditions) or "true"
