"""States as bytes, those of many entities parsed and written at once.

Header of five little-endian words of 8 bytes: magic and version | definition hash | fence (big-endian) | how many words
follow | sum of all words, this being 0. The words that follow are visible_at, last_seen, floor, lost_until, the number of
rows of each section, the sections' rows (see `layout.py`; the first word of a row is the difference to that of the row
before), and a 0 where their number would be odd. Of each word's four units of 16 bits only those are stored that are not
zero, which most are: first four bits for each word, saying which units are there, then those units. The fence is the sum
over the partitions of (last offset + 1): of two states of an entity, the greater is the newer.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from typing import Any

import numpy as np

from feature_store.errors import DefinitionError
from feature_store.windows.layout import Layout
from feature_store.windows.rows import NEVER, Array, Rows, copy_runs
from feature_store.windows.state_errors import WindowStateError

MAGIC = int.from_bytes(b"PFwin\x03\x00\x00", "little")
FENCE_AT = 16
"""Where the fence is, for the script that writes states; before it stand what must be equal: format and definition."""
_HEADER = struct.Struct("<5q")
_FIXED = 4


def decode(layout: Layout, blobs: Sequence[bytes | None]) -> tuple[Array, list[Rows]]:
    """Four words of every entity (visible_at, last_seen, floor, lost_until) and the sections.

    DefinitionError: written under another definition or format; WindowStateError: damaged.
    """
    n = len(blobs)
    if n == 1 and blobs[0]:
        made = _decode_one(layout, blobs[0])
        if made is not None:
            return made
    fixed = np.full((n, _FIXED), NEVER, np.int64)
    counts = np.zeros((n, len(layout.widths)), np.int64)
    first, words = np.zeros(n, np.int64), np.empty(0, np.int64)
    data = [b for b in blobs if b]
    head = _FIXED + len(layout.widths)
    if data:
        held = np.arange(n) if len(data) == n else np.flatnonzero(np.fromiter(map(bool, blobs), bool, n))
        words, sizes = _unpacked(layout, data, head)
        first[held] = starts = np.cumsum(sizes) - sizes
        top = words[starts[:, None] + np.arange(head)]
        rows = top[:, _FIXED:]
        sane = (rows >= 0).all(axis=1) & (rows <= sizes[:, None]).all(axis=1)
        sane &= _even(rows @ np.array(layout.widths) + head) == sizes
        if not sane.all():
            raise _damaged(layout, len(data[int(np.argmin(sane))]))
        fixed[held] = top[:, :_FIXED]
        counts[held] = rows
    sections = []
    at = first + head
    for i, width in enumerate(layout.widths):
        ends = np.zeros(n + 1, np.int64)
        np.cumsum(counts[:, i], out=ends[1:])
        section = np.empty((int(ends[-1]), width), np.int64)
        copy_runs(section.reshape(-1), ends[:-1] * width, words, at, counts[:, i] * width)
        if len(section) > 1:  # from differences within each entity
            keys = np.cumsum(section[:, 0])
            before = np.where(ends[:-1] > 0, keys[ends[:-1] - 1], 0)
            section[:, 0] = keys - np.repeat(before, counts[:, i])
        sections.append(Rows(ends, section))
        at += counts[:, i] * width
    return fixed, sections


def _unpacked(layout: Layout, data: Sequence[bytes], head: int) -> tuple[Array, Array]:
    """The words behind the headers of all states, and how many each has."""
    lengths = np.fromiter(map(len, data), np.int64, len(data))
    if int(lengths.min()) < _HEADER.size:
        raise _damaged(layout, int(lengths.min()))
    headers = np.frombuffer(b"".join([b[: _HEADER.size] for b in data]), "<i8").astype(np.int64, copy=False)
    headers = headers.reshape(-1, 5)
    if (headers[:, 0] != MAGIC).any() or (headers[:, 1] != layout.hash).any():
        raise _other(layout, headers[:, 0], headers[:, 1])
    sizes = headers[:, 3]
    sane = (sizes >= head) & (sizes & 1 == 0) & (sizes >> 1 <= lengths - _HEADER.size)
    if not sane.all():
        raise _damaged(layout, int(lengths[np.argmin(sane)]))
    cuts = ((sizes >> 1) + _HEADER.size).tolist()
    there = _there(b"".join([b[_HEADER.size : cut] for b, cut in zip(data, cuts)]))
    body = b"".join([b[cut:] for b, cut in zip(data, cuts)])
    if 2 * len(there) != len(body):
        raise _damaged(layout, int(lengths[0]))
    words = np.zeros(int(sizes.sum()), "<i8")
    words.view("<u2")[there] = np.frombuffer(body, "<u2")
    words = words.astype(np.int64, copy=False)
    sums = np.add.reduceat(words, np.cumsum(sizes) - sizes) + headers[:, :4].sum(axis=1)
    if (sums != headers[:, 4]).any():
        raise _damaged(layout, int(lengths[np.argmax(sums != headers[:, 4])]))
    return words, sizes


def _there(maps: bytes | memoryview) -> Array:
    """The places of the units that are there; by places numpy is twice as fast as by truth values."""
    return np.flatnonzero(np.unpackbits(np.frombuffer(maps, np.uint8), bitorder="little").view(np.bool_))


def _decode_one(layout: Layout, data: bytes) -> tuple[Array, list[Rows]] | None:
    """A single state, with few calls; None: something is wrong with it, and `decode` says what."""
    at = _FIXED + len(layout.widths)
    if len(data) < _HEADER.size:
        return None
    magic, digest, fence, size, total = _HEADER.unpack_from(data)
    cut = _HEADER.size + (size >> 1)
    if magic != MAGIC or digest != layout.hash or size & 1 or not (at <= size and cut <= len(data)):
        return None
    there = _there(memoryview(data)[_HEADER.size : cut])
    if 2 * len(there) != len(data) - cut:
        return None
    words = np.zeros(size, "<i8")
    words.view("<u2")[there] = np.frombuffer(data, "<u2", offset=cut)
    words = words.astype(np.int64, copy=False)
    if (int(np.add.reduce(words)) + magic + digest + fence + size - total) & (2**64 - 1):
        return None
    sections = []
    for count, width in zip(words[_FIXED:at].tolist(), layout.widths, strict=True):
        end = at + count * width
        if count < 0 or end > size:
            return None
        section = words[at:end].reshape(-1, width)
        if count > 1:
            section[:, 0] = np.cumsum(section[:, 0])
        sections.append(Rows(np.array([0, count]), section))
        at = end
    return (words[:_FIXED].reshape(1, _FIXED), sections) if _even(at) == size else None


def encode(layout: Layout, fixed: Array, fences: Array, sections: Sequence[Rows]) -> list[bytes]:
    """What `decode` reads, one for each entity."""
    n, head = len(fixed), _FIXED + len(layout.widths)
    if not n:
        return []
    counts = np.stack([s.counts for s in sections], axis=1)
    sizes = _even(counts @ np.array(layout.widths) + head)
    starts = np.cumsum(sizes) - sizes
    words = np.empty(int(sizes.sum()), np.int64)
    words[starts + sizes - 1] = 0
    words[starts[:, None] + np.arange(head)] = np.hstack([fixed, counts])
    at = starts + head
    for section, width in zip(sections, layout.widths, strict=True):
        if len(section):
            data = section.data.copy()
            data[1:, 0] -= section.data[:-1, 0]
            starting = section.starts[:-1][section.counts > 0]
            data[starting, 0] = section.data[starting, 0]
            copy_runs(words, at, data.reshape(-1), section.starts[:-1] * width, section.counts * width)
        at = at + section.counts * width
    headers = np.empty((n, 5), np.int64)
    headers[:, 0], headers[:, 1], headers[:, 2] = MAGIC, layout.hash, fences.astype(np.int64).byteswap()
    headers[:, 3] = sizes
    headers[:, 4] = np.add.reduceat(words, starts) + headers[:, :4].sum(axis=1)
    top = headers.astype("<i8", copy=False).tobytes()
    units = words.astype("<i8", copy=False).view("<u2")
    there = units != 0
    maps = np.packbits(there, bitorder="little")
    firsts, size = starts >> 1, _HEADER.size
    ends = (2 * np.cumsum(np.add.reduceat(np.bitwise_count(maps), firsts, dtype=np.int64))).tolist()
    said, body = maps.tobytes(), units[np.flatnonzero(there)].tobytes()
    return [
        top[i * size : (i + 1) * size] + said[a:b] + body[c:d]
        for i, (a, b, c, d) in enumerate(zip(firsts.tolist(), (firsts + (sizes >> 1)).tolist(), [0, *ends], ends))
    ]


def _even(n: Any) -> Any:
    return n + (n & 1)


def _damaged(layout: Layout, size: int) -> WindowStateError:
    name = layout.definition.name
    return WindowStateError(
        f"{name}: damaged window state",
        value=f"{size} bytes",
        next_step=f"rebuild it: `predictflow windows bootstrap {name}`",
    )


def _other(layout: Layout, magic: Array, digest: Array) -> Exception:
    name = layout.definition.name
    first = magic[magic != MAGIC]
    if len(first) and (int(first[0]) ^ MAGIC) & 0xFFFFFFFFFF:
        return WindowStateError(
            f"{name}: not a window state",
            value=int(first[0]).to_bytes(8, "little", signed=True).hex(),
            next_step=f"rebuild it: `predictflow windows bootstrap {name}`",
        )
    if len(first):
        return DefinitionError(
            f"{name}: the online state has another format",
            value=int(first[0]) >> 40,
            valid=[MAGIC >> 40],
            next_step=f"`predictflow windows bootstrap {name}`",
        )
    other = int(digest[digest != layout.hash][0]).to_bytes(8, "little", signed=True).hex()
    return DefinitionError(
        f"{name}: the online state was written under another definition",
        value=other,
        next_step=f"`predictflow windows bootstrap {name}`",
    )
