"""Stream, history and the oracle give the same values, for random definitions, histories, batches, crashes and reads.

`make prove-windows READS=1000000` runs it long, from a seed of its own; a difference is printed small, with its seed. That
the comparison can see a difference is shown by oracles with one rule broken each: every one of them must be caught.
"""

from __future__ import annotations

import os
from collections import Counter
from functools import cache
from random import Random

import pytest
from window_definitions import random_definition
from window_harness import Run
from window_histories import Message, random_scenario
from window_judge import judge, prove, shrunk
from window_oracle import Logged, Oracle, Raw, Result, aggregate

READS = int(os.environ.get("PREDICTFLOW_PROOF_READS", "20000"))
SEED = int(os.environ.get("PREDICTFLOW_PROOF_SEED", "1"))


def test_stream_history_and_oracle_agree(capsys):
    counts = prove(SEED * 1_000_000, READS)
    with capsys.disabled():
        print("\n" + ", ".join(f"{n} {what}" for what, n in sorted(counts.items())))  # noqa: T201 - the figures of the proof
    # What was not met was not proven.
    for what in ("late", "duplicate", "idle", "crashes", "NOT_FOUND", "OUTSIDE_MAX_AGE", "errors"):
        assert counts[what] > 0, what


def test_a_sentence_in_sql_means_what_was_meant():
    """The types and the windows, for many definitions; the values are compared above."""
    for seed in range(200):
        meant = random_definition(Random(seed), event_id=False)
        read = meant.view.statements
        assert [s.window for s in read] == [s.window for s in meant.statements], meant.view.sql
        assert [[(o.name, o.type) for o in s.outputs] for s in read] == [
            [(o.name, o.type) for o in s.outputs] for s in meant.statements
        ], meant.view.sql


# Faults, planted into the oracle: the comparison must see each


class OverWithoutItsStart(Oracle):
    def within_over(self, time, t, size):
        return t - size < time <= t


class OverBeyondItsStart(Oracle):
    def within_over(self, time, t, size):
        return t - size - 1 <= time <= t


class WindowWithItsEnd(Oracle):
    def within_window(self, time, end, size):
        return end - size <= time <= end


class WindowWithoutItsStart(Oracle):
    def within_window(self, time, end, size):
        return end - size < time < end


class HopThatEndsLast(Oracle):
    def open_end(self, w, t):
        return t // w.slide_us * w.slide_us + w.size_us


class TruncatesBeforeTheEpoch(Oracle):
    def open_end(self, w, t):
        return int(t / w.slide_us) * w.slide_us + w.slide_us


class CountsWhatIsNotVisible(Oracle):
    def is_known(self, e, t):
        return True


class CountsAheadOfItsTime(Oracle):
    def open(self, w, seen, t):
        return super().open(w, self._known, t + 5_000_000) if w.kind == "session" else super().open(w, self._known, t)

    def within_over(self, time, t, size):
        return t - size <= time

    def _answer(self, known, t, watermark):
        self._known = known
        return super()._answer(known, t, watermark)


class TakesLateEvents(Oracle):
    def is_late(self, e, before):
        return False


class LateOneTooEarly(Oracle):
    def is_late(self, e, before):
        return before is not None and e.time <= before - self.retention_us


class CountsLateEventsTwice(Oracle):
    def counted(self, entity):
        rows = super().counted(entity)
        return rows + [e for e in rows if e.watermark is not None and e.raw.time < e.watermark]


class SeesDroppedEvents(Oracle):
    def counted(self, entity):
        return self._of_entity.get(entity, [])


class ForgetsIds(Oracle):
    def remembers(self, time, watermark):
        return False


class RemembersIdsForEver(Oracle):
    def remembers(self, time, watermark):
        return True


class SplitsAtTheGap(Oracle):
    def splits(self, apart, gap):
        return apart >= gap


class SplitsBeyondTheGap(Oracle):
    def splits(self, apart, gap):
        return apart > gap + 1


class ClosesSessionsAtTheGap(Oracle):
    def has_closed(self, session, gap, watermark):
        return watermark >= session[-1].raw.time + gap


class LateEventsChangeClosedWindows(Oracle):
    def in_time_for(self, end, before):
        return True


class OnTimeAtTheEnd(Oracle):
    def in_time_for(self, end, before):
        return before is None or end >= before


