"""The point-in-time join of one row view: a match on keys and times only, then one fetch of the wanted columns.

The match gives, for each entity row, the place of the stored row with the greatest (event_timestamp, created) with
`t - ttl <= event_timestamp <= t`, and under as-known also `created <= t`. A row without `created` was known when it
happened. What is still equal is decided by the place in the files: the later row wins, so the result is repeatable.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.errors import DataError
from feature_store.point_in_time.engine import ident
from feature_store.point_in_time.fetch import ROW_MASK, SHIFT
from feature_store.point_in_time.layout import bucket_sql, row_group_buckets
from feature_store.point_in_time.narrow import Narrow, narrow
from feature_store.point_in_time.request import Key, ViewRequest
from feature_store.point_in_time.slots import Ints, Slots
from feature_store.point_in_time.source import (
    ParquetSource,
    arrow_kind,
    open_parquet,
    open_source,
    require_same_kind,
    scanning,
)
from feature_store.point_in_time.types import kind, ns_per_tick, time_literal

MAX_TICK = 2**63 - 1
FEW_KEYS = 1_000
BATCH_ROWS = 262_144
PLACE = f"(CAST(f._file AS BIGINT) << {SHIFT}) + f._pos"
Strategy = Literal["range", "slots"]
_NULLS = {"string": pa.string(), "bytes": pa.binary(), "bool": pa.bool_(), "time": pa.timestamp("us", "UTC")}


def match_view(
    con: duckdb.DuckDBPyConnection,
    request: ViewRequest,
    entities: pa.Table,
    t_ns: pa.Array,
    as_known: bool,
    strategy: Strategy = "slots",
) -> tuple[ParquetSource, Ints]:
    """The view's source and, for each entity row, the place of its stored row or -1: all that has to be held at once.

    Every strategy gives the same places. `slots` is as fast as the others or faster at every density of keys that was
    measured (docs/adr/006); `range`, the plain join, is what it is checked against.
    """
    source = open_source(con, request.label, [request.place], request.next_step)
    columns = [*(k.source for k in request.keys), request.timestamp, request.created]
    require_same_kind(source, columns)
    reading_of = narrow(source, [k.source for k in request.keys], request.timestamp, request.created)
    ask = _ask(request, source, reading_of, entities, t_ns, as_known)
    with scanning(source, columns):
        return source, STRATEGIES[strategy](con, ask)


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
    have = arrow_kind(arrow)
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


@dataclass(frozen=True)
class _Ask:
    """One match: the narrow reading of the stored rows, and the entity rows as key columns, times and bounds in ticks."""

    source: ParquetSource
    reading: Narrow
    key_names: tuple[str, ...]
    keys: list[pa.ChunkedArray]
    t: Ints
    high: Ints
    lowest: Ints | None
    known: Ints | None
    pruned: str
    """The narrow reading's SQL, less what no entity row can match by time."""


def _ask(
    request: ViewRequest, source: ParquetSource, rows: Narrow, entities: pa.Table, t_ns: pa.Array, as_known: bool
) -> _Ask:
    per_tick = ns_per_tick(rows.timestamp_type)
    t = t_ns.to_numpy()
    high = t // per_tick
    lowest = _lower(t, request, per_tick) if request.ttl else None
    time = ident(request.timestamp)
    bounds = []
    if len(t):
        bounds.append(f"{time} <= {time_literal(int(high.max()), rows.timestamp_type)}")
        if lowest is not None and int(lowest.min()) > -MAX_TICK // 2:
            bounds.append(f"{time} >= {time_literal(int(lowest.min()), rows.timestamp_type)}")
    where = f"({' AND '.join(bounds)} OR {time} IS NULL)" if bounds else "true"
    return _Ask(
        source=source,
        reading=rows,
        key_names=tuple(k.source for k in request.keys),
        keys=entity_keys(entities, request.keys, source),
        t=t,
        high=high,
        lowest=lowest,
        known=t // rows.created_ns_per_tick if as_known and request.created else None,
        pruned=f"{rows.sql} WHERE {where}",
    )


def _by_range(con: duckdb.DuckDBPyConnection, ask: _Ask) -> Ints:
    """A hash join by key with a time range, then the newest of each entity row's candidates: as many as a key has rows."""
    columns = {"_row": np.arange(len(ask.t)), "_hi": ask.high}
    conditions = [f"f._k{i} = e._k{i}" for i in range(len(ask.keys))]
    conditions.append("f._t <= e._hi")
    if ask.lowest is not None:
        columns["_lo"] = ask.lowest
        conditions.append("f._t >= e._lo")
    if ask.known is not None:
        columns["_known"] = ask.known
        conditions.append("f._c <= e._known")
    names = {**{f"_k{i}": k for i, k in enumerate(ask.keys)}, **{n: pa.array(c) for n, c in columns.items()}}
    con.register("_entities", pa.table(names))
    try:
        found = con.sql(
            f"SELECT e._row, {PLACE} AS _place FROM _entities e JOIN ({ask.pruned}) f ON {' AND '.join(conditions)} "
            f"QUALIFY row_number() OVER (PARTITION BY e._row ORDER BY {ask.reading.NEWEST_FIRST}) = 1"
        ).to_arrow_table()
    finally:
        con.unregister("_entities")
    places = np.full(len(ask.t), -1, np.int64)
    places[found.column("_row").to_numpy()] = found.column("_place").to_numpy()
    return places


