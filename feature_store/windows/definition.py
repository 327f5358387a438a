"""The definition of a windowed view: what is aggregated, over which window, from which stream. Pure data, no I/O.

A definition travels as JSON in the tags of the view's own FileSource, because Feast hands stores the source and not the
view. Stream (`state.py`) and history (`history.py`) both read this one definition.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

from feature_store.errors import DefinitionError

if TYPE_CHECKING:
    from feast import Entity, FeatureView

WINDOW_TAG = "predictflow.window"
"""Tag of a FileSource (and its view) that holds the definition as JSON."""
SQL_TAG = "predictflow.sql"
"""Tag of a FileSource that holds the SELECT which backfill runs over the raw tables."""
STATE_FIELD = "window_state"
"""BYTES field of a windowed view: the state from which the online reader finalises values at read time."""

ColumnType = Literal["string", "int64"]
Function = Literal["count", "sum"]
COLUMN_TYPES = ("string", "int64")
FUNCTIONS = ("count", "sum")


@dataclass(frozen=True)
class Where:
    """Keeps the events whose string `column` is one of `values`."""

    column: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Aggregate:
    """One feature: `function` over `column` of the events with `t - window <= event_timestamp <= t`, both inclusive.

    COUNT of an empty window is 0, SUM of it null. Sums are exact int64; overflow is an error.
    """

    name: str
    function: Function
    column: str | None = None
    window: timedelta = field(kw_only=True)
    where: Where | None = field(default=None, kw_only=True)
    description: str = field(default="", kw_only=True)
    unit: str = field(default="", kw_only=True)


@dataclass(frozen=True)
class WindowedView:
    """A set of aggregates over one keyed event stream.

    `columns` are the event's columns beside key and times; `event_id` names the column that makes repeated events
    duplicates. An entity silent for longer than `ttl` (zero: never) has no value.
    """

    name: str
    entity_key: tuple[str, ...]
    topic: str
    columns: Mapping[str, ColumnType]
    aggregates: tuple[Aggregate, ...]
    ttl: timedelta
    event_id: str | None = None
    timestamp: str = "event_timestamp"
    max_events_per_entity: int = 100_000

    @property
    def longest_window(self) -> timedelta:
        return max(a.window for a in self.aggregates)

    def to_json(self) -> str:
        """Canonical JSON: the same definition gives the same text, whatever the order of `columns`."""
        return json.dumps(
            {
                "version": 1,
                "name": self.name,
                "entity_key": list(self.entity_key),
                "topic": self.topic,
                "timestamp": self.timestamp,
                "event_id": self.event_id,
                "columns": dict(self.columns),
                "ttl_us": _micros(self.ttl),
                "max_events_per_entity": self.max_events_per_entity,
                "aggregates": [
                    {
                        "name": a.name,
                        "function": a.function,
                        "column": a.column,
                        "window_us": _micros(a.window),
                        "where": {"column": a.where.column, "values": list(a.where.values)} if a.where else None,
                    }
                    for a in self.aggregates
                ],
            },
            sort_keys=True,
            separators=(",", ":"),
        )

    @classmethod
    def from_json(cls, text: str) -> WindowedView:
        d: dict[str, Any] = json.loads(text)
        return cls(
            name=d["name"],
            entity_key=tuple(d["entity_key"]),
            topic=d["topic"],
            timestamp=d["timestamp"],
            event_id=d["event_id"],
            columns=d["columns"],
            ttl=timedelta(microseconds=d["ttl_us"]),
            max_events_per_entity=d["max_events_per_entity"],
            aggregates=tuple(
                Aggregate(
                    a["name"],
                    a["function"],
                    a["column"],
                    window=timedelta(microseconds=a["window_us"]),
                    where=Where(a["where"]["column"], tuple(a["where"]["values"])) if a["where"] else None,
                )
                for a in d["aggregates"]
            ),
        )

    @cached_property
    def hash(self) -> str:
        """16 hex digits that change whenever a value could."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]


