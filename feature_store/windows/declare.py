"""Declaring a windowed view: SQL over an event stream in, a plain Feast FeatureView out.

    from feature_store.windows.declare import event_source, windowed_feature_view

Everything wrong with a definition is a DefinitionError here, that is when `feast apply` reads the file.
"""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from feature_store.avro_types import check_avro
from feature_store.errors import DefinitionError
from feature_store.windows.definition import SQL_TAG, STATE_FIELD, WINDOW_TAG, EventSource, WindowedView
from feature_store.windows.ir import TYPES, Type
from feature_store.windows.sql_tokens import SqlError

if TYPE_CHECKING:
    from feast import Entity, FeatureView

_MICROSECOND = timedelta(microseconds=1)
_BY_VIEW = -1
"""Retention that a view has still to fill in: its longest window."""
CREATED = "created"


def event_source(
    *,
    topic: str,
    columns: Mapping[str, Type],
    timestamp: str = "event_timestamp",
    event_id: str | None = None,
    allowed_lateness: timedelta = timedelta(0),
    retention: timedelta | None = None,
    idle_timeout: timedelta | None = None,
    format: Literal["json", "avro"] = "json",
    avro_schema: str | None = None,
) -> EventSource:
    """A keyed event stream; see `EventSource` for what each setting means.

    `columns`: those beside the key, the time and the event id, with types of `ir.TYPES`. `retention`: how much older than
    the watermark an event may be and still count; default: the longest window of the view, at least `allowed_lateness`.
    """
    where = f"event source {topic}"
    if not topic:
        raise DefinitionError("an event source needs a topic", value=topic, next_step='write topic="customer-events"')
    for column, kind in columns.items():
        if kind not in TYPES:
            raise DefinitionError(f"{where}: unknown type of column {column}", value=kind, valid=TYPES)
    names = [timestamp, *([event_id] if event_id is not None else []), *columns]
    for name in names:
        if not name or name.startswith("_") or name in (CREATED, STATE_FIELD):
            raise DefinitionError(
                f"{where}: a column may not have this name",
                value=name,
                next_step=f"not empty, {CREATED}, {STATE_FIELD}, or _...",
            )
    _no_twice(names, f"{where}: two columns of one name (case aside)")
    lateness = _micros(allowed_lateness, f"{where}: allowed_lateness", least=0)
    kept = _BY_VIEW if retention is None else _micros(retention, f"{where}: retention", least=0)
    if kept != _BY_VIEW and kept < lateness:
        raise DefinitionError(
            f"{where}: retention below allowed_lateness, so that events would be dropped which are not late yet",
            value=str(retention),
            next_step=f"at least {allowed_lateness}",
        )
    if format not in ("json", "avro"):
        raise DefinitionError(f"{where}: unknown format", value=format, valid=("json", "avro"))
    if avro_schema is not None:
        _check_avro(avro_schema, format, names, where)
    return EventSource(
        topic=topic,
        columns=dict(columns),
        retention_us=kept,
        timestamp=timestamp,
        event_id=event_id,
        allowed_lateness_us=lateness,
        idle_timeout_us=None if idle_timeout is None else _micros(idle_timeout, f"{where}: idle_timeout", least=1),
        format=format,
        avro_schema=avro_schema,
    )


def windowed_feature_view(
    *,
    name: str,
    entity: Entity,
    source: EventSource,
    sql: str | Path,
    ttl: timedelta,
    path: str | None = None,
    description: str = "",
    owner: str = "",
    features: Mapping[str, tuple[str, str]] | None = None,
    history_sql: str | None = None,
    max_events_per_entity: int = 100_000,
    bounded_keys: bool = False,
) -> FeatureView:
    """A plain Feast FeatureView with a field for every output of `sql`, whose values the stream keeps current.

    `sql`: the text, or the path of a .sql file (relative to the file that calls). `features`: (description, unit) of
    outputs. `path`: the event history, relative to the offline store's path (default: the view's name); `history/` below
    it is written by backfill, which runs `history_sql` over the raw tables, `stream/` by sync. `ttl`: an entity silent for
    longer has no value; zero, never, only with `bounded_keys=True`, because state then lives for ever.
    """
    text, file = _text(sql, Path(sys._getframe(1).f_globals.get("__file__", ".")).parent)
    keys, key_types = _keys(name, entity, source)
    if ttl < timedelta(0) or (not ttl and not bounded_keys):
        raise DefinitionError(
            f"{name}: ttl must be positive, or the state of every key ever seen is kept",
            value=str(ttl),
            next_step="give a ttl, or bounded_keys=True where the number of keys is bounded",
        )
    if max_events_per_entity < 1:
        raise DefinitionError(f"{name}: max_events_per_entity must be positive", value=max_events_per_entity)
    definition = WindowedView(
        name=name,
        entity_key=keys,
        key_types=key_types,
        source=source,
        sql=text,
        ttl=ttl,
        max_events_per_entity=max_events_per_entity,
    )
    try:
        definition.statements  # noqa: B018 - read here, so that an error names where the text stands
    except SqlError as e:
        where = f"{name} ({file})" if file is not None else name
        raise DefinitionError(f"{where}: {e.what}", value=e.value, valid=e.valid, next_step=e.next_step) from e
    if source.retention_us == _BY_VIEW:
        kept = max(definition.longest_window_us, source.allowed_lateness_us)
        definition = replace(definition, source=replace(source, retention_us=kept))
    check_avro(definition)
    return _view(definition, entity, path or name, description, owner, features or {}, history_sql)


