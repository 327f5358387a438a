"""Records of the served log, from its topic or from a file, and the single served values in them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from feature_store.clock import to_micros
from feature_store.errors import DataError, NotFoundError


@dataclass(frozen=True)
class Served:
    """One served value of one record. `t_us`: microseconds; `read`: what was read of the value's view."""

    record: int
    entity: dict[str, Any]
    t_us: int
    feature: str
    value: Any
    status: str
    read: dict[str, Any]


def read_served(bootstrap_servers: str, topic: str, seconds: float = 10.0) -> Iterator[dict[str, Any]]:
    """The records of the served log that the topic holds now. DataError for a message that is not JSON."""
    from feature_store.topic import client_config, read_topic

    for message in read_topic(client_config(bootstrap_servers), topic, seconds):
        place = f"{topic} partition {message.partition()} offset {message.offset()}"
        yield _record(message.value() or b"", place)


def read_served_file(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a JSONL file of the served log. NotFoundError, DataError as above."""
    if not path.is_file():
        raise NotFoundError("no such file", value=str(path))
    with path.open("rb") as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield _record(line, f"{path} line {number}")


def values_of(number: int, record: Mapping[str, Any]) -> Iterator[tuple[str, Served]]:
    """(view, value) for each feature of a record. DataError for what is not a record of the served log."""
    try:
        t_us = micros(record["t"])
        for f in record["features"].values():
            read = record["views"].get(f["view"]) or {}
            yield f["view"], Served(number, record["entity"], t_us, f["feature"], f["value"], f["status"], read)
    except (KeyError, TypeError, ValueError, AttributeError) as e:
        raise not_served(record, e) from e


def after_t(served: Served, *times: str) -> str:
    """Which of the times that were read of the value's view is after t, in words; empty when none is."""
    late = [name for name in times if served.read.get(name) and micros(served.read[name]) > served.t_us]
    return ", ".join(f"{name} {served.read[name]} is after t" for name in late)


def not_served(record: Mapping[str, Any], reason: Exception) -> DataError:
    """The error for a record that lacks something."""
    return DataError(f"not a record of the served log ({reason!r})", value=str(record)[:200])


def micros(time: str) -> int:
    """An ISO 8601 time in microseconds since the epoch; ValueError, TypeError for anything else."""
    return to_micros(datetime.fromisoformat(time))


def _record(data: bytes, place: str) -> dict[str, Any]:
    try:
        record = json.loads(data)
    except ValueError as e:
        raise DataError(f"served log: not JSON ({e})", value=place) from e
    if not isinstance(record, dict):
        raise DataError("served log: not a JSON object", value=place)
    return record
