"""Writes packed rows into Redis so that the newest (event time, created) wins atomically, whatever the order of writers.

One script call writes up to 64 keys: measured by the server's CPU time, half of a call per row is the call itself. The
next batch is encoded while the server works on the last one; at most two are in flight, so memory stays bounded. A lost
connection is waited for with jitter, and what was not acknowledged is sent again: a write may be repeated.
"""

from __future__ import annotations

import asyncio
import hashlib
import random
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from feature_store.errors import UnavailableError
from feature_store.redis_connection import address_of, answering

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

KEYS_PER_CALL = 64
_FIELDS_PER_CALL = 1_200
"""A call holds up every other client: about half a millisecond at this size."""
IN_FLIGHT = 2
BUDGET_SECONDS = 5.0
"""How long a write waits for a Redis that does not answer, before it fails."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0
_COMMAND_BATCH = 1_000


@dataclass(frozen=True)
class Batch:
    """Packed rows of one view: `keys`, `rows` (for each part its bytes per row), and the start of ARGV that goes before.

    `script` decides which rows are written, and says how many were.
    """

    keys: list[bytes]
    rows: list[list[bytes]]
    head: tuple[bytes, bytes, bytes, bytes]
    fields: int
    script: str = NEWEST_WINS

    def calls(self, indices: Iterable[int] | None = None, per_call: int | None = None) -> tuple[bytes, int]:
        """The RESP bytes of the script calls for all rows, or those of `indices`, and how many calls there are."""
        chosen = list(range(len(self.keys))) if indices is None else list(indices)
        size = per_call or max(1, min(KEYS_PER_CALL, _FIELDS_PER_CALL // max(1, self.fields)))
        out: list[bytes] = []
        head = b"".join(map(_bulk, self.head))
        count = 0
        parts = len(self.rows)
        sha = _sha(self.script)
        for start in range(0, len(chosen), size):
            some = chosen[start : start + size]
            n = len(some)
            out.append(b"*%d\r\n$7\r\nEVALSHA\r\n$40\r\n%s\r\n%s" % (7 + n + n * parts, sha, _bulk(b"%d" % n)))
            for i in some:
                key = self.keys[i]
                out.append(b"$%d\r\n%s\r\n" % (len(key), key))
            out.append(head)
            for i in some:
                for part in self.rows:
                    row = part[i]
                    out.append(b"$%d\r\n%s\r\n" % (len(row), row))
            count += 1
        return b"".join(out), count


def _bulk(data: bytes) -> bytes:
    return b"$%d\r\n%s\r\n" % (len(data), data)


def write(client: Any, batches: Iterable[Batch], budget_seconds: float = BUDGET_SECONDS) -> Iterator[tuple[int, int]]:
    """Writes batches in order; yields (rows, rows that won) of each once Redis has acknowledged it.

    Safe to repeat. UnavailableError when Redis has not answered for `budget_seconds`: what was yielded is written, and of
    the rest an unknown part.
    """
    if _is_cluster(client):
        for batch in batches:
            yield len(batch.keys), _write_to_cluster(client, batch, budget_seconds)
        return
    lane = _Lane(client, budget_seconds)
    try:
        for batch in batches:
            lane.pending.append(batch)
            yield from lane.pump(IN_FLIGHT - 1)
        yield from lane.pump(0)
    finally:
        lane.close()


class _Pause:
    """Growing, jittered pauses within one time budget. Use: `yield`ed seconds to sleep; the error when none are left."""

    def __init__(self, client: Any, budget_seconds: float) -> None:
        self._client, self._budget = client, budget_seconds
        self.reset()

    def reset(self) -> None:
        """Redis has answered: the budget begins anew."""
        self._until: float | None = None
        self._pause = _FIRST_PAUSE

    def after(self, error: Exception) -> float:
        """Seconds to sleep before the next try; UnavailableError when the budget is used up."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._budget
        if now >= self._until:
            raise UnavailableError(
                f"Redis at {address_of(self._client)} (REDIS_URL) does not answer ({str(error).rstrip('.')}); "
                f"tried for {self._budget:g} s",
                next_step="start it, or `predictflow up`, and check REDIS_URL; then write again: it is safe to repeat",
            ) from error
        pause = min(self._pause * random.uniform(0.5, 1.5), self._until - now)  # jitter, no secret
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return pause


