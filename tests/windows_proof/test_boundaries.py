"""The edges of every rule, to the microsecond: each case is read from the states and from history, and must be as stated."""

from __future__ import annotations

import pytest
from window_cases import DAY, HOUR, MINUTE, SECOND, Topic, at
from window_oracle import K, distinct

T = at("2024-10-04 12:00")
COUNT_OVER = (
    (
        "SELECT k, COUNT(*) AS c, SUM(m) AS s FROM events WINDOW w AS (PARTITION BY k ORDER BY event_timestamp "
        "RANGE BETWEEN INTERVAL '1' HOUR PRECEDING AND CURRENT ROW)"
    )
    .replace("COUNT(*)", "COUNT(*) OVER w")
    .replace("SUM(m)", "SUM(m) OVER w")
)


def tumble(output: str = "COUNT(*) AS c", size: str = "'1' HOUR", emit: bool = False) -> str:
    close = " EMIT ON WINDOW CLOSE" if emit else ""
    return f"SELECT k, {output} FROM events GROUP BY k, TUMBLE(event_timestamp, INTERVAL {size}){close}"


def hop(output: str = "COUNT(*) AS c", slide: str = "'20' MINUTE", size: str = "'1' HOUR", emit: bool = False) -> str:
    close = " EMIT ON WINDOW CLOSE" if emit else ""
    return f"SELECT k, {output} FROM events GROUP BY k, HOP(event_timestamp, INTERVAL {slide}, INTERVAL {size}){close}"


def session(output: str = "COUNT(*) AS c", gap: str = "'10' MINUTE", emit: bool = False) -> str:
    close = " EMIT ON WINDOW CLOSE" if emit else ""
    return f"SELECT k, {output} FROM events GROUP BY k, SESSION(event_timestamp, INTERVAL {gap}){close}"


@pytest.mark.parametrize(
    ("age", "counted"),
    [(0, 1), (1, 1), (HOUR - 1, 1), (HOUR, 1), (HOUR + 1, 0), (2 * HOUR, 0)],
)
@pytest.mark.parametrize("t", [T, 0, 5, -DAY, at("1969-12-31 23:59:59.999999")])
def test_over_has_both_ends(age, counted, t):
    topic = Topic(COUNT_OVER)
    topic.send(t - age, visible_at=t - age, m=2)
    assert topic.read(t) == {"c": counted, "s": 2 if counted else None}


@pytest.mark.parametrize(
    "start", [T, 0, -HOUR, -7 * HOUR, at("2024-02-29 00:00"), at("2024-02-29 23:00"), at("2024-12-31 23:00")]
)
def test_a_tumbling_window_has_its_start_and_not_its_end(start):
    topic = Topic(tumble())
    for time in (start - 1, start, start + HOUR - 1):
        topic.send(time)
    assert topic.read(start - 1)["c"] == 1
    assert topic.read(start)["c"] == 1
    assert topic.read(start + HOUR - 1)["c"] == 2
    assert topic.read(start + HOUR)["c"] == 0
    topic.send(start + HOUR)
    assert topic.read(start + HOUR)["c"] == 1


@pytest.mark.parametrize(
    ("midnight", "weekday"),
    [
        (at("2024-02-29 00:00"), 4),
        (at("2024-03-01 00:00"), 5),
        (at("2025-01-01 00:00"), 3),
        (at("1970-01-01 00:00"), 4),
        (at("1969-12-31 00:00"), 3),
        (at("1600-02-29 00:00"), 2),
    ],
)
def test_a_day_begins_at_midnight_utc(midnight, weekday):
    output = (
        "COUNT(*) AS c, MAX(EXTRACT(ISODOW FROM event_timestamp)) AS d, MIN(EXTRACT(HOUR FROM event_timestamp)) AS h"
    )
    topic = Topic(tumble(output, "'1' DAY"), retention_us=10 * DAY)
    topic.send(midnight - 1)
    assert topic.read(midnight - 1) == {"c": 1, "d": (weekday - 2) % 7 + 1, "h": 23}
    topic.send(midnight)
    assert topic.read(midnight) == {"c": 1, "d": weekday, "h": 0}
    topic.send(midnight + DAY - 1)
    assert topic.read(midnight + DAY - 1) == {"c": 2, "d": weekday, "h": 0}


