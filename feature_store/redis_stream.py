"""Reads from Redis on an event loop: one connection carries every request at once, answers come back in order.

No pool and no lock: a request is one `write` of bytes made beforehand, its answer one call back. A second connection
carries the large reads, so that a small one does not wait behind the parsing of a large one. Reads only: what was lost
with a connection is asked again, once.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from typing import Any

from hiredis import HiredisError

from feature_store.errors import PredictFlowError
from feature_store.redis_wire import Address, command, keep_alive, reader, refused, unavailable

Replies = list[Any]
Done = Callable[[Replies | None, PredictFlowError | None], None]
"""Called once, on the loop, with the replies or with the error."""

LARGE = 16
"""Requests of at least this many commands go by the connection of the large ones."""
STALLED = 0.2
"""Seconds by which a timer is late when the loop itself stood still."""
IDLE = 5.0
"""Seconds without a byte after which a silent connection may be one that was lost unnoticed: what it was asked is asked
again on a new one."""
IN_FLIGHT = 200_000
"""So many commands may wait for their replies on one connection; of more, requests are refused. One alone never is."""
FAST_FAILURE = 0.1
"""Seconds that a request waits for a connection while the last attempt to make one has failed."""


class _Request:
    __slots__ = ("attempts", "count", "done", "payload", "replies", "since")

    def __init__(self, payload: bytes, count: int, done: Done) -> None:
        self.payload = payload
        self.count = count
        self.done = done
        self.replies: Replies = []
        self.since = 0.0
        self.attempts = 0


class _Wire(asyncio.Protocol):
    """One connection: what was asked on it, in order, and its parser."""

    def __init__(self, link: _Link) -> None:
        self.pending: deque[_Request] = deque()
        self.transport: asyncio.Transport | None = None
        self.in_flight = 0
        self.heard = link.loop.time()
        self._link = link
        self._time = link.loop.time
        self._reader = reader()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # a stream's transport can write
        keep_alive(transport.get_extra_info("socket"), self._link.address.timeout)

    def ask(self, request: _Request) -> None:
        self.pending.append(request)
        self.in_flight += request.count
        if self.transport is not None:
            self.transport.write(request.payload)

    def data_received(self, data: bytes) -> None:
        take, pending = self._reader.gets, self.pending
        self.heard = self._time()
        try:
            self._reader.feed(data)
            while pending:
                request = pending[0]
                replies = request.replies
                for _ in range(request.count - len(replies)):
                    reply = take()
                    if reply is False:
                        return
                    replies.append(reply)
                pending.popleft()
                self.in_flight -= request.count
                self._link.answer(request)
        except HiredisError:  # not Redis, or bytes were lost: what is parsed next cannot be trusted
            self.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self.transport = None
        self._link.lost(self, str(exc or "connection lost"))

    def abort(self) -> None:
        if self.transport is not None:
            self.transport.abort()


class _Link:
    """A connection that is made, and made again; `send` may be called in any state."""

    def __init__(self, address: Address, loop: asyncio.AbstractEventLoop) -> None:
        self.address = address
        self.loop = loop
        self._wire: _Wire | None = None
        self._waiting: deque[_Request] = deque()
        self._connecting: asyncio.Task[None] | None = None
        self._failed: str | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0
        self._closed = False

    def send(self, request: _Request) -> None:
        request.since = self.loop.time()
        wire = self._wire
        if wire is not None:
            if wire.in_flight and wire.in_flight + request.count > IN_FLIGHT:
                error = unavailable(self.address, f"{wire.in_flight} reads wait for it already")
                self.loop.call_soon(self._answer, request, None, error)
                return
            wire.ask(request)
        elif self._closed:
            self._answer(request, None, unavailable(self.address, "closed"))
            return
        else:
            self._waiting.append(request)
            if self._connecting is None:
                self._connecting = self.loop.create_task(self._connect())
        if self._timer is None:
            self._watch()

    async def _connect(self) -> None:
        address = self.address
        wire = _Wire(self)
        started = self.loop.time()
        try:
            async with asyncio.timeout(address.connect_timeout):
                if address.path is not None:
                    await self.loop.create_unix_connection(lambda: wire, address.path)
                else:
                    name = address.host if address.tls else None
                    await self.loop.create_connection(
                        lambda: wire, address.host, address.port, ssl=address.tls, server_hostname=name
                    )
                if address.hellos:
                    greeted: asyncio.Future[Replies] = self.loop.create_future()
                    greeting = _Request(address.hello, address.hellos, _settle(greeted))
                    greeting.attempts = 1
                    wire.ask(greeting)
                    await greeted
                if wire.transport is None:
                    raise ConnectionError("connection lost")
        except (OSError, PredictFlowError) as e:  # TimeoutError is an OSError
            self._failed = e.what if isinstance(e, PredictFlowError) else str(e) or type(e).__name__
            error = e if isinstance(e, PredictFlowError) else unavailable(address, self._failed)
            wire.abort()
            self._connecting = None
            late = self.loop.time() - started - address.connect_timeout
            if isinstance(e, TimeoutError) and late > STALLED and not self._closed:
                self._failed = None
                self._connecting = self.loop.create_task(self._connect())
                return
            self._fail(self._waiting, error)
            return
        self._failed = self._connecting = None
        self._wire = wire
        waiting, self._waiting = self._waiting, deque()
        for request in waiting:
            self.send(request)

    def answer(self, request: _Request) -> None:
        for reply in request.replies:
            if isinstance(reply, Exception):
                self._answer(request, None, refused(self.address, reply))
                return
        self._answer(request, request.replies, None)

    def _answer(self, request: _Request, replies: Replies | None, error: PredictFlowError | None) -> None:
        try:
            request.done(replies, error)
        except Exception as e:  # noqa: BLE001 - told by the loop; one request's fault must not cost the others of this connection
            self.loop.call_exception_handler({"message": "a reply could not be handled", "exception": e})

    def lost(self, wire: _Wire, reason: str) -> None:
        if self._wire is wire:
            self._wire = None
        error = unavailable(self.address, reason)
        pending, wire.pending = wire.pending, deque()
        self._again(pending, error, True)

    def _again(self, pending: deque[_Request], error: PredictFlowError, worth: bool) -> None:
        """Sends what was not answered once more, if that is `worth` it and was not done before; else fails it."""
        for request in pending:
            if not worth or request.attempts or self._closed:
                self._answer(request, None, error)
            else:
                request.attempts += 1
                request.replies = []
                self.send(request)

    def _watch(self) -> None:
        self._due = self.loop.time() + min(0.05, self.address.timeout / 4)
        self._timer = self.loop.call_at(self._due, self._check)

    def _check(self) -> None:
        """No byte came for too long: all that was asked waits for the same silent connection.

        How long a request waits while replies come does not matter: behind large reads that is no fault.
        """
        self._timer = None
        now = self.loop.time()
        if now - self._due > STALLED:  # it was this process that did not run: the answer may be there to be read
            self._watch()
            return
        wire = self._wire
        timeout = self.address.timeout
        if wire is not None and wire.pending and now - max(wire.pending[0].since, wire.heard) > timeout:
            idle = wire.pending[0].since - wire.heard > IDLE
            self._wire = None
            pending, wire.pending = wire.pending, deque()
            wire.abort()
            self._again(pending, unavailable(self.address, f"no answer within {timeout:g} s"), idle)
        limit = FAST_FAILURE if self._failed else self.address.connect_timeout
        while self._waiting and now - self._waiting[0].since > limit:
            reason = self._failed or f"no connection within {limit:g} s"
            self._answer(self._waiting.popleft(), None, unavailable(self.address, reason))
        if self._timer is None and (self._waiting or (self._wire is not None and self._wire.pending)):
            self._watch()

    def _fail(self, requests: deque[_Request], error: PredictFlowError) -> None:
        while requests:
            self._answer(requests.popleft(), None, error)

    def close(self) -> None:
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        if self._timer is not None:
            self._timer.cancel()
        if self._wire is not None:
            self._wire.abort()
        self._fail(self._waiting, unavailable(self.address, "closed"))


def _settle(future: asyncio.Future[Replies]) -> Done:
    def done(replies: Replies | None, error: PredictFlowError | None) -> None:
        if future.cancelled():
            return
        if error is not None:
            future.set_exception(error)
        else:
            future.set_result(replies or [])

    return done


class RedisStream:
    """Sends commands that only read. Bound to the event loop that first uses it; made again for another one."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._loop: asyncio.AbstractEventLoop | None = None
        self._links: tuple[_Link, _Link] | None = None

    def send(self, payload: bytes, count: int, done: Done) -> None:
        """Sends `count` commands and calls `done` with as many replies; on the loop's own thread."""
        if not count:
            done([], None)
            return
        links = self._links
        if links is None or self._loop is not asyncio.get_running_loop():
            links = self._open()
        links[count >= LARGE].send(_Request(payload, count, done))

    async def ask(self, payload: bytes, count: int) -> Replies:
        """As `send`. UnavailableError when Redis does not answer, DataError for an error reply about the data."""
        future: asyncio.Future[Replies] = asyncio.get_running_loop().create_future()
        self.send(payload, count, _settle(future))
        return await future

    async def ping(self) -> None:
        """Returns when Redis answers."""
        await self.ask(command(b"PING"), 1)

    def _open(self) -> tuple[_Link, _Link]:
        loop = asyncio.get_running_loop()
        self._loop = loop
        self._links = (_Link(self.address, loop), _Link(self.address, loop))
        return self._links

    async def aclose(self) -> None:
        """Closes the connections; requests under way fail. Safe to call twice."""
        links, self._links = self._links, None
        for link in links or ():
            link.close()
