"""The one way into the online store: a table of one view, or Feast's rows of protos, to atomic newest-wins writes.

Used by sync, materialisation, pushes and Feast's own `write_to_online_store`. Columns of the table: the view's join keys
and features by name, its source's timestamp column (any unit; naive is UTC) and, optionally, its created column.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.clock import MAX_SKEW, MICROSECOND, Clock, replay_clock_key, to_micros
from feature_store.errors import DataError
from feature_store.key_bytes import KEY, KeyColumns
from feature_store.redis_batch import Batch
from feature_store.redis_connection import answering
from feature_store.redis_layout import datetime_of, encode_pair, encode_timestamp, feature_field, nanos_of
from feature_store.redis_retry import BUDGET_SECONDS
from feature_store.redis_writer import awrite, write
from feature_store.row_bytes import Piece, RowPacker, Times
from feature_store.value_bytes import ColumnEncoder, times_of
from feature_store.view_plan import _key_parts
from feature_store.windows.definition import STATE_FIELD, definition_of

if TYPE_CHECKING:
    from feast import FeatureView, RepoConfig
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value

    from feature_store.online_store import PredictFlowOnlineStore

log = logging.getLogger(__name__)

CREATED = "created"
_FEATURE, _EVENT, _CREATED = "f:", "event", "created"
"""Columns of the checked table: a feature may be named as a join key or a time column is."""
_CHUNK_ROWS, _CHUNK_BYTES = 1_000, 2_000_000
_SCALAR_ROWS = 3
"""Up to so many rows, Python per cell is cheaper than numpy per column."""
_SECOND = 1_000_000_000
_SKEW_NS = MAX_SKEW // MICROSECOND * 1000

Row = tuple["EntityKey", Mapping[str, "Value"], datetime, "datetime | None"]
Head = tuple[bytes, bytes, bytes, bytes]
Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Written:
    """What became of the rows: `rows` given, `written` of them won (the others were older), `left_out` had no state."""

    rows: int
    written: int
    left_out: int = 0


class OnlineWriter:
    """Writes rows of one view; no I/O before the first write. Keep it for as long as the definition stands.

    Safe to use from several threads. `view` comes from the registry; under versioned views its version is the one written.
    """

    def __init__(self, online: PredictFlowOnlineStore, config: RepoConfig, view: FeatureView) -> None:
        from feast.infra.online_stores.helpers import compute_versioned_name

        self._online, self._config, self._view = online, config, view
        self._stored: str = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
        self._windowed = definition_of(view) is not None
        self._keys = KeyColumns(config.project, view.name, _key_parts(view))
        self._layouts: dict[tuple[str, ...], tuple[RowPacker, list[ColumnEncoder]]] = {}
        self._types = {f.name: f.dtype.to_value_type() for f in view.features}
        source = getattr(view, "batch_source", None)
        mapping = getattr(source, "field_mapping", None) or {}
        event = getattr(source, "timestamp_field", "") or "event_timestamp"
        created = getattr(source, "created_timestamp_column", "") or CREATED
        self.event_column, self.created_column = mapping.get(event, event), mapping.get(created, created)

    def write(
        self,
        table: pa.Table,
        *,
        wall: Clock | None,
        progress: Progress | None = None,
        budget_seconds: float = BUDGET_SECONDS,
    ) -> Written:
        """Writes a table; of each key the greatest (event, created) stays, whatever the order of rows and writers.

        A row without `created` counts as known at its event time; of equal pairs the last one stays. Rows of a windowed
        view without a window state are left out and logged. Before anything is written, DataError for: a missing column, a
        null key or event time, a number that does not fit its feature, a row dated more than MAX_SKEW after the clock (the
        replay clock's key under `replay`, unset: no check; else `wall`, None: no check; never for windowed views,
        whose events the stream has checked). A list or map that Feast cannot convert stops between chunks of 1,000 rows. Safe
        to repeat. UnavailableError when Redis has not answered for `budget_seconds`; chunks before it are written.
        """
        client, limit = self._client_and_limit(wall)
        left_out, batches = self._of_table(table, limit)
        return _counted(write(client, batches, budget_seconds), table.num_rows, left_out, progress)

    async def awrite(
        self,
        table: pa.Table,
        *,
        wall: Clock | None,
        progress: Progress | None = None,
        budget_seconds: float = BUDGET_SECONDS,
    ) -> Written:
        """As `write`, in an event loop: it is held up for the encoding of 1,000 rows at a time."""
        client, limit = await self._aclient_and_limit(wall)
        left_out, batches = self._of_table(table, limit)
        return await _acounted(awrite(client, batches, budget_seconds), table.num_rows, left_out, progress)

    def write_rows(self, rows: Sequence[Row], *, wall: Clock | None, progress: Progress | None = None) -> Written:
        """As `write`, of rows as Feast's provider hands them over. A key that the layout cannot hold: DataError."""
        client, limit = self._client_and_limit(wall)
        left_out, batches = self._of_rows(rows, limit)
        return _counted(write(client, batches), len(rows), left_out, progress)

    async def awrite_rows(
        self, rows: Sequence[Row], *, wall: Clock | None, progress: Progress | None = None
    ) -> Written:
        """As `write_rows`."""
        client, limit = await self._aclient_and_limit(wall)
        left_out, batches = self._of_rows(rows, limit)
        return await _acounted(awrite(client, batches), len(rows), left_out, progress)

    # --- the clock ----------------------------------------------------------------------------------------------------

    def newest_allowed(self, wall: Clock | None) -> datetime | None:
        """The newest event time that `write` takes now; None: any. UnavailableError: no Redis."""
        limit = self._client_and_limit(wall)[1]
        return None if limit is None else datetime_of(limit)

    def _client_and_limit(self, wall: Clock | None) -> tuple[Any, int | None]:
        client = self._online._get_client(self._config.online_store)
        clock = None
        if self._replay:
            with answering(client):
                clock = client.get(self._clock_key)
        return client, self._limit(clock, wall)

    async def _aclient_and_limit(self, wall: Clock | None) -> tuple[Any, int | None]:
        client = await self._online._get_client_async(self._config.online_store)
        clock = None
        if self._replay:
            with answering(client):
                clock = await client.get(self._clock_key)
        return client, self._limit(clock, wall)

    @property
    def _replay(self) -> bool:
        return not self._windowed and getattr(self._config.online_store, "clock", "wall") == "replay"

    @property
    def _clock_key(self) -> str:
        return replay_clock_key(self._config.project)

    def _limit(self, replay_clock: bytes | None, wall: Clock | None) -> int | None:
        """The newest event time that may be written, in nanoseconds; None: any."""
        if self._windowed:
            return None
        if self._replay:
            return None if replay_clock is None else int(replay_clock) * 1000 + _SKEW_NS
        return None if wall is None else to_micros(wall.now()) * 1000 + _SKEW_NS

    def _refuse_future(self, name_row: str, event_ns: int, limit: int) -> DataError:
        clock = datetime_of(limit - _SKEW_NS).isoformat()
        return DataError(
            f"{self._view.name}: {name_row} is dated {datetime_of(event_ns).isoformat()}, more than "
            f"{MAX_SKEW.total_seconds():g} s after the {'replay clock' if self._replay else 'clock'} ({clock}); "
            "nothing was written",
            next_step="mend the row's time, or write it when its time has come",
        )

    # --- tables -------------------------------------------------------------------------------------------------------

    def _of_table(self, table: pa.Table, limit: int | None) -> tuple[int, Iterator[Batch]]:
        names = tuple(self._types)
        wanted = [*self._keys.names, *names, self.event_column]
        missing = [n for n in wanted if n not in table.column_names]
        if missing:
            raise DataError(
                f"{self._view.name}: the rows lack {'a column' if len(missing) == 1 else 'columns'}",
                value=", ".join(missing),
                valid=wanted,
            )
        left_out = 0
        if self._windowed:
            held = pc.binary_length(table.column(STATE_FIELD).cast(pa.large_binary())).fill_null(0)
            stated = table.filter(pc.greater(held, 0))
            left_out = table.num_rows - stated.num_rows
            self._warn_stateless(left_out, table.num_rows)
            table = stated
        packer, encoders = self._layout(names)
        few = table.num_rows <= _SCALAR_ROWS  # then `ColumnEncoder.one` checks each value, also before the first write
        columns = {_FEATURE + e.name: c if few else e.checked(c) for e in encoders for c in [table.column(e.name)]}
        columns |= {KEY + n: self._keys.checked(n, table.column(n)) for n in self._keys.names}
        columns[_EVENT] = table.column(self.event_column)
        if self.created_column in table.column_names and self.created_column not in self._types:
            columns[_CREATED] = table.column(self.created_column)
        checked = pa.table(columns)
        for start in range(0, checked.num_rows, 1_000_000):  # all of it, before anything is written
            self._times(checked.slice(start, 1_000_000), start, limit)
        return left_out, self._batches(checked, packer, encoders)

    def _batches(self, table: pa.Table, packer: RowPacker, encoders: list[ColumnEncoder]) -> Iterator[Batch]:
        head = _head(packer)
        for chunk in _chunks(table):
            if chunk.num_rows <= _SCALAR_ROWS:
                yield self._scalar(chunk, packer, encoders, head)
                continue
            event, created = self._times(chunk)
            keys = self._keys.encode(chunk)
            rows = _newest(keys, event, created)
            if rows is not None:
                keys, chunk, event = keys.take(pa.array(rows)), chunk.take(pa.array(rows)), event.take(rows)
                created = created.take(rows) if created is not None else None
            cells = [e.column(_whole(chunk.column(_FEATURE + e.name))) for e in encoders]
            parts = [p.to_pylist() for p in packer.pack(event, created, cells)]
            yield Batch(keys.to_pylist(), parts, head, len(encoders) + 2)

    def _scalar(self, chunk: pa.Table, packer: RowPacker, encoders: list[ColumnEncoder], head: Head) -> Batch:
        event, created = self._times(chunk)
        values = [[e.one(v) for v in chunk.column(_FEATURE + e.name).to_pylist()] for e in encoders]
        rows = []
        for i in range(chunk.num_rows):
            event_ns = event.nanoseconds(i)
            pair = encode_pair(event_ns or 0, created.nanoseconds(i) if created is not None else None)
            rows.append(packer.pack_one(pair, encode_timestamp(event_ns or 0), [v[i] for v in values]))
        parts = [list(part) for part in zip(*rows, strict=True)]
        return Batch(self._keys.encode_rows(chunk), parts, head, len(encoders) + 2)

    def _times(self, chunk: pa.Table, first: int = 0, limit: int | None = None) -> tuple[Times, Times | None]:
        """Event times and, where there are any, created times. DataError for a null event, or one after `limit`."""
        event = self._time_column(chunk, _EVENT, self.event_column)
        created = self._time_column(chunk, _CREATED, self.created_column) if _CREATED in chunk.column_names else None
        if event.known is not None:
            row = int(np.argmin(event.known))
            raise DataError(
                f"{self._view.name}: row {first + row} ({self._keys.shown(chunk, row)}) has no {self.event_column}, and cannot "
                "be stored online; nothing was written"
            )
        late = _first_after(event, limit)
        if late is not None and limit is not None:
            name = f"row {first + late} ({self._keys.shown(chunk, late)})"
            raise self._refuse_future(name, event.nanoseconds(late) or 0, limit)
        return event, created

    def _time_column(self, chunk: pa.Table, column: str, name: str) -> Times:
        try:
            return times_of(_whole(chunk.column(column)))
        except pa.ArrowInvalid as e:
            raise DataError(f"{self._view.name}: column {name} holds no times", value=str(e)) from e

    def _layout(self, names: tuple[str, ...]) -> tuple[RowPacker, list[ColumnEncoder]]:
        made = self._layouts.get(names)
        if made is None:
            from feast import ValueType

            packer = RowPacker(self._stored, [feature_field(self._stored, n) for n in names])
            made = (
                packer,
                [
                    ColumnEncoder(n, self._types.get(n, ValueType.UNKNOWN), prefix)
                    for n, prefix in zip(names, packer.prefixes, strict=True)
                ],
            )
            self._layouts[names] = made
        return made

    def _warn_stateless(self, left_out: int, rows: int) -> None:
        if left_out:
            log.warning(
                "%s: %d of %d rows have no window state and are not written; to fill it from history: "
                "predictflow windows bootstrap %s",
                self._view.name,
                left_out,
                rows,
                self._view.name,
            )

    # --- Feast's rows of protos ---------------------------------------------------------------------------------------

    def _of_rows(self, rows: Sequence[Row], limit: int | None) -> tuple[int, Iterator[Batch]]:
        kept = rows
        if self._windowed:
            kept = [row for row in rows if STATE_FIELD in row[1] and row[1][STATE_FIELD].bytes_val]
            self._warn_stateless(len(rows) - len(kept), len(rows))
        event = _times_of_datetimes([row[2] for row in kept])
        if event.known is not None:
            row = int(np.argmin(event.known))
            raise DataError(
                f"{self._view.name}: row {row} ({_shown(kept[row][0])}) has no event timestamp, and cannot be stored online"
            )
        late = _first_after(event, limit)
        if late is not None and limit is not None:
            name = f"row {late} ({_shown(kept[late][0])})"
            raise self._refuse_future(name, event.nanoseconds(late) or 0, limit)
        keys = []
        for row_ in kept:
            key = self._keys.of_proto(row_[0])
            if key is None:
                raise DataError(f"{self._view.name}: this entity key cannot be kept online", value=_shown(row_[0]))
            keys.append(key)
        return len(rows) - len(kept), self._proto_batches(kept, keys, event)

    def _proto_batches(self, rows: Sequence[Row], keys: list[bytes], events: Times) -> Iterator[Batch]:
        start = 0
        while start < len(rows):
            names = tuple(rows[start][1])
            wanted = rows[start][1].keys()
            end = start + 1
            while end < min(start + _CHUNK_ROWS, len(rows)) and rows[end][1].keys() == wanted:
                end += 1
            chunk = rows[start:end]
            packer, encoders = self._layout(names)
            event = events.take(np.arange(start, end))
            created = _times_of_datetimes([row[3] for row in chunk])
            columns = [[row[1][name].SerializeToString() for row in chunk] for name in names]
            head = _head(packer)
            if len(chunk) <= _SCALAR_ROWS:
                parts_of = [
                    packer.pack_one(
                        encode_pair(event.nanoseconds(i) or 0, created.nanoseconds(i)),
                        encode_timestamp(event.nanoseconds(i) or 0),
                        [column[i] for column in columns],
                    )
                    for i in range(len(chunk))
                ]
                parts = [list(part) for part in zip(*parts_of, strict=True)]
            else:
                cells: list[list[Piece]] = [
                    e.serialised(pa.array(column, pa.binary())) for e, column in zip(encoders, columns, strict=True)
                ]
                known = None if created.known is not None and not created.known.any() else created
                parts = [p.to_pylist() for p in packer.pack(event, known, cells)]
            yield Batch(keys[start:end], parts, head, len(names) + 2)
            start = end


