"""The Flink and Spark SQL that a definition compiles to: it can be read, says what it computes, and DuckDB agrees where it can run it."""

from __future__ import annotations

import re
from datetime import UTC, datetime, timedelta

import duckdb
import numpy as np
import pytest
import sqlglot

from feature_store.clock import to_micros
from feature_store.windows.declare import event_source
from feature_store.windows.definition import WindowedView, definition_of
from feature_store.windows.explain import state_bytes
from feature_store.windows.flink import flink_sql
from feature_store.windows.in_words import output_columns, output_text
from feature_store.windows.spark import spark_sql
from feature_store.windows.sql_text import constant_sql
from tests.window_states import states_of

EVERYTHING = """
    COUNT(*) AS c, COUNT(*) FILTER (WHERE kind = 'it''s \\ ok') AS f, COUNT(DISTINCT kind) AS d, SUM(n) AS s, AVG(n) AS a,
    MIN(ok) AS least, MAX(seen) AS m, FIRST(price) AS p, LAST(n % 7) AS l, STDDEV(price) AS sd,
    CASE WHEN COUNT(*) > 3 THEN SUM(price) / COUNT(*) ELSE 0.5 END AS ratio,
    SUM(CAST(ok AS BIGINT)) FILTER (WHERE EXTRACT(ISODOW FROM ts) IN (6, 7) AND seen < TIMESTAMP '2024-01-01') AS weekend
"""
W = "WINDOW w AS (PARTITION BY id ORDER BY ts RANGE INTERVAL '100' DAYS PRECEDING)"
TAILS = {
    "tumble": "FROM e GROUP BY id, TUMBLE(ts, INTERVAL '500' MILLISECONDS)",
    "hop": "FROM e GROUP BY id, HOP(ts, INTERVAL '1' DAY, INTERVAL '100' DAYS) EMIT ON WINDOW CLOSE",
    "session": "FROM e GROUP BY id, SESSION(ts, INTERVAL '90' MINUTES)",
    "over": f"FROM e {W}",
}


def definition(kind: str) -> WindowedView:
    items = EVERYTHING
    if kind == "over":
        nested = r"\((?:[^()]|\((?:[^()]|\([^()]*\))*\))*\)"
        items = re.sub(rf"(\b(?:COUNT|SUM|AVG|MIN|MAX|FIRST|LAST|STDDEV){nested}(?: FILTER {nested})?)", r"\1 OVER w", items)  # fmt: skip
    source = event_source(
        topic="it's",
        columns={"kind": "string", "n": "int64", "price": "float64", "ok": "bool", "seen": "timestamp"},
        timestamp="ts",
        event_id="event_id",
        allowed_lateness=timedelta(minutes=1),
        retention=timedelta(days=1),
        idle_timeout=timedelta(seconds=30),
    )
    return WindowedView("v", ("id",), ("string",), source, f"SELECT {items} {TAILS[kind]}", timedelta(days=200))


@pytest.mark.parametrize("kind", TAILS)
def test_spark_sql_is_spark_sql_and_says_what_it_computes(kind: str) -> None:
    (query,) = spark_sql(definition(kind))
    tree = sqlglot.parse_one(query, read="spark")
    names = [e.alias_or_name for e in tree.expressions]
    assert names[-12:] == ["c", "f", "d", "s", "a", "least", "m", "p", "l", "sd", "ratio", "weekend"]
    first = query.splitlines()[0]
    assert first.startswith("--")
    assert ("neither closed windows" in first) == (kind == "over")
    assert "approximate" in query
    # Conditions and literals stay whole on the way.
    assert "it\\'s \\\\ ok" in query


@pytest.mark.parametrize("kind", TAILS)
def test_flink_sql_says_what_it_computes_and_carries_the_watermark(kind: str) -> None:
    table, query = flink_sql(definition(kind))
    assert "WATERMARK FOR `ts` AS `ts` - INTERVAL '1' MINUTE" in table
    assert "'topic' = 'it''s'" in table
    assert "'table.exec.source.idle-timeout' = '30000 ms'" in table
    first = query.splitlines()[0]
    assert first.startswith("--")
    assert ("neither closed windows" in first) == (kind == "over")
    assert "AVG(CAST(`n` AS DOUBLE))" in query  # an integer AVG is an integer there
    wanted = {
        "tumble": "TABLE(TUMBLE(TABLE events, DESCRIPTOR(`ts`), INTERVAL '0.500000' SECOND))",
        "hop": "TABLE(HOP(TABLE events, DESCRIPTOR(`ts`), INTERVAL '1' DAY, INTERVAL '100' DAY(3)))",
        "session": "TABLE(SESSION(TABLE events PARTITION BY `id`, DESCRIPTOR(`ts`), INTERVAL '90' MINUTE))",
        "over": "RANGE BETWEEN INTERVAL '100' DAY(3) PRECEDING AND CURRENT ROW",
    }
    assert wanted[kind] in query
    # Flink has no FILTER with OVER.
    assert ("FILTER" in query) == (kind != "over")


