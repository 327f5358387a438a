"""The platform's two sides of a windowed view, asked directly: `States` over blobs, `history_sql` over a log in DuckDB."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import duckdb
import numpy as np
import pyarrow as pa
from window_histories import Message
from window_oracle import Value

from feature_store.windows.definition import WindowedView
from feature_store.windows.history import LAST_SEEN, history_sql
from feature_store.windows.plan import plan_of
from feature_store.windows.state import APPLIED, DUPLICATE, LATE, Events, States

NEVER = -(2**63)
DROPPED = {APPLIED: None, DUPLICATE: "duplicate", LATE: "late"}
UTC_US = pa.timestamp("us", "UTC")
ARROW = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "timestamp": UTC_US}


@dataclass(frozen=True)
class Row:
    """A row of the event log."""

    message: Message
    partition: int
    offset: int
    visible_at: int
    watermark: int | None
    dropped: str | None


@dataclass(frozen=True)
class Got:
    """An answer of the platform; `errors`: why an output is not among the values. A time is its microseconds."""

    values: Mapping[str, Value]
    last_seen: int | None
    errors: Mapping[str, str] = field(default_factory=dict)


@dataclass
class Read:
    """One question. `offsets`: what the state had applied, None for a read by time alone. `watermark`: the one it used."""

    entity: str
    t: int
    offsets: dict[int, int] | None = None
    watermark: int | None = None


@dataclass(frozen=True)
class Numbers:
    """What the plan's SQL makes of events, in their order."""

    masks: np.ndarray
    ids: np.ndarray
    values: list[np.ndarray]

    def at(self, places: np.ndarray) -> Numbers:
        return Numbers(self.masks[places], self.ids[places], [v[places] for v in self.values])