class WatermarkWithoutLateness(Oracle):
    def __init__(self, *args, **settings):
        super().__init__(*args, **(settings | {"lateness_us": 0}))


class ExpiresAtTheTtl(Oracle):
    def is_expired(self, silent):
        return self.ttl_us > 0 and silent >= self.ttl_us


class TiesByVisibility(Oracle):
    def order(self, e: Logged):
        return e.raw.time, -e.raw.partition, -e.raw.offset


class PopulationDeviation(Oracle):
    def aggregate(self, function, inputs):
        result = super().aggregate(function, inputs)
        n = sum(v is not None for v in inputs)
        if function != "stddev" or result.value is None:
            return result
        return Result(result.value * ((n - 1) / n) ** 0.5, result.tolerance)


class EmptySumIsZero(Oracle):
    def aggregate(self, function, inputs):
        if function == "sum" and all(v is None for v in inputs):
            return Result(0)
        return aggregate(function, inputs)


class LosesTheLastDigits(Oracle):
    def passed(self, value):
        return int(float(value)) if type(value) is int else value


class DistinctWithNull(Oracle):
    def aggregate(self, function, inputs):
        result = aggregate(function, inputs)
        return Result(result.value + 1) if function == "count_distinct" and None in inputs else result


FAULTS = [c for c in list(globals().values()) if isinstance(c, type) and issubclass(c, Oracle) and c is not Oracle]


@cache
def run_of(seed: int) -> Run:
    return Run(random_scenario(seed)).go()


@pytest.mark.long
@pytest.mark.parametrize("fault", FAULTS, ids=lambda c: c.__name__)
def test_a_broken_rule_is_seen(fault):
    for seed in range(150):
        difference, _ = judge(run_of(seed), fault)
        if difference is not None:
            assert judge(run_of(seed))[0] is None, "the unbroken oracle differs too"
            assert difference.scenario.meant.view.sql in str(difference)
            return
    pytest.fail("150 scenarios do not tell this fault from the rules")


def test_a_difference_is_shown_small():
    """The report has the seed, the SQL and few messages: here a fault of the platform, an event counted twice."""
    scenario = random_scenario(7)
    run = Run(scenario).go()
    assert judge(run)[0] is None
    read = next(q for q in run.reads if q.state is not None and q.state.values is not None and q.state.last_seen)
    read.state = type(read.state)(dict.fromkeys(read.state.values, 12345), read.state.last_seen)
    difference, _ = judge(run)
    assert difference is not None
    text = str(shrunk(difference, tries=0))
    assert "seed 7" in text
    assert "12345 is not" in text
    assert scenario.meant.view.sql in text


def test_the_oracle_decides_late_and_duplicate_by_itself():
    oracle = Oracle([], retention_us=10, lateness_us=5, has_event_id=True)
    events = [
        Raw("a", 100, 0, 0, 1, event_id="x"),  # the watermark is 95 now
        Raw("a", 85, 0, 1, 2, event_id="y"),
        Raw("a", 84, 0, 2, 3, event_id="z"),
        Raw("a", 99, 0, 3, 4, event_id="x"),
        Raw(None, 0, 0, 3, 5, idle=200),
        Raw("a", 195, 0, 4, 6, event_id="x"),
        Raw("b", 50, 1, 0, 7, event_id="x"),
    ]
    logged = oracle.feed(events)
    assert [e.dropped for e in logged] == [None, None, "late", "duplicate", "idle", None, None]
    assert [e.watermark for e in logged] == [None, 95, 95, 95, 95, 200, None]


def test_scenarios_hold_what_they_are_for():
    met: Counter[str] = Counter()
    for seed in range(100):
        s = random_scenario(seed)
        messages: list[Message] = [*s.history, *(m for p in s.partitions for m in p)]
        met["history"] += bool(s.history)
        met["several partitions"] += len(s.partitions) > 1
        met["before 1970"] += any(m.time < 0 for m in messages)
        met["ahead of the clock"] += any(m.time > m.produced for m in messages)
        met["null"] += any(v is None for m in messages for v in m.columns.values())
        met["equal times"] += len({(m.entity, m.time) for m in messages}) < len(messages)
        met["huge"] += any(m.columns.get("n") in (2**63 - 1, 2**62) for m in messages)
    assert min(met.values()) >= 5, met
