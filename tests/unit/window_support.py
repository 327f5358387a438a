"""Definitions, event logs and a plain reading of the rules, for tests of windowed history: slow, one event after another."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import duckdb
import pyarrow as pa

from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.ir import Aggregate, AggregateRef, Call, Column, Constant, Output, Statement, Window

NEVER = -(2**63)
HOUR = 3_600_000_000
T0 = 20_000 * 24 * HOUR
UTC_US = pa.timestamp("us", "UTC")
LATENESS = 7
N, X, KIND, FLAG, AT = (
    Column("n", "int64"),
    Column("x", "float64"),
    Column("kind", "string"),
    Column("flag", "bool"),
    Column("at", "timestamp"),
)
IS_A = Call("=", (KIND, Constant("a", "string")), "bool")
AGGREGATES = (
    Aggregate("count", None, None, "int64"),
    Aggregate("count", N, IS_A, "int64"),
    Aggregate("sum", N, None, "int64"),
    Aggregate("sum", X, IS_A, "float64"),
    Aggregate("avg", N, IS_A, "float64"),
    Aggregate("min", X, None, "float64"),
    Aggregate("max", AT, None, "timestamp"),
    Aggregate("first", N, None, "int64"),
    Aggregate("last", FLAG, None, "bool"),
    Aggregate("last", N, IS_A, "int64"),
    Aggregate("stddev", X, None, "float64"),
    Aggregate("count_distinct", KIND, None, "int64"),
)
_numbers = itertools.count()


def view(*windows: Window, aggregates: Sequence[Aggregate] = AGGREGATES, **changes: Any) -> WindowedView:
    """A definition with all `aggregates` over each window, outputs `w<window>_<aggregate>`, and a ratio per window."""
    statements = []
    for i, window in enumerate(windows):
        outputs = [Output(f"w{i}_{j}", AggregateRef(j, a.type), a.type) for j, a in enumerate(aggregates)]
        ratio = Call("/", (AggregateRef(2, "int64"), AggregateRef(0, "int64")), "float64")
        if len(aggregates) > 2:
            outputs.append(Output(f"w{i}_ratio", ratio, "float64"))
        statements.append(Statement(window, tuple(aggregates), tuple(outputs)))
    columns = {"n": "int64", "x": "float64", "kind": "string", "flag": "bool", "at": "timestamp"}
    source = {"topic": "events", "columns": columns, "retention_us": HOUR, "allowed_lateness_us": LATENESS}
    source |= {k: changes.pop(k) for k in list(changes) if k in EventSource.__dataclass_fields__}
    arguments = {
        "name": "v",
        "entity_key": ("k",),
        "key_types": ("string",),
        "source": EventSource(**source),
        "sql": f"test {next(_numbers)}",
        "ttl": timedelta(0),
    }
    d = WindowedView(**(arguments | changes))
    d.__dict__["statements"] = tuple(statements)
    return d


@dataclass(frozen=True)
class Logged:
    """One row of the event log; a null key: an idle row."""

    key: str | None
    time: int | None
    partition: int
    offset: int
    visible: int
    watermark: int | None = None
    dropped: str | None = None
    n: int | None = None
    x: float | None = None
    kind: str | None = None
    flag: bool | None = None
    at: int | None = None


def table_of(rows: Sequence[Logged]) -> pa.Table:
    return pa.table(
        {
            "k": pa.array([r.key for r in rows], pa.string()),
            "event_timestamp": pa.array([r.time for r in rows], UTC_US),
            "n": pa.array([r.n for r in rows], pa.int64()),
            "x": pa.array([r.x for r in rows], pa.float64()),
            "kind": pa.array([r.kind for r in rows], pa.string()),
            "flag": pa.array([r.flag for r in rows], pa.bool_()),
            "at": pa.array([r.at for r in rows], UTC_US),
            "_topic_id": pa.array(["" for _ in rows], pa.string()),
            "_partition": pa.array([r.partition for r in rows], pa.int32()),
            "_offset": pa.array([r.offset for r in rows], pa.int64()),
            "_visible_at": pa.array([r.visible for r in rows], UTC_US),
            "_watermark": pa.array([r.watermark for r in rows], UTC_US),
            "_dropped": pa.array([r.dropped for r in rows], pa.string()),
        }
    )


def watermarks_before(rows: Sequence[Logged], lateness: int = LATENESS, bootstrap: int = NEVER) -> list[Logged]:
    """The rows with the watermark that the rule gives each row of the stream; idle rows keep theirs."""
    greatest: dict[int, int] = {}
    out = []
    for r in sorted(rows, key=lambda r: (r.partition, r.offset)):
        if r.partition < 0:
            out.append(r)
            continue
        before = greatest.get(r.partition, bootstrap)
        if r.dropped == "idle":
            assert r.watermark is not None
            greatest[r.partition] = max(before, r.watermark)
            out.append(r)
            continue
        assert r.time is not None
        greatest[r.partition] = max(before, r.time - lateness)
        out.append(Logged(**{**vars(r), "watermark": None if before == NEVER else before}))
    return out


def history_values(
    d: WindowedView,
    rows: pa.Table | Sequence[Logged],
    asked: Sequence[tuple[str | None, int]],
    offsets: Sequence[Mapping[int, int]] | None = None,
    watermarks: Sequence[int | None] | None = None,
) -> list[dict[str, Any]]:
    """What `history_sql` gives for (key, t), in order, times as microseconds."""
    from feature_store.windows.history import history_sql

    columns: dict[str, pa.Array] = {
        "_row": pa.array(range(len(asked)), pa.int64()),
        "k": pa.array([k for k, _ in asked], pa.string()),
        "_t": pa.array([t for _, t in asked], UTC_US),
    }
    if offsets is not None:
        columns["_offsets"] = pa.array([list(o.items()) for o in offsets], pa.map_(pa.int32(), pa.int64()))
        columns["_watermark_us"] = pa.array(watermarks or [None] * len(asked), pa.int64())
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        con.register("entities", pa.table(columns))
        con.register("events", rows if isinstance(rows, pa.Table) else table_of(rows))
        sql = history_sql(d, "entities", "events", known="by_time" if offsets is None else "by_offset")
        found = con.sql(f"SELECT * FROM ({sql}) ORDER BY _row").to_arrow_table()
    out = []
    for row in found.to_pylist():
        del row["_row"]
        out.append({n: v if not hasattr(v, "timestamp") else _micros(v) for n, v in row.items()})
    return out


def _micros(time: Any) -> int:
    from feature_store.clock import to_micros

    return to_micros(time)


# The rules, read one event after another


def expected(
    d: WindowedView,
    rows: Sequence[Logged],
    key: str | None,
    t: int,
    offsets: Mapping[int, int] | None = None,
    watermark: int | None = None,
) -> dict[str, Any]:
    """The value of every output of a key at t, and `_last_seen`."""
    names = [o.name for o in d.outputs]

    def known(r: Logged) -> bool:
        if offsets is None:
            return r.visible <= t
        return r.offset <= offsets.get(r.partition, 2**62 if r.partition < 0 else -1)

    once = list({(r.partition, r.offset, r.key, r.partition < 0 and i): r for i, r in enumerate(rows)}.values())
    mine = [r for r in once if r.key == key and key is not None and r.dropped is None and known(r)]
    mine.sort(key=lambda r: (r.time, r.partition, r.offset))
    seen = [r.time for r in mine if r.time is not None and r.time <= t]
    ttl = d.ttl // timedelta(microseconds=1)
    if not seen or (ttl and t - max(seen) > ttl):
        return dict.fromkeys([*names, "_last_seen"])
    if offsets is None:
        watermark = _watermark(d, rows, key, t)
    out: dict[str, Any] = {"_last_seen": max(seen)}
    for statement in d.statements:
        held = _window(statement.window, mine, t, watermark)
        values = [_aggregate(a, held) for a in statement.aggregates]
        for o in statement.outputs:
            if isinstance(o.expression, AggregateRef):
                out[o.name] = values[o.expression.index]
            else:
                top, bottom = values[2], values[0]
                out[o.name] = None if top is None or not bottom else top / bottom
    return out


def _watermark(d: WindowedView, rows: Sequence[Logged], key: str | None, t: int) -> int | None:
    partitions = {r.partition for r in rows if r.key == key and r.visible <= t}
    found = []
    for r in rows:
        if r.partition in partitions and r.visible <= t:
            found += [r.watermark] if r.watermark is not None else []
            found += [r.time - d.source.allowed_lateness_us] if r.dropped != "idle" and r.time is not None else []
    return max(found, default=None)


def _window(w: Window, mine: Sequence[Logged], t: int, watermark: int | None) -> list[Logged]:
    def at(r: Logged) -> int:
        assert r.time is not None
        return r.time

    if w.kind == "session":
        if w.on_close:
            mine = [r for r in mine if r.watermark is None or at(r) >= r.watermark]
        else:
            mine = [r for r in mine if at(r) <= t]
        sessions: list[list[Logged]] = []
        for r in mine:
            if sessions and at(r) - at(sessions[-1][-1]) <= w.size_us:
                sessions[-1].append(r)
            else:
                sessions.append([r])
        if w.on_close:
            sessions = [s for s in sessions if watermark is not None and watermark > at(s[-1]) + w.size_us]
            return sessions[-1] if sessions else []
        return sessions[-1] if sessions and t - at(sessions[-1][-1]) <= w.size_us else []
    if w.on_close:
        if watermark is None:
            return []
        end = watermark // w.slide_us * w.slide_us
        return [r for r in mine if end - w.size_us <= at(r) < end and (r.watermark is None or end > r.watermark)]
    if w.kind == "over":
        return [r for r in mine if t - w.size_us <= at(r) <= t]
    start = t // w.slide_us * w.slide_us + w.slide_us - w.size_us
    return [r for r in mine if start <= at(r) <= t]


def _aggregate(a: Aggregate, held: Sequence[Logged]) -> Any:
    rows = [r for r in held if a.filter is None or r.kind == "a"]
    if a.argument is None:
        return len(rows)
    assert isinstance(a.argument, Column)
    values = [v for r in rows if (v := getattr(r, a.argument.name)) is not None]
    match a.function:
        case "count":
            return len(values)
        case "count_distinct":
            return distinct(values)
        case "sum":
            return (sum(values) if a.type == "int64" else math.fsum(values)) if values else None
        case "avg":
            return sum(values) / len(values) if values else None
        case "stddev":
            return statistics.stdev(values) if len(values) > 1 else None
        case "first":
            return values[0] if values else None
        case "last":
            return values[-1] if values else None
        case "min":
            return min(values, default=None)
    return max(values, default=None)


def distinct(values: Sequence[str]) -> int:
    hashes = sorted({int.from_bytes(hashlib.md5(v.encode()).digest()[8:], "little") >> 1 for v in values})
    if len(hashes) < 1024:
        return len(hashes)
    return round(1023 * 2.0**63 / float(hashes[1023]))


def close(a: Any, b: Any) -> bool:
    """Equal: doubles to 1e-9, everything else exactly."""
    if isinstance(a, float) and isinstance(b, float):
        return math.isclose(a, b, rel_tol=1e-9, abs_tol=1e-9)
    return type(a) is type(b) and bool(a == b)
