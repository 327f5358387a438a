"""The script that writes packed rows so that the newest (event time, created) wins, and the bytes of its calls.

One call writes up to 64 keys: measured by the server's CPU time, half of a call per row is the call itself. Pure: no I/O.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, TypeAlias

import numpy as np
import pyarrow as pa

from feature_store.row_bytes import Piece, by_length, join, lengths_of

# Only what Redis 6.2 has. ARGV: _ts field, _pf field, where in a row the pair begins, parts per row, then the rows.
# A held pair counts only while its event is that of _ts: else a stock Feast writer was there since, and the row's
# created is unknown. An unknown created counts as the event time: nothing can be known earlier. Equal pairs: last wins.
# One HGET decides in all cases but equal event times. The straight-line branch reads the times of 1972 to 2106.
NEWEST_WINS = """
local function timestamp(p)
  local t, a, b, c, d, e, u, f, g, h, i, j = p:byte(1, 12)
  if t == 8 and e and a > 127 and b > 127 and c > 127 and d > 127 and e < 128 then
    local s = a + b * 128 + c * 16384 + d * 2097152 + e * 268435456 - 270549120
    if not u then return s, 0 end
    if u == 16 and f then
      if f < 128 then return s, f end
      if g < 128 then return s, f + g * 128 - 128 end
      if h < 128 then return s, f + g * 128 + h * 16384 - 16512 end
      if i < 128 then return s, f + g * 128 + h * 16384 + i * 2097152 - 2113664 end
      return s, f + g * 128 + h * 16384 + i * 2097152 + j * 268435456 - 270549120
    end
  end
  local seconds, nanos, at = 0, 0, 1
  while at <= #p do
    local tag, value, factor, inverse, n = p:byte(at), 0, 1, 0, 0
    repeat
      at = at + 1
      local byte = p:byte(at)
      local bits = byte % 128
      value = value + bits * factor
      if n < 9 then inverse = inverse + (127 - bits) * factor end
      factor, n = factor * 128, n + 1
    until byte < 128
    if n == 10 then value = -1 - inverse end
    if tag == 8 then seconds = value else nanos = value end
    at = at + 1
  end
  return seconds, nanos
end
local read = struct.unpack
local function created(pair, at, length, s, n)
  if length < 24 then return s, n end
  return read('>i8I4', pair, at + 12)
end
local ts, pf, at, parts = ARGV[1], ARGV[2], tonumber(ARGV[3]), tonumber(ARGV[4])
local call, fields = redis.call, cmsgpack.unpack
local written = 0
for i = 1, #KEYS do
  local key, first = KEYS[i], 5 + (i - 1) * parts
  local held, wins = call('HGET', key, ts), true
  if held then
    local row = ARGV[first]
    local s, n = read('>i8I4', row, at)
    local hs, hn = timestamp(held)
    if s == hs and n == hn then
      local cs, cn = created(row, at, row:byte(at - 1) - 160, s, n)
      local pair, hcs, hcn = call('HGET', key, pf), hs, hn
      if pair then
        local ps, pn = read('>i8I4', pair)
        if ps == hs and pn == hn then hcs, hcn = created(pair, 1, #pair, hs, hn) end
      end
      wins = cs > hcs or (cs == hcs and cn >= hcn)
    else
      wins = s > hs or (s == hs and n > hn)
    end
  end
  if wins then
    for part = first, first + parts - 1 do call('HSET', key, fields(ARGV[part])) end
    written = written + 1
  end
end
return written
"""


@lru_cache
def _sha(script: str) -> bytes:
    return hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest().encode()


KEYS_PER_CALL = 64
_FIELDS_PER_CALL = 1_200
"""A call holds up every other client: about half a millisecond at this size."""

Cells: TypeAlias = "list[bytes] | pa.Array"


@dataclass(frozen=True)
class Batch:
    """Packed rows of one view: `keys`, `rows` (for each part its bytes per row), and the start of ARGV that goes before.

    Lists where the rows are few, Arrow's binary arrays where they are many. `script` decides which rows are written, and
    says how many were.
    """

    keys: Cells
    rows: Sequence[Cells]
    head: tuple[bytes, bytes, bytes, bytes]
    fields: int
    script: str = NEWEST_WINS

    def listed(self) -> Batch:
        """The same with lists, for calls that are made of some of its rows."""
        if isinstance(self.keys, list):
            return self
        return replace(self, keys=self.keys.to_pylist(), rows=[_listed(part) for part in self.rows])

    @property
    def sha(self) -> str:
        """The script's name for EVALSHA."""
        return _sha(self.script).decode()

    def calls(self, indices: Iterable[int] | None = None, per_call: int | None = None) -> tuple[bytes, int]:
        """The RESP bytes of the script calls for all rows, or those of `indices`, and how many calls there are."""
        size = per_call or max(1, min(KEYS_PER_CALL, _FIELDS_PER_CALL // max(1, self.fields)))
        head = b"".join(map(_bulk, self.head))
        out: list[Any] = []
        count = 0
        if isinstance(self.keys, list) or indices is not None:
            some = self.listed()
            chosen = range(len(self.keys)) if indices is None else list(indices)
            keys = [_bulk(some.keys[i]) for i in chosen]
            first, *others = some.rows
            rows = [_bulk(first[i]) for i in chosen]
            for part in others:
                rows = [row + _bulk(part[i]) for row, i in zip(rows, chosen, strict=True)]
            for start in range(0, len(chosen), size):
                n = len(keys[start : start + size])
                out += [self._start(n), *keys[start : start + size], head, *rows[start : start + size]]
                count += 1
            return b"".join(out), count
        (key_bytes, key_at), (row_bytes, row_at) = _bulks([self.keys]), _bulks([_array(part) for part in self.rows])
        for start in range(0, len(self.keys), size):
            end = min(start + size, len(self.keys))
            out += [self._start(end - start), key_bytes[key_at[start] : key_at[end]], head]
            out.append(row_bytes[row_at[start] : row_at[end]])
            count += 1
        return b"".join(out), count

    def _start(self, keys: int) -> bytes:
        arguments = 7 + keys + keys * len(self.rows)
        return b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%s\r\n%s" % (arguments, _sha(self.script), _bulk(b"%d" % keys))


_BULK_HEADS = [b"$%d\r\n" % n for n in range(1_024)]


def _bulk(data: bytes) -> bytes:
    size = len(data)
    return (_BULK_HEADS[size] if size < 1_024 else b"$%d\r\n" % size) + data + b"\r\n"


def _listed(part: Cells) -> list[bytes]:
    return part if isinstance(part, list) else part.to_pylist()


def _array(part: Cells) -> pa.Array:
    return pa.array(part, pa.binary()) if isinstance(part, list) else part


def _bulks(parts: Sequence[pa.Array]) -> tuple[memoryview, list[int]]:
    """The bulk strings of all rows, one after the other, and where each row begins, and the last ends."""
    pieces: list[Piece] = []
    for part in parts:
        pieces += [by_length(lengths_of(part), lambda n: b"$%d\r\n" % n), part, b"\r\n"]
    joined = join(len(parts[0]), pieces)
    _, offsets, data = joined.buffers()
    ends: Any = np.frombuffer(offsets, np.int32)[joined.offset : joined.offset + len(joined) + 1]
    return memoryview(data), ends.tolist()
