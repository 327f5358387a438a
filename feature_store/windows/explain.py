"""What a windowed view does, for people: its plan, the state it keeps and how large that is, and the SQL it compiles to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from feature_store.windows.definition import WindowedView
from feature_store.windows.flink import flink_sql
from feature_store.windows.in_words import aggregate_text, output_text, window_text
from feature_store.windows.ir import Aggregate, Statement
from feature_store.windows.plan import Plan, plan_of
from feature_store.windows.spark import spark_sql
from feature_store.windows.sql_intervals import length_in_words

_DAY_US = 86_400_000_000
_WORD = 4
"""Bytes of a word as stored, without the units of it that are zero; measured: 3."""
_HEADER_WORDS = 12
"""Version, hash, fence, visible_at, last seen, watermark, counts, and one partition's offset."""
_SKETCH = 1_024
_SUMMARY_WORDS = {"count": 1, "sum": 3, "avg": 3, "min": 2, "max": 2, "first": 3, "last": 3, "stddev": 3}
"""Of one aggregate over a tile or session; a sum has two limbs and its count, first and last their event's place."""


@dataclass(frozen=True)
class StateSize:
    """What a Statement keeps of one entity: `formula` in words, `words` (see `blob.py`) at the given rate of events."""

    formula: str
    words: int


def explain(definition: WindowedView, *, events_per_day: float = 10.0) -> str:
    """Everything about a definition as text; sizes are of an entity with so many events per day, evenly spread."""
    from feature_store.windows.history import history_sql

    parts = [
        _head(definition),
        *(_statement(definition, n, s, events_per_day) for n, s in enumerate(definition.statements, 1)),
        _size(definition, events_per_day),
        "DuckDB (history; `entities` and `events` are given):\n" + history_sql(definition, "entities", "events"),
        "Flink SQL:\n" + ";\n\n".join(flink_sql(definition)) + ";",
        "Spark SQL:\n" + ";\n\n".join(spark_sql(definition)) + ";",
    ]
    return "\n\n".join(parts)


def _head(d: WindowedView) -> str:
    source = d.source
    ttl = length_in_words(d.ttl // timedelta(microseconds=1)) if d.ttl else "none"
    twice = "two offsets are two facts" if source.event_id is None else f"a repeated {source.event_id} counts once"
    idle = "never" if source.idle_timeout_us is None else f"after {length_in_words(source.idle_timeout_us)}"
    return (
        f"{d.name}: topic {d.topic}, key {', '.join(d.entity_key)}, ttl {ttl}, definition {d.hash}\n"
        f"events: {source.format}; {twice}; older than the watermark by more than {length_in_words(source.retention_us)}: dropped; "
        f"watermark {length_in_words(source.allowed_lateness_us)} behind the newest event, moved on by the clock: {idle}"
    )


def _statement(d: WindowedView, number: int, s: Statement, rate: float) -> str:
    inputs = plan_of(d).inputs[number - 1]
    lines = [f"{number}. {window_text(s.window)}: {reading_text(s)}"]
    lines += [f"   {o.name} ({o.type}) = {output_text(s, o)}" for o in s.outputs]
    for a, i in zip(s.aggregates, inputs, strict=True):
        reads = [f"bit {i.bit}"] if i.bit is not None else ["every event"]
        reads += [f"_v{i.value}"] if i.value is not None else []
        lines.append(f"   keeps {aggregate_text(a)} from {', '.join(reads)}")
    lines.append(f"   state: {state_size(d, s, rate).formula}")
    return "\n".join(lines)


def reading_text(s: Statement) -> str:
    """What the window holds, read at t."""
    length = length_in_words(s.window.size_us)
    if s.window.on_close:
        newest = "the newest one that the watermark has closed"
        if s.window.kind == "session":
            return f"{newest}, of events that were not behind the watermark when they came"
        return newest
    return {
        "over": f"events with t - {length} <= event time <= t",
        "tumble": f"the {length} that hold t, up to t",
        "hop": f"of the windows of {length} that hold t, the one that ends first, up to t",
        "session": f"the session whose last event is at most {length} before t, if there is one",
    }[s.window.kind]


def state_size(d: WindowedView, s: Statement, rate: float) -> StateSize:
    """An estimate for an entity with `rate` events a day."""
    kept = d.source.retention_us
    shown = length_in_words(kept)
    window, plan = s.window, plan_of(d)
    if window.kind == "over":
        width = 3 + (d.source.event_id is not None) + len(_values(plan, s))
        events = min(d.max_events_per_entity, round(rate * (window.size_us + kept) / _DAY_US))
        return StateSize(
            f"the events of {length_in_words(window.size_us)} and of {shown} for late ones, {width} words each "
            f"(time, place, bits, numbers), at most {d.max_events_per_entity:,}: about {events:,}",
            events * width,
        )
    summary = [_summary(a) for a in s.aggregates]
    in_words = " + ".join(text for text, _ in summary) or "0"
    distinct = sum(1 for a in s.aggregates if a.function == "count_distinct")
    if window.kind == "session":
        per_session = max(1.0, rate * window.size_us / _DAY_US)
        sessions = 1 + round(kept / _DAY_US * min(rate, _DAY_US / window.size_us))
        words = sessions * (2 + sum(w for _, w in summary) + distinct * min(_SKETCH, round(per_session)))
        return StateSize(
            f"the sessions of {shown} and the present one, 2 + {in_words} words each: about {sessions:,}", words
        )
    tiles = -(-(window.size_us + kept) // window.slide_us) + 1
    filled = max(1, min(tiles, round(rate * tiles * window.slide_us / _DAY_US)))
    per_tile = min(_SKETCH, max(1, round(rate * window.slide_us / _DAY_US)))
    words = filled * (1 + sum(w for _, w in summary) + distinct * per_tile)
    return StateSize(
        f"tiles of {length_in_words(window.slide_us)} over {length_in_words(window.size_us)} and {shown} for late events, "
        f"1 + {in_words} words each, at most {tiles:,}: about {filled:,} with events",
        words,
    )


def _values(plan: Plan, s: Statement) -> set[int]:
    inputs = plan.inputs[plan.definition.statements.index(s)]
    return {i.value for i in inputs if i.value is not None}


def _summary(a: Aggregate) -> tuple[str, int]:
    if a.function == "count_distinct":
        return f"up to {_SKETCH:,} hashes", 1
    words = _SUMMARY_WORDS[a.function]
    return str(words), words


def _size(d: WindowedView, rate: float) -> str:
    sizes = [state_size(d, s, rate).words for s in d.statements]
    ids = 0
    if d.source.event_id is not None:
        ids = 2 * round(rate * d.source.retention_us / _DAY_US)
    total = _WORD * (_HEADER_WORDS + sum(sizes) + ids)
    parts = " + ".join(f"{n:,}" for n in [_HEADER_WORDS, *sizes, *([ids] if ids else [])])
    named = ["header", *(f"window {n}" for n in range(1, len(sizes) + 1)), *(["event ids"] if ids else [])]
    return (
        f"state per entity, at {rate:g} events a day: {_WORD} bytes x ({parts}) = about {total:,} bytes\n"
        f"  ({', '.join(named)}; an estimate, measured by `make bench-stream`)"
    )
