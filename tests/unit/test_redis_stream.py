"""Our Redis client for event loops, and a peer that is slow, silent or forgot the connection. The peer is a few lines."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from typing import Any

import pytest

from feature_store import redis_stream
from feature_store.errors import UnavailableError
from feature_store.redis_connection import connection_options
from feature_store.redis_stream import RedisStream
from feature_store.redis_wire import address_from, command

PING = command(b"PING")
Peer = Callable[[int, asyncio.StreamReader, asyncio.StreamWriter], Coroutine[Any, Any, None]]


@asynccontextmanager
async def stream_to(peer: Peer, timeout: float) -> AsyncIterator[RedisStream]:
    """`peer` is told which connection it is, from 0."""
    count = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        count += 1
        await peer(count - 1, reader, writer)
        writer.close()

    server = await asyncio.start_server(accept, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    address = address_from(connection_options(f"redis://127.0.0.1:{port}/0", timeout))
    assert address is not None
    stream = RedisStream(address)
    try:
        yield stream
    finally:
        await stream.aclose()
        server.close()


async def answer_all(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    while await reader.read(len(PING)):
        writer.write(b"+PONG\r\n")


def test_a_request_may_wait_longer_than_the_timeout_while_replies_come() -> None:
    async def trickle(_: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for _ in range(10):
            await reader.readexactly(len(PING))
            await asyncio.sleep(0.1)
            writer.write(b"+PONG\r\n")

    async def run() -> None:
        async with stream_to(trickle, 0.6) as stream:
            got = await asyncio.gather(*(stream.ask(PING, 1) for _ in range(10)))
            assert [list(map(bytes, g)) for g in got] == [[b"PONG"]] * 10

    asyncio.run(run())


def test_more_than_may_wait_is_refused_at_once_and_one_alone_never(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_stream, "IN_FLIGHT", 2)

    async def run() -> None:
        async with stream_to(answer_all, 20) as stream:
            await stream.ask(PING * 5, 5)
            got = await asyncio.gather(*(stream.ask(PING, 1) for _ in range(3)), return_exceptions=True)
            assert [isinstance(g, UnavailableError) for g in got] == [False, False, True]
            assert "reads wait" in str(got[2])
            await stream.ask(PING, 1)

    asyncio.run(run())


@pytest.mark.parametrize("idle", [0.0, 60.0])
def test_a_connection_that_was_forgotten_while_idle_is_made_again(idle: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(redis_stream, "IDLE", idle)

    async def forgets(number: int, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if number:
            await answer_all(number, reader, writer)
        else:
            await reader.readexactly(len(PING))
            writer.write(b"+PONG\r\n")
            await reader.read()  # says nothing more

    async def run() -> None:
        async with stream_to(forgets, 0.3) as stream:
            await stream.ask(PING, 1)
            await asyncio.sleep(0.05)
            if idle:  # the connection was in use: the server stands still, and asking twice would not help
                with pytest.raises(UnavailableError):
                    await stream.ask(PING, 1)
            else:
                await stream.ask(PING, 1)

    asyncio.run(run())


def test_the_system_watches_idle_connections() -> None:
    async def run() -> None:
        async with stream_to(answer_all, 3) as stream:
            await stream.ping()
            assert stream._links is not None
            wire = stream._links[0]._wire
            assert wire is not None
            assert wire.transport is not None
            own = wire.transport.get_extra_info("socket")
            assert own.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            if hasattr(socket, "TCP_USER_TIMEOUT"):
                assert own.getsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT) == 3000

    asyncio.run(run())
