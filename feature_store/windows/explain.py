"""What a windowed view does, for people: its plan, the state it keeps and how large that is, and the SQL it compiles to."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta

from feature_store.windows.definition import WindowedView
from feature_store.windows.flink import flink_sql
from feature_store.windows.in_words import aggregate_text, output_text, window_text
from feature_store.windows.ir import Statement
from feature_store.windows.layout import Track, layout_of
from feature_store.windows.plan import SKETCH_SIZE, plan_of
from feature_store.windows.spark import spark_sql
from feature_store.windows.sql_intervals import length_in_words

_DAY_US = 86_400_000_000
_WORD = 4
"""Bytes of a word as stored, without the units of it that are zero; measured: 2.5 to 4."""
_HEADER_WORDS = 12
"""What `blob.py` puts before the sections, and one partition's offset."""


@dataclass(frozen=True)
class Section:
    """A part of one entity's state: what it holds in words, and how many `words` (see `blob.py`) at the given rate of events."""

    formula: str
    words: int


def explain(definition: WindowedView, *, events_per_day: float = 10.0) -> str:
    """Everything about a definition as text; sizes are of an entity with so many events per day, evenly spread."""
    from feature_store.windows.history import history_sql

    parts = [
        _head(definition),
        *(_statement(definition, n, s) for n, s in enumerate(definition.statements, 1)),
        _state(definition, events_per_day),
        "DuckDB (history; `entities` and `events` are given):\n" + history_sql(definition, "entities", "events"),
        "Flink SQL:\n" + ";\n\n".join(flink_sql(definition)) + ";",
        "Spark SQL:\n" + ";\n\n".join(spark_sql(definition)) + ";",
    ]
    return "\n\n".join(parts)


def _head(d: WindowedView) -> str:
    source = d.source
    ttl = length_in_words(d.ttl // timedelta(microseconds=1)) if d.ttl else "none"
    twice = "two offsets are two facts" if source.event_id is None else f"a repeated {source.event_id} counts once"
    idle = "never"
    if source.idle_timeout_us is not None and d.closes_windows:  # nothing else waits for a watermark
        idle = f"after {length_in_words(source.idle_timeout_us)} without a message, under the wall clock"
    return (
        f"{d.name}: topic {d.topic}, key {', '.join(d.entity_key)}, ttl {ttl}, definition {d.hash}\n"
        f"events: {source.format}; {twice}; older than the watermark by more than {length_in_words(source.retention_us)}: dropped; "
        f"watermark {length_in_words(source.allowed_lateness_us)} behind the newest event, moved on by the clock: {idle}"
    )


def _statement(d: WindowedView, number: int, s: Statement) -> str:
    inputs = plan_of(d).inputs[number - 1]
    lines = [f"{number}. {window_text(s.window)}: {reading_text(s)}"]
    lines += [f"   {o.name} ({o.type}) = {output_text(s, o)}" for o in s.outputs]
    for a, i in zip(s.aggregates, inputs, strict=True):
        reads = [f"bit {i.bit}"] if i.bit is not None else ["every event"]
        reads += [f"_v{i.value}"] if i.value is not None else []
        lines.append(f"   keeps {aggregate_text(a)} from {', '.join(reads)}")
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


def state_sections(d: WindowedView, rate: float) -> list[Section]:
    """What the state of an entity with `rate` evenly spread events a day holds; statements share what they can."""
    layout = layout_of(d)
    late, day = layout.retention, rate / _DAY_US
    sections = []
    if layout.has_id:
        ids = min(layout.cap, round(day * late))
        sections.append(Section(f"event ids of {length_in_words(late)}, 2 words each: about {ids:,}", 2 * ids))
    if layout.over:
        events, width = min(layout.cap, round(day * layout.over_size)), layout.event_width
        sections.append(
            Section(
                f"events of {length_in_words(layout.over_size)}, {_words(width)} each, at most {layout.cap:,}: about {events:,}",
                events * width,
            )
        )
    return sections + [_track_section(track, late, day) for track in layout.tracks]


def _track_section(track: Track, late: int, per_us: float) -> Section:
    length = length_in_words(track.length_us)
    if track.kind == "tiles":
        most = track.windows + (late // track.length_us if track.on_close else 0) + 1
        rows = max(1, min(most, round(per_us * most * track.length_us)))
        text = f"tiles of {length}, {_words(track.width)} each, at most {most:,}: about {rows:,} with events"
    else:
        between = 1 / per_us  # events at most a gap apart are one session
        rows = 1 if between <= track.length_us else 1 + round((late + track.length_us) / between)
        text = f"sessions of {length_in_words(late)} with gap {length}, {_words(track.width)} each: about {rows:,}"
    words = rows * track.width
    if track.partials.sketches:
        hashes = len(track.partials.sketches) * min(SKETCH_SIZE, max(1, round(per_us * track.length_us)))
        text += f"; of each up to {SKETCH_SIZE:,} hashes per COUNT(DISTINCT), 2 words each: about {hashes:,}"
        words += 2 * rows * hashes
    return Section(text, words)


def _words(n: int) -> str:
    return f"{n} word{'s' if n > 1 else ''}"


def state_bytes(d: WindowedView, rate: float) -> int:
    """About how large the stored state of such an entity is."""
    return _WORD * (_HEADER_WORDS + sum(s.words for s in state_sections(d, rate)))


def _state(d: WindowedView, rate: float) -> str:
    return "\n".join(
        [
            f"state of one entity, at {rate:g} events a day: about {state_bytes(d, rate):,} bytes, {_WORD} for a word",
            f"   {_HEADER_WORDS} words: what it is of, offsets and times",
            *(f"   {s.formula}" for s in state_sections(d, rate)),
            "   (an estimate; `make bench-stream` measures)",
        ]
    )
