"""All rows of a range, and the latest row per key: what materialisation reads, in chunks.

Latest is the greatest (event_timestamp, created), found in one aggregation over keys and times; the other columns are
fetched afterwards, row group by row group, so memory is bounded by the keys and one chunk.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.clock import to_micros
from feature_store.point_in_time.engine import give_back, ident
from feature_store.point_in_time.fetch import SHIFT, feature_columns, fetch, stored_columns
from feature_store.point_in_time.narrow import narrow
from feature_store.point_in_time.request import Feature
from feature_store.point_in_time.slots import Ints
from feature_store.point_in_time.source import ParquetSource, open_source, require_same_kind, scanning
from feature_store.point_in_time.types import ns_per_tick, time_literal

CHUNK_ROWS = 500_000
"""Rows per fetched chunk when the caller takes all: large, because each chunk opens the row groups it needs again."""


@dataclass(frozen=True)
class Pull:
    """A range of a source's rows; column names are the source's own. Both ends are inclusive; None: open.

    `late_since`: also rows older than `start` that became known (`created`) at or after this time.
    """

    label: str
    place: str
    next_step: str
    keys: tuple[str, ...]
    features: tuple[str, ...]
    timestamp: str
    created: str | None
    start: datetime | None
    end: datetime | None
    late_since: datetime | None = None

    @property
    def columns(self) -> list[str]:
        extra = [self.created] if self.created else []
        return list(dict.fromkeys([*self.keys, *self.features, self.timestamp, *extra]))


def pull_all(con: duckdb.DuckDBPyConnection, pull: Pull) -> pa.Table:
    """Every row of the range, with the columns of `pull` (all columns when it names no features), in file order."""
    source = open_source(con, pull.label, [pull.place], pull.next_step)
    columns = pull.columns if pull.features else list(source.columns)
    for column in columns:
        source.require(column, "the request")
    with scanning(source, columns):
        where = _range(source, pull)
        selected = ", ".join(ident(c) for c in columns)
        return con.sql(f"SELECT {selected} FROM {source.relation} WHERE {where}").to_arrow_table()


def pull_latest(con: duckdb.DuckDBPyConnection, pull: Pull) -> pa.Table:
    """The latest row per key of the range; rows with a null key belong to no entity and are left out."""
    _, chunks = latest_chunks(con, pull, CHUNK_ROWS)
    return pa.concat_tables(list(chunks))


def latest_chunks(
    con: duckdb.DuckDBPyConnection, pull: Pull, rows: int, declared: Sequence[Feature] | None = None
) -> tuple[int, Iterator[pa.Table]]:
    """The number of keys, and their latest rows in tables of at most `rows` (one empty table when there are none).

    Columns are those of `pull` as stored, or, given `declared`, these in their declared types and the times as stored.
    """
    source = open_source(con, pull.label, [pull.place], pull.next_step)
    columns = pull.columns if pull.features else list(source.columns)
    if declared is not None:
        columns = [pull.timestamp, *([pull.created] if pull.created else [])]
    require_same_kind(source, [*pull.keys, pull.timestamp, pull.created])
    with scanning(source, [*pull.keys, pull.timestamp, pull.created]):
        reading_of = narrow(source, pull.keys, pull.timestamp, pull.created)
        wanted = [*feature_columns(con, source, declared or ()), *stored_columns(con, source, columns)]
        conditions = [_range(source, pull), *(f"{ident(k)} IS NOT NULL" for k in pull.keys)]
        places = _latest(con, f"{reading_of.sql} WHERE {' AND '.join(conditions)}", len(pull.keys))
    places.sort()
    give_back(con)
    starts = range(0, max(len(places), 1), rows)
    return len(places), (fetch(con, source, places[i : i + rows], wanted) for i in starts)


def _latest(con: duckdb.DuckDBPyConnection, sql: str, keys: int) -> Ints:
    """The place of the greatest (_t, _c, _file, _pos) per key."""
    bounds = con.execute(
        f"SELECT min(_t), max(_t), min(_c), max(_c), max(_file), max(_pos) FROM ({sql})"
    ).fetchall()[0]  # fmt: skip
    if bounds[0] is None:
        return np.array([], np.int64)
    t0, t1, c0, c1, files, rows = (int(b) for b in bounds)
    c_bits, file_bits, row_bits = ((n).bit_length() for n in (c1 - c0, files, rows))
    group = f"GROUP BY {', '.join(f'_k{i}' for i in range(keys))}" if keys else ""
    if (t1 - t0).bit_length() + c_bits + file_bits + row_bits <= 126:
        # one 128-bit number holds all that decides: comparing it is several times as fast as comparing rows
        low = file_bits + row_bits
        packed = (
            f"((((_t - {t0})::HUGEINT << {c_bits}) + (_c - {c0})::HUGEINT) << {low}) "
            f"+ ((_file::HUGEINT << {row_bits}) + _pos::HUGEINT)"
        )
        greatest = f"SELECT (max({packed}) & {(1 << low) - 1}::HUGEINT)::BIGINT AS p FROM ({sql}) {group}"
        sql = f"SELECT ((p >> {row_bits}) << {SHIFT}) + (p & {(1 << row_bits) - 1}) AS _place FROM ({greatest})"
    else:
        greatest = f"SELECT max({{t: _t, c: _c, f: _file::BIGINT, p: _pos}}) AS m FROM ({sql}) {group}"
        sql = f"SELECT (m.f << {SHIFT}) + m.p AS _place FROM ({greatest})"
    found = con.sql(sql).to_arrow_table().column("_place")
    return np.array(found.to_numpy(), np.int64)


def _range(source: ParquetSource, pull: Pull) -> str:
    start = _bound(source, pull.timestamp, ">=", pull.start)
    if pull.late_since is not None and pull.created:
        start = f"({start} OR {_bound(source, pull.created, '>=', pull.late_since)})"
    return f"{start} AND {_bound(source, pull.timestamp, '<=', pull.end)}"


def _bound(source: ParquetSource, column: str, operator: str, bound: datetime | None) -> str:
    sql_type = source.require_time(column, "time")
    if bound is None:
        return "true"
    tick = to_micros(bound) * 1000 // ns_per_tick(sql_type)
    return f"{ident(column)} {operator} {time_literal(tick, sql_type)}"