def online_write(
    online: PredictFlowOnlineStore,
    config: RepoConfig,
    view: FeatureView,
    table: pa.Table,
    *,
    wall: Clock | None,
    progress: Progress | None = None,
    budget_seconds: float = BUDGET_SECONDS,
) -> Written:
    """`OnlineWriter.write` for a caller that writes a view once."""
    writer = OnlineWriter(online, config, view)
    return writer.write(table, wall=wall, progress=progress, budget_seconds=budget_seconds)


async def online_write_async(
    online: PredictFlowOnlineStore,
    config: RepoConfig,
    view: FeatureView,
    table: pa.Table,
    *,
    wall: Clock | None,
    progress: Progress | None = None,
    budget_seconds: float = BUDGET_SECONDS,
) -> Written:
    """`OnlineWriter.awrite` for a caller that writes a view once."""
    writer = OnlineWriter(online, config, view)
    return await writer.awrite(table, wall=wall, progress=progress, budget_seconds=budget_seconds)


def _head(packer: RowPacker) -> Head:
    return packer.ts_field, packer.pf_field, b"%d" % packer.pair_at, b"%d" % packer.parts


def _counted(done: Iterable[tuple[int, int]], rows: int, left_out: int, progress: Progress | None) -> Written:
    written = 0
    for n, won in done:
        written += won
        if progress:
            progress(n)
    if progress and left_out:
        progress(left_out)
    return Written(rows, written, left_out)


