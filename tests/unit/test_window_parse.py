"""The SQL of windowed definitions: every form is read, and everything else refused with its line, column and a way out."""

from __future__ import annotations

import contextlib
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest

from feature_store.errors import DefinitionError
from feature_store.events import LATEST_US
from feature_store.windows.definition import EventSource
from feature_store.windows.ir import (
    Aggregate,
    AggregateRef,
    Call,
    Column,
    Constant,
    Output,
    Statement,
    Window,
)
from feature_store.windows.parse import parse
from feature_store.windows.sql_tokens import SqlError
from feature_store.windows.sql_windows import MAX_TILES

MINUTE, HOUR, DAY = 60_000_000, 3_600_000_000, 86_400_000_000
SOURCE = EventSource(
    topic="t",
    columns={"kind": "string", "n": "int64", "price": "float64", "ok": "bool", "seen": "timestamp"},
    retention_us=DAY,
    timestamp="ts",
    event_id="event_id",
)
OVER = "OVER (PARTITION BY customer_id ORDER BY ts RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW)"
TUMBLE = (
    "FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end"
)
KIND, N, PRICE, OK = Column("kind", "string"), Column("n", "int64"), Column("price", "float64"), Column("ok", "bool")
COUNT = Aggregate("count", None, None, "int64")


def read(sql: str) -> tuple[Statement, ...]:
    return parse(sql, SOURCE, ("customer_id",))


def one(select: str, tail: str = TUMBLE) -> Statement:
    (statement,) = read(f"SELECT {select} {tail}")
    return statement


def test_a_tumble_with_where_filter_and_emit_on_window_close() -> None:
    sql = """SELECT customer_id, COUNT(*) AS n1, SUM(n) FILTER (WHERE kind = 'a') AS s
              FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(ts), INTERVAL '1' HOUR)) WHERE ok
              GROUP BY customer_id, window_start, window_end EMIT ON WINDOW CLOSE"""
    both = Call("and", (OK, Call("=", (KIND, Constant("a", "string")), "bool")), "bool")
    assert read(sql) == (
        Statement(
            Window("tumble", HOUR, HOUR, on_close=True),
            (Aggregate("count", None, OK, "int64"), Aggregate("sum", N, both, "int64")),
            (Output("n1", AggregateRef(0, "int64"), "int64"), Output("s", AggregateRef(1, "int64"), "int64")),
        ),
    )


@pytest.mark.parametrize(
    ("tail", "window"),
    [
        (TUMBLE, Window("tumble", HOUR, HOUR)),
        ("FROM events GROUP BY customer_id, TUMBLE(ts, INTERVAL '5' MINUTES)", Window("tumble", 5 * MINUTE, 5 * MINUTE)),
        ("FROM events e GROUP BY TUMBLE(e.ts, INTERVAL '5 minutes'), e.customer_id", Window("tumble", 5 * MINUTE, 5 * MINUTE)),
        (
            "FROM TABLE(HOP(TABLE events, DESCRIPTOR(ts), INTERVAL '5' MINUTE, INTERVAL 1 HOUR)) GROUP BY window_end, customer_id, window_start",
            Window("hop", HOUR, 5 * MINUTE),
        ),
        ("FROM e GROUP BY customer_id, HOP(ts, INTERVAL '1' DAY, INTERVAL '1' WEEK) EMIT ON WINDOW CLOSE", Window("hop", 7 * DAY, DAY, True)),
        (
            "FROM TABLE(SESSION(TABLE events PARTITION BY customer_id, DESCRIPTOR(ts), INTERVAL '500' MILLISECONDS)) "
            "GROUP BY customer_id, window_start, window_end",
            Window("session", 500_000),
        ),
        ("FROM events AS e GROUP BY customer_id, SESSION(ts, INTERVAL '30' SECONDS);", Window("session", 30_000_000)),
        ("from events -- a comment\n/* another\n one */ group by CUSTOMER_ID, tumble(ts, interval '1' day)".replace("CUSTOMER_ID", "`customer_id`"), Window("tumble", DAY, DAY)),
    ],
)  # fmt: skip
def test_windows_of_a_group_by(tail: str, window: Window) -> None:
    assert one("customer_id, COUNT(*) AS c", tail) == Statement(
        window, (COUNT,), (Output("c", AggregateRef(0, "int64"), "int64"),)
    )


