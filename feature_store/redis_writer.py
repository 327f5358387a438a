"""Writes packed rows into Redis, batch by batch: blocking, and in an event loop.

The next batch is encoded while the server works on the last one; a few are in flight at most, so memory stays bounded. A lost
connection is waited for with jitter, and what was not acknowledged is sent again: a write may be repeated.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import AsyncIterator, Iterable, Iterator
from typing import Any

from feature_store.redis_batch import Batch
from feature_store.redis_cluster_writer import awrite_to_cluster, is_cluster, write_to_cluster
from feature_store.redis_connection import answering
from feature_store.redis_retry import BUDGET_SECONDS, Pause, ScriptLost, checked, raise_meaning, retried

IN_FLIGHT = 2
AHEAD = 4
"""In flight where the writer has other work meanwhile: a short wait for the server is then no wait of ours."""


def write(client: Any, batches: Iterable[Batch], budget_seconds: float = BUDGET_SECONDS) -> Iterator[tuple[int, int]]:
    """Writes batches in order; yields (rows, rows that won) of each once Redis has acknowledged it.

    Safe to repeat. UnavailableError when Redis has not answered for `budget_seconds`: what was yielded is written, and of
    the rest an unknown part.
    """
    if is_cluster(client):
        for batch in batches:
            yield len(batch.keys), write_to_cluster(client, batch, budget_seconds)
        return
    lane = _Lane(client, budget_seconds)
    try:
        for batch in batches:
            lane.pending.append(batch)
            yield from lane.pump(IN_FLIGHT - 1)
        yield from lane.pump(0)
    finally:
        lane.close()


class Ahead:
    """Batches that are sent, in order, and acknowledged but for the last few: the server works on them until `finish`.

    Errors of both as `write`; after one, and after `close`, nothing is in flight. A cluster's nodes are not run ahead of.
    """

    def __init__(self, client: Any, batches: Iterable[Batch], budget_seconds: float = BUDGET_SECONDS) -> None:
        self._won = 0
        self._lane = None if is_cluster(client) else _Lane(client, budget_seconds)
        try:
            for batch in batches:
                if self._lane is None:
                    self._won += write_to_cluster(client, batch, budget_seconds)
                else:
                    self._lane.pending.append(batch)
                    self._won += sum(won for _, won in self._lane.pump(AHEAD - 1))
        except BaseException:
            self.close()
            raise

    def finish(self) -> int:
        """How many rows won, when all are acknowledged."""
        try:
            if self._lane is not None:
                self._won += sum(won for _, won in self._lane.pump(0))
            return self._won
        finally:
            self.close()

    def close(self) -> None:
        """Waits for nothing: what is not acknowledged may be written or not."""
        if self._lane is not None:
            self._lane.close()


class _Lane:
    """One connection to one server, with batches sent ahead of their replies."""

    def __init__(self, client: Any, budget_seconds: float) -> None:
        self._client = client
        self._connection: Any = None
        self._calls: deque[int] = deque()  # of the batches that were sent
        self._pause = Pause(client, budget_seconds)
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
            except ScriptLost:
                self._drop()
                with answering(self._client):
                    self._client.script_load(self.pending[0].script)
            except retried() as e:
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
            written += checked(self._client, self._connection.read_response, disconnect_on_error=False)
        self._calls.popleft()
        return len(self.pending.popleft().keys), written

    def _drop(self) -> None:
        self._calls.clear()
        if self._connection is not None:
            self._connection.disconnect()
            self._client.connection_pool.release(self._connection)
            self._connection = None


async def awrite(
    client: Any, batches: Iterable[Batch], budget_seconds: float = BUDGET_SECONDS
) -> AsyncIterator[tuple[int, int]]:
    """As `write`, on an asyncio client. Encoding runs in the event loop, one batch at a time."""
    for batch in batches:
        if is_cluster(client):
            yield len(batch.keys), await awrite_to_cluster(client, batch, budget_seconds)
            continue
        pause = Pause(client, budget_seconds)
        while True:
            try:
                written = await _awrite_to_one(client, batch)
                break
            except ScriptLost:
                with answering(client):
                    await client.script_load(batch.script)
            except retried() as e:
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
                raise_meaning(client, e)
                raise
        clean = True
        return written
    finally:
        if not clean:
            await connection.disconnect(nowait=True)
        await client.connection_pool.release(connection)
