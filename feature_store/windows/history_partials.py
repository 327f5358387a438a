"""Partial aggregates in DuckDB SQL: of one event, of a block of events, of blocks, and the value made of them.

Merging never subtracts, so what holds for one aggregate holds for all, and the order of merging only moves the last
digits of doubles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from feature_store.windows.ir import Aggregate
from feature_store.windows.plan import HASH_BITS, SKETCH_SIZE, Input, Plan
from feature_store.windows.sql_text import beyond_sql, finite_sql


@dataclass(frozen=True)
class Partial:
    """One column of partial aggregates. `one` is SQL over an event's numbers (`_mask`, `_v<i>`, `_g`, its place in the
    order of its entity's events), `block` and `merge` over the column itself: of single events, and of blocks."""

    name: str
    one: str
    block: str
    merge: str
    is_sketch: bool = False


def _smallest(lists: str) -> str:
    return f"list_slice(list_sort(list_distinct(flatten({lists}))), 1, {SKETCH_SIZE})"


def partials_of(plan: Plan, numbers: Sequence[int]) -> list[Partial]:
    """The partial columns that the aggregates of these statements need, each once."""
    found: dict[str, Partial] = {}
    for statement in numbers:
        for aggregate, wanted in zip(
            plan.definition.statements[statement].aggregates, plan.inputs[statement], strict=True
        ):
            for partial in _needed(plan, aggregate, wanted):
                found.setdefault(partial.name, partial)
    return list(found.values())


def final_sql(aggregate: Aggregate, wanted: Input, where: str) -> str:
    """The aggregate's value, of its type, from merged partial columns; null columns (no events) give its empty value."""
    bit = "x" if wanted.bit is None else wanted.bit
    count = f"coalesce(_n_{bit}, 0)"
    at = f"{bit}_{wanted.value}"
    match aggregate.function:
        case "count":
            return count
        case "count_distinct":
            kept = f"coalesce(len(_d_{at}), 0)"
            scaled = f"CAST('{float((SKETCH_SIZE - 1) * 2.0**HASH_BITS)!r}' AS DOUBLE)"
            estimate = f"CAST(round_even({scaled} / CAST(_d_{at}[{SKETCH_SIZE}] AS DOUBLE), 0) AS BIGINT)"
            return f"CASE WHEN {kept} < {SKETCH_SIZE} THEN {kept} ELSE {estimate} END"
        case "sum" if aggregate.type == "int64":
            fits = f"_s_{at} IS NULL OR _s_{at} BETWEEN -9223372036854775808 AND 9223372036854775807"
            return f"CASE WHEN {fits} THEN _s_{at}::BIGINT ELSE error({beyond_sql(where, 'an int64')}) END"
        case "sum":
            return finite_sql(f"_s_{at}", where)
        case "avg":
            return finite_sql(f"(CAST(_s_{at} AS DOUBLE) / nullif({count}, 0))", where)
        case "stddev":
            # Chan's formula over all blocks at once: none of them is large beside the differences of the means.
            m = f"_m_{at}"
            mean = f"(list_sum(list_transform({m}, lambda b: b.n * b.mean)) / {count})"
            spread = f"list_sum(list_transform({m}, lambda b: b.m2 + b.n * (b.mean - {mean}) * (b.mean - {mean})))"
            return finite_sql(f"CASE WHEN {count} >= 2 THEN sqrt({spread} / ({count} - 1)) END", where)
        case function:
            value = f"_{function}_{at}" + (".v" if function in ("first", "last") else "")
            match aggregate.type:
                case "bool":
                    return f"({value} <> 0)"
                case "timestamp":
                    return f"make_timestamptz({value})"
                case "float64":
                    return finite_sql(value, where)
            return value


def _needed(plan: Plan, aggregate: Aggregate, wanted: Input) -> list[Partial]:
    bit = "x" if wanted.bit is None else str(wanted.bit)
    counts = "TRUE" if wanted.bit is None else f"(_mask & {1 << wanted.bit}) <> 0"
    name = f"_n_{bit}"
    count = Partial(name, f"CAST({counts} AS BIGINT)", f"CAST(sum({name}) AS BIGINT)", f"CAST(sum({name}) AS BIGINT)")
    if wanted.value is None:
        return [count]
    column, at = f"_v{wanted.value}", f"{bit}_{wanted.value}"
    value = f"CASE WHEN {counts} THEN {column} END"
    match aggregate.function:
        case "count_distinct":
            name = f"_d_{at}"
            merged = _smallest(f"list({name}) FILTER ({name} IS NOT NULL)")
            return [Partial(name, f"CASE WHEN {counts} THEN [{column}] END", merged, merged, is_sketch=True)]
        case "sum" | "avg":
            name = f"_s_{at}"
            exact = "" if plan.values[wanted.value].is_float else "::HUGEINT"
            total = Partial(name, f"CASE WHEN {counts} THEN {column}{exact} END", f"sum({name})", f"sum({name})")
            return [count, total]
        case "stddev":
            name = f"_m_{at}"
            one = f"CASE WHEN {counts} THEN {{'n': 1::BIGINT, 'mean': {column}::DOUBLE, 'm2': 0::DOUBLE}} END"
            block = (
                f"CASE WHEN count({name}) > 0 THEN {{'n': count({name}), 'mean': avg({name}.mean), "
                f"'m2': var_pop({name}.mean) * count({name})}} END"
            )
            return [count, Partial(name, one, block, f"list({name}) FILTER ({name} IS NOT NULL)")]
        case "first" | "last":
            name = f"_{aggregate.function}_{at}"
            pick = "arg_min" if aggregate.function == "first" else "arg_max"
            merged = f"{pick}({name}, {name}.g)"
            return [Partial(name, f"CASE WHEN {counts} THEN {{'g': _g, 'v': {column}}} END", merged, merged)]
        case function:  # min, max
            name = f"_{function}_{at}"
            return [Partial(name, value, f"{function}({name})", f"{function}({name})")]
