"""States as bytes: little-endian words of 8 bytes, so that those of many entities are parsed and written at once.

Header: magic and version | definition hash | fence (big-endian) | words in all | sum of all words, this being 0 |
visible_at | last_seen | floor | lost_until | rows of each section. Then the sections' rows (see `layout.py`).
The fence is the sum over the partitions of (last offset + 1): of two states of an entity, the greater is the newer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from feature_store.errors import DefinitionError
from feature_store.windows.layout import Layout
from feature_store.windows.rows import NEVER, Array, Rows
from feature_store.windows.state_errors import WindowStateError

MAGIC = int.from_bytes(b"PFwin\x02\x00\x00", "little")
FENCE_AT = 16
"""Where the fence is, for the script that writes states; before it stand what must be equal: format and definition."""
_FIXED = 9


def decode(layout: Layout, blobs: Sequence[bytes | None]) -> tuple[Array, list[Rows]]:
    """Four header words of every entity (visible_at, last_seen, floor, lost_until) and the sections.

    DefinitionError: written under another definition or format; WindowStateError: damaged.
    """
    n, head = len(blobs), _FIXED + len(layout.widths)
    if n == 1 and blobs[0]:
        made = _decode_one(layout, blobs[0])
        if made is not None:
            return made
    data = [b or b"" for b in blobs]
    sizes = np.fromiter(map(len, data), np.int64, n)
    if (sizes & 7).any():
        raise _damaged(layout, int(sizes[(sizes & 7) != 0][0]))
    sizes >>= 3
    words = np.frombuffer(b"".join(data), "<i8").astype(np.int64, copy=False)
    first = starts = np.cumsum(sizes) - sizes
    fixed = np.full((n, 4), NEVER, np.int64)
    counts = np.zeros((n, len(layout.widths)), np.int64)
    held = np.flatnonzero(sizes)
    sizes, starts = sizes[held], starts[held]
    if len(held):
        if int(sizes.min()) < 2:
            raise _damaged(layout, int(sizes.min()) * 8)
        if (words[starts] != MAGIC).any() or (words[starts + 1] != layout.hash).any():
            raise _other(layout, words[starts], words[starts + 1])
        if int(sizes.min()) < head:
            raise _damaged(layout, int(sizes.min()) * 8)
        headers = words[starts[:, None] + np.arange(head)]
        rows = headers[:, _FIXED:]
        sane = (headers[:, 3] == sizes) & (rows >= 0).all(axis=1) & (rows <= sizes[:, None]).all(axis=1)
        sane &= rows @ np.array(layout.widths) + head == sizes
        sane &= np.add.reduceat(words, starts) - headers[:, 4] == headers[:, 4]
        if not sane.all():
            raise _damaged(layout, int(sizes[~sane][0]) * 8)
        fixed[held] = headers[:, 5:_FIXED]
        counts[held] = rows
    sections = []
    at = first + head
    for i, width in enumerate(layout.widths):
        ends = np.zeros(n + 1, np.int64)
        np.cumsum(counts[:, i], out=ends[1:])
        sections.append(Rows(ends, words[_places(at, counts[:, i], ends, width)]))
        at += counts[:, i] * width
    return fixed, sections


def _decode_one(layout: Layout, data: bytes) -> tuple[Array, list[Rows]] | None:
    """A single state, with few calls; None: something is wrong with it, and `decode` says what."""
    head = _FIXED + len(layout.widths)
    if len(data) & 7 or len(data) < head * 8:
        return None
    words = np.frombuffer(data, "<i8").astype(np.int64, copy=False)
    header = words[:head].tolist()
    if header[0] != MAGIC or header[1] != layout.hash or header[3] != len(words):
        return None
    if int(np.add.reduce(words)) - 2 * header[4] & (2**64 - 1):
        return None
    at, sections = head, []
    for count, width in zip(header[_FIXED:], layout.widths, strict=True):
        end = at + count * width
        if count < 0 or end > len(words):
            return None
        sections.append(Rows(np.array([0, count]), words[at:end].reshape(-1, width)))
        at = end
    return (words[5:_FIXED].reshape(1, 4), sections) if at == len(words) else None


def encode(layout: Layout, fixed: Array, fences: Array, sections: Sequence[Rows]) -> list[bytes]:
    """What `decode` reads, one for each entity."""
    n, head = len(fixed), _FIXED + len(layout.widths)
    counts = np.stack([s.counts for s in sections], axis=1)
    sizes = counts @ np.array(layout.widths) + head
    ends = np.cumsum(sizes)
    starts = ends - sizes
    out = np.empty(int(ends[-1]) if n else 0, np.int64)
    headers = np.empty((n, head), np.int64)
    headers[:, 0], headers[:, 1], headers[:, 2] = MAGIC, layout.hash, fences.astype(np.int64).byteswap()
    headers[:, 3], headers[:, 4], headers[:, 5:_FIXED], headers[:, _FIXED:] = sizes, 0, fixed, counts
    out[starts[:, None] + np.arange(head)] = headers
    at = starts + head
    for section, width in zip(sections, layout.widths, strict=True):
        out[_places(at, section.counts, section.starts, width)] = section.data
        at = at + section.counts * width
    if n:
        out[starts + 4] = np.add.reduceat(out, starts)
    data = out.astype("<i8", copy=False).tobytes()
    return [data[a:b] for a, b in zip((starts * 8).tolist(), (ends * 8).tolist())]


def _places(at: Array, counts: Array, starts: Array, width: int) -> Array:
    """Where the words of a section's rows are, entity i's beginning at `at[i]`."""
    first = np.repeat(at - starts[:-1] * width, counts) + np.arange(int(starts[-1])) * width
    return first[:, None] + np.arange(width)


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
