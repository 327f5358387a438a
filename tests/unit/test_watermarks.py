"""The watermark before an event: the same for any batches, any restart and any replay."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.event_log import LOG_FIELDS, UTC_MICROS, EventLog
from feature_store.logged import NEVER, Logged, LoggedTails
from feature_store.watermarks import Watermarks

LATENESS = 3
SCHEMA = pa.schema([pa.field("at", UTC_MICROS), *LOG_FIELDS])
events = st.lists(st.tuples(st.integers(0, 1), st.integers(0, 50)), max_size=30)  # partition, time


def rule(
    stream: Sequence[tuple[int, int]], idle: Sequence[tuple[int, int, int]] = (), history: int = NEVER
) -> list[int]:
    """As the definition says it. `idle`: partition, offset, watermark."""
    out, offsets = [], {0: 0, 1: 0}
    for i, (p, _) in enumerate(stream):
        of_idle = [w for q, o, w in idle if q == p and o < offsets[p]]
        out.append(max([history, *of_idle, *(t - LATENESS for q, t in stream[:i] if q == p)]))
        offsets[p] += 1
    return out


def in_batches(marks: Watermarks, stream, cuts, logged=None) -> list[int]:
    out, seen = [], {0: 0, 1: 0}
    bounds = sorted({0, len(stream), *(c % (len(stream) + 1) for c in cuts)})
    for a, b in pairwise(bounds):
        partitions = np.array([p for p, _ in stream[a:b]], np.int64)
        offsets = []
        for p, _ in stream[a:b]:
            offsets.append(seen[p])
            seen[p] += 1
        known = np.full(b - a, NEVER) if logged is None else np.array(logged[a:b])
        before, after = marks.before(partitions, np.array(offsets), np.array([t for _, t in stream[a:b]]), known)
        assert marks.before(partitions, np.array(offsets), np.array([t for _, t in stream[a:b]]), known)[1] == after
        marks.advance(after, seen)
        out += before.tolist()
    return out


@given(events, st.lists(st.integers(0, 30), max_size=5))
def test_it_does_not_depend_on_the_batches(stream, cuts):
    assert in_batches(Watermarks(LATENESS), stream, cuts) == rule(stream)


def log_rows(rows: Sequence[dict]) -> pa.Table:
    return pa.Table.from_pylist([dict.fromkeys(SCHEMA.names) | r for r in rows], SCHEMA)


@settings(deadline=None)  # it writes files
@given(
    st.lists(st.integers(0, 50), min_size=1, max_size=20),
    st.lists(st.tuples(st.integers(0, 19), st.integers(20, 60)), max_size=3),
    st.integers(0, 20),
    st.integers(0, 20),
    st.sampled_from([NEVER, 25]),
)
def test_a_restart_goes_on_where_the_log_ends_and_repeats_what_it_held(
    tmp_path_factory, times, idle, n, start, history
):
    """`n` events were logged before the end; the group's place is `start`, at or before `n`."""
    n, start = min(n, len(times)), min(start, n, len(times))
    stream = [(0, t) for t in times]
    idle = sorted((o, w) for o, w in idle if o < n)
    expected = rule(stream, [(0, o, w) for o, w in idle], history)
    log = EventLog(Path(tmp_path_factory.mktemp("log")), "t")
    for o in range(n):
        mark = None if expected[o] == NEVER else expected[o]
        log.append(log_rows([{"at": times[o], "_partition": 0, "_offset": o, "_visible_at": o, "_watermark": mark}]))
    for i, (o, w) in enumerate(idle):
        log.append(log_rows([{"_partition": 0, "_offset": o, "_visible_at": i, "_watermark": w, "_dropped": "idle"}]))
    marks = Watermarks(LATENESS)
    logged = log.logged(0, start)
    marks.start(log, "at", 0, start, logged, history)
    offsets = np.arange(start, len(times))
    found, at = logged.find(offsets)
    known = np.where(found, logged.watermarks[at] if len(logged) else NEVER, NEVER)
    before, after = marks.before(np.zeros(len(offsets), np.int64), offsets, np.array(times[start:], np.int64), known)
    assert before.tolist() == expected[start:]
    if len(offsets):
        marks.advance(after, {0: len(times)})
    end = max([history, *(t - LATENESS for t in times), *(w for _, w in idle)])
    assert marks.of(0) == end


def test_an_idle_advance_counts_from_the_next_event_on():
    marks = Watermarks(LATENESS)
    assert in_batches(marks, [(0, 10)], []) == [NEVER]
    marks.idle(0, 40)
    before, after = marks.before(*(np.array([x]) for x in (0, 1, 20)), np.array([NEVER]))
    assert (before.tolist(), after) == ([40], {0: 40})
    marks.stop(0)
    assert marks.of(0) == NEVER


def test_what_the_log_holds_is_found_by_offset():
    logged = Logged(np.array([3, 5]), np.array([30, 50]), np.array([1, 2]))
    found, at = logged.find(np.array([2, 3, 4, 5, 6]))
    assert found.tolist() == [False, True, False, True, False]
    assert logged.visible_at[at[found]].tolist() == [30, 50]
    tails = LoggedTails()
    tails.start(0, logged)
    tails.add(0, Logged(np.array([4, 6]), np.array([40, 60]), np.array([1, 3])))
    assert tails.find(np.array([0, 0, 1]), np.array([4, 7, 4]))[0].tolist() == [True, False, False]
    found, visible, watermarks = tails.find(np.zeros(4, np.int64), np.array([3, 4, 5, 6]))
    assert (visible.tolist(), watermarks.tolist()) == ([30, 40, 50, 60], [1, 1, 2, 3])
    tails.committed(0, 6)
    assert tails.find(np.zeros(4, np.int64), np.array([3, 4, 5, 6]))[0].tolist() == [False, True, False, True]
    tails.stop(0)
    assert not tails.find(np.zeros(1, np.int64), np.array([6]))[0].any()
    assert logged.since(5).visible_at.tolist() == [50]
    assert not Logged.none().find(np.array([1]))[0].any()
