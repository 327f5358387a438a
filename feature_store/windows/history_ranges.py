"""Aggregates of ranges of event time, per entity row, without reading every event of a range.

An entity's events stand in the order of time, in places by how late they became known. Of a place's order, all events
before the first one not yet known make a prefix that is settled: of a range, the settled part is put together from blocks
of 8, 64, 512, ... events that are aggregated once, and only the few events behind it are looked at one by one. Late events
have places of their own, so that one of them does not hold up the rest. Merging never subtracts.
"""

from __future__ import annotations

from collections.abc import Sequence

from feature_store.windows.history_partials import Partial, partials_of
from feature_store.windows.plan import SKETCH_SIZE, Plan

SEEN = -1
"""The number of a statement that is in no definition: the newest event with time <= t."""
ALL_OFFSETS = 2**63 - 1
"""The limit of history where none was asked for; a partition of the stream without one was not read yet."""

_SHIFT = 3
_LEVELS = 6
_LATE, _PARTITION = 1_000, 10_000
_LAG = "CASE WHEN {0} <= 0 THEN 0 ELSE 1 + CAST(floor(log2({0}) / 4) AS BIGINT) END"


def aligned(time: str, step_us: int) -> str:
    """SQL: the greatest multiple of the step that is not after the time, before 1970 too."""
    return f"({time} - (({time} % {step_us}) + {step_us}) % {step_us})"


def limit_of(partition: str) -> str:
    """SQL: the last offset of a partition that counts for the entity row `r`."""
    return f"coalesce(r._offsets[{partition}], CASE WHEN {partition} < 0 THEN {ALL_OFFSETS} ELSE -1 END)"


def range_ctes(plan: Plan, ranges: Sequence[str], *, by_offset: bool) -> list[str]:
    """`summed`: per `_row` and `_s` (statement, or SEEN) the merged partial columns, and `_last`, the newest time read.

    Reads `log` and `timed`; `ranges`: one SELECT per statement of `_row, _k, _t, _s, _lo, _hi, _e, _timely`.
    """
    partials = partials_of(plan, range(len(plan.definition.statements)))
    closes = plan.definition.closes_windows
    late = "coalesce(_wm > _us, FALSE)"
    if by_offset:
        place = f"CAST(_p + 1 AS BIGINT) * {_PARTITION}"
        lag = f"CASE WHEN {late} THEN _wm - _us ELSE 0 END" if closes else "0"
        knows = "_o"
    else:
        place, knows = "0", "_vis"
        lag = f"greatest(_vis - _us, CASE WHEN {late} THEN _wm - _us ELSE 0 END)" if closes else "(_vis - _us)"
    lateness = f" + CASE WHEN {late} THEN {_LATE} ELSE 0 END" if closes else ""
    order = "ORDER BY _us, _p, _o"
    rank = any("_g" in p.one for p in partials)
    g = f", row_number() OVER (PARTITION BY _k {order}) AS _g" if rank else ""
    limit = "r._t"
    if by_offset:
        limit = limit_of(f"CAST(c._c // {_PARTITION} - 1 AS INTEGER)")
    carried = ", r._offsets" if by_offset else ""
    seen = f"SELECT _row, _k, _t, {SEEN} AS _s, NULL AS _lo, _t AS _hi, NULL AS _e, FALSE AS _timely FROM timed"
    offsets_join = " JOIN asked AS r USING (_row)" if by_offset else ""
    ranges_of = "SELECT w.*" + carried + " FROM (" + "\n    UNION ALL ".join([seen, *ranges]) + f") AS w{offsets_join}"
    timely = f" AND NOT (r._timely AND c._c % {_PARTITION} >= {_LATE})" if closes else ""
    numbers = "".join(f", _v{i}" for i in range(len(plan.values)))
    wm_max = ", max(_wm) OVER w AS _wm_max" if closes else ""
    return [
        f"""placed AS MATERIALIZED (
  SELECT *, row_number() OVER w - 1 AS _i, max(_kn) OVER w AS _kn_max{wm_max}, count(*) OVER (PARTITION BY _k, _c) AS _n
  FROM (SELECT _k, _p, _o, _us, _wm, {knows} AS _kn, _mask{numbers}{g}, {place}{lateness} + {_LAG.format(lag)} AS _c FROM log)
  WINDOW w AS (PARTITION BY _k, _c {order} ROWS UNBOUNDED PRECEDING)
)""",
        "places AS MATERIALIZED (SELECT _k, _c, count(*) AS _n FROM placed GROUP BY ALL)",
        "times AS (SELECT _k, _c, _us, max(_i) + 1 AS _i FROM placed GROUP BY ALL)",
        "settled AS (SELECT _k, _c, _kn_max, min(_i) AS _i FROM placed GROUP BY ALL)",
        *_blocks(partials),
        f"""ranges AS MATERIALIZED (
  SELECT r._row, r._k, r._s, r._lo, r._hi, r._e, c._c, c._n, {limit} AS _kl
  FROM ({ranges_of}) AS r JOIN places AS c ON c._k = r._k{timely}
)""",
        *_spans(closes=closes),
        *_pieces(),
        *_summed(partials),
    ]


