"""An ordinary feature view fed by a topic: each message is a row, and the newest row of a key wins. No Kafka.

The view's source is a Feast KafkaSource, or the view has the tag `predictflow.topic` (JSON). A message is an object with
the join keys, the source's timestamp, optionally its created column, and the features by name. Writing is idempotent, so a
batch that comes again changes nothing; the message key may be anything.
"""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_store.batch_columns import int64_of, valid_of
from feature_store.batch_result import BatchResult, PartitionResult
from feature_store.clock import ClockMode, from_micros
from feature_store.erased_rows import ErasedRows
from feature_store.errors import DataError, DefinitionError
from feature_store.event_decode import Decoder, RawBatch
from feature_store.events import MessageSchema
from feature_store.logged import Bools, Ints
from feature_store.online_write import OnlineWriter
from feature_store.replay_clock import ReplayClock
from feature_store.stream_batch import Begun, Prepared
from feature_store.visibility import ahead, too_far_ahead, visible_times
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

TOPIC_TAG = "predictflow.topic"
"""Tag of a feature view: the topic whose messages are its rows."""
_TYPES: dict[str, Any] = {
    "STRING": "string",
    "INT32": "int64",
    "INT64": "int64",
    "FLOAT": "float64",
    "DOUBLE": "float64",
    "BOOL": "bool",
    "UNIX_TIMESTAMP": "timestamp",
}
_KEYS = {"STRING", "INT32", "INT64"}


def topic_of(view: FeatureView) -> str | None:
    """The topic that feeds an ordinary view; None for one that no topic feeds, and for a windowed one."""
    if definition_of(view) is not None:
        return None
    options = getattr(getattr(view, "stream_source", None), "kafka_options", None)
    return (options.topic if options is not None else None) or (view.tags or {}).get(TOPIC_TAG) or None


