"""Columns to the bytes of Redis writes, without Python per cell: entity keys, times and `Value` protos of an Arrow table.

A row becomes one packed string: MessagePack strings `_pf` field, its value, `_ts` field, its value, then field, value, ...
(see `redis_writer.py`, whose script unpacks it in one call). Numbers are laid out as byte matrices by numpy, strings
are joined by Arrow; lists, maps and other rare types go through Feast's own converter, cell by cell. Pure: no I/O, no clock.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.redis_layout import pair_field, timestamp_field

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Bytes = NDArray[np.uint8]
    Ints = NDArray[np.int64]
    Flags = NDArray[np.bool_]

_VARINT_STEPS = np.array([1 << (7 * i) for i in range(1, 10)], dtype=np.uint64)
_SHIFTS = np.arange(0, 70, 7, dtype=np.uint64)
_FIELDS_PER_PART = 500
"""A part is unpacked onto Lua's stack at once, which holds 8,000 values."""


@dataclass(frozen=True)
class Narrow:
    """One short cell per row: a byte matrix, and which of its bytes count (None: all)."""

    data: Bytes
    keep: Flags | None


@dataclass(frozen=True)
class Times:
    """One time per row, exact at any unit: whole seconds since the epoch and nanoseconds, floored. `known` None: all."""

    seconds: Ints
    nanos: Ints
    known: Flags | None = None

    def nanoseconds(self, row: int) -> int | None:
        """One time, in nanoseconds since the epoch; None: unknown."""
        if self.known is not None and not self.known[row]:
            return None
        return int(self.seconds[row]) * 1_000_000_000 + int(self.nanos[row])

    def slice(self, start: int, end: int) -> Times:
        return Times(
            self.seconds[start:end], self.nanos[start:end], None if self.known is None else self.known[start:end]
        )

    def take(self, rows: Ints) -> Times:
        return Times(self.seconds[rows], self.nanos[rows], None if self.known is None else self.known[rows])


Piece: TypeAlias = Any
"""Part of every row: `Narrow` cells, an Arrow binary array, or the same bytes for all rows."""


def join(rows: int, pieces: Sequence[Piece]) -> pa.Array:
    """Concatenates the pieces row by row into one binary array of `rows` rows."""
    parts: list[Any] = []
    narrow: list[Narrow] = []
    for piece in [*pieces, b""]:
        if isinstance(piece, Narrow):
            narrow.append(piece)
            continue
        if narrow:
            parts.append(_packed(rows, narrow))
            narrow = []
        if not isinstance(piece, bytes):
            parts.append(piece)
        elif piece:
            parts.append(pa.scalar(piece, pa.binary()))
    if len(parts) == 1 and isinstance(parts[0], pa.Array):
        return parts[0]
    if not any(isinstance(part, pa.Array) for part in parts):
        parts.append(pa.array([b""] * rows, pa.binary()))
    return pc.binary_join_element_wise(*parts, b"")


def _packed(rows: int, blocks: Sequence[Narrow]) -> pa.Array:
    data = np.hstack([b.data for b in blocks]) if len(blocks) > 1 else np.ascontiguousarray(blocks[0].data)
    width = data.shape[1]
    if all(b.keep is None for b in blocks):
        offsets = np.arange(0, (rows + 1) * width, width, dtype=np.int32) if width else np.zeros(rows + 1, np.int32)
        body = data.reshape(-1)
    else:
        keep = np.hstack([np.ones(b.data.shape, bool) if b.keep is None else b.keep for b in blocks])
        offsets = np.zeros(rows + 1, dtype=np.int32)
        np.cumsum(keep.sum(axis=1), out=offsets[1:])
        body = data[keep]
    return pa.Array.from_buffers(pa.binary(), rows, [None, pa.py_buffer(offsets), pa.py_buffer(body)])


def constant(rows: int, data: bytes) -> Bytes:
    """A matrix that repeats `data` in every row."""
    return np.broadcast_to(np.frombuffer(data, np.uint8), (rows, len(data)))