async def _acounted(
    done: AsyncIterator[tuple[int, int]], rows: int, left_out: int, progress: Progress | None
) -> Written:
    written = 0
    async for n, won in done:
        written += won
        if progress:
            progress(n)
    if progress and left_out:
        progress(left_out)
    return Written(rows, written, left_out)


def _chunks(table: pa.Table) -> Iterator[pa.Table]:
    """Slices of at most 1,000 rows and, but for a single large row, 2 MB."""
    for start in range(0, table.num_rows, _CHUNK_ROWS):
        todo = [table.slice(start, _CHUNK_ROWS)]
        while todo:
            chunk = todo.pop()
            half = chunk.num_rows // 2
            if half and chunk.nbytes > _CHUNK_BYTES:
                todo += [chunk.slice(half), chunk.slice(0, half)]
            else:
                yield chunk


def _whole(column: pa.ChunkedArray) -> pa.Array:
    whole = column.combine_chunks()
    if isinstance(whole, pa.ChunkedArray):  # no chunk at all, or too large for one: chunks are small, so the former
        return whole.chunk(0) if whole.num_chunks else pa.array([], column.type)
    return whole


def _newest(keys: pa.Array, event: Times, created: Times | None) -> Any:
    """The rows to write when keys repeat: the newest of each, of equal ones the last; None when no key repeats."""
    coded = keys.dictionary_encode()
    if len(coded.dictionary) == len(keys):
        return None
    codes = coded.indices.to_numpy()
    known_s, known_n = event.seconds, event.nanos
    if created is not None:
        known = np.ones(len(codes), bool) if created.known is None else created.known
        known_s = np.where(known, created.seconds, known_s)
        known_n = np.where(known, created.nanos, known_n)
    order = np.lexsort((np.arange(len(codes)), known_n, known_s, event.nanos, event.seconds, codes))
    last = np.append(np.diff(codes[order]) != 0, True)
    return np.sort(order[last])