def test_times_in_flink_and_spark_keep_their_microseconds() -> None:
    micros = -62_135_596_799_999_999  # the year 1
    assert constant_sql(1_706_745_600_123_456, "timestamp", "flink") == (
        "CAST(TIMESTAMP '2024-02-01 00:00:00.123456' AS TIMESTAMP_LTZ(6))"
    )
    assert "'0001-01-01 00:00:00.000001'" in constant_sql(micros, "timestamp", "flink")
    assert constant_sql(1_706_745_600_123_456, "timestamp", "spark") == "timestamp_micros(1706745600123456)"


def test_spark_over_gives_the_same_numbers_in_duckdb() -> None:
    """Carried over by sqlglot, Spark's text computes the same window as the loop below."""
    (query,) = spark_sql(
        WindowedView(
            "v", ("id",), ("string",), event_source(topic="t", columns={"n": "int64"}, timestamp="ts"),
            f"SELECT COUNT(*) OVER w AS c, SUM(n) FILTER (WHERE n > 1) OVER w / COUNT(*) OVER w AS r FROM e {W.replace('100', '2')}",
            definition("over").ttl,
        )
    )  # fmt: skip
    rows = [(0, 1), (1, 5), (2, None), (4, 7), (4, 2)]
    with duckdb.connect() as con:
        con.execute("CREATE TABLE events (id VARCHAR, ts TIMESTAMP, n BIGINT)")
        con.executemany("INSERT INTO events VALUES ('a', TIMESTAMP '2024-02-27' + ? * INTERVAL 1 DAY, ?)", rows)
        found = con.sql(sqlglot.transpile(query, read="spark", write="duckdb")[0] + " ORDER BY ts, c").fetchall()
    assert [row[2] for row in found] == [sum(d - 2 <= day <= d for day, _ in rows) for d, _ in rows]
    expected = []
    for d, _ in rows:
        big = [n for day, n in rows if d - 2 <= day <= d and n is not None and n > 1]
        count = sum(d - 2 <= day <= d for day, _ in rows)
        expected.append(sum(big) / count if big else None)
    assert [row[3] for row in found] == expected


def test_lineage_names_the_columns_and_the_whole_of_an_output() -> None:
    (statement,) = definition("tumble").statements
    outputs = {o.name: o for o in statement.outputs}
    assert output_columns(statement, outputs["ratio"]) == {"price"}
    assert output_columns(statement, outputs["weekend"]) == {"ok", "seen", "ts"}
    assert output_text(statement, outputs["s"]) == "SUM(n) TUMBLE(INTERVAL '0.500000' SECOND)"
    assert output_text(statement, outputs["f"]).startswith("COUNT(*) FILTER (WHERE kind = 'it''s \\ ok')")
    assert "TIMESTAMP '2024-01-01 00:00:00'" in output_text(statement, outputs["weekend"])


def test_the_size_of_a_state_grows_with_what_it_keeps() -> None:
    for kind in TAILS:
        few, many = (state_bytes(definition(kind), rate) for rate in (1, 1_000))
        assert 0 < few <= many
    d = definition("over")
    assert state_bytes(d, 1e9) == state_bytes(d, 1e12)  # the cap


@pytest.mark.parametrize("rate", [1, 10, 100])
def test_a_state_is_about_as_large_as_explain_says(rate: int) -> None:
    d = behaviour()
    start = datetime(2026, 1, 1, tzinfo=UTC)
    rng = np.random.default_rng(3)
    events = [
        (start + timedelta(days=i / rate), {"event_type": "purchase", "quantity": int(q), "amount_cents": int(100 * q)})
        for i, q in enumerate(rng.integers(1, 60, 150 * rate))
    ]
    states = states_of(d, events, events[-1][0])
    states.advance(to_micros(events[-1][0]))
    (blob,) = states.encode()
    assert 0.6 < state_bytes(d, rate) / len(blob) < 1.7


def behaviour() -> WindowedView:
    from features.behavioral_features import customer_behavior

    made = definition_of(customer_behavior)
    assert made is not None
    return made


def test_the_flink_table_says_where_its_topic_is() -> None:
    from feature_store.windows.definition import EventSource
    from feature_store.windows.ir import Window
    from tests.unit.window_support import view

    for kind, coded in (("json", "'json'"), ("avro", "'avro-confluent.url' = '<schema registry>'")):
        d = view(Window("over", 20), source=EventSource("t", {"n": "int64"}, 0, format=kind))
        table = flink_sql(d)[0]
        assert coded in table
        assert "'properties.bootstrap.servers' = '<brokers>', 'scan.startup.mode' = 'earliest-offset'" in table