class _ScriptLost(Exception):  # not an error that anybody sees
    """The server does not know the script: new, restarted, or failed over to."""


def _retried() -> tuple[type[Exception], ...]:
    from redis import exceptions

    return (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, exceptions.MasterDownError)


class _Lane:
    """One connection to one server, with batches sent ahead of their replies."""

    def __init__(self, client: Any, budget_seconds: float) -> None:
        self._client = client
        self._connection: Any = None
        self._calls: deque[int] = deque()  # of the batches that were sent
        self._pause = _Pause(client, budget_seconds)
        self.pending: deque[Batch] = deque()

    def pump(self, leave: int) -> list[tuple[int, int]]:
        """Sends what is pending and reads replies until only `leave` batches are unanswered."""
        done: list[tuple[int, int]] = []
        while True:
            try:
                self._send()
                while len(self.pending) > leave:
                    done.append(self._receive())
                    self._pause.reset()
                return done
            except _ScriptLost:
                self._drop()
                with answering(self._client):
                    self._client.script_load(self.pending[0].script)
            except _retried() as e:
                self._drop()
                time.sleep(self._pause.after(e))  # grows, with jitter, and ends with the time budget

    def close(self) -> None:
        """Gives the connection back; a connection with unread replies is closed."""
        if self._calls:
            self._drop()
        elif self._connection is not None:
            self._client.connection_pool.release(self._connection)
            self._connection = None

    def _send(self) -> None:
        while len(self._calls) < len(self.pending):
            if self._connection is None:
                self._connection = self._client.connection_pool.get_connection()
            payload, calls = self.pending[len(self._calls)].calls()
            self._calls.append(calls)
            self._connection.send_packed_command([payload], check_health=len(self._calls) == 1)

    def _receive(self) -> tuple[int, int]:
        written = 0
        for _ in range(self._calls[0]):
            written += _checked(self._client, self._connection.read_response, disconnect_on_error=False)
        self._calls.popleft()
        return len(self.pending.popleft().keys), written

    def _drop(self) -> None:
        self._calls.clear()
        if self._connection is not None:
            self._connection.disconnect()
            self._client.connection_pool.release(self._connection)
            self._connection = None


def _checked(client: Any, read: Any, **options: Any) -> int:
    try:
        return int(read(**options))
    except Exception as e:
        _raise(client, e)
        raise


def _raise(client: Any, error: Exception) -> None:
    """Raises what an error reply means to the writer; returns where it means nothing special."""
    from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

    if isinstance(error, NoScriptError):
        raise _ScriptLost from error
    text = str(error)
    if "-READONLY" in text:  # raised within the script: a primary that became a replica
        raise ReadOnlyError(text) from error
    if isinstance(error, ResponseError) and any(f in text for f in ("OOM command", "-MISCONF", "-NOREPLICAS")):
        raise UnavailableError(
            f"Redis at {address_of(client)} (REDIS_URL) refuses writes ({text[-160:]})",
            next_step="give it memory (maxmemory) or mend what it names; then write again: it is safe to repeat",
        ) from error


# --- Redis Cluster: a call may hold keys of one slot only, so one call per row, side by side on all nodes ---------------


def _is_cluster(client: Any) -> bool:
    return hasattr(client, "nodes_manager")


def _write_to_cluster(client: Any, batch: Batch, budget_seconds: float) -> int:
    pause = _Pause(client, budget_seconds)
    written, left = 0, list(range(len(batch.keys)))
    while left:
        by_node: dict[str, tuple[Any, list[int]]] = {}
        for i in left:
            node = client.get_node_from_key(batch.keys[i])
            if node is None:  # a slot without a node
                raise UnavailableError(f"Redis Cluster at {address_of(client)} (REDIS_URL) does not cover all slots")
            by_node.setdefault(node.name, (node, []))[1].append(i)
        left, moved, error = [], [], None
        for node, rows in by_node.values():
            try:
                done, again = _on_node(client.get_redis_connection(node), batch, rows)
                written += done
                moved += again
            except _retried() as e:
                left, error = left + rows, e
        with answering(client):
            for i in moved:  # the client follows the slot
                arguments = [batch.keys[i], *batch.head, *(part[i] for part in batch.rows)]
                written += int(client.eval(batch.script, 1, *arguments))
        if moved or left:
            with answering(client):
                client.nodes_manager.initialize()
        if error is not None:
            time.sleep(pause.after(error))  # as above, while the Cluster moves slots
    return written