def definition_of(view_or_source: Any) -> WindowedView | None:
    """The windowed definition that a FeatureView or its source carries in its tags; None for an ordinary one."""
    for carrier in (view_or_source, getattr(view_or_source, "batch_source", None)):
        text = (getattr(carrier, "tags", None) or {}).get(WINDOW_TAG)
        if text:
            return WindowedView.from_json(text)
    return None


def windowed_feature_view(
    *,
    name: str,
    entity: Entity,
    topic: str,
    path: str,
    columns: Mapping[str, ColumnType],
    aggregates: Sequence[Aggregate],
    ttl: timedelta,
    sql: str,
    event_id: str | None = None,
    description: str = "",
    owner: str = "",
    max_events_per_entity: int = 100_000,
) -> FeatureView:
    """A plain Feast FeatureView over the event history at `path`, whose values the stream keeps current.

    `path` is relative to the offline store's path; `history/` below it is written by backfill, `stream/` by sync.
    Raises DefinitionError for an unknown function, column or type, and for duplicate names.
    """
    from feast import FeatureView, Field, FileSource
    from feast.data_format import ParquetFormat
    from feast.types import Bytes, Int64

    definition = WindowedView(
        name=name,
        entity_key=tuple(entity.join_keys) if hasattr(entity, "join_keys") else (entity.join_key,),
        topic=topic,
        columns=dict(columns),
        aggregates=tuple(aggregates),
        ttl=ttl,
        event_id=event_id,
        max_events_per_entity=max_events_per_entity,
    )
    _check(definition)
    tags = {WINDOW_TAG: definition.to_json(), "predictflow.window_hash": definition.hash}
    source = FileSource(
        name=f"{name}_source",
        path=path,
        file_format=ParquetFormat(),
        timestamp_field=definition.timestamp,
        created_timestamp_column="created",
        description=f"Events of topic {topic}: history/ from backfill, stream/ from sync",
        tags={**tags, SQL_TAG: sql},
    )
    fields = [Field(name=a.name, dtype=Int64, description=a.description, tags={"unit": a.unit}) for a in aggregates]
    state = Field(
        name=STATE_FIELD,
        dtype=Bytes,
        description="Kept events and offsets, from which values are finalised at read time; null: never seen",
        tags={"unit": "internal"},
    )
    return FeatureView(
        name=name,
        description=description,
        entities=[entity],
        ttl=ttl,
        schema=[*fields, state],
        source=source,
        owner=owner,
        tags=tags,
    )


def _check(view: WindowedView) -> None:
    if not view.aggregates:
        raise DefinitionError("windowed view without aggregates", value=view.name, next_step="add an Aggregate(...)")
    names = [a.name for a in view.aggregates]
    for duplicate in {n for n in names if names.count(n) > 1}:
        raise DefinitionError(f"{view.name}: two aggregates of one name", value=duplicate)
    for column, kind in view.columns.items():
        if kind not in COLUMN_TYPES:
            raise DefinitionError(f"{view.name}.{column}: unknown column type", value=kind, valid=COLUMN_TYPES)
    numbers = [c for c, kind in view.columns.items() if kind == "int64"]
    strings = [c for c, kind in view.columns.items() if kind == "string"]
    for a in view.aggregates:
        where = f"{view.name}.{a.name}"
        if a.function not in FUNCTIONS:
            raise DefinitionError(f"{where}: unknown function", value=a.function, valid=FUNCTIONS)
        if a.function == "sum" and a.column not in numbers:
            raise DefinitionError(f"{where}: not an int64 column of the event", value=a.column, valid=numbers)
        if a.function == "count" and a.column is not None:
            raise DefinitionError(f"{where}: count takes no column", value=a.column, next_step="use where=Where(...)")
        if a.where is not None and a.where.column not in strings:
            raise DefinitionError(f"{where}: not a string column of the event", value=a.where.column, valid=strings)
        if a.window <= timedelta(0):
            raise DefinitionError(f"{where}: window must be positive", value=str(a.window))


def _micros(delta: timedelta) -> int:
    return delta // timedelta(microseconds=1)
