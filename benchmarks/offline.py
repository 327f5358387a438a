"""`make bench-offline SIZE=small|full`: training sets and latest values, ours beside stock Feast and queries by hand.

Every contender's result is compared with a brute-force oracle in plain Python on sampled rows, and with the others' by
row count and column sums; a bench that disagrees ends with code 2 and reports no speed. Data goes to PREDICTFLOW_BENCH_DIR
(default: the system's temporary directory) and is removed at the end. `--only huge` is the single run of the issue's
memory target: 10M entity rows against one view of 100M rows x 10 features.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import duckdb

from benchmarks import offline_data as data
from benchmarks.harness import Measured, Row, measure, report, save
from benchmarks.offline_contenders import (
    ASOF,
    BY_HAND,
    BY_HAND_LATEST,
    LATEST_VIEW,
    ON_LAYOUT,
    OURS,
    OURS_LAYOUT,
    POLARS,
    RANGE,
    STOCK_DUCKDB,
    STOCK_FILE,
)
from benchmarks.offline_data import KEY, TIME, TTL, WIDTHS, Size, features

CONTENDERS = "benchmarks.offline_contenders"
SAMPLED = 200
SMOKE, SMOKE_BY_HAND = 0.5, 0.1
"""Floors at SIZE=small, against stock Feast and against queries by hand: fixed costs (a tenth of a second and 200 MB of
imports, which a bare query has not) hide there what the real floors are about, so these catch breakage only."""


@dataclass(frozen=True)
class Case:
    """One set of data and the targets on it: per peer (floor, goal) for any Parquet and for our layout."""

    name: str
    size: Size
    task: str
    repeat: int
    time: Mapping[str, tuple[tuple[float, float], tuple[float, float]]]
    memory: tuple[float, float]
    by_hand: tuple[str, ...] = ()
    by_hand_on_layout: tuple[str, ...] = ()


FILE_TARGET = ((10.0, 25.0), (10.0, 25.0))
SPARSE = {STOCK_DUCKDB: ((1.2, 1.6), (1.4, 2.2))}
DENSE = {STOCK_DUCKDB: ((6.0, 12.0), (6.0, 12.0))}
LATEST = {STOCK_DUCKDB: ((2.0, 4.0), (2.0, 4.0))}
HAND = ((1 / 1.5, 1 / 1.1), (1 / 1.5, 1.0))
SPARSE_MEMORY, DENSE_MEMORY, LATEST_MEMORY = (1 / 0.75, 2.5), (4.0, 10.0), (4.0, 4.0)

ALL, FOR_SPARSE, FOR_DENSE = BY_HAND, (RANGE, POLARS), (ASOF, POLARS)
"""Queries by hand on any Parquet; on our layout only those that do well on keys of that density."""

SIZES = {
    "small": [
        Case("200k sparse x 20k", Size(200_000, 24, 20_000), "join", 2,
             {STOCK_FILE: FILE_TARGET, **SPARSE}, SPARSE_MEMORY, ALL, FOR_SPARSE),
        Case("100k dense x 3k", Size(100_000, 1000, 3_000), "join", 2, DENSE, DENSE_MEMORY, ALL, FOR_DENSE),
        Case("latest of 200k", Size(200_000, 24, 1000), "latest", 3, LATEST, LATEST_MEMORY, BY_HAND_LATEST, BY_HAND_LATEST),
    ],
    "full": [
        Case("10M sparse x 1M", Size(10_000_000, 24, 1_000_000), "join", 2, SPARSE, SPARSE_MEMORY, ALL, FOR_SPARSE),
        Case("2M dense x 100k", Size(2_000_000, 1000, 100_000), "join", 2, DENSE, DENSE_MEMORY, ALL, FOR_DENSE),
        Case("latest of 10M", Size(10_000_000, 24, 1000), "latest", 2, LATEST, LATEST_MEMORY, BY_HAND_LATEST, BY_HAND_LATEST),
        Case("1M x 100k", Size(1_000_000, 24, 100_000), "join", 2, {STOCK_FILE: FILE_TARGET}, SPARSE_MEMORY),
        Case("1M x 10k", Size(1_000_000, 24, 10_000), "join", 2, {STOCK_FILE: FILE_TARGET}, SPARSE_MEMORY),
    ],
}  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the bench; 0 when every ratio is at or above its floor, 1 when one is below, 2 when results differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.offline", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--only", metavar="TEXT", help="only the cases whose name holds TEXT, or `huge`")
    parser.add_argument("--repeat", type=int, help="runs per contender (default: the case's own, 2 or 3)")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="take the data from DIR, make what is missing, keep it"
    )
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="predictflow-bench-", dir=os.environ.get("PREDICTFLOW_BENCH_DIR")) as root:
        if options.only == "huge":
            from benchmarks.offline_huge import huge

            return huge(Path(root))
        cases = [c for c in SIZES[options.size] if not options.only or options.only in c.name]
        if not cases:
            parser.error(f"no case of that name: {options.only!r}; valid: {[c.name for c in SIZES[options.size]]}")
        name = "offline-part" if options.only else "offline"
        rows: list[Row] = []
        for case in cases:
            rows += run_case(case, options.data or Path(root), options.size, options.repeat or case.repeat)
            save(name, rows)
    return report(name, rows)


def run_case(case: Case, root: Path, size: str, repeat: int) -> list[Row]:
    """Generates the case's data, measures all contenders on it, compares their results, and gives the report's rows."""
    print(
        f"\n{case.name}: {case.size.rows:,} rows per view, {case.size.keys:,} keys, "
        + (f"{case.size.entities:,} entity rows" if case.task == "join" else "newest row per key of one view"),
        flush=True,
    )
    place = data.generate(root, case.size)
    sample = _sample(case, place)
    entities = str(place / f"entities-{case.size.entities}.parquet")
    spec = {"root": str(place), "entities": entities, "task": case.task, "sample": list(sample)}
    names = [*case.time, *case.by_hand, OURS, *(b + ON_LAYOUT for b in case.by_hand_on_layout), OURS_LAYOUT]
    found = measure(CONTENDERS, names, spec, repeat, size == "full", _progress)
    _compare(case, found, sample)
    _table(found)
    return _rows(case, found, size)


def _progress(name: str, run: Measured) -> None:
    print(f"  {name:32} {run.seconds:8.2f} s {run.cpu:8.2f} s CPU {run.peak_mb:8.0f} MB", flush=True)


def _table(found: Mapping[str, Sequence[Measured]]) -> None:
    print("  median of runs")
    for name, runs in found.items():
        print(
            f"  {name:32} {statistics.median(r.seconds for r in runs):8.2f} s "
            f"{statistics.median(r.cpu for r in runs):8.2f} s CPU {runs[0].peak_mb:8.0f} MB",
            flush=True,
        )


def _rows(case: Case, found: Mapping[str, Sequence[Measured]], size: str) -> list[Row]:
    def seconds(name: str) -> list[float]:
        return [r.seconds for r in found[name]]

    def peaks(name: str) -> list[float]:
        return [found[name][0].peak_mb] if size == "small" else [r.peak_mb for r in found[name]]

    def row(metric: str, unit: str, ours: list[float], peer: list[float], name: str, pair: tuple[float, float]) -> Row:
        floor, goal = pair
        if size == "small":
            floor = SMOKE if name in case.time else SMOKE_BY_HAND
        return Row.less_is_better(metric, unit, ours, peer, name, (round(floor, 3), round(goal, 3)))

    rows = []
    for peer, (plain, layout) in case.time.items():
        for ours, pair, files in ((OURS, plain, "any Parquet"), (OURS_LAYOUT, layout, "our layout")):
            rows.append(row(f"{case.name}, {files}: time", "s", seconds(ours), seconds(peer), peer, pair))
            if peer == STOCK_DUCKDB:
                rows.append(row(f"{case.name}, {files}: peak RSS", "MB", peaks(ours), peaks(peer), peer, case.memory))
    for ours, rivals, pair, files in (
        (OURS, case.by_hand, HAND[0], "any Parquet"),
        (OURS_LAYOUT, [b + ON_LAYOUT for b in case.by_hand_on_layout], HAND[1], "our layout"),
    ):
        if rivals:
            best = min(rivals, key=lambda n: statistics.median(seconds(n)))
            rows.append(row(f"{case.name}, {files}: time, by hand", "s", seconds(ours), seconds(best), best, pair))
    return rows


def _sample(case: Case, place: Path) -> dict[int, dict[str, Any]]:
    """What the oracle says of some rows: by row_id for a join, by key for latest; loops over rows, no joins."""
    identity = "row_id" if case.task == "join" else KEY
    asked: list[dict[str, Any]] = []
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        if case.task == "join":
            every = max(1, case.size.entities // SAMPLED)
            found = con.execute(
                f"SELECT row_id, {KEY}, epoch_us({TIME}) FROM read_parquet('{place}/entities-{case.size.entities}.parquet') WHERE row_id % {every} = 0"
            ).fetchall()
            asked = [{"row_id": r, KEY: k, "t": t} for r, k, t in found]
        else:
            last = int((data.START + data.SPAN + timedelta(days=1)).timestamp() * 1_000_000)
            asked = [{KEY: k, "t": last} for k in range(0, case.size.keys, max(1, case.size.keys // SAMPLED))]
        answers: dict[int, dict[str, Any]] = {a[identity]: {identity: a[identity]} for a in asked}
        keys = ", ".join(str(k) for k in sorted({a[KEY] for a in asked}))
        for view in WIDTHS if case.task == "join" else [LATEST_VIEW]:
            stored = con.execute(
                f"SELECT {KEY}, epoch_us({TIME}), epoch_us({data.CREATED}), {', '.join(features(view))} "
                f"FROM read_parquet('{place}/plain/{view}.parquet') WHERE {KEY} IN ({keys})"
            ).fetchall()
            by_key: dict[int, list[tuple[Any, ...]]] = {}
            for r in stored:
                by_key.setdefault(r[0], []).append(r)
            ttl = TTL // timedelta(microseconds=1) if case.task == "join" else None
            for a in asked:
                best = _as_of(by_key.get(a[KEY], []), a["t"], ttl)
                answers[a[identity]].update(
                    zip(features(view), best[3:] if best else [None] * WIDTHS[view], strict=True)
                )
    return answers


def _as_of(rows: Sequence[tuple[Any, ...]], t: int, ttl: int | None) -> tuple[Any, ...] | None:
    best: tuple[Any, ...] | None = None
    for r in rows:
        if r[1] <= t and (ttl is None or r[1] >= t - ttl) and (best is None or r[1:3] > best[1:3]):
            best = r
    return best


def _compare(case: Case, found: Mapping[str, Sequence[Measured]], sample: Mapping[int, dict[str, Any]]) -> None:
    """Exits with code 2 and the first difference unless every run gave the oracle's values, and all the same sums."""
    want_rows = case.size.entities if case.task == "join" else case.size.keys
    sums = next(iter(found.values()))[0].answer["sums"]
    for name, runs in found.items():
        for run in runs:
            answer = run.answer
            if answer["rows"] != want_rows:
                _differ(case, name, "rows", answer["rows"], want_rows)
            if len(answer["sample"]) != len(sample):
                _differ(case, name, "sampled rows", len(answer["sample"]), len(sample))
            identity = "row_id" if case.task == "join" else KEY
            for got in answer["sample"]:
                want = sample[got[identity]]
                if got != want:
                    column = next(c for c in want if got.get(c) != want[c])
                    _differ(case, name, f"{identity} {got[identity]} {column}", got.get(column), want[column])
            for column, value in sums.items():
                if not math.isclose(answer["sums"][column], value, rel_tol=1e-9):
                    _differ(case, name, f"sum of {column}", answer["sums"][column], value)
    print(
        f"  all {len(found)} agree with the oracle on {len(sample)} rows, and with each other on {len(sums)} column sums"
    )


def _differ(case: Case, name: str, what: str, got: Any, want: Any) -> None:
    print(f"{case.name}: {name} is wrong: {what}: {got!r}, not {want!r}", file=sys.stderr)
    raise SystemExit(2)


if __name__ == "__main__":
    sys.exit(main())