def _by_slots(con: duckdb.DuckDBPyConnection, ask: _Ask) -> Ints:
    """One pass over the stored rows of the wanted keys, in whatever order they lie; see `slots`."""
    on = " AND ".join(f"f._k{i} = d._k{i}" for i in range(len(ask.keys)))
    codes = _number_keys(con, ask)
    slots = Slots(codes, ask.t)
    rows = f"SELECT {{}}, f._t, f._c, {PLACE} AS _place FROM ({ask.pruned}{_wanted_row_groups(con, ask)}) f"
    rows = rows.format("d._code") + f" JOIN _keys d ON {on}" if on else rows.format("0 AS _code")
    t_unit, c_unit = ns_per_tick(ask.reading.timestamp_type), ask.reading.created_ns_per_tick
    with con.sql(rows).to_arrow_reader(BATCH_ROWS) as batches:
        for batch in batches:
            if batch.column("_t").null_count:
                raise _missing_time(ask, batch)
            code, event, created, place = (batch.column(i).to_numpy(zero_copy_only=False) for i in range(4))
            visible = _nanoseconds(event, t_unit)
            if ask.known is not None:
                visible = np.maximum(visible, _nanoseconds(created, c_unit))
            slots.add(code, visible, event, created, place)
    return slots.places(ask.lowest, seen_when_happened=ask.known is None)


def _number_keys(con: duckdb.DuckDBPyConnection, ask: _Ask) -> Ints:
    """Creates `_keys(_k0.., _code)`, the distinct keys numbered from 0; returns each entity row's number, -1 for a null key."""
    if not ask.keys:
        return np.zeros(len(ask.t), np.int64)
    names = [f"_k{i}" for i in range(len(ask.keys))]
    con.register("_entities", pa.table({**dict(zip(names, ask.keys, strict=True)), "_row": np.arange(len(ask.t))}))
    try:
        listed = ", ".join(names)
        present = " AND ".join(f"{n} IS NOT NULL" for n in names)
        con.execute(
            f"CREATE OR REPLACE TEMP TABLE _keys AS SELECT {listed}, row_number() OVER () - 1 AS _code "
            f"FROM (SELECT DISTINCT {listed} FROM _entities WHERE {present})"
        )
        found = con.sql(f"SELECT _row, _code FROM _entities JOIN _keys USING ({listed})").to_arrow_table()
    finally:
        con.unregister("_entities")
    codes = np.full(len(ask.t), -1, np.int64)
    codes[found.column("_row").to_numpy()] = found.column("_code").to_numpy()
    return codes


def _wanted_row_groups(con: duckdb.DuckDBPyConnection, ask: _Ask) -> str:
    """A condition that leaves out the buckets that none of few keys falls into; empty where it would not pay."""
    count = con.execute("SELECT count(*) FROM _keys").fetchall()[0][0] if ask.keys else FEW_KEYS
    if count >= FEW_KEYS:
        return ""
    files = []
    for number, file in enumerate(ask.source.files):
        metadata = open_parquet(file, ask.source.label).metadata
        laid_out = row_group_buckets(metadata, ask.key_names)
        if laid_out is None or laid_out[0] == 1:
            files.append(f"_file = {number}")
            continue
        types = {str(r[0]): str(r[1]) for r in con.execute("DESCRIBE _keys").fetchall() if r[0] != "_code"}
        sql = f"SELECT DISTINCT {bucket_sql(types, laid_out[0])} FROM _keys"
        wanted = {b for (b,) in con.execute(sql).fetchall()}
        start = 0
        for group, bucket in enumerate(laid_out[1]):
            rows = metadata.row_group(group).num_rows
            if bucket in wanted:
                files.append(f"(_file = {number} AND _pos BETWEEN {start} AND {start + rows - 1})")
            start += rows
    condition = " OR ".join(files).replace("_file", "file_index").replace("_pos", "file_row_number")
    return f" AND ({condition or 'false'})"


def _nanoseconds(ticks: Ints, unit: int) -> Ints:
    """Ticks in ns. Beyond 64 bits they saturate, which is beyond every entity time."""
    if unit == 1:
        return ticks
    return np.where(ticks > MAX_TICK // unit, MAX_TICK, np.where(ticks < -MAX_TICK // unit, -MAX_TICK, ticks * unit))


def _missing_time(ask: _Ask, batch: pa.RecordBatch) -> DataError:
    place = batch.filter(batch.column("_t").is_null()).column("_place")[0].as_py()
    return DataError(
        f"{ask.source.label}: a row without event timestamp, row {place & ROW_MASK} of",
        value=ask.source.files[place >> SHIFT],
        next_step="correct that row",
    )


STRATEGIES: dict[Strategy, Callable[[duckdb.DuckDBPyConnection, _Ask], Ints]] = {
    "range": _by_range,
    "slots": _by_slots,
}


def _lower(t: np.ndarray, request: ViewRequest, per_tick: int) -> np.ndarray:
    """ceil((t - ttl) / tick), saturating where the subtraction would leave 64 bits."""
    assert request.ttl is not None
    ttl_us = (request.ttl.days * 86_400 + request.ttl.seconds) * 1_000_000 + request.ttl.microseconds
    ttl_ns = min(ttl_us * 1000, MAX_TICK)
    least = np.iinfo(np.int64).min
    lowest = np.where(t >= least + ttl_ns, t - ttl_ns, least)
    down = lowest // per_tick
    return down + (down * per_tick != lowest)
