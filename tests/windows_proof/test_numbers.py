"""What SQL makes of one event (`plan.py`, in DuckDB) is what the oracle's own evaluator makes of it, for any expression."""

from __future__ import annotations

import duckdb
import pyarrow as pa
import pytest
from window_definitions import COLUMNS, TIME, view_of
from window_histories import random_scenario
from window_oracle import Oracle, OutOfRangeError, Raw, hash63, text_of

from feature_store.windows.plan import hash_sql, plan_of

UTC_US = pa.timestamp("us", "UTC")
ARROW = {"string": pa.string(), "int64": pa.int64(), "float64": pa.float64(), "bool": pa.bool_(), "timestamp": UTC_US}


def table_of(messages) -> pa.Table:
    columns = {c: pa.array([m.columns[c] for m in messages], ARROW[t]) for c, t in COLUMNS.items()}
    columns[TIME] = pa.array([m.time for m in messages], pa.int64()).cast(UTC_US)
    columns["_offset"] = pa.array(range(len(messages)), pa.int64())
    return pa.table(columns)


@pytest.mark.parametrize("seed", range(40))
def test_masks_and_numbers_are_those_of_the_oracle(seed):
    scenario = random_scenario(seed)
    view = scenario.meant.view
    plan = plan_of(view)
    oracle = Oracle(scenario.meant.statements, retention_us=0)
    kept, inputs = [], []
    for m in [*scenario.history, *(m for p in scenario.partitions for m in p if m.idle is None)]:
        try:
            inputs.append(oracle.inputs(Raw(m.entity, m.time, 0, 0, 0, m.columns)))
        except OutOfRangeError:
            continue
        kept.append(m)
    if not kept:
        pytest.skip("every event of this seed overflows")
    with duckdb.connect(config={"threads": 1}) as con:
        con.execute(f"SET TimeZone='{'America/New_York' if seed % 2 else 'UTC'}'")
        con.register("raw", table_of(kept))
        rows = con.execute(f"SELECT {plan.numbers_sql()} FROM raw ORDER BY _offset").fetchall()
    meant = [a for s in scenario.meant.statements for a in _used(s)]
    read = [(a, i) for s, of in zip(view.statements, plan.inputs) for a, i in zip(_used(s), [of[j] for j in _order(s)])]
    assert [(a.function, a.type) for a in meant] == [(a.function, a.type) for a, _ in read]
    for message, expected, (mask, *values) in zip(kept, inputs, rows):
        flat = [row[j] for s, row in zip(scenario.meant.statements, expected) for j in _order(s)]
        for (aggregate, wanted), value in zip(read, flat):
            passes = wanted.bit is None or bool(mask >> wanted.bit & 1)
            assert passes == (value is not None), (view.sql, message, aggregate)
            if passes and wanted.value is not None:
                got = values[wanted.value]
                assert got == (hash63(text_of(value)) if aggregate.function == "count_distinct" else value)


def _order(statement) -> list[int]:
    """The aggregates in the order in which the outputs use them, each as often as it is used."""
    from window_oracle import _references

    return [i for o in statement.outputs for i in _references(o.expression)]


def _used(statement) -> list:
    return [statement.aggregates[i] for i in _order(statement)]


def test_an_expression_that_overflows_is_an_error_in_both():
    view = view_of("SELECT k, SUM(n * 2) AS s FROM events GROUP BY k, TUMBLE(event_timestamp, INTERVAL '1' HOUR)")
    with duckdb.connect() as con, pytest.raises(duckdb.OutOfRangeException):
        con.execute(f"SELECT {plan_of(view).numbers_sql()} FROM (SELECT {2**62}::BIGINT AS n)").fetchall()
    with pytest.raises(OutOfRangeError):
        Oracle(view.statements, retention_us=0).inputs(Raw("a", 0, 0, 0, 0, {"n": 2**62}))


@pytest.mark.parametrize("text", ["", "a", "it's", "日本é", "-9223372036854775808", "true", "x" * 1000])
def test_one_hash_for_all(text):
    with duckdb.connect() as con:
        assert con.execute(f"SELECT {hash_sql('$1')}", [text]).fetchone() == (hash63(text),)


@pytest.mark.parametrize("zone", ["UTC", "America/New_York"])
def test_the_hash_of_a_time_does_not_depend_on_the_time_zone_of_the_session(zone):
    sql = "SELECT k, COUNT(DISTINCT at) AS d FROM events GROUP BY k, TUMBLE(event_timestamp, INTERVAL '1' HOUR)"
    plan = plan_of(view_of(sql))
    found = []
    for z in ("UTC", zone):
        with duckdb.connect() as con:
            con.execute(f"SET TimeZone='{z}'")
            raw = "(SELECT make_timestamptz(1709251199000001) AS at)"
            found.append(con.execute(f"SELECT {plan.numbers_sql()} FROM {raw}").fetchall())
    assert found[0] == found[1]
