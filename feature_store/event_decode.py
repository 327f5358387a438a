"""A batch of messages as one Arrow table: what `events.parse_message` would say of each, at a fraction of the time.

Records are read one by one (so that no message can spoil another), columns are checked and converted all at once. A
message of which any column is in doubt goes to `parse_message`, and what it says counts: both ways give the same.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import repeat
from operator import itemgetter
from typing import Any, NamedTuple

import numpy as np
import orjson
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.event_codec import BadMessageError, Codec, json_record
from feature_store.events import EARLIEST_US, KEY_SEPARATOR, LATEST_US, MessageSchema, Scalar, parse_message
from feature_store.iso_times import micros_of
from feature_store.windows.ir import Type

UTC_MICROS = pa.timestamp("us", tz="UTC")
ARROW: Mapping[str, pa.DataType] = {
    "string": pa.string(),
    "int64": pa.int64(),
    "float64": pa.float64(),
    "bool": pa.bool_(),
    "timestamp": UTC_MICROS,
}
_PYTHON: Mapping[str, frozenset[type]] = {
    "string": frozenset({str, type(None)}),
    "int64": frozenset({int, type(None)}),
    "float64": frozenset({float, int, type(None)}),
    "bool": frozenset({bool, type(None)}),
    "timestamp": frozenset({str, datetime, type(None)}),
}
_MISSING = object()
_BIG = 2**63


class Raw(NamedTuple):
    """A message as it came."""

    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


@dataclass(frozen=True, slots=True)
class RawBatch:
    """Messages as they came, by column; of each partition in the order of offsets."""

    partitions: Sequence[int]
    offsets: Sequence[int]
    keys: Sequence[bytes | None]
    values: Sequence[bytes | None]

    @classmethod
    def of(cls, messages: Sequence[Raw]) -> RawBatch:
        """The columns of messages."""
        return cls(*(list(column) for column in zip(*messages, strict=True))) if messages else cls([], [], [], [])

    @classmethod
    def consumed(cls, messages: Sequence[Any]) -> RawBatch:
        """The columns of confluent_kafka messages without error."""
        from confluent_kafka import Message

        # The methods themselves: a comprehension costs half as much again.
        partitions: Any = list(map(Message.partition, messages))  # a consumed message has both
        offsets: Any = list(map(Message.offset, messages))
        return cls(partitions, offsets, list(map(Message.key, messages)), list(map(Message.value, messages)))

    def __len__(self) -> int:
        return len(self.values)

    def __getitem__(self, i: int) -> Raw:
        return Raw(self.partitions[i], self.offsets[i], self.keys[i], self.values[i])

    def __add__(self, later: RawBatch) -> RawBatch:
        """These messages and later ones."""
        columns = ("partitions", "offsets", "keys", "values")
        return RawBatch(*([*getattr(self, c), *getattr(later, c)] for c in columns))

    def only(self, partitions: Container[int]) -> RawBatch:
        """The messages of some partitions."""
        return RawBatch.of([self[i] for i, p in enumerate(self.partitions) if p in partitions])


@dataclass
class Decoded:
    """The good messages of a batch, in its order: `rows` has the schema's columns (keys, event id, time, `created`, columns),
    `places` their places in the batch. `refused`: place and reason of the others.
    """

    rows: pa.Table
    places: np.ndarray[Any, np.dtype[np.int64]]
    refused: list[tuple[int, str]]


class Decoder:
    """Reads the messages of one topic for one view. `decode` may raise UnavailableError: the schema registry is away."""

    def __init__(self, schema: MessageSchema, codec: Codec | None = None) -> None:
        self.schema = schema
        self._codec = codec or schema.codec()
        self._types: dict[str, Type] = {}
        self._required: set[str] = {*schema.keys, schema.timestamp}
        if schema.event_id is not None:
            self._types[schema.event_id] = "string"
            self._required.add(schema.event_id)
        self._types |= schema.keys
        self._types[schema.timestamp] = "timestamp"
        self._types[schema.created] = "timestamp"
        self._types |= schema.columns
        self.fields = pa.schema([pa.field(name, ARROW[kind]) for name, kind in self._types.items()])

    def decode(self, batch: RawBatch) -> Decoded:
        """The rows of a batch and what was refused. Pure: the same batch gives the same."""
        rows, doubtful = self._records(batch)
        found: dict[str, list[Any]] = {}
        for name, kind in self._types.items():
            found[name] = self._checked(rows, name, kind, doubtful)
        arrays = {name: self._array(found, name, kind, doubtful) for name, kind in self._types.items()}
        if self.schema.keyed:
            keys = self._keys_as_text(arrays)
            theirs = pa.array(batch.keys, pa.binary())
            equal = pc.fill_null(pc.equal(theirs, pc.cast(keys, pa.binary())), False)
            if not pc.all(equal).as_py():
                doubtful.update(np.flatnonzero(~np.asarray(equal)).tolist())
        return self._settled(batch, arrays, doubtful)

    def _records(self, batch: RawBatch) -> tuple[list[dict[str, Any]], set[int]]:
        """A record per message; an empty one where there is doubt."""
        codec: Any = self._codec
        try:
            # The reader itself, without a call of ours per message.
            read: Any = orjson.loads if codec is json_record else codec
            rows = list(map(read, batch.values))
        except (BadMessageError, orjson.JSONDecodeError, TypeError):
            rows = []
        if rows and set(map(type, rows)) == {dict}:
            return rows, set()
        rows, doubtful = [], set()
        for i, value in enumerate(batch.values):
            row: dict[str, Any] = {}
            try:
                if value is not None:
                    row = codec(value)
            except BadMessageError:
                row = {}
            if not row:
                doubtful.add(i)
            rows.append(row)
        return rows, doubtful

    def _checked(self, rows: list[dict[str, Any]], name: str, kind: Type, doubtful: set[int]) -> list[Any]:
        """The values of a column, None where there is doubt."""
        if name == self.schema.created:
            values = list(map(dict.get, rows, repeat(name)))
        else:
            try:
                values = list(map(itemgetter(name), rows))
            except KeyError:
                values = [r.get(name, _MISSING) for r in rows]
        allowed = _PYTHON[kind]
        if name in self._required:
            allowed = allowed - {type(None)}
        if not set(map(type, values)) <= allowed:
            # Datetimes may come as a subclass: doubtful, so that one rule decides.
            for i, v in enumerate(values):
                if type(v) not in allowed:
                    doubtful.add(i)
                    values[i] = None
        return values

    def _array(self, found: dict[str, list[Any]], name: str, kind: Type, doubtful: set[int]) -> pa.Array:
        values = found[name]
        if kind == "timestamp":
            return self._times(values, doubtful)
        if kind == "float64":
            if int in set(map(type, values)):
                values = [v if v is None else float(v) for v in values]
            numbers = pa.array(values, pa.float64())
            finite = pc.fill_null(pc.is_finite(numbers), True)
            if not pc.all(finite).as_py():
                doubtful.update(np.flatnonzero(~np.asarray(finite)).tolist())
            return numbers
        if kind == "int64":
            try:
                return pa.array(values, pa.int64())
            except (pa.ArrowInvalid, OverflowError):
                for i, v in enumerate(values):
                    if v is not None and not -_BIG <= v < _BIG:
                        doubtful.add(i)
                        values[i] = None
                return pa.array(values, pa.int64())
        array = pa.array(values, ARROW[kind])
        if kind == "string" and (name in self.schema.keys or name == self.schema.event_id):
            empty = pc.fill_null(pc.equal(pc.binary_length(array), 0), False)
            if pc.any(empty).as_py():
                doubtful.update(np.flatnonzero(np.asarray(empty)).tolist())
        return array

    def _times(self, values: list[Any], doubtful: set[int]) -> pa.Array:
        kinds = set(map(type, values))
        if datetime in kinds:
            texts: list[Any] = [v if type(v) is str else None for v in values]
        else:
            texts = values
        text = pa.array(texts, pa.string())
        us, read = micros_of(text)
        null = np.asarray(text.is_null())
        if datetime in kinds:
            for i, v in enumerate(values):
                if type(v) is datetime:
                    doubtful.add(i) if v.tzinfo is None else None
            given = pa.array([v if type(v) is datetime and v.tzinfo else None for v in values], UTC_MICROS)
            there = np.asarray(given.is_valid())
            us = np.where(there, np.asarray(pc.fill_null(given.cast(pa.int64()), 0)), us)
            read, null = read | there, null & ~there
        bad = ~null & (~read | (us < EARLIEST_US) | (us > LATEST_US))
        if bad.any():
            doubtful.update(np.flatnonzero(bad).tolist())
            null |= bad
        return pa.array(us, mask=null if null.any() else None).cast(UTC_MICROS)

    def _keys_as_text(self, arrays: Mapping[str, pa.Array]) -> pa.Array:
        parts = [arrays[k] if kind == "string" else arrays[k].cast(pa.string()) for k, kind in self.schema.keys.items()]
        return parts[0] if len(parts) == 1 else pc.binary_join_element_wise(*parts, KEY_SEPARATOR)

    def _settled(self, batch: RawBatch, arrays: dict[str, pa.Array], doubtful: set[int]) -> Decoded:
        """The judge's word on what is in doubt."""
        table = pa.table(arrays, schema=self.fields)
        places = np.arange(len(batch))
        if not doubtful:
            return Decoded(table, places, [])
        refused, mended = [], []
        for i in sorted(doubtful):
            r = batch[i]
            try:
                m = parse_message(self.schema, r.key, r.value, self._codec)
            except BadMessageError as e:
                refused.append((i, e.message))
                continue
            row: dict[str, Scalar] = dict(zip(self.schema.keys, m.key, strict=True))
            if self.schema.event_id is not None:
                row[self.schema.event_id] = m.event_id
            mended.append((i, row | {self.schema.timestamp: m.timestamp, self.schema.created: m.created} | m.values))
        sure = np.ones(len(batch), bool)
        sure[list(doubtful)] = False
        table = table.filter(pa.array(sure))
        places = places[sure]
        if mended:
            columns = {f.name: pa.array([row[f.name] for _, row in mended], f.type) for f in self.fields}
            table = pa.concat_tables([table, pa.table(columns, schema=self.fields)])
            places = np.concatenate([places, np.array([i for i, _ in mended])])
            order = np.argsort(places)
            table, places = table.take(pa.array(order)), places[order]
        return Decoded(table.combine_chunks(), places, refused)