def by_length(lengths: Ints, head: Callable[[int], bytes]) -> Piece:
    """`head(length)` of every row, computed once per distinct length (-1: null)."""
    low, high = (int(lengths.min()), int(lengths.max())) if len(lengths) else (0, 0)
    if low == high:
        return head(low)
    if high < 1 << 16:  # without the sort of np.unique
        distinct = np.flatnonzero(np.bincount(lengths + 1)) - 1
        places = np.zeros(high + 2, np.int64)
        places[distinct + 1] = np.arange(len(distinct))
        where = places[lengths + 1]
    else:
        distinct, where = np.unique(lengths, return_inverse=True)
    return pa.array([head(int(n)) for n in distinct], pa.binary()).take(pa.array(where))


def lengths_of(array: pa.Array) -> Ints:
    """Length of every cell of a binary array, -1 for null."""
    lengths: Ints = pc.binary_length(array).fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64)
    return lengths


def varints(values: Ints) -> tuple[Bytes, Ints]:
    """Protobuf's base-128 encoding: bytes, left-aligned, and how many of them count. Negative numbers take ten."""
    unsigned = np.ascontiguousarray(values, dtype=np.int64).view(np.uint64)
    lengths = np.searchsorted(_VARINT_STEPS, unsigned, side="right") + 1
    width = int(lengths.max(initial=1))
    data = ((unsigned[:, None] >> _SHIFTS[:width]) & np.uint64(0x7F)).astype(np.uint8)
    if width > 1:
        data |= (np.arange(width) < (lengths - 1)[:, None]).view(np.uint8) << 7
    return data, lengths


def varint(value: int) -> bytes:
    """One number (not negative), as `varints` writes it."""
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


# --- MessagePack strings ----------------------------------------------------------------------------------------------


_SHORT = [bytes([0xA0 | n]) for n in range(32)]


def string_head(length: int) -> bytes:
    """What stands before a MessagePack string of `length` bytes."""
    if length < 32:
        return _SHORT[length]
    if length < 1 << 8:
        return bytes([0xD9, length])
    if length < 1 << 16:
        return b"\xda" + length.to_bytes(2, "big")
    return b"\xdb" + length.to_bytes(4, "big")


def packed(data: bytes) -> bytes:
    """`data` as a MessagePack string."""
    return string_head(len(data)) + data


def short_cells(
    prefixes: Sequence[bytes], data: Bytes, lengths: Ints | None, tag: bytes = b"", null: Flags | None = None
) -> Narrow:
    """Cells of at most 31 bytes of one column or several side by side: of each its prefix (all of one length), and a
    MessagePack string of `tag` and the first `lengths` bytes of `data`.

    `data`: (rows, columns, bytes); `lengths`, `null`: (rows, columns); None: all bytes, no null. `null` cells get the
    empty string. One call for columns of a kind: a call's own time is that of hundreds of cells.
    """
    rows, columns, width = data.shape
    before = len(prefixes[0]) + 1
    body = len(tag) + width
    out = np.empty((rows, columns, before + body), np.uint8)
    out[:, :, : before - 1] = np.frombuffer(b"".join(prefixes), np.uint8).reshape(columns, -1)
    out[:, :, before : before + len(tag)] = np.frombuffer(tag, np.uint8)
    out[:, :, before + len(tag) :] = data
    if lengths is None and null is None:
        out[:, :, before - 1] = 0xA0 | body
        return Narrow(out.reshape(rows, -1), None)
    sizes = np.full((rows, columns), body) if lengths is None else lengths + len(tag)
    if null is not None:
        sizes = np.where(null, 0, sizes)
    out[:, :, before - 1] = 0xA0 | sizes
    keep = np.arange(before + body) < (before + sizes)[:, :, None]
    return Narrow(out.reshape(rows, -1), keep.reshape(rows, -1))


# --- rows -------------------------------------------------------------------------------------------------------------


