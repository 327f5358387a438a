"""One message of an event topic: parsed and checked against a windowed definition, or refused with the reason.

The value is a JSON object with the entity key, the definition's columns, `event_timestamp`, the event id where the view
names one, and optionally `created`. Times are ISO 8601 with at most microseconds; without an offset they are UTC. The
message key is the entity key as text (several key columns: joined by `|`): offsets order the events of one entity only
if all of them are in one partition.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from feature_store.clock import to_micros
from feature_store.errors import DataError
from feature_store.windows.definition import WindowedView

KEY_SEPARATOR = "|"
_EARLIEST_US, _LATEST_US = -9_214_560_000_000_000, 9_214_646_399_999_999
"""Start of 1678 and end of 2261 in microseconds: Feast writes through pandas, whose nanoseconds end there."""
_TIME = re.compile(r"\d{4}-\d{2}-\d{2}[T ]\d{2}:\d{2}:\d{2}(\.\d{1,6})?(Z|[+-]\d{2}:\d{2})?")


class BadMessageError(DataError):
    """A message that does not fit the definition; it goes to the dead-letter topic with this reason."""

    code = "bad_message"


@dataclass(frozen=True, slots=True)
class Message:
    """A checked message. Times are microseconds since the epoch; `created` is None where the source gives none."""

    key: tuple[str | int, ...]
    timestamp: int
    created: int | None
    event_id: str | None
    values: dict[str, str | int | None]


def parse_message(
    definition: WindowedView, key: bytes | None, value: bytes | None, integer_keys: Collection[str] = ()
) -> Message:
    """Checks one message; BadMessageError says what is wrong. Columns the definition does not name are ignored.

    A column may be null, but not missing; key, times and event id must be there. Numbers are JSON integers within int64.
    Key columns are strings, but for those in `integer_keys`.
    """
    if value is None:
        raise BadMessageError("message without a value")
    try:
        row = json.loads(value, parse_constant=_no_constant)
    except (ValueError, RecursionError) as e:
        raise BadMessageError(f"not JSON ({e})") from e
    if not isinstance(row, dict):
        raise BadMessageError("not a JSON object", value=type(row).__name__)
    entity = tuple(_key_part(row, k, k in integer_keys) for k in definition.entity_key)
    expected = KEY_SEPARATOR.join(str(k) for k in entity)
    if key is None or key != expected.encode():
        shown = None if key is None else key[:80].decode("utf-8", "replace")
        raise BadMessageError(
            f"message key {shown!r} is not the entity key {expected[:80]!r}",
            next_step=f"produce topic {definition.topic} with {KEY_SEPARATOR.join(definition.entity_key)} as key",
        )
    event_id = None
    if definition.event_id is not None:
        event_id = _text(row, definition.event_id)
        if not event_id:
            raise BadMessageError(f"{definition.event_id} is null or empty")
    timestamp = _time(row, definition.timestamp)
    if timestamp is None:
        raise BadMessageError(f"{definition.timestamp} is null")
    return Message(
        key=entity,
        timestamp=timestamp,
        created=_time(row, "created") if "created" in row else None,
        event_id=event_id,
        values={c: _text(row, c) if kind == "string" else _int(row, c) for c, kind in definition.columns.items()},
    )


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _get(row: Mapping[str, Any], column: str) -> Any:
    if column not in row:
        raise BadMessageError("missing column", value=column)
    return row[column]


def _key_part(row: Mapping[str, Any], column: str, integer: bool) -> str | int:
    value = _int(row, column) if integer else _text(row, column)
    if value is None or value == "":
        raise BadMessageError(f"{column} is null or empty")
    return value


def _text(row: Mapping[str, Any], column: str) -> str | None:
    value = _get(row, column)
    if value is None:
        return None
    if not isinstance(value, str):
        raise BadMessageError(f"{column} is not a string", value=value)
    try:
        value.encode()
    except UnicodeEncodeError as e:
        raise BadMessageError(f"{column} is not valid Unicode ({e.reason})") from e
    return value


def _int(row: Mapping[str, Any], column: str) -> int | None:
    value = _get(row, column)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise BadMessageError(f"{column} is not an integer", value=value)
    if not -(2**63) <= value < 2**63:
        raise BadMessageError(f"{column} does not fit into an int64", value=value)
    return value


def _time(row: Mapping[str, Any], column: str) -> int | None:
    value = _get(row, column)
    if value is None:
        return None
    if not isinstance(value, str) or not _TIME.fullmatch(value):
        raise BadMessageError(
            f"{column} is not an ISO 8601 time with at most microseconds, such as 2026-01-31T08:00:00.000000Z",
            value=value,
        )
    try:
        us = to_micros(datetime.fromisoformat(value))
    except (ValueError, OverflowError) as e:
        raise BadMessageError(f"{column} is not a time ({e})", value=value) from e
    if not _EARLIEST_US <= us <= _LATEST_US:
        raise BadMessageError(f"{column} is outside the years 1678 to 2261, which Feast's writes can hold", value=value)
    return us
