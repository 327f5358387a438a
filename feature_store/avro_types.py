"""Whether the Avro schema of a source fits what its view declares: found at `feast apply`, not by a topic of dead letters."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from feature_store.errors import DefinitionError
from feature_store.event_codec import avro_fields

if TYPE_CHECKING:
    from feature_store.windows.definition import WindowedView

CREATED = "created"
_LOGICAL = "logicalType"
_TIMES = ("timestamp-millis", "timestamp-micros", "local-timestamp-millis", "local-timestamp-micros")
_PLAIN = {
    "string": ["string", "enum"],
    "int64": ["int", "long"],
    "float64": ["float", "double", "int", "long"],
    "bool": ["boolean"],
    "timestamp": ["string"],  # ISO 8601
}
"""Kind of a column -> Avro types of which a value can be one."""
_READ_AS_OTHER = ("date", "time-millis", "time-micros", "decimal", "uuid", *_TIMES)
"""Logical types that the reader turns into something else than their Avro type."""


def check_avro(view: WindowedView) -> None:
    """DefinitionError: the source's `avro_schema` is no schema, or a field is missing, or is never of its column's kind."""
    source = view.source
    if source.avro_schema is None:
        return
    found = avro_fields(source.avro_schema)
    kinds: dict[str, str] = {**dict(zip(view.entity_key, view.key_types, strict=True)), **source.columns}
    kinds[source.timestamp] = "timestamp"
    if source.event_id is not None:
        kinds[source.event_id] = "string"
    if CREATED in found:
        kinds[CREATED] = "timestamp"
    for name, kind in kinds.items():
        if name not in found:
            raise DefinitionError(f"{view.name}: not a field of the Avro schema", value=name, valid=found)
        types = list(found[name])
        if not any(_fits(t, kind) for t in types):
            raise DefinitionError(
                f"{view.name}: field {name} of the Avro schema cannot be {kind}",
                value=", ".join(_shown(t) for t in types) or "null",
                valid=[*_PLAIN[kind], *(_TIMES if kind == "timestamp" else ())],
            )


def _fits(avro: Mapping[str, Any], kind: str) -> bool:
    logical = avro.get(_LOGICAL)
    if kind == "timestamp" and avro["type"] == "long":
        return logical in _TIMES
    return avro["type"] in _PLAIN[kind] and logical not in _READ_AS_OTHER


def _shown(avro: Mapping[str, Any]) -> str:
    return f"{avro['type']} ({avro[_LOGICAL]})" if _LOGICAL in avro else str(avro["type"])