@pytest.mark.parametrize("edge", [T, 0, -20 * MINUTE, at("2024-02-29 00:00")])
def test_a_hopping_window_is_the_one_that_ends_first(edge):
    topic = Topic(hop())
    for time in (edge - 40 * MINUTE - 1, edge - 40 * MINUTE, edge - 1, edge):
        topic.send(time)
    # At the edge the window [edge - 40 min, edge + 20 min) begins to be the first to end.
    assert topic.read(edge - 1)["c"] == 3
    assert topic.read(edge)["c"] == 3
    assert topic.read(edge + 20 * MINUTE)["c"] == 2
    assert topic.read(edge + 40 * MINUTE)["c"] == 1
    assert topic.read(edge + HOUR)["c"] == 0


@pytest.mark.parametrize(("apart", "counted"), [(10 * MINUTE, 2), (10 * MINUTE + 1, 1), (0, 2), (1, 2)])
@pytest.mark.parametrize("t", [T, 0, -DAY])
def test_a_gap_exactly_as_long_does_not_split(apart, counted, t):
    topic = Topic(session())
    topic.send(t)
    topic.send(t + apart)
    assert topic.read(t + apart)["c"] == counted


@pytest.mark.parametrize(("silent", "counted"), [(0, 1), (10 * MINUTE, 1), (10 * MINUTE + 1, 0)])
def test_an_open_session_lasts_as_long_as_its_gap(silent, counted):
    topic = Topic(session("COUNT(*) AS c, MAX(m) AS x"))
    topic.send(T, m=7)
    assert topic.read(T + silent) == {"c": counted, "x": 7 if counted else None}


def test_a_late_event_joins_two_sessions():
    topic = Topic(session("COUNT(*) AS c, MIN(m) AS lo, FIRST(m) AS f"))
    topic.send(T, m=5)
    topic.send(T + 15 * MINUTE, m=1)
    assert topic.read(T + 15 * MINUTE) == {"c": 1, "lo": 1, "f": 1}
    topic.send(T + 7 * MINUTE, visible_at=T + 16 * MINUTE, m=9)
    assert topic.read(T + 16 * MINUTE) == {"c": 3, "lo": 1, "f": 5}


@pytest.mark.parametrize(
    ("watermark", "counted"), [(HOUR - 1, 0), (HOUR, 1), (HOUR + 1, 1), (2 * HOUR - 1, 1), (2 * HOUR, 0)]
)
@pytest.mark.parametrize("start", [T, 0, -3 * HOUR])
def test_a_window_closes_when_the_watermark_is_at_its_end(watermark, counted, start):
    topic = Topic(tumble(emit=True))
    topic.send(start)
    topic.send(0, idle=start + watermark, visible_at=start + 3 * HOUR)
    assert topic.read(start + 3 * HOUR)["c"] == counted


@pytest.mark.parametrize(("watermark", "counted"), [(10 * MINUTE, 0), (10 * MINUTE + 1, 1), (DAY, 1)])
def test_a_session_closes_when_the_watermark_is_beyond_its_gap(watermark, counted):
    topic = Topic(session(emit=True))
    topic.send(T)
    topic.send(0, idle=T + watermark, visible_at=T + 2 * DAY)
    assert topic.read(T + 2 * DAY)["c"] == counted


def test_a_closed_window_never_changes_but_the_open_one_does():
    topic = Topic(tumble(emit=True) + ";" + tumble("COUNT(*) AS o"), lateness_us=10 * MINUTE)
    topic.send(T)
    topic.send(T + HOUR + 10 * MINUTE - 1)  # the watermark is one microsecond before the end
    topic.send(T + 1, visible_at=T + HOUR + 10 * MINUTE)
    assert topic.read(T + HOUR + 10 * MINUTE)["c"] == 0
    topic.send(T + HOUR + 10 * MINUTE, visible_at=T + HOUR + 11 * MINUTE)  # now it is closed
    assert topic.read(T + HOUR + 11 * MINUTE) == {"c": 2, "o": 2}
    topic.send(T + 2, visible_at=T + HOUR + 12 * MINUTE)
    topic.send(T + HOUR, visible_at=T + HOUR + 13 * MINUTE)
    assert topic.read(T + HOUR + 13 * MINUTE) == {"c": 2, "o": 3}


@pytest.mark.parametrize(("visible", "counted"), [(-1, 1), (0, 1), (1, None)])
def test_an_event_counts_from_when_it_is_visible(visible, counted):
    topic = Topic(COUNT_OVER)
    topic.send(T - MINUTE, visible_at=T + visible)
    assert topic.read(T)["c"] == counted