class RowView:
    """Applies messages of one topic to one ordinary view, as `StreamView` does to a windowed one."""

    def __init__(
        self,
        store: FeatureStore,
        view: FeatureView,
        offline_path: str,
        clock: ClockMode,
        *,
        schema_registry: str | None = None,
    ) -> None:
        store.refresh_registry()
        online: Any = store._get_provider().online_store  # Feast has no public way
        self.name = view.name
        self._writer = OnlineWriter(online, store.config, view)
        self._clock = clock
        self._replay = ReplayClock(online._get_client(store.config.online_store), store.project)
        self.schema = row_schema(view, self._writer.event_column, self._writer.created_column)
        self._decoder = Decoder(self.schema, self.schema.codec(schema_registry))
        self._erased = ErasedRows(offline_path, list(self.schema.keys))

    def start_partition(self, partition: int, from_offset: int, wall_us: int = 0) -> None:
        """Nothing to do: what comes again is written again, with the same end."""

    def stop_partition(self, partition: int) -> None:
        """Nothing to do."""

    def committed(self, partition: int, next_offset: int) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Nothing to do."""

    def compact(self, partition: int, wall_us: int, rest: object) -> None:
        """Nothing to do: there is no log."""

    def prepare(self, batch: RawBatch, now_us: int, wall_us: int) -> Prepared:
        """Nothing to do before the batch before is written."""
        return Prepared(batch, now_us, wall_us, BatchResult())

    def begin(self, prepared: Prepared) -> Begun:
        """Errors as `apply`."""
        return Begun(self.apply(prepared.batch, prepared.now_us, prepared.wall_us))

    def apply(self, batch: RawBatch, now_us: int, wall_us: int) -> BatchResult:
        """Writes the rows of a batch, newest wins. Safe to repeat. UnavailableError: no Redis."""
        result = BatchResult(partitions={p: PartitionResult() for p in set(batch.partitions)})
        decoded = self._decoder.decode(batch)
        refused: dict[int, str] = dict(decoded.refused)
        rows, place = decoded.rows, decoded.places
        keep = ~self._erased.of(rows)
        for i in place[~keep].tolist():
            result.partitions[batch.partitions[i]].erased += 1
        rows, place = _where(rows, place, keep)
        time, created = int64_of(rows[self.schema.timestamp]), rows[self.schema.created]
        known = np.where(valid_of(created), int64_of(created), time)
        for name, times in ((self.schema.created, known), (self.schema.timestamp, time)):
            for i in np.flatnonzero(too_far_ahead(times, wall_us)).tolist():
                refused.setdefault(int(place[i]), ahead(name, int(times[i]), "the machine's clock", wall_us))
        good = np.array([int(p) not in refused for p in place.tolist()], bool)
        rows, place = _where(rows, place, good)
        time, known = time[good], known[good]
        if self._clock == "replay" and len(place):
            new = np.zeros(len(place), bool)
            visible, early = visible_times(time, known, new, known, now_us, "replay")
            for i in np.flatnonzero(early).tolist():
                refused[int(place[i])] = ahead(self.schema.timestamp, int(time[i]), "the clock", int(visible[i]))
            rows, place = _where(rows, place, ~early)
            if len(place):
                result.clock_us = int(visible[~early].max())
                self._replay.advance(result.clock_us)  # first: the writer refuses what is ahead of it
        self._write(rows, place, from_micros(wall_us), refused)
        result.refused = [(batch[i], reason) for i, reason in sorted(refused.items())]
        for i in place.tolist():
            if i not in refused:
                result.partitions[batch.partitions[i]].applied += 1
        return result

    def _write(self, rows: pa.Table, place: Ints, wall: datetime, refused: dict[int, str]) -> None:
        """Rows that the writer refuses are found by halving; nothing is written of a table with such a row."""
        if not rows.num_rows:
            return
        try:
            self._writer.write(rows, wall=_At(wall))
        except DataError as e:
            if rows.num_rows == 1:
                refused[int(place[0])] = e.message
                return
            half = rows.num_rows // 2
            self._write(rows.slice(0, half), place[:half], wall, refused)
            self._write(rows.slice(half), place[half:], wall, refused)


class _At:
    """The machine's clock at the time of the batch."""

    mode: ClockMode = "wall"

    def __init__(self, time: datetime) -> None:
        self._time = time

    def now(self) -> datetime:
        return self._time


def row_schema(view: FeatureView, timestamp: str, created: str) -> MessageSchema:
    """What the messages of an ordinary view's topic hold. DefinitionError: a type that no message can hold."""
    keys: dict[str, Any] = {}
    for column in view.entity_columns:
        kind = column.dtype.to_value_type().name
        if kind not in _KEYS:
            raise DefinitionError(
                f"{view.name}: a topic cannot feed entity key {column.name} of this type", value=kind, valid=_KEYS
            )
        keys[column.name] = _TYPES[kind]
    columns: dict[str, Any] = {}
    for f in view.features:
        kind = f.dtype.to_value_type().name
        if kind not in _TYPES:
            raise DefinitionError(
                f"{view.name}: a topic cannot feed feature {f.name} of this type", value=kind, valid=_TYPES
            )
        columns[f.name] = _TYPES[kind]
    avro, schema = False, None
    options = getattr(getattr(view, "stream_source", None), "kafka_options", None)
    if options is not None:
        format_ = options.message_format
        avro = type(format_).__name__ == "AvroFormat"
        schema = (format_.schema_json or None) if avro else None
        if not avro and type(format_).__name__ != "JsonFormat":
            raise DefinitionError(
                f"{view.name}: messages of this format",
                value=type(format_).__name__,
                valid=["JsonFormat", "AvroFormat"],
            )
    return MessageSchema(
        topic_of(view) or "",
        keys,
        timestamp,
        columns,
        keyed=False,
        created=created,
        format="avro" if avro else "json",
        avro_schema=schema,
    )


def _where(rows: pa.Table, place: Ints, keep: Bools) -> tuple[pa.Table, Ints]:
    return (rows, place) if keep.all() else (rows.filter(pa.array(keep)), place[keep])
