"""How the rows of windowed views get into Redis: a state never replaces a newer one, and a watermark never goes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from feature_store.redis_batch import Batch
from feature_store.windows.blob import FENCE_AT

# ARGV: the state's field, two unused, parts per row, then the rows: format, definition and fence as in the state, whether it
# was made of one that Redis held, and what HSET takes. The held state is a Value proto: a tag, a varint length, the blob.
# Fences are compared as two numbers of 32 bits, because Lua compares strings by the server's locale. An owner of before a
# rebalance has the smaller fence.
FENCED = f"""
local call, fields, read = redis.call, cmsgpack.unpack, struct.unpack
local state, parts = ARGV[1], tonumber(ARGV[4])
local written = 0
for i = 1, #KEYS do
  local key, first = KEYS[i], 5 + (i - 1) * parts
  local held, wins = call('HGET', key, state), true
  if held and #held > {FENCE_AT + 8} then
    local at = 2
    while held:byte(at) > 127 do at = at + 1 end
    local new = ARGV[first]
    if held:sub(at + 1, at + {FENCE_AT}) ~= new:sub(1, {FENCE_AT}) then return redis.error_reply('OTHERDEFINITION') end
    local high, low = read('>I4I4', held, at + {FENCE_AT + 1})
    local new_high, new_low = read('>I4I4', new, {FENCE_AT + 1})
    wins = new_high > high or (new_high == high and new_low >= low)
  elseif not held and ARGV[first]:byte({FENCE_AT + 9}) == 1 then
    return redis.error_reply('STATEGONE')
  end
  if wins then
    for part = first + 1, first + parts - 1 do call('HSET', key, fields(ARGV[part])) end
    written = written + 1
  end
end
return written
"""
OTHER_DEFINITION = "OTHERDEFINITION"
STATE_GONE = "STATEGONE"

# Field: partition; value: watermark, and the time by which it was known, in microseconds (exact as Lua numbers until 2255).
WATERMARKS = """
for i = 1, #ARGV, 3 do
  local mark, visible = ARGV[i + 1], ARGV[i + 2]
  local held = redis.call('HGET', KEYS[1], ARGV[i])
  if held then
    local comma = held:find(',', 1, true)
    local old, before = held:sub(1, comma - 1), held:sub(comma + 1)
    if tonumber(old) > tonumber(mark) then mark = old end
    if tonumber(before) > tonumber(visible) then visible = before end
  end
  redis.call('HSET', KEYS[1], ARGV[i], mark .. ',' .. visible)
end
return 0
"""


def watermarks_key(project: str, view: str) -> str:
    """The hash of a view's watermarks, by partition."""
    return f"predictflow:{project}:{view}:watermarks"


def state_key(project: str, view: str) -> str:
    """The key that says that a view's states are in this Redis: definition hash and run id, `:` between them."""
    return f"predictflow:{project}:{view}:state"


def parse_watermarks(reply: Mapping[bytes, bytes] | Sequence[bytes]) -> tuple[dict[int, int], int | None]:
    """The watermark of each partition, and the newest time by which they were known (None: there are none)."""
    pairs = reply.items() if isinstance(reply, Mapping) else zip(reply[::2], reply[1::2])
    marks, known = {}, None
    for partition, value in pairs:
        mark, _, visible = value.partition(b",")
        marks[int(partition)] = int(mark)
        known = int(visible) if known is None else max(known, int(visible))
    return marks, known


def fenced(
    batches: Iterable[Batch], state_field: bytes, blobs: Sequence[bytes], read: Sequence[bool]
) -> Iterator[Batch]:
    """The batches, of rows in the order of `blobs`, so that the newest state wins. `read`: was made of a state in Redis,
    and is an error where that is gone."""
    start = 0
    for batch in batches:
        end = start + len(batch.keys)
        heads = [b[: FENCE_AT + 8] + b"\0\1"[r : r + 1] for b, r in zip(blobs[start:end], read[start:end], strict=True)]
        head = (state_field, b"", b"", b"%d" % (len(batch.rows) + 1))
        yield replace(batch, rows=[heads, *batch.rows], head=head, script=FENCED)
        start = end
