"""Outputs read online (Python) and in history (DuckDB) are the same, for any expression and any value."""

from __future__ import annotations

import math
import random

import duckdb
import pytest

from feature_store.windows.evaluate import evaluate
from feature_store.windows.ir import Expression, Type
from feature_store.windows.sql_expressions import Checker
from feature_store.windows.sql_syntax import selects
from feature_store.windows.sql_text import expression_sql

COLUMNS: dict[str, Type] = {
    "i": "int64",
    "j": "int64",
    "x": "float64",
    "y": "float64",
    "b": "bool",
    "s": "string",
    "t": "timestamp",
}


def expression(text: str) -> Expression:
    (select,) = selects(f"SELECT {text} AS o FROM events")
    return Checker(COLUMNS, ()).expression(select.items[0].expression)


@pytest.fixture(scope="module")
def connection():
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        yield con


def in_duckdb(con, e: Expression, row: dict):
    """The value in DuckDB; OverflowError as `evaluate` has it."""
    kinds = {"int64": "BIGINT", "float64": "DOUBLE", "bool": "BOOLEAN", "string": "VARCHAR"}
    columns = ", ".join(
        f'make_timestamptz(?::BIGINT) AS "{n}"' if k == "timestamp" else f'?::{kinds[k]} AS "{n}"'
        for n, k in COLUMNS.items()
    )
    sql = expression_sql(e, "duckdb", finite="v.o")
    try:
        # A table of its own: constants would be folded, which columns are not.
        con.execute(f"CREATE OR REPLACE TEMP TABLE one AS SELECT {columns}", [row[n] for n in COLUMNS])
        (value,) = con.execute(f"SELECT {f'epoch_us({sql})' if e.type == 'timestamp' else sql} FROM one").fetchone()
    except (duckdb.OutOfRangeException, duckdb.InvalidInputException):
        raise OverflowError from None
    assert not isinstance(value, float) or math.isfinite(value)
    return value


FIXED = [
    ("i / j", {"j": 0}, None),
    ("i / j", {"i": 7, "j": 2}, 3.5),
    ("i % j", {"i": -7, "j": 3}, -1),
    ("i % j", {"j": 0}, None),
    ("b AND i > 0", {"b": False, "i": None}, False),
    ("b AND i > 0", {"b": True, "i": None}, None),
    ("x / y", {"x": 1.0, "y": -0.0}, None),
    ("ceil(x)", {"x": -0.5}, -0.0),
    ("floor(x)", {"x": -0.5}, -1.0),
    ("extract(isodow FROM t)", {"t": 0}, 4),
    ("hour(t)", {"t": -1}, 23),
    ("length(s)", {"s": "é🙂"}, 2),
    ("upper(s)", {"s": "Aé1"}, "AÉ1"),
    ("s < 'é'", {"s": "z"}, True),
    ("CAST(b AS BIGINT) + 1", {"b": True}, 2),
    ("i = 1 OR b", {"i": None, "b": True}, True),
    ("CASE i WHEN 1 THEN 'one' ELSE s END", {"i": 1}, "one"),
]
ROW = {"i": 5, "j": 3, "x": 1.5, "y": 2.0, "b": True, "s": "a", "t": 1_700_000_000_000_000}


@pytest.mark.parametrize(("text", "row", "expected"), FIXED)
def test_documented_values(connection, text, row, expected):
    e = expression(text)
    assert evaluate(e, names=ROW | row) == in_duckdb(connection, e, ROW | row) == expected


@pytest.mark.parametrize("text", ["i + j", "i * j", "-i", "abs(i)", "i % j"])
def test_overflow_is_an_error_on_both(connection, text):
    row = ROW | {"i": -(2**63), "j": -1}
    e = expression(text)
    with pytest.raises(OverflowError):
        evaluate(e, names=row)
    with pytest.raises(OverflowError):
        in_duckdb(connection, e, row)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("i > 5 AND j * j > 0", False),
        ("i < 5 OR j * j > 0", True),
        ("j * j > 0 AND i > 5", OverflowError),
        ("j * j > 0 OR i < 5", OverflowError),
        ("x IS NULL AND (i > 5 AND j * j > 0)", False),
        ("i > NULLIF(i, i) AND j * j > 0", OverflowError),
        ("CASE WHEN j * j > 0 OR i < 5 THEN 1 ELSE 2 END", OverflowError),
        ("CASE WHEN i > 5 AND j * j > 0 THEN 1 ELSE 2 END", 2),
        ("(i > NULLIF(i, i) OR i > 5) AND i < 9", None),
    ],
)
def test_what_a_condition_does_not_need_is_not_looked_at_and_what_it_needs_may_fail(connection, text, expected):
    e, row = expression(text), ROW | {"i": 1, "j": 3 * 10**12, "x": None}
    if expected is OverflowError:
        for compute in (lambda: evaluate(e, names=row), lambda: in_duckdb(connection, e, row)):
            with pytest.raises(OverflowError):
                compute()
    else:
        assert evaluate(e, names=row) is in_duckdb(connection, e, row) is expected