def test_over_windows_become_a_statement_each_in_the_order_of_first_use() -> None:
    sql = f"""SELECT SUM(n) FILTER (WHERE ok) OVER w30 AS s, COUNT(*) {OVER} AS c7, COUNT(*) OVER w30 AS c30,
                     COUNT(*) OVER w30 / SUM(n) FILTER (WHERE ok) OVER w30 AS ratio
              FROM events WINDOW w30 AS (PARTITION BY customer_id ORDER BY ts ASC RANGE INTERVAL '30' DAYS PRECEDING),
                                 unused AS (PARTITION BY customer_id ORDER BY ts RANGE INTERVAL '1' DAYS PRECEDING)"""
    month, week = read(sql)
    assert (month.window, week.window) == (Window("over", 30 * DAY), Window("over", 7 * DAY))
    assert month.aggregates == (Aggregate("sum", N, OK, "int64"), COUNT)  # shared by three outputs
    assert [o.name for o in month.outputs] == ["s", "c30", "ratio"]
    as_float = [Call("cast", (AggregateRef(i, "int64"),), "float64") for i in (1, 0)]
    assert month.outputs[2].expression == Call("/", tuple(as_float), "float64")
    assert [o.name for o in week.outputs] == ["c7"]


def test_several_selects_over_one_source() -> None:
    assert (
        len(
            read(
                f"SELECT COUNT(*) AS a {TUMBLE};\n SELECT COUNT(*) AS b FROM events GROUP BY customer_id, SESSION(ts, INTERVAL '1' DAY);;"
            )
        )
        == 2
    )


@pytest.mark.parametrize(
    ("call", "function", "argument", "kind"),
    [
        ("COUNT(kind)", "count", KIND, "int64"), ("COUNT(DISTINCT kind)", "count_distinct", KIND, "int64"),
        ("COUNT(DISTINCT customer_id)", "count_distinct", Column("customer_id", "string"), "int64"),
        ("SUM(price)", "sum", PRICE, "float64"), ("AVG(n)", "avg", N, "float64"), ("MIN(ok)", "min", OK, "bool"),
        ("MAX(ts)", "max", Column("ts", "timestamp"), "timestamp"), ("FIRST(n)", "first", N, "int64"),
        ("FIRST_VALUE(seen)", "first", Column("seen", "timestamp"), "timestamp"), ("LAST(price)", "last", PRICE, "float64"),
        ("LAST_VALUE(n)", "last", N, "int64"), ("STDDEV(n)", "stddev", N, "float64"), ("STDDEV_SAMP(price)", "stddev", PRICE, "float64"),
    ],
)  # fmt: skip
def test_aggregates(call: str, function: str, argument: Column, kind: str) -> None:
    assert one(f"{call} AS x").aggregates == (Aggregate(function, argument, None, kind),)  # type: ignore[arg-type]


ONE, HALF = Constant(1, "int64"), Constant(0.5, "float64")
N_AS_FLOAT = Call("cast", (N,), "float64")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n + 1 * 2 - -3", Call("-", (Call("+", (N, Call("*", (ONE, Constant(2, "int64")), "int64")), "int64"), Constant(-3, "int64")), "int64")),
        ("n * 0.5", Call("*", (N_AS_FLOAT, HALF), "float64")),
        ("n / 1", Call("/", (N_AS_FLOAT, Constant(1.0, "float64")), "float64")),
        ("MOD(n, 1) % n", Call("%", (Call("%", (N, ONE), "int64"), N), "int64")),
        ("-9223372036854775808", Constant(-(2**63), "int64")),
        ("ABS(-n)", Call("abs", (Call("neg", (N,), "int64"),), "int64")),
        ("CEILING(price)", Call("ceil", (PRICE,), "float64")),
        ("COALESCE(n, price, NULL)", Call("coalesce", (N_AS_FLOAT, PRICE, Constant(None, "float64")), "float64")),
        ("NULLIF(n, 1)", Call("nullif", (N, ONE), "int64")),
        ("CASE WHEN ok THEN n ELSE 0.5 END", Call("case", (OK, N_AS_FLOAT, HALF), "float64")),
        ("CASE n WHEN 1 THEN 1 END", Call("case", (Call("=", (N, ONE), "bool"), ONE, Constant(None, "int64")), "int64")),
        ("CAST(ok AS BIGINT)", Call("cast", (OK,), "int64")),
        ("CAST(CAST(n AS DOUBLE PRECISION) AS DOUBLE)", N_AS_FLOAT),
        ("LENGTH(LOWER(kind))", Call("length", (Call("lower", (KIND,), "string"),), "int64")),
        ("EXTRACT(ISODOW FROM ts)", Call("isodow", (Column("ts", "timestamp"),), "int64")),
        ("HOUR(events.seen)", Call("hour", (Column("seen", "timestamp"),), "int64")),
    ],
)  # fmt: skip
def test_numbers(text: str, expected: object) -> None:
    assert one(f"SUM({text}) AS x").aggregates[0].argument == expected


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("n > 0.5", Call(">", (N_AS_FLOAT, HALF), "bool")),
        ("kind != 'it''s'", Call("<>", (KIND, Constant("it's", "string")), "bool")),
        ("n BETWEEN 1 AND n AND ok", Call("and", (Call(">=", (N, ONE), "bool"), Call("<=", (N, N), "bool"), OK), "bool")),
        ("kind NOT IN ('a', 'b')", Call("not", (Call("in", (KIND, Constant("a", "string"), Constant("b", "string")), "bool"),), "bool")),
        ("n IN (1, 0.5)", Call("in", (N_AS_FLOAT, Constant(1.0, "float64"), HALF), "bool")),
        ("NOT ok OR n IS NOT NULL", Call("or", (Call("not", (OK,), "bool"), Call("not", (Call("is_null", (N,), "bool"),), "bool")), "bool")),
        ("ts >= TIMESTAMP '1970-01-01 01:00:00+01:00'", Call(">=", (Column("ts", "timestamp"), Constant(0, "timestamp")), "bool")),
        ("ok = TRUE", Call("=", (OK, Constant(True, "bool")), "bool")),
    ],
)  # fmt: skip
def test_conditions(text: str, expected: object) -> None:
    assert one(f"COUNT(*) FILTER (WHERE {text}) AS x").aggregates[0].filter == expected


