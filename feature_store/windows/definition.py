"""The definition of a windowed view: its SQL, and the event stream that the SQL is over. Pure data, no I/O.

It travels as JSON in the tags of the view's own FileSource, because Feast hands stores the source and not the view. What the
SQL means is not stored but read from it again (`statements`), so that the text stays the one definition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import timedelta
from functools import cached_property, lru_cache
from typing import Any, Literal

from feature_store.errors import DefinitionError
from feature_store.windows.ir import Output, Statement, Type

WINDOW_TAG = "predictflow.window"
"""Tag of a FileSource (and its view) that holds the definition as JSON."""
SQL_TAG = "predictflow.sql"
"""Tag of a FileSource that holds the SELECT which backfill runs over the raw tables."""
STATE_FIELD = "window_state"
"""BYTES field of a windowed view: the state from which the online reader finalises values at read time."""

_MICROSECOND = timedelta(microseconds=1)
_VERSION = 2


@dataclass(frozen=True)
class EventSource:
    """A keyed event stream: one topic, whose messages have the entity key, `timestamp` and `columns`.

    `columns`: the event's columns beside key, times and event id. `event_id`: the (string) column that makes repeated
    events duplicates. Lengths are microseconds. `allowed_lateness_us`: how far the watermark stays behind the greatest
    event time of its partition. `retention_us`: events older than the watermark by more than this are dropped, and logged
    as dropped. `idle_timeout_us`: a partition silent for so long has its watermark moved on by the clock (None: never).
    `format`: json, or avro with `avro_schema` (or a schema registry's framing).
    """

    topic: str
    columns: Mapping[str, Type]
    retention_us: int
    timestamp: str = "event_timestamp"
    event_id: str | None = None
    allowed_lateness_us: int = 0
    idle_timeout_us: int | None = None
    format: Literal["json", "avro"] = "json"
    avro_schema: str | None = None


@dataclass(frozen=True)
class WindowedView:
    """The outputs of `sql` (one or more SELECTs, `;` between them) as features of one entity.

    An entity silent for longer than `ttl` (zero: never) has no value. Above `max_events_per_entity` kept events the
    outputs of the OVER windows that need more are errors online; of so many event ids the oldest are forgotten.
    """

    name: str
    entity_key: tuple[str, ...]
    key_types: tuple[Literal["string", "int64"], ...]
    source: EventSource
    sql: str
    ttl: timedelta
    max_events_per_entity: int = 100_000

    @property
    def topic(self) -> str:
        return self.source.topic

    @cached_property
    def statements(self) -> tuple[Statement, ...]:
        """What the SQL says. DefinitionError (with line and column) for what is not supported."""
        from feature_store.windows.parse import parse

        return parse(self.sql, self.source, self.entity_key, self.key_types)

    @property
    def outputs(self) -> list[Output]:
        """The features, in the order of the SQL."""
        return [o for s in self.statements for o in s.outputs]

    @cached_property
    def longest_window_us(self) -> int:
        return max(s.window.size_us for s in self.statements)

    @cached_property
    def closes_windows(self) -> bool:
        """Whether a value depends on the watermark (EMIT ON WINDOW CLOSE)."""
        return any(s.window.on_close for s in self.statements)

    def to_json(self) -> str:
        """Canonical JSON: the same definition gives the same text, whatever the order of `columns`."""
        d = asdict(self) | {"version": _VERSION, "ttl": self.ttl // _MICROSECOND}
        return json.dumps(d, sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> WindowedView:
        """DefinitionError for a definition that another version of this code has written."""
        d: dict[str, Any] = json.loads(text)
        if (version := d.pop("version", None)) != _VERSION:
            raise DefinitionError(
                f"windowed view {d.get('name')}: its definition in the registry is of another version",
                value=version,
                valid=[_VERSION],
                next_step="feast apply, then predictflow windows bootstrap",
            )
        return cls(
            **d
            | {
                "entity_key": tuple(d["entity_key"]),
                "key_types": tuple(d["key_types"]),
                "source": EventSource(**d["source"]),
                "ttl": timedelta(microseconds=d["ttl"]),
            }
        )

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change whenever a value could."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def __hash__(self) -> int:
        return hash(self.hash)


_from_json = lru_cache(maxsize=256)(WindowedView.from_json)


def definition_of(view_or_source: Any) -> WindowedView | None:
    """The windowed definition that a FeatureView or its source carries in its tags; None for an ordinary one."""
    for carrier in (view_or_source, getattr(view_or_source, "batch_source", None)):
        text = (getattr(carrier, "tags", None) or {}).get(WINDOW_TAG)
        if text:
            return _from_json(text)
    return None