def test_random_expressions_agree(connection):
    rng = random.Random(5)
    numbers = {
        "i": [None, 0, 1, -1, 7, 2**53 + 1, 2**63 - 1, -(2**63)],
        "x": [None, 0.0, -0.0, 1.5, -2.25, 1e308, 5e-324, float(2**53)],
        "b": [None, True, False],
        "s": [None, "", "a", "Z", "é", "🙂"],
        "t": [None, 0, -1, 86_399_999_999, 1_709_164_800_000_000],
    }
    numbers |= {"j": numbers["i"], "y": numbers["x"]}
    agreed = overflowed = got_round = 0
    for _ in range(1_500):
        e = expression(_random(rng, rng.choice(["int64", "float64", "bool"]), 3))
        row = {n: rng.choice(values) for n, values in numbers.items()}
        found = []
        for compute in (
            lambda e=e, row=row: evaluate(e, names=row),
            lambda e=e, row=row: in_duckdb(connection, e, row),
        ):
            try:
                found.append(compute())
            except OverflowError:
                found.append(OverflowError)
        ours, theirs = found
        if ours is OverflowError:
            overflowed += 1
            got_round += theirs is not OverflowError
            continue
        assert ours == theirs, (expression_sql(e, "duckdb", finite="v.o"), row)
        agreed += 1
    assert agreed > 1_000
    assert overflowed > 20
    # DuckDB does not compute what stands beside a null that it knows of, and moves integers from one side of a comparison
    # to the other: seldom. What has no null and no integer comparison in it agrees always, as below.
    assert got_round < overflowed / 10


@pytest.mark.parametrize(
    "text",
    [
        "CASE WHEN x * 2 > 5 THEN 1 ELSE 0 END",
        "COALESCE(1 / (x * x), 0)",
        "x * 2 > 5",
        "x * 2 IN (1.0, 2.0)",
        "x * 2 IS NULL",
        "NOT x - y * 2 > 5",
        "x + x",
        "i / (x * y)",
        "x / 0.1 - x / 0.1",
        "ABS(x * x) > 1 OR b",
        "x * x > 1 AND b",
        "((((((((x * y) + 1) * 0.5) - 1) * 0.5) + 1) * 0.5) + 1) * 0.0",
    ],
)
def test_a_float_that_is_no_longer_finite_on_the_way_is_an_error_on_both(connection, text):
    e, row = expression(text), ROW | {"x": 1e308, "y": 1e308}
    for compute in (lambda: evaluate(e, names=row), lambda: in_duckdb(connection, e, row)):
        with pytest.raises(OverflowError):
            compute()
    assert evaluate(e, names=ROW) == in_duckdb(connection, e, ROW)


def test_the_text_of_a_nested_float_does_not_explode():
    text = "x"
    for _ in range(15):
        text = f"({text} * y + 1)"
    assert len(expression_sql(expression(text), "duckdb", finite="v.o")) < 10_000


def test_what_a_case_does_not_take_may_overflow(connection):
    e, row = expression("CASE WHEN b THEN 0.5 ELSE ((((x * y) + 1) * 0.5) - 1) * 0.5 END"), ROW | {"x": 1e308}
    assert evaluate(e, names=row) == in_duckdb(connection, e, row) == 0.5


def _random(rng: random.Random, kind: str, depth: int) -> str:
    def part(k: str) -> str:
        return _random(rng, k, depth - 1)

    if depth == 0:
        return rng.choice(
            {
                "int64": ["i", "j", "3", "-1"],
                "float64": ["x", "y", "0.5"],
                "bool": ["b", "TRUE", "s = 'a'", "t > TIMESTAMP '2024-02-29'"],
            }[kind]
        )
    same = [
        f"CASE WHEN {part('bool')} THEN {part(kind)} ELSE {part(kind)} END",
        f"COALESCE({part(kind)}, {part(kind)})",
        f"NULLIF({part(kind)}, {part(kind)})",
    ]
    number = rng.choice(["int64", "float64"])
    if kind == "bool":
        return rng.choice([
            f"({part('bool')} {rng.choice(['AND', 'OR'])} {part('bool')})", f"NOT {part('bool')}", f"({part('int64')} {rng.choice(['<', '=', '>=', '<>'])} {part(number)})",
            f"({part(number)} IS NULL)", f"({part('int64')} IN (1, -1, 7))", f"({part(number)} BETWEEN {part('int64')} AND {part(number)})", same[0],
        ])  # fmt: skip
    if kind == "int64":
        return rng.choice(
            [
                *same,
                f"({part(kind)} {rng.choice('+-*%')} {part(kind)})",
                f"ABS({part(kind)})",
                f"(- {part(kind)})",
                "HOUR(t)",
                "EXTRACT(ISODOW FROM t)",
                "LENGTH(s)",
                f"CAST({part('bool')} AS BIGINT)",
            ]
        )
    return rng.choice(
        [
            *same,
            f"({part(kind)} {rng.choice('+-*/')} {part(number)})",
            f"FLOOR({part(kind)})",
            f"CEIL({part(kind)})",
            f"({part('int64')} / {part('int64')})",
            f"CAST({part('int64')} AS DOUBLE)",
        ]
    )