def test_keys_have_their_declared_types() -> None:
    sql = f"SELECT SUM(customer_id) AS x {TUMBLE}"
    (statement,) = parse(sql, SOURCE, ("customer_id",), ("int64",))
    assert statement.aggregates[0].type == "int64"
    with pytest.raises(SqlError, match="SUM of string"):
        read(sql)


def test_an_output_may_be_a_string_made_of_conditions() -> None:
    output = one("CASE WHEN COUNT(*) > 3 THEN 'high' ELSE 'low' END AS level").outputs[0]
    assert output.type == "string"


W = "FROM events WINDOW w AS (PARTITION BY customer_id ORDER BY ts RANGE INTERVAL '7' DAYS PRECEDING)"
REFUSED = [
    # text, ^ before the place at fault; reason; what to write
    ("^", "there is no SELECT", "SELECT"),
    ("^INSERT INTO x", "expected SELECT", "SELECT"),
    ("^WITH a AS (SELECT 1) SELECT 1", "WITH is not supported", "FILTER"),
    ("SELECT ^DISTINCT customer_id", "SELECT DISTINCT", "COUNT(DISTINCT"),
    (f"SELECT ^* {TUMBLE}", "SELECT *", "COUNT(*) AS n"),
    (f"SELECT events.^* {TUMBLE}", "SELECT *", "COUNT(*) AS n"),
    (f"SELECT ^COUNT(*) {TUMBLE}", "without a name", "AS"),
    (f"SELECT COUNT(*) ^c {TUMBLE}", "expected AS", "AS c"),
    (f"SELECT COUNT(*) AS a,\n  SUM(n) AS ^a {TUMBLE}", "two outputs of one name", "another name"),
    (f"SELECT COUNT(*) AS a, SUM(n) AS ^A {TUMBLE}", "two outputs of one name", "another name"),
    (f"SELECT COUNT(*) AS ^customer_id {TUMBLE}", "name is taken", "another name"),
    (f"SELECT COUNT(*) AS ^ts {TUMBLE}", "name is taken", "another name"),
    (f"SELECT COUNT(*) AS ^Created {TUMBLE}", "name is taken", "another name"),
    (f"SELECT COUNT(*) AS ^window_state {TUMBLE}", "name is taken", "another name"),
    (f"SELECT COUNT(*) AS ^event_id {TUMBLE}", "name is taken", "another name"),
    (f"SELECT COUNT(*) AS ^window_end {TUMBLE}", "taken by the window", "another name"),
    (f'SELECT COUNT(*) AS ^"a b" {TUMBLE}', "ASCII letters", "AS a_b"),
    (f"SELECT COUNT(*) AS ^_x {TUMBLE}", "ASCII letters", "AS x"),
    (f"SELECT customer_id AS ^c, COUNT(*) AS n {TUMBLE}", "key keeps its name", "customer_id"),
    (f"SELECT ^customer_id {TUMBLE}", "no output", "COUNT(*) AS n"),
    (f"SELECT ^window_start, COUNT(*) AS c {TUMBLE}", "bounds of a window are not served", "MIN(ts)"),
    (f"SELECT ^n AS x {TUMBLE}", "a column outside of an aggregate", "LAST(n)"),
    (f"SELECT ^m AS x {TUMBLE}", "unknown column", None),
    (f"SELECT ^5 AS x {TUMBLE}", "without an aggregate", "COUNT(*)"),
    (f"SELECT SUM(n + ^COUNT(*)) AS x {TUMBLE}", "an aggregate within", "SUM(a) / COUNT(*)"),
    (f"SELECT SUM(^quantity) AS x {TUMBLE}", "unknown column", None),
    (f"SELECT SUM(^other.n) AS x {TUMBLE}", "unknown table", None),
    (f"SELECT ^SUM(n, 2) AS x {TUMBLE}", "takes 1 argument", "SUM(column)"),
    (f"SELECT ^COUNT() AS x {TUMBLE}", "takes 1 argument", "COUNT(*)"),
    (f"SELECT COUNT(^1) AS x {TUMBLE}", "COUNT of a constant", "COUNT(*)"),
    (f"SELECT SUM(^*) AS x {TUMBLE}", "COUNT(*) only", "COUNT(*) AS n"),
    (f"SELECT SUM(^ok) AS x {TUMBLE}", "SUM of bool", "COUNT(*) FILTER (WHERE x)"),
    (f"SELECT AVG(^ts) AS x {TUMBLE}", "AVG of timestamp", "EXTRACT(HOUR FROM x)"),
    (f"SELECT MIN(^kind) AS x {TUMBLE}", "MIN of string", "COUNT(DISTINCT x)"),
    (f"SELECT LAST(^kind) AS x {TUMBLE}", "LAST of string", "FILTER"),
    (f"SELECT COUNT(DISTINCT ^price) AS x {TUMBLE}", "COUNT(DISTINCT) of floats", "integer or string"),
    (f"SELECT ^SUM(DISTINCT n) AS x {TUMBLE}", "SUM(DISTINCT ...) is not supported", "COUNT(DISTINCT x)"),
    (f"SELECT ^MEDIAN(n) AS x {TUMBLE}", "cannot be merged", "AVG(x)"),
    (f"SELECT ^FROBNICATE(n) AS x {TUMBLE}", "unknown function", None),
    (f"SELECT FIRST(n ^ORDER BY ts) AS x {TUMBLE}", "order of time", "FIRST(x)"),
    (f"SELECT LAST(n) ^IGNORE NULLS AS x {TUMBLE}", "nulls are always ignored", "LAST(x)"),
    (f"SELECT ^LOWER('A') AS x {TUMBLE}", "strings of an output are constants", "the constant"),
    (f"SELECT ^ABS(n) FILTER (WHERE ok) AS x {TUMBLE}", "with an aggregate only", "ABS(x)"),
    (f"SELECT SUM(^NOW()) AS x {TUMBLE}", "a clock within the definition", "length"),
    (f"SELECT COUNT(*) FILTER (WHERE ts > ^CURRENT_TIMESTAMP) AS x {TUMBLE}", "a clock within the definition", "length"),
    (f"SELECT SUM(^RANDOM()) AS x {TUMBLE}", "chance", "column of the event"),
    (f"SELECT SUM(^GREATEST(n, 0)) AS x {TUMBLE}", "engines disagree", "CASE WHEN"),
    (f"SELECT SUM(^ROUND(price)) AS x {TUMBLE}", "engines disagree", "FLOOR(x + 0.5)"),
    (f"SELECT SUM(FLOOR(^n)) AS x {TUMBLE}", "FLOOR needs float64", "the integer itself"),
    (f"SELECT SUM(CAST(price AS ^BIGINT)) AS x {TUMBLE}", "float64 cannot be cast to int64", "FLOOR(x)"),
    (f"SELECT SUM(CAST(n AS ^DECIMAL(10, 2))) AS x {TUMBLE}", "not a type to cast to", "CAST(x AS DOUBLE)"),
    (f"SELECT SUM(CAST(ok AS ^INT)) AS x {TUMBLE}", "not a type to cast to", "CAST(x AS BIGINT)"),
    (f"SELECT SUM(n^::DOUBLE) AS x {TUMBLE}", "not an operator", "CAST(x AS DOUBLE)"),
    (f"SELECT SUM(^NULL) AS x {TUMBLE}", "a null without a type", "CAST(NULL AS BIGINT)"),
    (f"SELECT SUM(n ^|| kind) AS x {TUMBLE}", "cannot be joined", "COUNT(DISTINCT a)"),
    (f"SELECT SUM(n + ^kind) AS x {TUMBLE}", "+ needs int64 or float64, not string", None),
    (f"SELECT SUM(n + ^ok) AS x {TUMBLE}", "+ needs int64 or float64, not bool", "CAST(x AS BIGINT)"),
    (f"SELECT SUM(n % ^price) AS x {TUMBLE}", "% needs int64", None),
    (f"SELECT SUM(^9223372036854775808) AS x {TUMBLE}", "beyond 64 bits", "a float"),
    (f"SELECT SUM(^1e999) AS x {TUMBLE}", "beyond a float64", "1.8e308"),
    (f"SELECT SUM(EXTRACT(^MINUTE FROM ts)) AS x {TUMBLE}", "part of a time", "HOUR"),
    (f"SELECT SUM(^COALESCE(n, kind)) AS x {TUMBLE}", "different types", "one type"),
    (f"SELECT SUM(^CASE WHEN ok THEN n ELSE kind END) AS x {TUMBLE}", "different types", "one type"),
    (f"SELECT SUM(CASE WHEN ^n THEN 1 END) AS x {TUMBLE}", "WHEN needs bool", "a comparison"),
    (f"SELECT COUNT(*) FILTER (WHERE ^n) AS x {TUMBLE}", "FILTER needs a condition", "a comparison"),
    (f"SELECT COUNT(*) FILTER (WHERE kind ^= 1) AS x {TUMBLE}", "string cannot be compared with int64", "one type"),
    (f"SELECT COUNT(*) FILTER (WHERE ts ^> '2024-01-01') AS x {TUMBLE}", "timestamp cannot be compared", "TIMESTAMP '2024"),
    (f"SELECT COUNT(*) FILTER (WHERE ts > ^TIMESTAMP '2024-02-30') AS x {TUMBLE}", "not a time", "TIMESTAMP '2024"),
    (f"SELECT COUNT(*) FILTER (WHERE n = ^NULL) AS x {TUMBLE}", "a null without a type", "IS NULL"),
    (f"SELECT COUNT(*) FILTER (WHERE n ^== 1) AS x {TUMBLE}", "not an operator", "="),
    (f"SELECT COUNT(*) FILTER (WHERE kind ^LIKE 'a%') AS x {TUMBLE}", "condition is not supported", "IN (...)"),
    (f"SELECT COUNT(*) FILTER (WHERE n IN (1, ^NULL)) AS x {TUMBLE}", "a null within IN", "OR x IS NULL"),
    (f"SELECT COUNT(*) FILTER (WHERE n IN (1, ^n)) AS x {TUMBLE}", "IN takes constants", "OR"),
    (f"SELECT COUNT(*) FILTER (WHERE n IN (^SELECT 1)) AS x {TUMBLE}", "subquery", "IN ('a', 'b')"),
    (f"SELECT COUNT(*) FILTER (WHERE ok IS ^TRUE) AS x {TUMBLE}", "NULL or NOT NULL only", "IS NULL"),
    (f"SELECT COUNT(*) FILTER (WHERE ok ^< TRUE) AS x {TUMBLE}", "bools have no order", "AND"),
    (f"SELECT COUNT(*) FILTER (WHERE n > ^INTERVAL '1' DAY) AS x {TUMBLE}", "length of a window only", "condition"),
    ("SELECT COUNT(*) AS x FROM ^(SELECT 1)", "subquery", "FROM events"),
    ("SELECT COUNT(*) AS x FROM a^, b", "a join", "one table"),
    ("SELECT COUNT(*) AS x FROM a ^JOIN b ON 1", "a join", "view of its own"),
    ("SELECT COUNT(*) AS x FROM a ^LEFT JOIN b ON 1", "a join", "view of its own"),
    ("SELECT COUNT(*) AS x FROM a^.b", "one name", "FROM events"),
    ("SELECT COUNT(*) AS x FROM ^TUMBLE(TABLE events)", "within TABLE(...)", "FROM TABLE(TUMBLE("),
    ("SELECT COUNT(*) AS x FROM TABLE(^CUMULATE(TABLE events))", "unknown window function", "FROM TABLE(TUMBLE("),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^HAVING COUNT(*) > 1", "HAVING", "CASE WHEN"),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^ORDER BY x", "ORDER BY", "without it"),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^LIMIT 1", "a limit of rows", "without it"),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^UNION ALL SELECT 1", "a set operation", "; between them"),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^QUALIFY 1", "QUALIFY", "FILTER"),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^EMIT CHANGES", "only closed windows", "EMIT ON WINDOW CLOSE"),
    (f"SELECT COUNT(*) AS x {TUMBLE}; SELECT COUNT(*) AS y FROM ^others GROUP BY customer_id, TUMBLE(ts, INTERVAL '1' DAY)", "one event stream", "view of its own"),
    # windows
    ("SELECT COUNT(*) AS x FROM TABLE(TUMBLE(TABLE e, DESCRIPTOR(^seen), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end", "not the time column", None),
    ("SELECT COUNT(*) AS x FROM TABLE(TUMBLE(TABLE e ^PARTITION BY customer_id, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end".replace("^PARTITION BY customer_id", "PARTITION BY ^customer_id"), "stands in SESSION only", "TUMBLE"),
    ("SELECT COUNT(*) AS x FROM TABLE(^SESSION(TABLE e, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end", "belongs to one entity", "PARTITION BY customer_id"),
    ("SELECT COUNT(*) AS x FROM TABLE(SESSION(TABLE e PARTITION BY ^kind, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end", "not the entity's key", "PARTITION BY customer_id"),
    ("SELECT COUNT(*) AS x FROM TABLE(^HOP(TABLE e, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end", "takes 2 lengths", "HOP"),
    ("SELECT COUNT(*) AS x FROM TABLE(HOP(TABLE e, DESCRIPTOR(ts), INTERVAL '25' MINUTES, ^INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end", "must be a multiple", "INTERVAL '50' MINUTE)"),
    ("^SELECT COUNT(*) AS x FROM TABLE(TUMBLE(TABLE e, DESCRIPTOR(ts), INTERVAL '1' HOUR))", "needs a GROUP BY", "GROUP BY customer_id, window_start, window_end"),
    ("SELECT COUNT(*) AS x FROM TABLE(TUMBLE(TABLE e, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY ^customer_id", "without window_start, window_end", "window_start, window_end"),
    ("SELECT COUNT(*) AS x FROM TABLE(TUMBLE(TABLE e, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, window_start, window_end, ^kind", "exactly the entity's key", "GROUP BY customer_id, window_start, window_end"),
    ("SELECT COUNT(*) AS x FROM TABLE(TUMBLE(TABLE e, DESCRIPTOR(ts), INTERVAL '1' HOUR)) GROUP BY customer_id, ^TUMBLE(ts, INTERVAL '1' HOUR)", "stands in FROM already", "window_start"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY ^TUMBLE(ts, INTERVAL '1' HOUR)", "GROUP BY without customer_id", "GROUP BY customer_id"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY ^customer_id", "GROUP BY without a window", "TUMBLE"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY customer_id, ^customer_id, TUMBLE(ts, INTERVAL '1' HOUR)", "twice in GROUP BY", "GROUP BY customer_id"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY ^1, TUMBLE(ts, INTERVAL '1' HOUR)", "exactly the entity's key", "GROUP BY customer_id"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY customer_id, TUMBLE(ts, INTERVAL '1' HOUR), ^HOP(ts, INTERVAL '1' HOUR, INTERVAL '1' HOUR)", "two windows", "two SELECTs"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY customer_id, ^LOWER(kind), TUMBLE(ts, INTERVAL '1' HOUR)", "exactly the entity's key", "GROUP BY"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY customer_id, TUMBLE(^seen, INTERVAL '1' HOUR)", "not the time column", None),
    ("SELECT COUNT(*) AS x FROM e GROUP BY customer_id, TUMBLE(ts, ^5)", "length of a window", "INTERVAL '1' HOUR"),
    ("SELECT ^COUNT(*) AS x FROM events", "an aggregate without a window", "OVER (PARTITION BY"),
    (f"SELECT COUNT(*) OVER ^(ORDER BY ts) AS x {TUMBLE}".replace("^(", "(^"), "begins with PARTITION BY", "PARTITION BY"),
    (f"SELECT COUNT(*) ^{OVER} AS x {TUMBLE}", "OVER within a GROUP BY", "two SELECTs"),
    ("SELECT COUNT(*) AS x FROM e WHERE ^ok GROUP BY customer_id, SESSION(ts, INTERVAL '1' HOUR)", "would change the sessions", "FILTER (WHERE ...), or FROM TABLE(SESSION(TABLE e"),
    ("SELECT COUNT(*) AS x FROM e GROUP BY customer_id, HOP(ts, ^INTERVAL '1' MILLISECOND, INTERVAL '1' DAY) EMIT ON WINDOW CLOSE", "86,400,000 slides", "HOP(..., INTERVAL '864' MILLISECONDS, INTERVAL '1' DAY), or an OVER"),
    ("SELECT COUNT(*) AS x FROM TABLE(HOP(TABLE e, DESCRIPTOR(ts), ^INTERVAL '1' SECOND, INTERVAL '100001' SECONDS)) GROUP BY customer_id, window_start, window_end", "100,001 slides, and a state holds at most 100,000", "OVER window"),
    (f"SELECT COUNT(*) OVER ^v AS x {W}", "unknown window", "WINDOW v AS"),
    ("SELECT COUNT(*) OVER (PARTITION BY ^kind ORDER BY ts RANGE INTERVAL '7' DAYS PRECEDING) AS x FROM e", "not the entity's key", "PARTITION BY customer_id"),
    ("SELECT COUNT(*) OVER (PARTITION BY customer_id ORDER BY ^seen RANGE INTERVAL '7' DAYS PRECEDING) AS x FROM e", "not the time column", None),
    ("SELECT COUNT(*) OVER (PARTITION BY customer_id ORDER BY ts ^DESC RANGE INTERVAL '7' DAYS PRECEDING) AS x FROM e", "ascending", "without DESC"),
    ("SELECT COUNT(*) OVER (PARTITION BY customer_id ORDER BY ts ^ROWS 5 PRECEDING) AS x FROM e", "number of rows", "RANGE BETWEEN"),
    ("SELECT COUNT(*) OVER (PARTITION BY customer_id ORDER BY ts RANGE BETWEEN ^UNBOUNDED PRECEDING AND CURRENT ROW) AS x FROM e", "without a beginning", "PRECEDING"),
    ("SELECT COUNT(*) OVER (PARTITION BY customer_id ORDER BY ts RANGE BETWEEN INTERVAL '1' DAY PRECEDING AND ^INTERVAL '1' DAY FOLLOWING) AS x FROM e", "expected CURRENT", "CURRENT ROW"),
    (f"SELECT COUNT(*) OVER w / ^COUNT(*) OVER (PARTITION BY customer_id ORDER BY ts RANGE INTERVAL '8' DAYS PRECEDING) AS x {W}", "aggregates of two windows", "two outputs"),
    (f"SELECT COUNT(*) {OVER} AS x FROM events ^EMIT ON WINDOW CLOSE", "never closes", "TUMBLE"),
    (f"SELECT COUNT(*) OVER w AS x {W}, ^w AS (PARTITION BY customer_id ORDER BY ts RANGE INTERVAL '7' DAYS PRECEDING)", "two windows of one name", None),
    # lengths
    *((f"SELECT COUNT(*) AS x FROM e GROUP BY customer_id, TUMBLE(ts, INTERVAL {text})", reason, nearest) for text, reason, nearest in [
        ("'1' ^MONTH", "no fixed length", "INTERVAL '30' DAYS"), ("'2' ^YEARS", "no fixed length", "INTERVAL '730' DAYS"),
        ("^'1 month'", "no fixed length", "INTERVAL '30' DAYS"), ("'1' ^FORTNIGHT", "not a unit of time", "INTERVAL '7' DAYS"),
        ("^'0' DAYS", "must be positive", "INTERVAL '1' DAY"), ("^'-1' DAYS", "must be positive", "INTERVAL '1' DAY"),
        ("^'1.5' HOURS", "not a whole number", "INTERVAL '90' MINUTES"), ("^'99999999' DAYS", "longer than 100 years", "INTERVAL '365' DAYS"),
        ("'1' HOUR ^TO MINUTE", "two units", "INTERVAL '90' MINUTES"),
    ]),
    # words
    (f"SELECT COUNT(*) AS x {TUMBLE} ^?", "no meaning here", None),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^'a", "quote that never ends", "' after it"),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^/* forever", "comment that never ends", "*/"),
    (f"SELECT COUNT(*) FILTER (WHERE kind = ^'\x00') AS x {TUMBLE}", "character that no text has", None),
    (f"SELECT COUNT(*) AS x {TUMBLE} ^nonsense nonsense", "expected ; or the end", None),
    ("SELECT COUNT(*) AS x FROM events GROUP BY customer_id,^", "but the text ends", None),
]  # fmt: skip


