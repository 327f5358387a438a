"""Writes rows into Redis so that the newest (event time, created) wins atomically, whatever the order of the writers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from feature_store.redis_connection import answering
from feature_store.redis_layout import encode_pair, encode_timestamp, feature_field, pair_field, timestamp_field

# Only what Redis 6.2 has. ARGV: _ts field, its value, _pf field, its value, then field, value, ...
# A held pair counts only while its event is that of _ts: else a stock Feast writer was there since, and the row's
# created is unknown. An unknown created counts as the event time: nothing can be known earlier. Equal pairs: last wins.
NEWEST_WINS = """
local function timestamp(proto)
  local seconds, nanos, i = 0, 0, 1
  while i <= #proto do
    local tag, value, factor, inverse, n = proto:byte(i), 0, 1, 0, 0
    repeat
      i = i + 1
      local byte = proto:byte(i)
      local bits = byte % 128
      value = value + bits * factor
      if n < 9 then inverse = inverse + (127 - bits) * factor end
      factor, n = factor * 128, n + 1
    until byte < 128
    if n == 10 then value = -1 - inverse end
    if tag == 8 then seconds = value else nanos = value end
    i = i + 1
  end
  return seconds, nanos
end
local function older(s1, n1, s2, n2) return s1 < s2 or (s1 == s2 and n1 < n2) end
local function created(pair, s, n)
  if #pair < 24 then return s, n end
  return struct.unpack('>i8I4', pair, 13)
end

local held = redis.call('HMGET', KEYS[1], ARGV[1], ARGV[3])
if held[1] then
  local new = ARGV[4]
  local s, n = struct.unpack('>i8I4', new)
  local hs, hn = timestamp(held[1])
  if older(s, n, hs, hn) then return 0 end
  if s == hs and n == hn then
    local cs, cn = created(new, s, n)
    local hcs, hcn = hs, hn
    if held[2] then
      local ps, pn = struct.unpack('>i8I4', held[2])
      if ps == hs and pn == hn then hcs, hcn = created(held[2], hs, hn) end
    end
    if older(cs, cn, hcs, hcn) then return 0 end
  end
end
for i = 1, #ARGV, 2000 do
  redis.call('HSET', KEYS[1], unpack(ARGV, i, math.min(i + 1999, #ARGV)))
end
return 1
"""
# Removes one view from a hash that several views share; the hash goes when no view is left in it.
DROP_VIEW = """
for i = 1, #ARGV, 2000 do
  redis.call('HDEL', KEYS[1], unpack(ARGV, i, math.min(i + 1999, #ARGV)))
end
for _, field in ipairs(redis.call('HKEYS', KEYS[1])) do
  if field:sub(1, 4) == '_ts:' then return 0 end
end
return redis.call('DEL', KEYS[1])
"""

_BATCH_ROWS = 1_000
_BATCH_BYTES = 4_000_000
"""A pipeline holds no more than this, so that memory stays bounded whatever the size of rows."""


@dataclass(frozen=True)
class Command:
    """One script call on one key."""

    key: bytes
    args: list[bytes]


class RowEncoder:
    """Turns rows of one view into `Command`s of NEWEST_WINS. `view` is the stored (versioned) name."""

    def __init__(self, view: str) -> None:
        self._view = view
        self._ts, self._pf = timestamp_field(view), pair_field(view)
        self._fields: dict[str, bytes] = {}

    def encode(self, key: bytes, values: Mapping[str, bytes], event_ns: int, created_ns: int | None) -> Command:
        """`values`: feature name -> `Value` proto bytes, zero bytes for null."""
        args = [self._ts, encode_timestamp(event_ns), self._pf, encode_pair(event_ns, created_ns)]
        for name, data in values.items():
            field = self._fields.get(name)
            if field is None:
                field = self._fields[name] = feature_field(self._view, name)
            args += (field, data)
        return Command(key, args)


def run_script(client: Any, script: str, commands: Iterable[Command]) -> Iterator[list[int]]:
    """Runs `script` once per command, pipelined; yields the replies of each batch (NEWEST_WINS: 1 written, 0 older).

    Safe to repeat. UnavailableError when Redis does not answer: batches before it are written.
    """
    from redis.exceptions import NoScriptError

    sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    for batch in _batches(commands):
        with answering(client):
            replies = _pipeline(client, sha, batch).execute(raise_on_error=False)
            if any(isinstance(r, NoScriptError) for r in replies):  # a fresh or restarted server
                client.script_load(script)
                replies = _pipeline(client, sha, batch).execute(raise_on_error=False)
            yield _checked(replies)


async def arun_script(client: Any, script: str, commands: Iterable[Command]) -> list[int]:
    """As `run_script`, on an asyncio client; returns all replies."""
    from redis.exceptions import NoScriptError

    sha = hashlib.sha1(script.encode(), usedforsecurity=False).hexdigest()
    done: list[int] = []
    for batch in _batches(commands):
        with answering(client):
            replies = await _pipeline(client, sha, batch).execute(raise_on_error=False)
            if any(isinstance(r, NoScriptError) for r in replies):
                await client.script_load(script)
                replies = await _pipeline(client, sha, batch).execute(raise_on_error=False)
            done += _checked(replies)
    return done


def _pipeline(client: Any, sha: str, batch: list[Command]) -> Any:
    pipe = client.pipeline(transaction=False)
    for command in batch:
        pipe.evalsha(sha, 1, command.key, *command.args)
    return pipe


def _checked(replies: list[Any]) -> list[int]:
    for reply in replies:
        if isinstance(reply, Exception):
            raise reply
    return replies


def _batches(commands: Iterable[Command]) -> Iterator[list[Command]]:
    batch: list[Command] = []
    size = 0
    for command in commands:
        batch.append(command)
        size += sum(map(len, command.args))
        if len(batch) >= _BATCH_ROWS or size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch
