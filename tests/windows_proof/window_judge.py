"""Compares what a run answered with the oracle, read by read, and shows a difference as small as it can be made."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from window_definitions import sql_of
from window_harness import MakeOracle, Read, Run, expected_of
from window_histories import Scenario, random_scenario
from window_oracle import Answer, Oracle, Possible
from window_platform import Got


@dataclass
class Difference(Exception):
    """What was wrong, with all that is needed to see it again."""

    scenario: Scenario
    what: str
    read: Read | None = None
    answers: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return report(self)


def judge(run: Run, make: MakeOracle = Oracle) -> tuple[Difference | None, Counter[str]]:
    """The first difference between a run and an oracle that was fed the same events, and how much was compared."""
    counts = Counter(run.counts)
    if run.faults:
        return Difference(run.scenario, run.faults[0]), counts
    oracle = run.oracle(make)
    for logged, row in zip(oracle.feed(run.raws()), run.rows, strict=True):
        counts[logged.dropped or "counted"] += 1
        if logged.dropped != row.dropped:
            return Difference(
                run.scenario, f"the oracle says {logged.dropped}, the stream {row.dropped}: {row}"
            ), counts
        if row.dropped != "idle" and logged.watermark != row.watermark:
            return Difference(run.scenario, f"watermark: oracle {logged.watermark}, stream: {row}"), counts
    for q in run.reads:
        expected = expected_of(oracle, q)
        counts["reads"] += 1
        counts[expected.status] += 1
        answers: dict[str, Any] = {"oracle": expected}
        what = _compare(q, expected, counts)
        if what is None and q.by_time and q.offsets is not None:
            counts["reads both by time and by offset"] += 1
            answers["oracle by time"] = oracle.read_by_time(q.entity, q.t)
            if answers["oracle by time"] != expected:
                what = "the oracle itself: by time and by offset"
        if what is not None:
            return Difference(run.scenario, what, q, answers), counts
    return None, counts


def _compare(q: Read, e: Answer, counts: Counter[str]) -> str | None:
    if q.state is not None:
        counts["errors"] += bool(q.state.errors)
        for n, p in e.values.items():
            certain = p.error and p.low is None and not p.null
            if (q.too_early or certain) and n not in q.state.errors:
                return f"the state gives a value where there is none: {n}"
            if n in q.state.errors and not (q.too_early or p.error):
                return f"the state gives an error: {n}"
        if q.too_early:
            return None
    for name in ("state", "history_by_time", "history_by_offset"):
        got: Got | None = getattr(q, name)
        if got is None:
            continue
        counts[f"compared: {name}"] += 1
        wrong = [
            f"{n}: {got.values[n]!r} is not {_show(p)}"
            for n, p in e.values.items()
            if n not in got.errors and not p.allows(got.values[n])
        ]
        seen = e.last_seen if name == "state" or e.status == "PRESENT" else None
        if got.last_seen != seen:
            wrong.append(f"last seen {got.last_seen} is not {seen}")
        if wrong:
            return f"{name}: " + "; ".join(wrong)
    return None


def _show(p: Possible) -> str:
    if p.low is None:
        return "null" if p.null else "an error"
    return repr(p.low) if p.low == p.high else f"between {p.low!r} and {p.high!r}"


def prove(seed: int, reads: int) -> Counter[str]:
    """Runs scenarios from a seed on until so many reads were compared; raises the first Difference, made small."""
    counts: Counter[str] = Counter()
    while counts["reads"] < reads:
        difference, found = judge(Run(random_scenario(seed)).go())
        if difference is not None:
            raise shrunk(difference)
        counts += found
        counts["scenarios"] += 1
        seed += 1
    return counts


def shrunk(difference: Difference, tries: int = 150) -> Difference:
    """The same scenario with as few messages as still show a difference: whole stretches go first, then single ones."""
    best = difference
    for share in (2, 4, 8, 1_000_000):
        progress = True
        while progress:
            progress = False
            for smaller in _smaller(best.scenario, share):
                if (tries := tries - 1) < 0:
                    return best
                found, _ = judge(Run(smaller).go())
                if found is not None:
                    best, progress = found, True
                    break
    return best


def _smaller(scenario: Scenario, share: int) -> Iterator[Scenario]:
    for p in (-1, *range(len(scenario.partitions))):
        count = len(scenario.history if p < 0 else scenario.partitions[p])
        step = max(1, count // share)
        for first in reversed(range(0, count, step)):
            yield scenario.without(p, first, step)


def report(d: Difference) -> str:
    """All of it as text: the seed, the definition and its meaning, the messages, the read, every answer."""
    s = d.scenario
    v = s.meant.view
    lines = [
        d.what,
        f"seed {s.seed}, unit {s.meant.unit}, retention {v.source.retention_us}, "
        f"lateness {v.source.allowed_lateness_us}, ttl {v.ttl}",
        v.sql,
        "meant:",
    ]
    for statement in s.meant.statements:
        aggregates = [
            (a.function, a.argument and sql_of(a.argument), a.filter and sql_of(a.filter)) for a in statement.aggregates
        ]
        lines.append(f"  {statement.window} {aggregates}")
    for p, messages in [(-1, s.history), *enumerate(s.partitions)]:
        lines += [f"  partition {p}: {m}" for m in messages]
    if d.read is not None:
        q = d.read
        lines.append(f"read {q.entity} t={q.t} offsets={q.offsets} watermark={q.watermark} by_time={q.by_time}")
        lines += [f"  {n}: {getattr(q, n)}" for n in ("state", "history_by_time", "history_by_offset")]
    lines += [f"  {name}: {answer}" for name, answer in d.answers.items()]
    return "\n".join(lines)