def _view(
    definition: WindowedView,
    entity: Entity,
    path: str,
    description: str,
    owner: str,
    features: Mapping[str, tuple[str, str]],
    history_sql: str | None,
) -> FeatureView:
    from feast import FeatureView, Field, FileSource
    from feast.data_format import ParquetFormat
    from feast.types import Bool, Bytes, Float64, Int64, String, UnixTimestamp

    from feature_store.windows.plan import plan_of

    plan_of(definition)  # more filters than a view can hold are refused here too
    types: dict[Type, Any] = {
        "int64": Int64, "float64": Float64, "bool": Bool, "string": String, "timestamp": UnixTimestamp,
    }  # fmt: skip
    outputs = {o.name: o for o in definition.outputs}
    for named in features:
        if named not in outputs:
            raise DefinitionError(
                f"{definition.name}: described, but not an output of the SQL", value=named, valid=outputs
            )
    described = {o: features.get(o, ("", "")) for o in outputs}
    tags = {WINDOW_TAG: definition.to_json(), "predictflow.window_hash": definition.hash}
    source = FileSource(
        name=f"{definition.name}_source",
        path=path,
        file_format=ParquetFormat(),
        timestamp_field=definition.source.timestamp,
        created_timestamp_column=CREATED,
        description=f"Events of topic {definition.topic}: history/ from backfill, stream/ from sync",
        tags={**tags, SQL_TAG: history_sql} if history_sql is not None else tags,
    )
    fields = [
        Field(name=n, dtype=types[o.type], description=described[n][0], tags={"unit": described[n][1]})
        for n, o in outputs.items()
    ]
    state = Field(
        name=STATE_FIELD,
        dtype=Bytes,
        description="What is kept of the events, from which values are finalised at read time; null: never seen",
        tags={"unit": "internal"},
    )
    return FeatureView(
        name=definition.name,
        description=description,
        entities=[entity],
        ttl=definition.ttl,
        schema=[*fields, state],
        source=source,
        owner=owner,
        tags=tags,
    )


def _text(sql: str | Path, base: Path) -> tuple[str, Path | None]:
    """The SQL, and the file that it stands in."""
    if isinstance(sql, str) and not re.fullmatch(r"[^\n;()]+\.sql", sql.strip(), re.IGNORECASE):
        return sql, None  # as it is, so that errors name the lines of the user's text
    file = base / (sql.strip() if isinstance(sql, str) else sql)
    try:
        return file.read_text(encoding="utf-8-sig"), file  # some editors begin a file with a mark
    except (OSError, UnicodeDecodeError) as e:
        reason = e.strerror if isinstance(e, OSError) else "not UTF-8"
        raise DefinitionError(
            f"the SQL cannot be read ({reason})", value=str(file), next_step="give the SQL or its file"
        ) from e


def _keys(
    view: str, entity: Entity, source: EventSource
) -> tuple[tuple[str, ...], tuple[Literal["string", "int64"], ...]]:
    from feast import ValueType

    kinds: dict[Any, Literal["string", "int64"]] = {ValueType.STRING: "string", ValueType.INT64: "int64"}
    if entity.value_type not in kinds:
        raise DefinitionError(
            f"{view}: a stream's key is a string or an int64",
            value=f"{entity.name}: {entity.value_type.name}",
            valid=[k.name for k in kinds],
            next_step=f"write value_type=ValueType.STRING on the entity {entity.name}",
        )
    key = str(entity.join_key)
    _no_twice(
        [key, CREATED, STATE_FIELD, source.timestamp, *([source.event_id] if source.event_id else []), *source.columns],
        f"{view}: the key is a column of its own, not one of the source's",
    )
    return (key,), (kinds[entity.value_type],)


def _check_avro(schema: str, format: str, names: Sequence[str], where: str) -> None:
    if format != "avro":
        raise DefinitionError(f"{where}: avro_schema without avro", value=format, next_step='write format="avro"')
    try:
        fields = [f["name"] for f in json.loads(schema)["fields"]]
    except (ValueError, KeyError, TypeError) as e:
        raise DefinitionError(
            f"{where}: avro_schema is not the JSON of an Avro record", value=schema[:60], next_step="give its text"
        ) from e
    for name in names:
        if name not in fields:
            raise DefinitionError(f"{where}: not a field of the Avro schema", value=name, valid=fields)


def _no_twice(names: Sequence[str], what: str) -> None:
    seen: set[str] = set()
    for name in names:
        if name.lower() in seen:
            raise DefinitionError(what, value=name)
        seen.add(name.lower())


def _micros(length: timedelta, what: str, *, least: int) -> int:
    if not isinstance(length, timedelta) or length < least * _MICROSECOND:
        raise DefinitionError(
            f"{what} must be a {'positive ' if least else ''}timedelta{'' if least else ' of at least 0'}",
            value=str(length),
        )
    return length // _MICROSECOND
