"""Bytes in and out of Redis: entity keys, hash fields, times and values, in the layout of Feast's own Redis store.

One hash per entity key (entity key v3 + project), shared by all views of that key:

| Field | Value |
|---|---|
| `mmh3_32("{view}:{feature}")`, 4 bytes little-endian | `Value` proto; zero bytes: null |
| `_ts:{view}` | `Timestamp` proto: event time of the row |
| `_pf:{view}` | ours, unknown to Feast: event time, then `created` where known, each `>qI` (seconds, nanoseconds) |

Times are nanoseconds since the epoch (int), so that no input is rounded. Pure: no I/O, no clock.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from operator import index
from typing import Any, Literal

import mmh3

from feature_store.clock import from_micros, to_micros
from feature_store.errors import DataError, DefinitionError, UsageError

KeyType = Literal["STRING", "BYTES", "INT32", "INT64", "UNIX_TIMESTAMP"]

_TYPE_NUMBERS = {"BYTES": 1, "STRING": 2, "INT32": 3, "INT64": 4, "UNIX_TIMESTAMP": 8}
_NULL_KEY = struct.pack("<II", 0, 0)
"""Stands for a null key value in a read: well-formed, and a key that no writer produces, so nothing is found."""
_NULL_UNIX_TIMESTAMP = -(2**63)
_SECOND = 1_000_000_000
_MASK = 2**64 - 1
_PAIR = struct.Struct(">qI")
_LENGTHS = struct.Struct("<II")


def feature_field(view: str, feature: str) -> bytes:
    """The hash field of a feature of a view (its stored, that is versioned, name)."""
    return mmh3.hash(f"{view}:{feature}", signed=False).to_bytes(4, "little")


def timestamp_field(view: str) -> bytes:
    """The hash field of a row's event time: Feast's own."""
    return b"_ts:" + view.encode()


def pair_field(view: str) -> bytes:
    """The hash field of a row's (event time, created) pair: ours."""
    return b"_pf:" + view.encode()


# --- times ------------------------------------------------------------------------------------------------------------


def nanos_of(t: datetime) -> int:
    """Nanoseconds since the epoch; naive is UTC; a pandas Timestamp keeps its nanoseconds. DataError for NaT."""
    if t != t:  # NaT is the one datetime that differs from itself
        raise DataError("a row without an event timestamp cannot be stored online", value=str(t))
    return to_micros(t) * 1000 + getattr(t, "nanosecond", 0)


