"""One message of an event topic: parsed and checked against a view's schema, or refused with the reason.

The value is a record (`event_codec.py`) with the entity key, the view's columns, its time, the event id where the view
names one, and optionally `created`. Times are ISO 8601 with at most microseconds (Avro: also its logical types); without
an offset they are UTC. The message key of a windowed view's topic is the entity key as text (several key columns: joined
by `|`): offsets order the events of one entity only if all of them are in one partition.

This is the judge of every message that `event_decode.py`, which reads whole batches, is not sure of.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal

from feature_store.clock import to_micros
from feature_store.event_codec import BadMessageError, Codec, codec_of
from feature_store.windows.definition import WindowedView
from feature_store.windows.ir import Type

__all__ = ["KEY_SEPARATOR", "BadMessageError", "Message", "MessageSchema", "Scalar", "parse_message"]

KEY_SEPARATOR = "|"
CREATED = "created"
EARLIEST_US, LATEST_US = -9_214_560_000_000_000, 9_214_646_399_999_999
"""Start of 1678 and end of 2261 in microseconds: Feast writes through pandas, whose nanoseconds end there."""
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,6})?(Z|[+-]\d{2}:\d{2})?", re.ASCII)

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class MessageSchema:
    """What the messages of a topic hold for one view. `keyed`: the message key must be the entity key."""

    topic: str
    keys: Mapping[str, Literal["string", "int64"]]
    timestamp: str
    columns: Mapping[str, Type]
    event_id: str | None = None
    keyed: bool = True
    created: str = CREATED
    format: Literal["json", "avro"] = "json"
    avro_schema: str | None = None

    @classmethod
    def of_windowed(cls, definition: WindowedView) -> MessageSchema:
        """The schema of a windowed view's event source."""
        s = definition.source
        keys = dict(zip(definition.entity_key, definition.key_types, strict=True))
        return cls(s.topic, keys, s.timestamp, s.columns, s.event_id, format=s.format, avro_schema=s.avro_schema)

    def codec(self, registry_url: str | None = None) -> Codec:
        """What reads the values of the topic. DefinitionError: Avro without a schema."""
        return codec_of(self.format, self.avro_schema, registry_url)


@dataclass(frozen=True, slots=True)
class Message:
    """A checked message. Times, also those in `values`, are microseconds since the epoch; `created` may be None."""

    key: tuple[str | int, ...]
    timestamp: int
    created: int | None
    event_id: str | None
    values: dict[str, Scalar]


def parse_message(schema: MessageSchema, key: bytes | None, value: bytes | None, codec: Codec | None = None) -> Message:
    """Checks one message; BadMessageError says what is wrong. Columns that the schema does not name are ignored.

    A column may be null, but not missing; key, time and event id must be there. int64: JSON integers within 64 bits.
    float64: finite numbers. `codec` (default: the schema's own) may raise UnavailableError: a schema registry is away.
    """
    if value is None:
        raise BadMessageError("message without a value")
    row = (codec or schema.codec())(value)
    entity = tuple(_key_part(row, name, kind) for name, kind in schema.keys.items())
    expected = KEY_SEPARATOR.join(str(k) for k in entity)
    if schema.keyed and (key is None or key != expected.encode()):
        shown = None if key is None else key[:80].decode("utf-8", "replace")
        raise BadMessageError(
            f"message key {shown!r} is not the entity key {expected[:80]!r}",
            next_step=f"produce topic {schema.topic} with {KEY_SEPARATOR.join(schema.keys)} as key",
        )
    event_id = None
    if schema.event_id is not None:
        event_id = _text(row, schema.event_id)
        if not event_id:
            raise BadMessageError(f"{schema.event_id} is null or empty")
    timestamp = _time(row, schema.timestamp)
    if timestamp is None:
        raise BadMessageError(f"{schema.timestamp} is null")
    return Message(
        key=entity,
        timestamp=timestamp,
        created=_time(row, schema.created) if schema.created in row else None,
        event_id=event_id,
        values={name: _READ[kind](row, name) for name, kind in schema.columns.items()},
    )


def _get(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise BadMessageError("missing column", value=column)
    return row[column]


def _key_part(row: Mapping[str, Any], column: str, kind: str) -> str | int:
    value = _int(row, column) if kind == "int64" else _text(row, column)
    if value is None or value == "":
        raise BadMessageError(f"{column} is null or empty")
    return value


def _text(row: Mapping[str, Any], column: str) -> str | None:
    value = _get(row, column)
    if value is None:
        return None
    if type(value) is not str:
        raise BadMessageError(f"{column} is not a string", value=value)
    return value


def _int(row: Mapping[str, Any], column: str) -> int | None:
    value = _get(row, column)
    if value is None:
        return None
    if type(value) is not int:
        raise BadMessageError(f"{column} is not an integer", value=value)
    if not -(2**63) <= value < 2**63:
        raise BadMessageError(f"{column} does not fit into an int64", value=value)
    return value


def _float(row: Mapping[str, Any], column: str) -> float | None:
    value = _get(row, column)
    if value is None:
        return None
    if type(value) not in (int, float):
        raise BadMessageError(f"{column} is not a number", value=value)
    if not math.isfinite(value):
        raise BadMessageError(f"{column} is not finite", value=value)
    return float(value)


def _bool(row: Mapping[str, Any], column: str) -> bool | None:
    value = _get(row, column)
    if value is not None and type(value) is not bool:
        raise BadMessageError(f"{column} is not true or false", value=value)
    return value


def _time(row: Mapping[str, Any], column: str) -> int | None:
    value = _get(row, column)
    if value is None:
        return None
    try:
        if isinstance(value, datetime):  # Avro's logical types
            us = to_micros(value)
        elif type(value) is str and _TIME.fullmatch(value):
            us = to_micros(datetime.fromisoformat(value))
        else:
            raise BadMessageError(
                f"{column} is not an ISO 8601 time with at most microseconds, such as 2026-01-31T08:00:00.000000Z",
                value=value,
            )
    except (ValueError, OverflowError) as e:
        raise BadMessageError(f"{column} is not a time ({e})", value=value) from e
    if not EARLIEST_US <= us <= LATEST_US:
        raise BadMessageError(f"{column} is outside the years 1678 to 2261, which Feast's writes can hold", value=value)
    return us


_READ: Mapping[str, Any] = {"string": _text, "int64": _int, "float64": _float, "bool": _bool, "timestamp": _time}
