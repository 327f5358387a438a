"""The point-in-time join of one row view: narrow match (keys and times only), then one fetch of the wanted columns.

The match gives, for each entity row, the file and row number of the greatest (event_timestamp, created) with
`t - ttl <= event_timestamp <= t`, and under as-known also `created <= t`. A row without `created` was known when it
happened. What is still equal is decided by the place in the files: the later row wins, so the result is repeatable.
"""

from __future__ import annotations

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.errors import DataError
from feature_store.point_in_time.engine import ident, reading
from feature_store.point_in_time.narrow import narrow
from feature_store.point_in_time.request import Key, ViewRequest
from feature_store.point_in_time.source import ParquetSource, open_source
from feature_store.point_in_time.types import as_declared, kind, ns_per_tick, time_literal

MAX_TICK = 2**63 - 1
_NULLS = {"string": pa.string(), "bytes": pa.binary(), "bool": pa.bool_(), "time": pa.timestamp("us", "UTC")}


def join_view(
    con: duckdb.DuckDBPyConnection, request: ViewRequest, entities: pa.Table, t_ns: pa.Array, as_known: bool
) -> pa.Table:
    """One row per entity row, in order: the request's features in their declared types, null where nothing matches."""
    source = open_source(con, request.label, [request.place], request.next_step)
    with reading(source.label):
        _match(con, request, source, entities, t_ns, as_known)
        found = _fetch(con, request, source)
    return spread(found, len(entities), [f.output for f in request.features])


def spread(found: pa.Table, rows: int, columns: list[str]) -> pa.Table:
    """`found` (with `_row`) as a table of `rows` rows: row i holds the found row of `_row` i, or nulls."""
    place = np.full(rows, -1, dtype=np.int64)
    place[found.column("_row").to_numpy()] = np.arange(found.num_rows)
    return found.select(columns).combine_chunks().take(pa.array(place, mask=place < 0))


def entity_keys(entities: pa.Table, keys: tuple[Key, ...], source: ParquetSource) -> list[pa.ChunkedArray]:
    """The entity columns of a view's join keys, checked against the source: widths may differ, kinds may not."""
    columns = []
    for key in keys:
        if key.entity not in entities.column_names:
            raise DataError(
                f"{source.label}: entity rows lack the join key", value=key.entity, valid=entities.column_names
            )
        column = entities.column(key.entity)
        if pa.types.is_dictionary(column.type):
            column = column.cast(column.type.value_type)
        want = source.require(key.source, f"join key {key.source}")
        columns.append(_comparable(column, kind(want), key, want, source.label))
    return columns


def _comparable(column: pa.ChunkedArray, want: str, key: Key, stored: str, label: str) -> pa.ChunkedArray:
    arrow = column.type
    have = (
        "integer" if pa.types.is_integer(arrow)
        else "string" if pa.types.is_string(arrow) or pa.types.is_large_string(arrow) or pa.types.is_string_view(arrow)
        else "bytes" if pa.types.is_binary(arrow) or pa.types.is_large_binary(arrow)
        else "bool" if pa.types.is_boolean(arrow)
        else "time" if pa.types.is_timestamp(arrow) or pa.types.is_date(arrow)
        else "number" if pa.types.is_floating(arrow) or pa.types.is_decimal(arrow)
        else str(arrow)
    )  # fmt: skip
    if have == want:
        return column
    if pa.types.is_null(arrow):  # a column of nulls alone has no type of its own yet
        return column.cast(_NULLS.get(want, pa.int64()))
    if have == "number" and want == "integer":
        # pandas holds integers with nulls as floating point.
        try:
            return column.cast(pa.int64())
        except pa.ArrowInvalid as e:
            raise DataError(f"{label}: join key {key.entity} is stored as {stored}: {e}") from e
    raise DataError(f"{label}: join key {key.entity} is {arrow} in the entity rows, but stored as {stored}")


def _match(
    con: duckdb.DuckDBPyConnection,
    request: ViewRequest,
    source: ParquetSource,
    entities: pa.Table,
    t_ns: pa.Array,
    as_known: bool,
) -> None:
    """Creates the temporary table `_matches(_row, _file, _pos)`."""
    reading_of = narrow(source, [k.source for k in request.keys], request.timestamp, request.created)
    per_tick = ns_per_tick(reading_of.timestamp_type)
    t = t_ns.to_numpy()
    columns = {"_row": np.arange(len(t)), "_hi": t // per_tick, "_known": t // reading_of.created_ns_per_tick}
    conditions = [f"f._k{i} = e._k{i}" for i in range(len(request.keys))]
    conditions.append("f._t <= e._hi")
    if request.ttl:
        columns["_lo"] = _lower(t, request, per_tick)
        conditions.append("f._t >= e._lo")
    if as_known and request.created:
        conditions.append("f._c <= e._known")
    keys = entity_keys(entities, request.keys, source)
    arrow = pa.table({**{f"_k{i}": k for i, k in enumerate(keys)}, **{n: pa.array(c) for n, c in columns.items()}})
    con.register("_entities", arrow)
    stored_time = ident(request.timestamp)
    pruned = reading_of.sql
    if len(t):
        pruned += f" WHERE {stored_time} <= {time_literal(int(columns['_hi'].max()), reading_of.timestamp_type)}"
        if request.ttl and int(columns["_lo"].min()) > -MAX_TICK // 2:
            pruned += f" AND {stored_time} >= {time_literal(int(columns['_lo'].min()), reading_of.timestamp_type)}"
    con.execute(
        f"CREATE OR REPLACE TEMP TABLE _matches AS SELECT e._row, f._file, f._pos FROM _entities e "
        f"JOIN ({pruned}) f ON {' AND '.join(conditions)} QUALIFY row_number() OVER "
        f"(PARTITION BY e._row ORDER BY {reading_of.NEWEST_FIRST}) = 1"
    )
    con.unregister("_entities")


def _lower(t: np.ndarray, request: ViewRequest, per_tick: int) -> np.ndarray:
    """ceil((t - ttl) / tick), saturating where the subtraction would leave 64 bits."""
    assert request.ttl is not None
    ttl_us = (request.ttl.days * 86_400 + request.ttl.seconds) * 1_000_000 + request.ttl.microseconds
    ttl_ns = min(ttl_us * 1000, MAX_TICK)
    least = np.iinfo(np.int64).min
    lowest = np.where(t >= least + ttl_ns, t - ttl_ns, least)
    down = lowest // per_tick
    return down + (down * per_tick != lowest)


def _fetch(con: duckdb.DuckDBPyConnection, request: ViewRequest, source: ParquetSource) -> pa.Table:
    wanted = []
    for f in request.features:
        where = f"{source.label}: feature {f.name}"
        value = as_declared("f." + ident(f.source), source.require(f.source, f"feature {f.name}"), f.dtype, where)
        wanted.append(f"{value} AS {ident(f.output)}")
    return con.sql(
        f"SELECT m._row, {', '.join(wanted)} FROM {source.relation} f "
        "JOIN _matches m ON f.file_index = m._file AND f.file_row_number = m._pos"
    ).to_arrow_table()