@pytest.mark.parametrize(("marked", "reason", "nearest"), REFUSED, ids=[f"{i}-{r[1]}" for i, r in enumerate(REFUSED)])
def test_what_is_refused_names_its_place_the_reason_and_the_way_out(
    marked: str, reason: str, nearest: str | None
) -> None:
    before, _, after = marked.partition("^")
    # Two lines in front, so that the line is not always the first.
    for lead in ("", "-- one\n/* two\n*/ "):
        with pytest.raises(SqlError) as caught:
            read(lead + before + after)
        text = lead + before if before + after else ""
        line, column = text.count("\n") + 1, len(text) - (text.rfind("\n") + 1) + 1
        message = caught.value.message
        assert f"SQL line {line}, column {column}: " in message or (marked == "^" and "line 1, column 1" in message), (
            message
        )
        assert reason in message
        if nearest is not None:
            assert caught.value.next_step is not None
            assert nearest in caught.value.next_step
        else:
            assert caught.value.valid or caught.value.value or "the text ends" in message


def test_a_session_over_all_events_may_have_a_condition_and_other_windows_a_where() -> None:
    table = "TABLE(SESSION(TABLE e PARTITION BY customer_id, DESCRIPTOR(ts), INTERVAL '1' HOUR))"
    (filtered,) = read(
        "SELECT COUNT(*) FILTER (WHERE ok) AS x FROM e GROUP BY customer_id, SESSION(ts, INTERVAL '1' HOUR)"
    )
    assert read(f"SELECT COUNT(*) AS x FROM {table} WHERE ok GROUP BY customer_id, window_start, window_end") == (
        filtered,
    )
    read("SELECT COUNT(*) AS x FROM e WHERE ok GROUP BY customer_id, TUMBLE(ts, INTERVAL '1' HOUR)")


