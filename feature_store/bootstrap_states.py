"""States of a windowed view made from its event log, for bootstrap and for a rebuild: some entities at a time.

The numbers of the events come from the same SQL as in the stream (`plan.numbers_sql`), computed by DuckDB; the states from
the same `States.apply`. Nothing is done row by row in Python.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_store.event_log import HISTORY, STREAM
from feature_store.point_in_time.engine import EngineSettings, connect, ident
from feature_store.point_in_time.source import open_source, scanning
from feature_store.point_in_time.windowed import EVENTS, make_events
from feature_store.windows.definition import WindowedView
from feature_store.windows.plan import plan_of
from feature_store.windows.state import HISTORY_PARTITION, NEVER, Events, States

if TYPE_CHECKING:
    import duckdb

Key = tuple[str | int, ...]

_EVENTS_PER_CHUNK = 500_000
_ENTITIES_PER_CHUNK = 20_000


@dataclass(frozen=True)
class LogSummary:
    """What the log holds, known by a time. `watermarks`: partition (-1: history) -> its watermark and the newest
    `_visible_at`, microseconds; `visible_us` is NEVER for an empty log."""

    entities: int
    events: int
    visible_us: int
    watermarks: Mapping[int, tuple[int, int]]

    @property
    def history_watermark_us(self) -> int | None:
        """From which the watermarks of the stream's partitions start; None without history."""
        found = self.watermarks.get(HISTORY_PARTITION)
        return None if found is None else found[0]


@dataclass(frozen=True)
class Chunk:
    """Some entities with their states, in one order."""

    keys: list[Key]
    states: States


