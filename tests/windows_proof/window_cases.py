"""A topic written by hand, read all ways at once: a test says what the value must be, and every side must give it."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Any

from window_definitions import TIME, view_of
from window_histories import Message
from window_oracle import Answer, Oracle, Raw
from window_platform import DROPPED, NEVER, Got, Platform, Read, Row

from feature_store.windows.definition import WindowedView
from feature_store.windows.ir import Type
from feature_store.windows.state import States

SECOND, MINUTE, HOUR, DAY = 1_000_000, 60_000_000, 3_600_000_000, 86_400_000_000


def at(text: str) -> int:
    """Microseconds of a time written as 2020-04-15 08:05[:00[.000001]], UTC."""
    return (datetime.fromisoformat(text).replace(tzinfo=UTC) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(
        microseconds=1
    )


class Topic:
    """Events of one view, sent in the order of their arrival. Columns not given are null."""

    def __init__(self, sql: str | WindowedView, columns: dict[str, Type] | None = None, **settings: Any) -> None:
        self.view = sql if isinstance(sql, WindowedView) else view_of(sql, columns=columns, **settings)
        source = self.view.source
        self.platform = Platform(self.view)
        self.oracle = Oracle(
            self.view.statements,
            retention_us=source.retention_us,
            lateness_us=source.allowed_lateness_us,
            ttl_us=self.platform.ttl_us,
            has_event_id=source.event_id is not None,
        )
        self.rows: list[Row] = []

    def send(
        self,
        time: int,
        *,
        entity: str = "a",
        visible_at: int | None = None,
        partition: int = 0,
        event_id: str | None = None,
        idle: int | None = None,
        **columns: Any,
    ) -> str | None:
        """Adds an event (`idle`: a watermark instead); gives why it is dropped. Visible at its own time unless said otherwise."""
        source = self.view.source
        offset = sum(r.partition == partition and r.dropped != "idle" for r in self.rows) - (idle is not None)
        every = {name: columns.get(name) for name in source.columns} | {TIME: time}
        assert set(columns) <= set(source.columns), f"no such column in {columns}"
        visible = time if visible_at is None else visible_at
        who = None if idle is not None else entity
        if source.event_id is not None and event_id is None and idle is None:
            event_id = f"{partition}-{offset}"
        raw = Raw(who, time, partition, offset, visible, every, event_id, idle)
        [logged] = self.oracle.feed([raw])
        message = Message(who, time, visible, every, event_id, idle)
        before = idle if idle is not None else logged.watermark
        self.rows.append(Row(message, partition, offset, visible, before, logged.dropped))
        return logged.dropped

    def read(self, t: int, entity: str = "a") -> Mapping[str, Any]:
        """The values at t: the same from the states (however batched), from history by time and by offset."""
        answer = self.oracle.read_by_time(entity, t)
        found = {
            "state": self._state(t, entity, len(self.rows) or 1),
            "state, in small batches": self._state(t, entity, 1 + len(self.rows) // 100),
        }
        self.platform.set_log(self.rows)
        found["by_time"] = self.platform.ask_history([Read(entity, t)], "by_time")[0]
        question = self.question
        found["by_offset"] = self.platform.ask_history(
            [Read(entity, t, question.offsets, question.watermark)], "by_offset"
        )[0]
        for name, got in found.items():
            assert not got.errors, f"{name}: {got.errors}"
            assert got.values is not None
            _check(name, got, answer)
        values = found["state"].values
        assert values is not None
        return values

    def status(self, t: int, entity: str = "a") -> str:
        """The status that the rules give; the values are compared as by `read`."""
        self.read(t, entity)
        return self.oracle.read_by_time(entity, t).status

    def states(self, t: int, batch: int = 1) -> tuple[States, list[str], dict[int, int]]:
        """The states of all entities after what was visible by t, the entities, and the partitions' watermarks."""
        rows = [r for r in self.rows if r.visible_at <= t]
        watermarks: dict[int, int] = {}
        for r in rows:
            lateness = self.view.source.allowed_lateness_us
            after = r.message.idle if r.message.idle is not None else r.message.time - lateness
            watermarks[r.partition] = max(watermarks.get(r.partition, NEVER), after)
        rows = [r for r in rows if r.message.entity is not None]
        entities = sorted({r.message.entity or "" for r in rows} | {"nobody"})
        blobs: list[bytes | None] = [None] * len(entities)
        for first in range(0, len(rows), batch):
            part = rows[first : first + batch]
            states = States.decode(self.view, blobs)
            numbers = self.platform.numbers([r.message for r in part])
            codes = states.apply(self.platform.events(part, entities, numbers))
            assert [DROPPED[c] for c in codes.tolist()] == [r.dropped for r in part]
            blobs = list(states.encode())
        return States.decode(self.view, blobs), entities, watermarks

    def _state(self, t: int, entity: str, batch: int) -> Got:
        states, entities, watermarks = self.states(t, batch)
        answers = self.platform.ask_states(states, [t] * len(entities), watermarks)
        i = entities.index(entity if entity in entities else "nobody")
        question, got = answers[2 * i : 2 * i + 2]
        assert isinstance(question, Read)
        assert isinstance(got, Got)
        self.question = question
        return got


def _check(name: str, got: Got, answer: Answer) -> None:
    assert got.values is not None
    for output, possible in answer.values.items():
        assert possible.allows(got.values[output]), f"{name}: {output} is {got.values[output]!r}, oracle: {possible}"
