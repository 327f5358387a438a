"""The narrow reading of a source: join keys, times and the place of each stored row, but none of its wide columns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feature_store.point_in_time.engine import ident
from feature_store.point_in_time.source import ParquetSource
from feature_store.point_in_time.types import ns_per_tick, ticks


@dataclass(frozen=True)
class Narrow:
    """SQL over a source that yields `_k0.., _t, _c, _file, _pos`: what a match needs of each stored row."""

    sql: str
    timestamp_type: str
    created_ns_per_tick: int

    NEWEST_FIRST = "_t DESC, _c DESC, _file DESC, _pos DESC"


def narrow(source: ParquetSource, keys: Sequence[str], timestamp: str, created: str | None) -> Narrow:
    """The narrow reading; DataError for a missing column or a time that is none."""
    t_type = source.require_time(timestamp, "event timestamp")
    t = ticks(ident(timestamp), t_type)
    known, per_tick = t, ns_per_tick(t_type)
    if created:
        c_type = source.require_time(created, "created timestamp")
        per_tick = ns_per_tick(c_type)
        known = f"coalesce({ticks(ident(created), c_type)}, {_in_ticks(t, ns_per_tick(t_type), per_tick)})"
    for key in keys:
        source.require(key, "a join key")
    selected = "".join(f"{ident(k)} AS _k{i}, " for i, k in enumerate(keys))
    sql = f"SELECT {selected}{t} AS _t, {known} AS _c, file_index AS _file, file_row_number AS _pos FROM {source.relation}"
    return Narrow(sql, t_type, per_tick)


def _in_ticks(t: str, have: int, want: int) -> str:
    """Ticks of one unit in another, rounded up: a row that lacks `created` must never be known too early."""
    if have == want:
        return t
    if have > want:
        return f"{t} * {have // want}"
    factor = want // have
    return f"{t} // {factor} + CASE WHEN {t} % {factor} > 0 THEN 1 ELSE 0 END"
