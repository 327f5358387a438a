"""Where the session of an entity row begins and ends, from events known by then. See `history_ranges.py` for `settled`.

Among the settled events a session is known from the events alone, worked out once; the few known events behind them
prolong it, or begin new ones. So that late events can merge sessions, they are put together per entity row.
"""

from __future__ import annotations

from feature_store.windows.history_ranges import limit_of
from feature_store.windows.ir import Window


def session_ctes(number: int, window: Window, *, by_offset: bool) -> list[str]:
    """`session_<number>`: `_row, _k, _t, _lo, _hi`, first and last event time of the session at t; rows without are absent.

    Open: the session of the newest event with time <= t, unless more than the gap ago. On close: the newest session that
    the watermark `_w` has closed, of events that were not behind their watermark. Reads `log` and `timed`.
    """
    n, gap = number, window.size_us
    timely = " WHERE _wm IS NULL OR _us >= _wm" if window.on_close else ""
    knows = "_o" if by_offset else "_vis"
    within = ", _p" if by_offset else ""
    of_key = "PARTITION BY _k ORDER BY _i"
    limit = limit_of("m._p") if by_offset else "r._t"
    known = f"m._kn <= {limit}"
    if by_offset:
        first_unknown = f"""unknown_{n} AS (
  SELECT r._row, min(s._i) AS _i
  FROM (SELECT r._row, m._k, m._p, {limit} AS _kl FROM timed AS r JOIN (SELECT DISTINCT _k, _p FROM events_{n}) AS m ON m._k = r._k) AS r
  ASOF JOIN steps_{n} AS s ON s._k = r._k AND s._p = r._p AND r._kl < s._kn_max GROUP BY ALL
)"""
    else:
        first_unknown = f"""unknown_{n} AS (
  SELECT r._row, s._i FROM timed AS r ASOF JOIN steps_{n} AS s ON s._k = r._k AND r._t < s._kn_max
)"""
    # Closed: of the events that can be the last of a closed session, and the next one, which may prolong it.
    newest, reach = (f"r._w - {gap + 1}", "r._w - 1") if window.on_close else ("r._t", "r._t")
    end = "CASE WHEN _h < _u THEN least(_h + 1, _until) ELSE _until END" if window.on_close else "_h"
    carried = ", r._offsets" if by_offset else ""
    closed = f"r._w > _en + {gap}" if window.on_close else f"r._t - _en <= {gap}"
    if not window.on_close:
        # Only the newest session counts, even if it is over.
        chosen = f"SELECT _row, max(_st) AS _lo, max(_en) AS _hi FROM sessions_{n} GROUP BY ALL"
    else:
        chosen = (
            f"SELECT s._row, max(s._st) AS _lo, max(s._en) AS _hi FROM sessions_{n} AS s JOIN timed AS r USING (_row) "
            f"WHERE {closed} GROUP BY ALL"
        )
    return [
        f"""events_{n} AS MATERIALIZED (
  SELECT _k, _p, _us, {knows} AS _kn, row_number() OVER (PARTITION BY _k ORDER BY _us, _p, _o) - 1 AS _i FROM log{timely}
)""",
        f"""starts_{n} AS (
  SELECT *, max(_kn) OVER (PARTITION BY _k{within} ORDER BY _i ROWS UNBOUNDED PRECEDING) AS _kn_max,
         lag(_us) OVER ({of_key}) AS _before
  FROM events_{n}
)""",
        f"""begun_{n} AS (
  SELECT *, max(CASE WHEN _before IS NULL OR _us - _before > {gap} THEN _us END) OVER ({of_key}) AS _st,
         max(CASE WHEN _us - _before > {gap} THEN _before END) OVER ({of_key}) AS _last_en
  FROM starts_{n}
)""",
        f"""chain_{n} AS MATERIALIZED (
  SELECT b.*, max(CASE WHEN _us - _before > {gap} THEN _last_st END) OVER ({of_key}) AS _prior_st
  FROM (SELECT *, lag(_st) OVER ({of_key}) AS _last_st FROM begun_{n}) AS b
)""",
        f"steps_{n} AS (SELECT _k{within}, _kn_max, min(_i) AS _i FROM chain_{n} GROUP BY ALL)",
        f"moments_{n} AS (SELECT _k, _us, max(_i) + 1 AS _i FROM chain_{n} GROUP BY ALL)",
        f"sizes_{n} AS (SELECT _k, count(*) AS _n FROM chain_{n} GROUP BY ALL)",
        first_unknown,
        f"""found_{n} AS MATERIALIZED (
  SELECT _row, _k, least(_h, _u) AS _z, {end} AS _end FROM (
    SELECT r._row, r._k, coalesce(h._i, 0) AS _h, coalesce(w._i, 0) AS _until, coalesce(u._i, z._n) AS _u
    FROM (SELECT r._row, r._k, {newest} AS _newest, {reach} AS _reach FROM timed AS r) AS r
    JOIN sizes_{n} AS z ON z._k = r._k
    ASOF LEFT JOIN moments_{n} AS h ON h._k = r._k AND r._newest >= h._us
    ASOF LEFT JOIN moments_{n} AS w ON w._k = r._k AND r._reach >= w._us
    LEFT JOIN unknown_{n} AS u ON u._row = r._row
  )
)""",
        f"""links_{n} AS (
  SELECT f._row, m._st, m._us AS _en FROM found_{n} AS f JOIN chain_{n} AS m ON m._k = f._k AND m._i = f._z - 1
  UNION ALL
  SELECT f._row, m._prior_st, m._last_en FROM found_{n} AS f JOIN chain_{n} AS m ON m._k = f._k AND m._i = f._z - 1
  WHERE m._last_en IS NOT NULL
  UNION ALL
  SELECT r._row, m._us, m._us
  FROM (SELECT f._row, f._k, r._t{carried}, unnest(range(f._z, f._end)) AS _i FROM found_{n} AS f JOIN timed AS r USING (_row)
        WHERE f._z < f._end) AS r
  JOIN chain_{n} AS m ON m._k = r._k AND m._i = r._i WHERE {known}
)""",
        f"""sessions_{n} AS (
  SELECT _row, _number, min(_st) AS _st, max(_en) AS _en FROM (
    SELECT *, sum(coalesce(CAST(_st - _reached > {gap} AS BIGINT), 0)) OVER (PARTITION BY _row ORDER BY _st, _en ROWS UNBOUNDED PRECEDING) AS _number
    FROM (SELECT *, max(_en) OVER (PARTITION BY _row ORDER BY _st, _en ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING) AS _reached FROM links_{n})
  ) GROUP BY ALL
)""",
        f"""session_{n} AS (
  SELECT r._row, r._k, r._t, c._lo, c._hi FROM timed AS r JOIN ({chosen}) AS c USING (_row)
  {"" if window.on_close else f"WHERE r._t - c._hi <= {gap}"}
)""",
    ]
