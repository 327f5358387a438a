"""States and finished values of one windowed view in the online store: loaded in one round trip, written as one table."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from feature_store.errors import DefinitionError, NotFoundError, UnavailableError
from feature_store.held_states import HeldStates, Key
from feature_store.key_bytes import KEY, KeyColumns
from feature_store.online_write import OnlineWriter
from feature_store.recent_states import RecentStates
from feature_store.redis_batch import Batch
from feature_store.redis_connection import answering
from feature_store.redis_layout import feature_field
from feature_store.redis_socket import RedisSocket
from feature_store.redis_wire import command
from feature_store.redis_writer import Ahead
from feature_store.replay_clock import ReplayClock
from feature_store.row_bytes import by_length, join, lengths_of
from feature_store.view_plan import _key_parts as key_parts
from feature_store.view_plan import blob_of
from feature_store.window_write import OTHER_DEFINITION, STATE_GONE, WATERMARKS, fenced, state_key, watermarks_key
from feature_store.windows.definition import STATE_FIELD, WindowedView, definition_of
from feature_store.windows.intact import decode_intact
from feature_store.windows.state import NEVER, States, WindowStateError

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

_TIME = pa.timestamp("us", "UTC")
_KEY_TYPES = {"string": pa.string(), "int64": pa.int64()}
_BLOCK = 1_000
"""Entities whose rows are made at once."""
HELD_BYTES = 128_000_000
"""Of the states that one consumer keeps of a view."""


def windowed_views(store: FeatureStore, names: Sequence[str] = ()) -> list[tuple[FeatureView, WindowedView]]:
    """The windowed views of the registry with their definitions, or those named. NotFoundError for an unknown name."""
    views = {v.name: (v, d) for v in store.list_feature_views() if (d := definition_of(v)) is not None}
    for name in names:
        if name not in views:
            raise NotFoundError("no such windowed feature view", value=name, valid=views, next_step="feast apply")
    if not views:
        raise NotFoundError("the registry holds no windowed feature view", next_step="feast apply")
    return [views[n] for n in names] if names else list(views.values())


class StateMovedError(UnavailableError):
    """A state in Redis is no longer the one that events were applied to: erased, expired or replaced. Apply them again."""

    code = "state_moved"


class StateLostError(UnavailableError):
    """Redis does not hold the states that the log says were applied: it lost its data, or is another one."""

    code = "state_lost"


@dataclass(frozen=True)
class WriteResult:
    """`without_values`: entities of which some value cannot be finalised (it is null); `fenced`: entities of which Redis
    holds a newer state, so that nothing was written: another process owns their partition."""

    without_values: int = 0
    fenced: int = 0


@dataclass
class _Told:
    """What is known of a write while it is made."""

    without_values: int = 0
    blobs: list[bytes] = field(default_factory=list)


class Writing:
    """A write of `WindowStore` that Redis has not wholly acknowledged."""

    def __init__(self, store: WindowStore, rows: Ahead, told: _Told, marks: Mapping[int, tuple[int, int]]) -> None:
        self._store, self._rows, self._told, self._marks = store, rows, told, marks

    def finish(self) -> WriteResult:
        """Returns when everything is written. Errors as `WindowStore.write`. Once."""
        return self._store._finished(self._rows, self._told, self._marks)

    def drop(self) -> None:
        """Waits for nothing; an unknown part is written. Safe to call after `finish`."""
        self._store.forget()
        self._rows.close()


class WindowStore:
    """One windowed view in Redis. `clock` is the project's replay clock.

    `held_bytes`: of the states written last, how many bytes are kept for the next `load`, and up to half as many more of the
    newest as they stand in memory: for the only writer of the entities, who calls `forget` when that, or Redis, may have changed.
    """

    def __init__(self, store: FeatureStore, view: FeatureView, held_bytes: int = 0) -> None:
        from feast.infra.online_stores.helpers import compute_versioned_name

        definition = definition_of(view)
        if definition is None:
            raise DefinitionError("not a windowed feature view", value=view.name)
        self.definition = definition
        self.name = view.name
        store.refresh_registry()  # else a write may look up the view in a cache from before the latest apply
        self._store = store
        self._view = view
        online: Any = store._get_provider().online_store  # Feast has no public way
        self._writer = OnlineWriter(online, store.config, view)
        self._redis: Any = online._get_client(store.config.online_store)
        self._socket: RedisSocket | None = online._direct(store.config.online_store, online._sockets, RedisSocket)
        stored = compute_versioned_name(view, store.config.registry.enable_online_feature_view_versioning)
        self._field = feature_field(stored, STATE_FIELD)
        self._keys = KeyColumns(store.project, view.name, key_parts(view))
        self._key_types = [_KEY_TYPES[t] for t in definition.key_types]
        self._marker_key = state_key(store.project, stored).encode()
        self._marker: bytes | None = None
        self.damaged: dict[Key, WindowStateError] = {}
        self._held = HeldStates(held_bytes)
        self._recent = RecentStates(held_bytes // 2)
        self._marks_key = watermarks_key(store.project, stored)
        self.clock = ReplayClock(self._redis, store.project)
        self._move_marks = self._redis.register_script(WATERMARKS)

    # --- whether the states are there ---------------------------------------------------------------------------------

    def attach(self, applied: bool, run_id: str) -> str:
        """Call before the first `load`, which from then on checks that the states are still those of the same run.

        `applied`: whether the log says that events were applied. Returns the id of the run that began the states, which
        is `run_id` where nothing was applied and Redis knows of none. StateLostError: events were applied, and Redis
        knows nothing of it. DefinitionError: the states are of another definition.
        """
        with answering(self._redis):
            held = self._redis.get(self._marker_key)
        if held is None:
            if applied:
                raise self._lost()
            return self.begin(run_id)
        digest, _, run = held.decode().partition(":")
        if digest != self.definition.hash:
            raise DefinitionError(
                f"{self.name}: the online states are of another definition",
                value=digest,
                valid=[self.definition.hash],
                next_step=f"`predictflow windows bootstrap {self.name}`",
            )
        self._marker = held
        return run

    def is_of_another_definition(self) -> bool:
        """Whether Redis may hold states that this definition cannot read: the marker is of another one, or there is none."""
        with answering(self._redis):
            held = self._redis.get(self._marker_key)
        return held is None or held.decode().partition(":")[0] != self.definition.hash

    def begin(self, run_id: str) -> str:
        """Says that the view's states are complete in this Redis from now on: for bootstrap, when it is done."""
        marker = f"{self.definition.hash}:{run_id}".encode()
        with answering(self._redis):
            self._redis.set(self._marker_key, marker)
        self._marker = marker
        return run_id

    def _lost(self) -> StateLostError:
        return StateLostError(
            f"{self.name}: Redis does not hold the states of the events that were applied; it lost its data or is another one",
            next_step="`predictflow sync --from-log` rebuilds them from the event log",
        )

    # --- states -------------------------------------------------------------------------------------------------------

    def load(self, keys: Sequence[Key]) -> States:
        """The states of entities, in the order of `keys`; an empty one where there is none yet.

        UnavailableError: no Redis; StateLostError: see `attach`; DefinitionError: written under another definition, or
        rebuilt since `attach`. Damaged states come as empty ones, and stay in `damaged` (key -> why) until the next load:
        `write` leaves them as they are.
        """
        self.damaged = {}
        if not keys:
            return States.empty(self.definition, 0)
        blobs = self._held.of(keys)
        unknown = [i for i, b in enumerate(blobs) if b is None]
        names = self._redis_keys([keys[i] for i in unknown]) if unknown else None
        marker, *cells = self._ask(names)
        self._check(marker)
        for i, b in zip(unknown, map(blob_of, cells), strict=True):
            blobs[i] = b
        return self._made(keys, blobs)

    def load_held(self, keys: Sequence[Key]) -> States | None:
        """As `load`, of states that are kept, without a word to Redis; None where one of them is not.

        Before they are written again, `confirm` asks what `load` would have.
        """
        blobs = self._held.of(keys)
        if not keys or None in blobs:
            return None
        self.damaged = {}
        return self._made(keys, blobs)

    def confirm(self) -> None:
        """Whether Redis still holds the states of the same run: errors as `load`."""
        self._check(self._ask(None)[0])

    def _check(self, marker: bytes | None) -> None:
        if self._marker is None or marker == self._marker:
            return
        if marker is None:
            raise self._lost()
        raise DefinitionError(
            f"{self.name}: the online states were rebuilt meanwhile",
            value=marker.decode(errors="replace"),
            valid=[self._marker.decode()],
            next_step="start `predictflow sync` again",
        )

    def _made(self, keys: Sequence[Key], blobs: Sequence[bytes | None]) -> States:
        """The states, of which as few as possible are unpacked."""
        recent = self._recent.of(keys)
        left = np.ones(len(keys), bool)
        for _, _, places in recent:
            left[places] = False
        rest = np.flatnonzero(left)
        states, damaged = decode_intact(self.definition, [blobs[i] for i in rest.tolist()] if recent else blobs)
        self.damaged = {keys[rest[i]]: e for i, e in damaged.items()}
        if recent:
            parts = [*recent, (states, np.arange(len(rest)), rest)] if len(rest) else recent
            states = States.gathered(self.definition, len(keys), parts)
        states.read = np.fromiter(map(bool, blobs), bool, len(blobs))
        return states

    def forget(self) -> None:
        """Call when another process may have written these entities, or Redis may have lost something: all are read again."""
        self._held.forget()
        self._recent.forget()

    def _ask(self, keys: pa.Array | None) -> list[bytes | None]:
        """The marker, and the states under these keys."""
        if self._socket is not None:
            if keys is None:
                return self._socket.ask(command(b"GET", self._marker_key), 1)
            tail = b"\r\n$%d\r\n%b\r\n" % (len(self._field), self._field)
            size = by_length(lengths_of(keys), lambda n: b"*3\r\n$4\r\nHGET\r\n$%d\r\n" % n)
            asked = join(len(keys), [size, keys, tail])
            _, ends, data = asked.buffers()
            first, last = np.frombuffer(ends, np.int32)[[asked.offset, asked.offset + len(asked)]].tolist()
            asked = command(b"GET", self._marker_key) + bytes(memoryview(data)[first:last])
            return self._socket.ask(asked, len(keys) + 1)
        pipe = self._redis.pipeline(transaction=False)
        pipe.get(self._marker_key)
        for key in keys.to_pylist() if keys is not None else []:
            pipe.hget(key, self._field)
        with answering(self._redis):
            return list(pipe.execute())

    def _key_table(self, keys: Sequence[Key]) -> dict[str, pa.Array]:
        columns = [pa.array(c, t) for c, t in zip(zip(*keys, strict=True), self._key_types, strict=True)]
        return dict(zip(self.definition.entity_key, columns, strict=True))

    def _redis_keys(self, keys: Sequence[Key]) -> pa.Array:
        table = pa.table(self._key_table(keys))
        checked = {KEY + n: self._keys.checked(n, table.column(n)) for n in self._keys.names}
        return self._keys.encode(pa.table(checked))

    def write(
        self, keys: Sequence[Key], states: States, watermarks: Mapping[int, tuple[int, int]] | None = None
    ) -> WriteResult:
        """Writes each state and its values as of `visible_at` in one atomic row, then the watermarks. Safe to repeat.

        A state with a smaller fence than the one that Redis holds is not written, nor one of `damaged`. The row's event_timestamp is the last
        seen one (`visible_at` where nothing was seen), created is `visible_at`. A value that cannot be finalised
        is null: a reader without our store sees nothing wrong. `watermarks`: partition -> (watermark, time
        by which it is known), microseconds; they never go back. DefinitionError: Redis holds states of another
        definition. UnavailableError: no Redis; StateMovedError: a state is not the one that `load` gave; an unknown part is written.
        """
        return self.begin_write(keys, states, watermarks).finish()

    def begin_write(
        self, keys: Sequence[Key], states: States, watermarks: Mapping[int, tuple[int, int]] | None = None
    ) -> Writing:
        """As `write`, but for the last of it, which Redis works on until `finish`: until then only `load_held` may load, and
        nothing else be written. Errors as `write`."""
        told = _Told()
        marks = {p: mark for p, (mark, _) in (watermarks or {}).items()}
        with self._meant():
            rows = Ahead(self._redis, self._batches(keys, states, marks, told))
        self._held.put([k for k in keys if k not in self.damaged] if self.damaged else keys, told.blobs)
        if self.damaged:
            self._recent.forget()
        else:
            self._recent.put(keys, states)
        return Writing(self, rows, told, watermarks if watermarks and self.definition.closes_windows else {})

    def _finished(self, rows: Ahead, told: _Told, marks: Mapping[int, tuple[int, int]]) -> WriteResult:
        with self._meant():
            written = rows.finish()
        if written < len(told.blobs):
            self.forget()  # Redis holds newer ones
        if marks:
            args = [n for p, (mark, visible) in marks.items() for n in (p, mark, visible)]
            with answering(self._redis):
                self._move_marks(keys=[self._marks_key], args=args)
        return WriteResult(told.without_values, len(told.blobs) - written)

    @contextmanager
    def _meant(self) -> Iterator[None]:
        """What the script's errors mean. After any error an unknown part is written."""
        from redis.exceptions import ResponseError  # loaded with the client that raises it

        try:
            yield
        except BaseException as e:
            held = len(self._held)
            self.forget()
            if isinstance(e, ResponseError) and (STATE_GONE in str(e) or (held and OTHER_DEFINITION in str(e))):
                raise StateMovedError(f"{self.name}: a state was erased, expired or replaced meanwhile") from e
            if isinstance(e, ResponseError) and OTHER_DEFINITION in str(e):
                raise DefinitionError(
                    f"{self.name}: Redis holds states of another definition, which stay",
                    next_step=f"`predictflow windows bootstrap {self.name}`, then start `predictflow sync` again",
                ) from e
            raise

    def _batches(self, keys: Sequence[Key], states: States, marks: Mapping[int, int], told: _Told) -> Iterator[Batch]:
        """Block by block, so that Redis writes one while the next is made, and a block stays in the processor's cache."""
        size = -(-len(keys) // max(1, round(len(keys) / _BLOCK)))  # alike: a small last one would cost as much
        for first in range(0, len(keys), size or 1):
            some, held = keys[first : first + size], states.slice(first, first + size)
            finals = held.values(held.visible_at, marks)
            told.without_values += len(finals.errors)
            blobs = held.encode()
            table: dict[str, pa.Array] = self._key_table(some)
            for o in self.definition.outputs:
                values, null = finals.arrays[o.name]
                kind = pa.string() if o.type == "string" else None  # else as numpy has it
                array = pa.array(values != 0 if o.type == "bool" else values, kind, mask=null if null.any() else None)
                table[o.name] = array.cast(_TIME) if o.type == "timestamp" else array
            table[STATE_FIELD] = pa.array(blobs, pa.binary())
            seen = np.where(held.last_seen == NEVER, held.visible_at, held.last_seen)
            table[self._writer.event_column] = pa.array(seen).cast(_TIME)
            table[self._writer.created_column] = pa.array(held.visible_at).cast(_TIME)
            rows, read = pa.table(table), held.read if held.read is not None else np.zeros(len(held), bool)
            if self.damaged:
                sound = np.array([k not in self.damaged for k in some])
                rows, read = rows.filter(pa.array(sound)), read[sound]
                blobs = [b for b, s in zip(blobs, sound, strict=True) if s]
            told.blobs += blobs
            yield from fenced(self._writer.batches(rows), self._field, blobs, read.tolist())

    def rewrite(
        self, keys: Sequence[Key], states: States, watermarks: Mapping[int, tuple[int, int]] | None = None
    ) -> WriteResult:
        """As `write`, for states made from the log: what Redis holds of these entities and is damaged gives way.

        Only without a stream beside it.
        """
        try:
            result = self.write(keys, states, watermarks)
            if not result.fenced or not self._drop_damaged(keys):
                return result
        except DefinitionError:  # a damaged head looks like another definition's
            if not self._drop_damaged(keys):
                raise
        return self.write(keys, states, watermarks)

    def _drop_damaged(self, keys: Sequence[Key]) -> int:
        names = self._redis_keys(keys)
        _, damaged = decode_intact(self.definition, [blob_of(c) for c in self._ask(names)[1:]])
        with answering(self._redis):
            for i in damaged:
                self._redis.hdel(names[i].as_py(), self._field)
        return len(damaged)

    def delete(self) -> None:
        """Removes every row of this version of the view from the online store, its marker and watermarks: the next bootstrap starts from
        nothing."""
        online: Any = self._store._get_provider().online_store  # Feast has no public way
        with answering(self._redis):
            online.delete_version(self._store.config, self._view)