def _blocks(partials: Sequence[Partial]) -> list[str]:
    ones = "".join(f", {p.one} AS {p.name}" for p in partials)
    blocks = "".join(f", {p.block} AS {p.name}" for p in partials)
    names = "".join(f", {p.name}" for p in partials)
    levels = [f"SELECT _k, _c, 0 AS _level, _i AS _b, _us, _kn, _wm{names} FROM ones"]
    levels += [
        f"SELECT _k, _c, {j}, _i >> {_SHIFT * j}, NULL, NULL, NULL{blocks} FROM ones "
        f"WHERE _i < ((_n >> {_SHIFT * j}) << {_SHIFT * j}) GROUP BY _k, _c, _i >> {_SHIFT * j}"
        for j in range(1, _LEVELS + 1)
    ]
    return [
        f"ones AS MATERIALIZED (SELECT _k, _c, _i, _n, _us, _kn, _wm{ones} FROM placed)",
        "blocks AS MATERIALIZED (\n  " + "\n  UNION ALL ".join(levels) + "\n)",
    ]


def _spans(*, closes: bool) -> list[str]:
    """`spans`: of each place the events `_a` to `_z` (settled) and on to `_h` (looked at one by one), ends excluded."""
    until, join, steps = "coalesce(u._i, r._n)", "", []
    if closes:
        steps = [
            f"overtaken AS (SELECT _k, _c, _wm_max, min(_i) AS _i FROM placed WHERE _c % {_PARTITION} >= {_LATE} AND _wm_max IS NOT NULL GROUP BY ALL)"
        ]
        join = "\n  ASOF LEFT JOIN overtaken AS o ON o._k = r._k AND o._c = r._c AND r._e <= o._wm_max"
        until = "least(coalesce(u._i, r._n), coalesce(o._i, r._n))"
    return [
        *steps,
        f"""cut AS (
  SELECT r.*, coalesce(a._i, 0) AS _a, coalesce(h._i, 0) AS _h, {until} AS _u
  FROM ranges AS r
  ASOF LEFT JOIN times AS a ON a._k = r._k AND a._c = r._c AND r._lo > a._us
  ASOF LEFT JOIN times AS h ON h._k = r._k AND h._c = r._c AND r._hi >= h._us
  ASOF LEFT JOIN settled AS u ON u._k = r._k AND u._c = r._c AND r._kl < u._kn_max{join}
)""",
        f"""spans AS MATERIALIZED (
  SELECT _row, _k, _c, _s, _e, _kl, _h, least(_h, _u) AS _z, CASE WHEN _s = {SEEN} THEN greatest(least(_h, _u) - 1, 0) ELSE _a END AS _a
  FROM cut WHERE _h > _a
)""",
    ]


def _pieces() -> list[str]:
    """`pieces`: the blocks of each span, as few as there are; `_kl` and `_e` only where an event must be looked at."""
    parts = []
    for j in range(_LEVELS + 1):
        a, z = (f"((_a + {(1 << (_SHIFT * j)) - 1}) >> {_SHIFT * j})", f"(_z >> {_SHIFT * j})") if j else ("_a", "_z")
        inner = f"range({a}, {z})"
        if j < _LEVELS:
            up = _SHIFT * (j + 1)
            higher_a, higher_z = f"((_a + {(1 << up) - 1}) >> {up})", f"(_z >> {up})"
            inner = (
                f"CASE WHEN {higher_a} < {higher_z} THEN list_concat(range({a}, {higher_a} << {_SHIFT}), "
                f"range({higher_z} << {_SHIFT}, {z})) ELSE {inner} END"
            )
        parts.append(
            f"SELECT _row, _s, _k, _c, {j} AS _level, unnest({inner}) AS _b, NULL::BIGINT AS _kl, NULL::BIGINT AS _e FROM spans WHERE {a} < {z}"
        )
    parts.append("SELECT _row, _s, _k, _c, 0, unnest(range(greatest(_a, _z), _h)), _kl, _e FROM spans WHERE _z < _h")
    return ["pieces AS (\n  " + "\n  UNION ALL ".join(parts) + "\n)"]


def _summed(partials: Sequence[Partial]) -> list[str]:
    on = "b._k = p._k AND b._c = p._c AND b._level = p._level AND b._b = p._b"
    counted = "(p._kl IS NULL OR b._kn <= p._kl) AND (p._e IS NULL OR b._wm IS NULL OR b._wm < p._e)"
    sketches = [p for p in partials if p.is_sketch]
    merged = "".join(f", {p.merge} AS {p.name}" for p in partials)
    if not sketches:
        return [
            f"""summed AS MATERIALIZED (
  SELECT p._row, p._s, max(b._us) AS _last{merged} FROM pieces AS p JOIN blocks AS b ON {on} WHERE {counted} GROUP BY ALL
)"""
        ]
    # A full block's greatest hash bounds what can be among the smallest of all.
    kth = "".join(f", {p.name}[{SKETCH_SIZE}] AS {p.name}" for p in sketches)
    least = "".join(f", min(b.{p.name}) AS {p.name}" for p in sketches)
    kept = "".join(
        f", CASE WHEN t.{p.name} IS NULL THEN b.{p.name} ELSE list_filter(b.{p.name}, lambda h: h <= t.{p.name}) END AS {p.name}"
        for p in sketches
    )
    others = ", ".join(p.name for p in sketches)
    return [
        f"full_blocks AS MATERIALIZED (SELECT _k, _c, _level, _b{kth} FROM blocks WHERE _level > {10 // _SHIFT})",
        f"bounds AS MATERIALIZED (SELECT p._row, p._s{least} FROM pieces AS p JOIN full_blocks AS b ON {on} GROUP BY ALL)",
        f"""summed AS MATERIALIZED (
  SELECT _row, _s, max(_us) AS _last{merged} FROM (
    SELECT p._row, p._s, b.* EXCLUDE (_k, _c, _level, _b, _kn, _wm, {others}){kept}
    FROM pieces AS p JOIN blocks AS b ON {on} LEFT JOIN bounds AS t ON t._row = p._row AND t._s = p._s WHERE {counted}
  ) GROUP BY ALL
)""",
    ]
