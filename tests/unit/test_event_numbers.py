"""The numbers of a batch: by Arrow the same as by DuckDB, for every plain definition."""

from __future__ import annotations

import random
from typing import Any

import pyarrow as pa
import pytest

from feature_store import plain_numbers
from feature_store.event_decode import ARROW
from feature_store.event_numbers import EventNumbers
from feature_store.windows.ir import Aggregate, Call, Column, Constant, Expression, Window
from feature_store.windows.plan import plan_of
from tests.unit.window_support import AT, FLAG, HOUR, KIND, T0, N, X, view

COLUMNS = (N, X, KIND, FLAG, AT)
VALUES: dict[str, list[Any]] = {
    "n": [None, 0, 1, -7, 2**63 - 1, -(2**63)],
    "x": [None, 0.0, -0.0, 1.5, -1e300, 5e-324],
    "kind": [None, "", "a", "A", "b", "ä\u0000", "aa"],
    "flag": [None, True, False],
    "at": [None, T0, T0 + 1, -1],
}


def events(rng: random.Random, n: int) -> pa.Table:
    columns = {c.name: pa.array([rng.choice(VALUES[c.name]) for _ in range(n)], ARROW[c.type]) for c in COLUMNS}
    return pa.table(columns | {"id": pa.array([f"e{rng.randrange(n)}" for _ in range(n)])})


def condition(rng: random.Random, depth: int = 2) -> Expression:
    if depth and rng.random() < 0.5:
        operator = rng.choice(["and", "or", "not"])
        parts = tuple(condition(rng, depth - 1) for _ in range(1 if operator == "not" else rng.choice([2, 3])))
        return Call(operator, parts, "bool")
    column = rng.choice(COLUMNS)
    some = [Constant(v, column.type) for v in VALUES[column.name] if v is not None]
    match rng.choice(["compare", "in", "is_null", "bool"]):
        case "in":
            return Call("in", (column, *rng.sample(some, rng.randint(1, len(some)))), "bool")
        case "is_null":
            return Call("is_null", (column,), "bool")
        case "bool":
            return FLAG
    operators = ["=", "<>"] if column.type == "bool" else ["=", "<>", "<", "<=", ">", ">="]
    return Call(rng.choice(operators), (column, rng.choice(some)), "bool")


@pytest.mark.parametrize("seed", range(40))
def test_plain_numbers_are_those_of_duckdb(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = random.Random(seed)
    aggregates = [
        Aggregate("max", c, None if rng.random() < 0.3 else condition(rng), c.type) for c in COLUMNS if c is not KIND
    ]
    aggregates += [Aggregate("count", rng.choice([None, *COLUMNS]), condition(rng), "int64") for _ in range(4)]
    aggregates += [Aggregate("count_distinct", c, condition(rng), "int64") for c in (KIND, N)]
    definition = view(Window("over", HOUR), aggregates=aggregates, event_id="id")
    assert plain_numbers.most_events(plan_of(definition)) > 0
    batch = events(rng, rng.choice([1, 2, 60]))
    numbers = EventNumbers(definition)
    plain, none = numbers.of(batch)
    monkeypatch.setattr(numbers, "_most", 0)
    by_duckdb, refused = numbers.of(batch)
    numbers.close()
    assert none == refused == []
    assert plain.keys() == by_duckdb.keys()
    for name, column in by_duckdb.items():
        assert plain[name].dtype == column.dtype
        assert plain[name].tobytes() == column.tobytes(), name


def test_what_only_duckdb_can_say_is_left_to_it() -> None:
    product = Call("*", (N, Constant(2, "int64")), "int64")
    for a in (
        Aggregate("sum", product, None, "int64"),
        Aggregate("count", N, Call(">", (product, Constant(2, "int64")), "bool"), "int64"),
        Aggregate("count", N, Call("=", (N, Column("x", "float64")), "bool"), "int64"),
        Aggregate("count", N, Call("=", (X, Constant(1, "int64")), "bool"), "int64"),
        Aggregate("count_distinct", X, None, "int64"),
        Aggregate("count_distinct", AT, None, "int64"),
    ):
        assert plain_numbers.most_events(plan_of(view(Window("over", HOUR), aggregates=[a]))) == 0