def _on_node(node: Any, batch: Batch, rows: list[int]) -> tuple[int, list[int]]:
    """Rows that won, and the rows that this node does not hold (any more)."""
    from redis.exceptions import AskError, ClusterDownError, MovedError, TryAgainError

    pool = node.connection_pool
    connection = pool.get_connection()
    written, again, script_lost = 0, [], False
    try:
        payload, calls = batch.calls(rows, per_call=1)
        connection.send_packed_command([payload])
        for i in rows[:calls]:
            try:
                written += _checked(node, connection.read_response, disconnect_on_error=False)
            except _ScriptLost:
                script_lost = True
                again.append(i)
            except (MovedError, AskError, TryAgainError, ClusterDownError):
                again.append(i)
    except BaseException:
        connection.disconnect()  # replies are left unread: whoever has it next would take them for its own
        raise
    finally:
        pool.release(connection)
    if script_lost:
        node.script_load(batch.script)
    return written, again


# --- asyncio ----------------------------------------------------------------------------------------------------------


async def awrite(
    client: Any, batches: Iterable[Batch], budget_seconds: float = BUDGET_SECONDS
) -> AsyncIterator[tuple[int, int]]:
    """As `write`, on an asyncio client. Encoding runs in the event loop, one batch at a time."""
    for batch in batches:
        pause = _Pause(client, budget_seconds)
        while True:
            try:
                if _is_cluster(client):
                    written = await _awrite_to_cluster(client, batch)
                else:
                    written = await _awrite_to_one(client, batch)
                break
            except _ScriptLost:
                with answering(client):
                    await client.script_load(batch.script)
            except _retried() as e:
                await asyncio.sleep(pause.after(e))
        yield len(batch.keys), written


async def _awrite_to_one(client: Any, batch: Batch) -> int:
    connection = await client.connection_pool.get_connection()
    clean = False
    try:
        payload, calls = batch.calls()
        await connection.send_packed_command(payload)
        written = 0
        for _ in range(calls):
            try:
                written += int(await connection.read_response(disconnect_on_error=False))
            except Exception as e:
                _raise(client, e)
                raise
        clean = True
        return written
    finally:
        if not clean:
            await connection.disconnect(nowait=True)
        await client.connection_pool.release(connection)


async def _awrite_to_cluster(client: Any, batch: Batch) -> int:
    replies = []
    for start in range(0, len(batch.keys), KEYS_PER_CALL):  # as many connections at a time, at most
        some = range(start, min(start + KEYS_PER_CALL, len(batch.keys)))
        calls = [
            client.eval(batch.script, 1, batch.keys[i], *batch.head, *(part[i] for part in batch.rows)) for i in some
        ]
        with answering(client):
            replies += await asyncio.gather(*calls)
    return sum(map(int, replies))


# --- one script call per key, for deletes -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Command:
    """One script call on one key."""

    key: bytes
    args: list[bytes]


def run_script(client: Any, script: str, commands: Iterable[Command]) -> Iterator[list[int]]:
    """Runs `script` once per command, pipelined; yields the replies of each thousand.

    Safe to repeat where the script is. UnavailableError when Redis does not answer: batches before it are done.
    """
    batch: list[Command] = []
    for command in commands:
        batch.append(command)
        if len(batch) >= _COMMAND_BATCH:
            yield _run(client, script, batch)
            batch = []
    if batch:
        yield _run(client, script, batch)


def _run(client: Any, script: str, batch: list[Command]) -> list[int]:
    with answering(client):
        if _is_cluster(client):  # its pipelines know no scripts
            return [int(client.eval(script, 1, c.key, *c.args)) for c in batch]
        sha = client.script_load(script)
        pipe = client.pipeline(transaction=False)
        for command in batch:
            pipe.evalsha(sha, 1, command.key, *command.args)
        return [int(reply) for reply in pipe.execute()]