def test_closed_windows_of_the_most_and_shortest_slides_are_numbered_in_62_bits() -> None:
    (found,) = read(
        "SELECT COUNT(*) AS x FROM e GROUP BY customer_id, HOP(ts, INTERVAL '1' MILLISECOND, INTERVAL '100' SECONDS) EMIT ON WINDOW CLOSE"
    )
    windows = found.window.size_us // found.window.slide_us
    assert windows == MAX_TILES
    assert (windows + 1) * (LATEST_US // found.window.slide_us + 1) < 2**62


def test_an_unknown_column_names_the_valid_ones() -> None:
    with pytest.raises(DefinitionError) as caught:
        read(f"SELECT SUM(prise) AS x {TUMBLE}")
    assert "did you mean 'price'?" in caught.value.message
    assert caught.value.valid == ["customer_id", "event_id", "kind", "n", "ok", "price", "seen", "ts"]


@pytest.mark.parametrize(
    "deep",
    ["(" * 500 + "COUNT(*)" + ")" * 500, "+".join(["COUNT(*)"] * 500), "- " * 500 + "COUNT(*)", "CASE WHEN TRUE THEN " * 200 + "1" + " END" * 200,
     "SUM(CAST(" + "n BETWEEN 1 AND 2 AND " * 900 + "ok AS BIGINT))"],
)  # fmt: skip
def test_too_much_is_refused_before_the_stack_runs_out(deep: str) -> None:
    with pytest.raises(SqlError, match=r"more than .* (levels|parts)"):
        read(f"SELECT {deep} AS x {TUMBLE}")


def test_whatever_the_text_only_definition_errors_come_back() -> None:
    rng = random.Random(7)
    sound = [before + after for before, _, after in (r[0].partition("^") for r in REFUSED)]
    sound += [f"SELECT STDDEV(price) {OVER} AS sd, CASE WHEN COUNT(*) {OVER} > 1 THEN 'a' END AS c FROM events"] * 50
    sound += [f"SELECT customer_id, COUNT(DISTINCT kind) FILTER (WHERE n BETWEEN 1 AND 2) AS d {TUMBLE}"] * 50
    words = sorted({w for s in sound for w in s.replace("(", " ( ").replace(")", " ) ").split()})
    read_well = 0
    for _ in range(4_000):
        text = rng.choice(sound)
        if rng.random() < 0.5:
            i = rng.randrange(len(text) + 1)
            text = (
                text[:i]
                + rng.choice(["", " ", "'", "\ud800", "é", "\x00", "(", ")", ",", "/*", "^"])
                + text[i + rng.randrange(6) :]
            )
        else:
            parts = text.replace("(", " ( ").replace(")", " ) ").split()
            for _ in range(rng.randrange(1, 5)):
                parts.insert(rng.randrange(len(parts) + 1), rng.choice(words))
                del parts[rng.randrange(len(parts))]
            text = " ".join(parts)
        with contextlib.suppress(DefinitionError):
            read(text)
            read_well += 1
    assert read_well > 10  # else nothing but the first words was ever tried


def test_the_sql_of_the_reference_page_is_read() -> None:
    page = (Path(__file__).parents[2] / "docs/reference/windows-sql.md").read_text()
    (text,) = re.findall(r"```sql\n(.*?)```", page, re.DOTALL)
    source = replace(SOURCE, timestamp="event_timestamp", columns={"status": "string", "amount_cents": "int64"})
    statements = parse(text, source, ("customer_id",))
    assert [s.window.kind for s in statements] == ["tumble", "hop", "session", "session", "over", "over"]