@pytest.mark.parametrize(("ahead", "counted"), [(0, 2), (1, 1), (5 * SECOND, 1)])
def test_an_event_ahead_of_the_clock_waits_for_its_time(ahead, counted):
    topic = Topic(";".join([COUNT_OVER, tumble("COUNT(*) AS t"), hop("COUNT(*) AS h"), session("COUNT(*) AS z")]))
    topic.send(T)
    topic.send(T + ahead, visible_at=T)
    assert [topic.read(T)[n] for n in "cthz"] == [counted] * 4
    assert [topic.read(T + ahead)[n] for n in "cthz"] == [2] * 4


def test_only_ahead_of_the_clock_is_not_seen_yet():
    topic = Topic(COUNT_OVER)
    topic.send(T + SECOND, visible_at=T)
    assert topic.status(T + SECOND - 1) == "NOT_FOUND"
    assert topic.status(T + SECOND) == "PRESENT"


@pytest.mark.parametrize(("silent", "status"), [(2 * HOUR, "PRESENT"), (2 * HOUR + 1, "OUTSIDE_MAX_AGE")])
def test_ttl_is_inclusive(silent, status):
    topic = Topic(COUNT_OVER, ttl_us=2 * HOUR)
    topic.send(T)
    assert topic.status(T + silent) == status


@pytest.mark.parametrize(("age", "dropped"), [(HOUR, None), (HOUR + 1, "late")])
def test_late_is_older_than_the_watermark_by_more_than_the_retention(age, dropped):
    topic = Topic(COUNT_OVER.replace("'1' HOUR", "'3' HOUR"), retention_us=HOUR, lateness_us=MINUTE)
    topic.send(T + MINUTE)  # the watermark is T
    assert topic.send(T - age, visible_at=T + 2 * MINUTE) == dropped
    assert topic.read(T + 2 * MINUTE)["c"] == (1 if dropped else 2)


@pytest.mark.parametrize(("later", "dropped"), [(HOUR, "duplicate"), (HOUR + 1, None)])
def test_an_id_is_remembered_as_long_as_the_retention(later, dropped):
    topic = Topic(COUNT_OVER.replace("'1' HOUR", "'3' HOUR"), retention_us=HOUR, event_id=True)
    topic.send(T, event_id="x")
    topic.send(T + later, entity="b")  # moves the watermark of the partition
    assert topic.send(T + later, visible_at=T + later + 1, event_id="x") == dropped
    assert topic.read(T + later + 1)["c"] == (1 if dropped else 2)


def test_a_duplicate_is_of_one_entity_and_a_late_event_was_never_counted():
    topic = Topic(COUNT_OVER, retention_us=HOUR, event_id=True)
    assert topic.send(T, event_id="x") is None
    assert topic.send(T, entity="b", visible_at=T + 1, event_id="x") is None
    assert topic.send(T - 2 * HOUR, visible_at=T + 2, event_id="y") == "late"
    assert topic.send(T, visible_at=T + 3, event_id="y") is None
    assert topic.send(T, visible_at=T + 4, event_id="y") == "duplicate"
    assert topic.read(T + 4)["c"] == 2


def test_first_and_last_of_one_time_follow_partition_and_offset():
    topic = Topic(tumble("FIRST(m) AS f, LAST(m) AS l"))
    for partition, m in [(1, 10), (0, 20), (1, 30), (0, 40)]:
        topic.send(T, visible_at=T + m, partition=partition, m=m)
    topic.send(T, visible_at=T + 50, partition=1)  # null: not a value
    assert topic.read(T + 60) == {"f": 20, "l": 30}
    topic.send(T, visible_at=T + 2, partition=-1, m=50)
    assert topic.read(T + 60) == {"f": 50, "l": 30}


@pytest.mark.parametrize("count", [1, K - 1, K, K + 1, 3 * K])
def test_a_distinct_count_is_exact_under_k(count):
    topic = Topic(tumble("COUNT(DISTINCT kind) AS d"))
    for i in range(count):
        topic.send(T + i, kind=f"v{i}")
        if i < 5:
            topic.send(T + i, kind=f"v{i}")
    got = topic.read(T + count)["d"]
    assert got == distinct([f"v{i}" for i in range(count)])
    assert got == count if count < K else abs(got / count - 1) < 0.12  # four standard errors


@pytest.mark.parametrize(
    ("values", "total"),
    [
        ([2**63 - 1], 2**63 - 1),
        ([2**63 - 1, 1, -1], 2**63 - 1),
        ([-(2**63)], -(2**63)),
        ([2**62, 2**62 - 1, 2**62, -(2**62)], 2**63 - 1),
        ([2**53 + 1, 1], 2**53 + 2),
    ],
)
def test_integer_sums_are_exact_to_the_last_bit(values, total):
    topic = Topic(tumble("SUM(n) AS s"))
    for i, v in enumerate(values):
        topic.send(T + i, n=v)
    assert topic.read(T + MINUTE)["s"] == total