class Platform:
    """One view. `zone`: DuckDB's, on which nothing may depend."""

    def __init__(self, view: WindowedView, zone: str = "UTC") -> None:
        self.view = view
        self.plan = plan_of(view)
        self.ttl_us = view.ttl // view.ttl.resolution
        self.con = duckdb.connect(config={"threads": 1})
        self.con.execute(f"SET TimeZone='{zone}'")

    def close(self) -> None:
        self.con.close()

    def numbers(self, messages: Sequence[Message]) -> Numbers:
        """duckdb.OutOfRangeException where an int64 overflows; a float may be infinite."""
        self.con.register("raw", self.table([Row(m, 0, i, 0, None, None) for i, m in enumerate(messages)]))
        sql = f"SELECT {self.plan.numbers_sql()}, {self.plan.event_id_sql()} FROM raw ORDER BY _offset"
        out = self.con.execute(sql).fetchnumpy()
        self.con.unregister("raw")
        kinds = [np.float64 if v.is_float else np.int64 for v in self.plan.values]
        values = [np.asarray(out[f"_v{i}"]).astype(kind, copy=False) for i, kind in enumerate(kinds)]
        return Numbers(np.asarray(out["_mask"], np.int64), np.asarray(out["_id"], np.int64), values)

    def events(self, rows: Sequence[Row], entities: Sequence[str], numbers: Numbers) -> Events:
        """Rows as the states take them; `numbers` are theirs, in their order."""
        number = {e: i for i, e in enumerate(entities)}

        def integers(of: Callable[[Row], int | None]) -> np.ndarray:
            return np.array([NEVER if (v := of(r)) is None else v for r in rows], dtype=np.int64)

        return Events(
            entity=integers(lambda r: number[r.message.entity or ""]),
            time=integers(lambda r: r.message.time),
            partition=integers(lambda r: r.partition),
            offset=integers(lambda r: r.offset),
            visible_at=integers(lambda r: r.visible_at),
            watermark=integers(lambda r: r.watermark),
            mask=numbers.masks,
            id=numbers.ids,
            values=numbers.values,
        )

    def table(self, rows: Sequence[Row]) -> pa.Table:
        """Rows as the event log holds them."""
        source = self.view.source
        columns: dict[str, pa.Array] = {
            "k": pa.array([r.message.entity for r in rows], pa.string()),
            source.timestamp: _times([r.message.time for r in rows]),
        }
        for name, kind in source.columns.items():
            columns[name] = pa.array([r.message.columns.get(name) for r in rows], ARROW[kind])
        if source.event_id is not None:
            columns[source.event_id] = pa.array([r.message.event_id for r in rows], pa.string())
        columns["_topic_id"] = pa.array(["t"] * len(rows), pa.string())
        columns["_partition"] = pa.array([r.partition for r in rows], pa.int32())
        columns["_offset"] = pa.array([r.offset for r in rows], pa.int64())
        columns["_visible_at"] = _times([r.visible_at for r in rows])
        columns["_watermark"] = _times([r.watermark for r in rows])
        columns["_dropped"] = pa.array([r.dropped for r in rows], pa.string())
        return pa.table(columns)

    def set_log(self, rows: Sequence[Row]) -> None:
        """The event log that `ask_history` reads."""
        self.con.register("log_table", self.table(rows))
        self.con.execute("CREATE OR REPLACE TEMP TABLE log_rows AS SELECT * FROM log_table")
        self.con.unregister("log_table")

    def ask_states(
        self, states: States, times: Sequence[int], watermarks: Mapping[int, int] | None
    ) -> list[Read | Got]:
        """One read of each state: the question with the offsets and the watermark that went into it, then the answer."""
        finals = states.values(np.array(times, dtype=np.int64), watermarks)
        out: list[Read | Got] = []
        for i, t in enumerate(times):
            offsets = {p: o for p, o in states.offsets_of(i).items() if p >= 0}
            watermark = int(finals.watermark[i])
            out.append(Read("", t, offsets, None if watermark == NEVER else watermark))
            errors = {n: str(e) for n, e in finals.errors.get(i, {}).items()}
            seen = finals.seen[i]
            assert all(finals.columns[n][i] is None for n in errors)
            values = {n: plain(c[i]) for n, c in finals.columns.items() if n not in errors}
            # As a reader shows it: what is too old has no value, and no error in it.
            expired = seen is not None and self.ttl_us and t - seen > self.ttl_us
            if expired and t >= states.visible_at[i]:
                values, errors = dict.fromkeys(finals.columns), {}
            if seen is None or expired:
                values = dict.fromkeys(values)
            out.append(Got(values, None if seen is None else int(seen), errors))
        return out

    def ask_history(self, reads: Sequence[Read], known: Literal["by_time", "by_offset"]) -> list[Got]:
        """duckdb.Error where any of the values overflows."""
        asked: dict[str, pa.Array] = {
            "_row": pa.array(range(len(reads)), pa.int64()),
            "k": pa.array([q.entity for q in reads], pa.string()),
            "_t": _times([q.t for q in reads]),
        }
        if known == "by_offset":
            offsets = [list((q.offsets or {}).items()) for q in reads]
            asked["_offsets"] = pa.array(offsets, pa.map_(pa.int32(), pa.int64()))
            asked["_watermark_us"] = pa.array([q.watermark for q in reads], pa.int64())
        self.con.register("asked_rows", pa.table(asked))
        columns = self.con.sql(history_sql(self.view, "asked_rows", "log_rows", known)).to_arrow_table().to_pydict()
        self.con.unregister("asked_rows")
        names = [o.name for o in self.view.outputs]
        found = {
            row: Got({n: plain(v) for n, v in zip(names, values)}, plain(seen))
            for row, seen, *values in zip(columns["_row"], columns[LAST_SEEN], *(columns[n] for n in names))
        }
        assert len(columns["_row"]) == len(reads) == len(found), "history must give one row per question"
        return [found[i] for i in range(len(reads))]


def _times(values: Sequence[int | None]) -> pa.Array:
    return pa.array(values, pa.int64()).cast(UTC_US)


def plain(value: Any) -> Any:
    """A value as the oracle has it: times in microseconds."""
    if isinstance(value, np.generic):
        return value.item()
    if hasattr(value, "utctimetuple"):
        return pa.scalar(value, UTC_US).value
    return value