class RowPacker:
    """Packs rows of one view. `view` is the stored (versioned) name, `fields` the hash fields of its features."""

    def __init__(self, view: str, fields: Sequence[bytes]) -> None:
        self.ts_field, self.pf_field = timestamp_field(view), pair_field(view)
        self._pf, self._ts = packed(self.pf_field), packed(self.ts_field)
        self.prefixes = [packed(f) for f in fields]
        self.pair_at = len(self._pf) + 2
        """Where the pair's bytes begin in a row, counted from 1 as in Lua; the byte before says how many they are."""
        self.parts = max(1, -(-len(fields) // _FIELDS_PER_PART))

    def pack(self, event: Times, created: Times | None, cells: Sequence[Sequence[Piece]]) -> list[pa.Array]:
        """The packed rows, in `parts` arrays: the first begins with the times. `cells`: each feature's pieces."""
        rows = len(event.seconds)
        groups = [cells[i : i + _FIELDS_PER_PART] for i in range(0, len(cells), _FIELDS_PER_PART)] or [[]]
        heads: list[list[Piece]] = [[*self._times(event, created)], *([] for _ in groups[1:])]
        return [
            join(rows, [*head, *(p for cell in group for p in cell)]) for head, group in zip(heads, groups, strict=True)
        ]

    def pack_one(self, pair: bytes, timestamp: bytes, values: Sequence[bytes]) -> list[bytes]:
        """One row: the parts. `values` are `Value` protos, zero bytes for null."""
        cells = [[prefix + packed(value)] for prefix, value in zip(self.prefixes, values, strict=True)]
        return [part for (part,) in self.pack_few([self.head(pair, timestamp)], cells)]

    def pack_few(self, heads: Sequence[bytes], cells: Sequence[Sequence[bytes]]) -> list[list[bytes]]:
        """As `pack`, without numpy: `heads` of all rows, and each feature's cells (prefix and packed value)."""
        groups = [cells[i : i + _FIELDS_PER_PART] for i in range(0, len(cells), _FIELDS_PER_PART)]
        if not groups:
            return [list(heads)]
        first, *others = ([b"".join(row) for row in zip(*group, strict=True)] for group in groups)
        return [[head + row for head, row in zip(heads, first, strict=True)], *others]

    def head(self, pair: bytes, timestamp: bytes) -> bytes:
        """What a row begins with: its times."""
        return self._pf + packed(pair) + self._ts + packed(timestamp)

    def _times(self, event: Times, created: Times | None) -> list[Piece]:
        rows = len(event.seconds)
        pair = np.empty((rows, 12 if created is None else 24), np.uint8)
        _big_endian(pair, 0, event)
        lengths: Ints | None = None
        if created is not None:
            _big_endian(pair, 12, created)
            if created.known is not None:
                lengths = np.where(created.known, 24, 12)
        fields = [f for f in (_field(0x08, event.seconds), _field(0x10, event.nanos)) if f is not None]
        size = sum(
            (f.data.shape[1] if f.keep is None else f.keep.sum(axis=1) for f in fields), np.zeros(rows, np.int64)
        )
        head = np.empty((rows, len(self._ts) + 1), np.uint8)
        head[:, :-1] = np.frombuffer(self._ts, np.uint8)
        head[:, -1] = 0xA0 | size
        pairs = short_cells([self._pf], pair[:, None], None if lengths is None else lengths[:, None])
        return [pairs, Narrow(head, None), *fields]


def _field(tag: int, values: Ints) -> Narrow | None:
    """A number of a proto3 message, which leaves zeros out; None: all are zero."""
    there = values != 0
    if not there.any():
        return None
    data, lengths = varints(values)
    rows, width = data.shape
    cell = np.empty((rows, width + 1), np.uint8)
    cell[:, 0] = tag
    cell[:, 1:] = data
    sizes = np.where(there, lengths + 1, 0)
    return Narrow(cell, None if sizes.min() > width else np.arange(width + 1) < sizes[:, None])


def _big_endian(out: Bytes, at: int, times: Times) -> None:
    out[:, at : at + 8] = times.seconds.astype(">i8")[:, None].view(np.uint8).reshape(-1, 8)
    out[:, at + 8 : at + 12] = times.nanos.astype(">u4")[:, None].view(np.uint8).reshape(-1, 4)