@pytest.mark.parametrize("values", [[2**63 - 1, 1], [-(2**63), -1], [2**62] * 4])
def test_a_sum_beyond_64_bits_is_an_error_in_both(values):
    topic = Topic(tumble("SUM(n) AS s, AVG(n) AS a"))
    for i, v in enumerate(values):
        topic.send(T + i, n=v)
    errors_everywhere(topic, T + MINUTE)


@pytest.mark.parametrize("values", [[1.7e308, 1.7e308], [-1.7e308, -1.7e308]])
def test_a_sum_of_doubles_that_is_infinite_is_an_error_in_both(values):
    topic = Topic(tumble("SUM(y) AS s"))
    for i, v in enumerate(values):
        topic.send(T + i, y=v)
    errors_everywhere(topic, T + MINUTE)


def test_an_average_of_a_sum_beyond_64_bits_is_a_value():
    topic = Topic(tumble("AVG(n) AS a"))
    for i in range(4):
        topic.send(T + i, n=2**62)
    assert topic.read(T + MINUTE)["a"] == 2.0**62


def test_a_deviation_survives_a_large_mean():
    topic = Topic(tumble("STDDEV(z) AS d"))
    assert topic.read(T)["d"] is None
    topic.send(T, z=1e9)
    assert topic.read(T)["d"] is None
    topic.send(T + 1, z=1e9 + 1)
    topic.send(T + 2, z=1e9 + 2)
    assert topic.read(T + 2)["d"] == pytest.approx(1.0, abs=1e-6)


def test_seen_but_nothing_in_the_window_is_zero_and_null():
    topic = Topic(
        tumble(
            "COUNT(*) AS c, COUNT(DISTINCT m) AS d, SUM(m) AS s, AVG(m) AS a, MIN(m) AS lo, LAST(x) AS l, STDDEV(x) AS v"
        )
    )
    topic.send(T, m=1, x=1.0)
    empty = {"c": 0, "d": 0, "s": None, "a": None, "lo": None, "l": None, "v": None}
    assert topic.read(T + HOUR) == empty
    assert topic.status(T + HOUR) == "PRESENT"
    assert topic.read(T - 1) == dict.fromkeys(empty)
    assert topic.status(T - 1) == "NOT_FOUND"


def test_history_before_the_stream_is_never_late_and_closes_windows():
    topic = Topic(tumble() + ";" + tumble("COUNT(*) AS closed", emit=True))
    topic.send(T - HOUR, partition=-1)
    assert topic.read(T - HOUR) == {"c": 1, "closed": 0}
    topic.send(T, partition=-1, visible_at=T)
    topic.send(T - DAY, partition=-1, visible_at=T)
    assert topic.read(T) == {"c": 1, "closed": 1}
    topic.send(T + HOUR)
    assert topic.read(T + HOUR) == {"c": 1, "closed": 1}


@pytest.mark.parametrize("more", [0, 1])
def test_the_cap_is_reached_only_by_one_more_event(more):
    topic = Topic(COUNT_OVER, cap=20)
    for i in range(20 + more):
        topic.send(T + i)
    t = T + MINUTE
    states, entities, watermarks = topic.states(t)
    finals = states.values(t, watermarks)
    assert (entities.index("a") in finals.errors) == bool(more)
    if not more:
        assert topic.read(t)["c"] == 20


def test_beyond_the_cap_a_window_without_the_lost_events_has_a_value_again():
    topic = Topic(COUNT_OVER, cap=20)
    for i in range(30):
        topic.send(T + i)
    assert topic.read(T + 29 + 2 * HOUR)["c"] == 0


def test_a_state_answers_nothing_before_what_it_has_applied():
    topic = Topic(COUNT_OVER)
    topic.send(T, visible_at=T + 5)
    states, entities, watermarks = topic.states(T + 5)
    i = entities.index("a")
    assert i in states.values(T + 4, watermarks).errors
    assert i not in states.values(T + 5, watermarks).errors


def errors_everywhere(topic: Topic, t: int) -> None:
    import duckdb
    from window_platform import Read

    states, entities, watermarks = topic.states(t)
    assert entities.index("a") in states.values(t, watermarks).errors
    topic.platform.set_log(topic.rows)
    with pytest.raises(duckdb.Error):
        topic.platform.ask_history([Read("a", t)], "by_time")