class LoggedStates:
    """The events of one view's log that were visible by a time, ready to be turned into states.

    Use as a context manager. Reads `directory`/history and `directory`/stream; only rows that meet all `conditions` (SQL
    over the entity keys) count. Trusts `_dropped` of history; of the stream's rows `States.apply` finds it again, by the
    same rules. NotFoundError: no files; DataError: files that cannot be read.
    """

    def __init__(
        self,
        definition: WindowedView,
        directory: Path,
        known_by_us: int | None,
        conditions: Sequence[str] = (),
        engine: EngineSettings | None = None,
    ) -> None:
        self.definition = definition
        self._directory = directory
        self._known_by_us = known_by_us
        self._conditions = conditions
        self._engine = engine or EngineSettings()

    def __enter__(self) -> LoggedStates:
        self._connected = connect(self._engine)
        self._con: duckdb.DuckDBPyConnection = self._connected.__enter__()
        try:
            self.summary = self._load()
        except BaseException:
            self._connected.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, *raised: Any) -> None:
        self._connected.__exit__(*raised)

    def _load(self) -> LogSummary:
        d, con, plan = self.definition, self._con, plan_of(self.definition)
        places = [str(self._directory / part) for part in (HISTORY, STREAM)]
        source = open_source(con, d.name, places, f"`predictflow backfill {d.name}`")
        columns = make_events(con, source, d, ids=True)
        keys = ", ".join(ident(k) for k in d.entity_key)
        time = f"epoch_us({ident(d.source.timestamp)})"
        known = "true" if self._known_by_us is None else f"epoch_us(_visible_at) <= {int(self._known_by_us)}"
        some_key = " AND ".join(f"{ident(k)} IS NOT NULL" for k in d.entity_key)
        wanted = " AND ".join([known, some_key, *self._conditions])
        row = (
            f"{keys}, {time} AS _us, _partition AS _p, _offset AS _o, epoch_us(_visible_at) AS _vis, "
            f"coalesce(epoch_us(_watermark), {_SQL_NEVER}) AS _wm, _dropped IS NULL AS _counts, "
            f"{plan.numbers_sql()}, {plan.event_id_sql()}"
        )
        with scanning(source, columns):
            con.execute(
                f"""CREATE TEMP TABLE log AS
                WITH own AS (
                  SELECT {row} FROM {EVENTS} WHERE {wanted} AND _partition < 0 AND _dropped IS NULL
                  UNION ALL
                  (SELECT DISTINCT ON (_p, _o) * FROM (SELECT {row} FROM {EVENTS} WHERE {wanted} AND _partition >= 0)
                   ORDER BY _p, _o, _vis)
                ), entity AS (
                  SELECT {keys}, row_number() OVER (ORDER BY {keys}) - 1 AS _e
                  FROM (SELECT DISTINCT {keys} FROM own WHERE _counts)
                ), ordered AS (
                  -- As they were applied: history first, then by time of being visible, each partition in its own order.
                  SELECT *, CASE WHEN _p < 0 THEN {_SQL_NEVER} ELSE max(_vis) OVER (PARTITION BY _p ORDER BY _o) END AS _turn
                  FROM own
                )
                SELECT e._e, o.* FROM ordered AS o JOIN entity AS e USING ({keys}) ORDER BY _e, _turn, _p, _o"""
            )
            after = f"CASE WHEN _dropped IS DISTINCT FROM 'idle' THEN {time} - {d.source.allowed_lateness_us} END"
            watermarks = con.execute(
                f"""SELECT _partition, max(greatest(coalesce(epoch_us(_watermark), {_SQL_NEVER}), coalesce({after}, {_SQL_NEVER}))),
                           max(epoch_us(_visible_at))
                FROM {EVENTS} WHERE {known} GROUP BY _partition"""
            ).fetchall()
        found = con.execute("SELECT coalesce(max(_e) + 1, 0), count(*) FILTER (WHERE _counts) FROM log").fetchall()[0]
        return LogSummary(
            entities=int(found[0]),
            events=int(found[1]),
            visible_us=max((v for *_, v in watermarks), default=NEVER),
            watermarks={p: (w, v) for p, w, v in watermarks if w != NEVER},
        )

    def chunks(self, events: int = _EVENTS_PER_CHUNK, entities: int = _ENTITIES_PER_CHUNK) -> Iterator[Chunk]:
        """The states of all entities, in key order: as many at a time as have about `events` events, at most `entities`."""
        counts = self._con.execute("SELECT _e, count(*) FROM log GROUP BY _e ORDER BY _e").fetchnumpy()["count_star()"]
        ends = np.cumsum(counts)
        first = 0
        while first < len(ends):
            before = ends[first - 1] if first else 0
            last = int(np.searchsorted(ends, before + events, side="right"))
            last = min(max(last, first + 1), first + entities)
            yield self._chunk(first, last)
            first = last

    def _chunk(self, first: int, last: int) -> Chunk:
        d = self.definition
        keys = ", ".join(ident(k) for k in d.entity_key)
        named = self._con.sql(
            f"SELECT {keys} FROM log WHERE _e >= {first} AND _e < {last} GROUP BY _e, {keys} ORDER BY _e"
        ).to_arrow_table()
        values = [f"_v{i}" for i in range(len(plan_of(d).values))]
        listed = ", ".join(["_us", "_p", "_o", "_vis", "_wm", "_mask", "_id", *values])
        rows = self._con.sql(
            f"SELECT _e - {first} AS _e, {listed} FROM log WHERE _e >= {first} AND _e < {last} ORDER BY _e, _turn, _p, _o"
        ).to_arrow_table()
        numbers = {name: _numpy(rows[name]) for name in ["_e", *listed.split(", ")]}
        states = States.empty(d, last - first)
        states.apply(
            Events(
                entity=numbers["_e"],
                time=numbers["_us"],
                partition=numbers["_p"],
                offset=numbers["_o"],
                visible_at=numbers["_vis"],
                watermark=numbers["_wm"],
                mask=numbers["_mask"],
                id=numbers["_id"],
                values=[numbers[v] for v in values],
            )
        )
        return Chunk(list(zip(*(named[k].to_pylist() for k in d.entity_key), strict=True)), states)


_SQL_NEVER = "(-9223372036854775807 - 1)"


def _numpy(column: pa.ChunkedArray) -> np.ndarray[Any, Any]:
    found = column.to_numpy()
    return found if found.dtype == np.float64 else found.astype(np.int64, copy=False)