def _first_after(times: Times, limit: int | None) -> int | None:
    """The first row dated after `limit` (nanoseconds; None: no limit)."""
    if limit is None:
        return None
    seconds, nanos = divmod(limit, _SECOND)
    late = (times.seconds > seconds) | ((times.seconds == seconds) & (times.nanos > nanos))
    return int(np.argmax(late)) if late.any() else None


def _times_of_datetimes(times: Sequence[datetime | None]) -> Times:
    """Python's or pandas' times, a naive one being UTC; None and NaT are unknown."""
    if all(type(t) is datetime or t is None for t in times):  # not a subclass: pandas' have nanoseconds
        return times_of(pa.array(times, pa.timestamp("us", "UTC")))
    known = np.array([t is not None and t == t for t in times])  # NaT differs from itself
    pairs = [divmod(nanos_of(t) if k and t is not None else 0, _SECOND) for t, k in zip(times, known, strict=True)]
    both = np.array(pairs, dtype=np.int64).reshape(-1, 2)
    return Times(both[:, 0], both[:, 1], None if known.all() else known)


def _shown(key: EntityKey) -> str:
    parts = zip(key.join_keys, key.entity_values, strict=False)
    return ", ".join(f"{n}: {getattr(v, v.WhichOneof('val') or '', 'null')}" for n, v in parts)