def datetime_of(ns: int) -> datetime:
    """The UTC time, at the microsecond below."""
    return from_micros(ns // 1000)


def encode_timestamp(ns: int) -> bytes:
    """The `Timestamp` proto, byte for byte as protobuf writes it."""
    seconds, nanos = divmod(ns, _SECOND)
    return (b"\x08" + _varint(seconds & _MASK) if seconds else b"") + (b"\x10" + _varint(nanos) if nanos else b"")


def decode_timestamp(data: bytes) -> int:
    """Nanoseconds of a `Timestamp` proto."""
    seconds = nanos = i = 0
    while i < len(data):
        tag = data[i]
        value, i = _read_varint(data, i + 1)
        if tag == 0x08:
            seconds = _signed(value)
        elif tag == 0x10:
            nanos = value
        else:
            raise DataError("not a Timestamp proto in Redis", value=data.hex())
    return seconds * _SECOND + nanos


def encode_pair(event_ns: int, created_ns: int | None) -> bytes:
    """The `_pf:` value; `created` is left out where the row has none (it then counts as known at its event time)."""
    event = _PAIR.pack(*divmod(event_ns, _SECOND))
    return event if created_ns is None else event + _PAIR.pack(*divmod(created_ns, _SECOND))


def decode_pair(data: bytes) -> tuple[int, int | None]:
    """(event, created) of a `_pf:` value."""
    times = [seconds * _SECOND + nanos for seconds, nanos in _PAIR.iter_unpack(data)]
    return times[0], times[1] if len(times) > 1 else None


# --- entity keys ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KeyPart:
    """One join key: its name in Redis, its name in a request (None: the constant key of an entity-less view), its type."""

    stored: str
    requested: str | None
    type: KeyType


class KeyLayout:
    """Makes the Redis key of entity rows with one set of join keys. `parts` may come in any order."""

    def __init__(self, project: str, parts: Sequence[KeyPart]) -> None:
        self.parts = tuple(sorted(parts, key=lambda p: p.stored))  # Feast sorts by the stored name
        for part in self.parts:
            if part.type not in _TYPE_NUMBERS:
                raise DefinitionError(
                    f"join key {part.stored} has a type that cannot be a Redis key",
                    value=part.type,
                    valid=_TYPE_NUMBERS,
                )
        names = [p.stored.encode() for p in self.parts]
        self.prefix = struct.pack("<I", len(names)) + b"".join(_LENGTHS.pack(2, len(n)) + n for n in names)
        self.suffix = project.encode()
        self._encoders = [(p.requested, _TYPE_NUMBERS[p.type], _KEY_ENCODERS[p.type]) for p in self.parts]

    def encode(self, entity: Any, row: int) -> bytes:
        """The Redis key of `entity` (mapping of requested join keys to values); `row` is named in a UsageError.

        A null value gives a key under which nothing is ever stored, as a null key matches nothing in history.
        """
        out = [self.prefix]
        for name, number, encoder in self._encoders:
            value = "" if name is None else entity[name]
            if value is None:
                out.append(_NULL_KEY)
                continue
            try:
                data = encoder(value)
            except (TypeError, ValueError, struct.error) as e:
                wanted = next(p.type for p in self.parts if p.requested == name)
                raise UsageError(
                    f"entity row {row}: join key {name} must be {wanted}, not {type(value).__name__}",
                    value=value,
                    next_step=f"pass {_EXAMPLES[wanted]}",
                ) from e
            out.append(_LENGTHS.pack(number, len(data)) + data)
        out.append(self.suffix)
        return b"".join(out)


def join_keys_of(key: bytes, project: str) -> list[str] | None:
    """The join keys of a Redis key of exactly this project; None for any other key."""
    try:
        (count,) = struct.unpack_from("<I", key)
        names, i = [], 4
        for n in range(2 * count):  # names, then values, in one shape: type, length, bytes
            number, length = _LENGTHS.unpack_from(key, i)
            i += 8 + length
            if n < count:
                if number != 2:
                    return None
                names.append(key[i - length : i].decode())
    except (struct.error, UnicodeDecodeError):
        return None
    return names if key[i:] == project.encode() else None


def _text_key(value: Any) -> bytes:
    if not isinstance(value, str):
        raise TypeError
    return value.encode()


def _bytes_key(value: Any) -> bytes:
    if not isinstance(value, bytes):
        raise TypeError
    return value


def _integer(value: Any) -> int:
    if isinstance(value, bool):
        raise TypeError
    return index(value)


def _time_key(value: Any) -> bytes:
    if isinstance(value, datetime):  # whole seconds, as Feast's UNIX_TIMESTAMP
        return struct.pack("<q", nanos_of(value) // _SECOND)
    return struct.pack("<q", _integer(value))


_KEY_ENCODERS: dict[str, Callable[[Any], bytes]] = {
    "STRING": _text_key,
    "BYTES": _bytes_key,
    "INT32": lambda v: struct.pack("<i", _integer(v)),
    "INT64": lambda v: struct.pack("<q", _integer(v)),
    "UNIX_TIMESTAMP": _time_key,
}
_EXAMPLES = {
    "STRING": "a string",
    "BYTES": "bytes",
    "INT32": "a whole number of 32 bits",
    "INT64": "a whole number of 64 bits",
    "UNIX_TIMESTAMP": "a time, or whole seconds since 1970",
}


# --- values -----------------------------------------------------------------------------------------------------------


def decode_value(data: bytes, value_type: Any = None) -> object:
    """The Python value of a `Value` proto, as Feast's own converter gives it; None for a null.

    Scalars are read by their wire tag; all else, and what looks odd, goes through protobuf. `value_type` (Feast's
    ValueType) is its hint for types that were once stored as strings.
    """
    if not data:
        return None
    tag = data[0]
    try:
        if tag == 0x20 or tag == 0x18 or tag == 0x40:
            number, end = _read_varint(data, 1)
            if end == len(data):
                number = _signed(number)
                if tag != 0x40:
                    return number
                return None if number == _NULL_UNIX_TIMESTAMP else datetime.fromtimestamp(number, tz=UTC)
        elif tag == 0x29 and len(data) == 9:
            return struct.unpack_from("<d", data, 1)[0]
        elif tag == 0x35 and len(data) == 5:
            return struct.unpack_from("<f", data, 1)[0]
        elif tag == 0x38 and len(data) == 2:
            return data[1] != 0
        elif (tag == 0x12 and value_type is None) or tag == 0x0A:
            length, start = _read_varint(data, 1)
            if start + length == len(data):
                return data[start:].decode() if tag == 0x12 else data[start:]
    except (IndexError, UnicodeDecodeError):
        pass  # cut short: protobuf says what is wrong with it
    return _decode_with_protobuf(data, value_type)


def _decode_with_protobuf(data: bytes, value_type: Any) -> object:
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import feast_value_type_to_python_type
    from google.protobuf.message import DecodeError

    try:
        value = Value.FromString(data)
    except DecodeError as e:
        raise DataError("not a Value proto in Redis", value=data[:40].hex()) from e
    if value.WhichOneof("val") == "null_val":
        return None
    return feast_value_type_to_python_type(value, value_type)


def _varint(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _read_varint(data: bytes, i: int) -> tuple[int, int]:
    """(value, next position); IndexError where `data` ends within it."""
    value = shift = 0
    while True:
        byte = data[i]
        i += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, i
        shift += 7


def _signed(value: int) -> int:
    return value - 2**64 if value >= 2**63 else value
