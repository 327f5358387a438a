"""Bad HTTP framing, endless and slow heads: each is answered or hung up on, and harms nobody else. For every route."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import random
import re
from typing import Any

import pytest
import uvicorn
from hot_support import GOOD, HOT, Server, request, talk, until
from test_serving_app import Server as Application

from serving.hot_protocol import HotProtocol


async def sent(port: int, *pieces: bytes) -> bytes:
    """What the server says to these pieces until it hangs up, or until the client has had enough."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        for piece in pieces:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)
        if writer.can_write_eof():
            writer.write_eof()
        async with asyncio.timeout(2):
            return await reader.read()
    except (TimeoutError, ConnectionError):
        return b""
    finally:
        writer.close()


async def unharmed(server: Server) -> None:
    assert await talk(server.port, request(GOOD), count=1) == [(200, HOT)]
    assert server.guard.inside == 0


def mutated(rng: random.Random) -> bytes:
    data = bytearray(request(GOOD))
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0:
                data[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                del data[at:]
            case 2:
                data[at:at] = rng.randbytes(rng.randrange(40))
            case 3:
                data = bytearray(rng.randbytes(rng.randrange(200)))
            case 4:
                data = data.replace(b"content-length", rng.choice([b"content-length: 1\r\nx", b"transfer-encoding"]))
            case 5:
                length = rng.choice(
                    [b"-1", b"+5", b"0x10", b"9" * 30, b"5, 5", b"", b"\xb2", b"7\r\ncontent-length: 8"]
                )
                data[:] = b"\r\n".join(
                    b"content-length: " + length if line.startswith(b"content-length") else line
                    for line in bytes(data).split(b"\r\n")
                )
    return bytes(data)


@pytest.mark.parametrize("seed", range(4))
def test_malformed_requests_get_a_4xx_or_nothing_and_kill_nothing(seed: int, caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        faults: list[dict[str, Any]] = []
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        rng = random.Random(seed)
        async with Server(HotProtocol) as server:
            for start in range(0, 200, 20):
                batch = [mutated(rng) for _ in range(20)]
                cuts = [rng.randrange(len(data) + 1) for data in batch]
                got = await asyncio.gather(*(sent(server.port, d[:c], d[c:]) for d, c in zip(batch, cuts)))
                for data, answer in zip(batch, got):
                    assert not answer or answer[:10] in (b"HTTP/1.1 2", b"HTTP/1.1 4"), (start, data, answer)
            await unharmed(server)
        assert faults == []

    asyncio.run(run())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.ERROR] == []


@pytest.mark.parametrize("filler", [b"x: " + b"y" * 1000 + b"\r\n", b"y" * 1000], ids=["many", "one"])
@pytest.mark.parametrize("path", ["/api/v1/features/online", "/healthz"])
def test_an_endless_head_is_refused(filler: bytes, path: str) -> None:
    async def run() -> None:
        async with Server(HotProtocol) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(f"POST {path} HTTP/1.1\r\nhost: x\r\nfiller: ".encode() + filler)
            await writer.drain()
            taken = 0
            while server.uvicorn.server_state.connections and taken < 8_000_000:
                writer.write(filler * 16)
                with contextlib.suppress(ConnectionError):  # it has hung up
                    await writer.drain()
                await asyncio.sleep(0.001)
                taken += 16 * len(filler)
            async with asyncio.timeout(20):
                answer = await reader.readuntil(b"}}")
            assert answer.startswith(b"HTTP/1.1 431 ")
            assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "headers_too_large"
            assert taken < 8_000_000
            writer.close()
            await unharmed(server)

    asyncio.run(run())


def test_large_headers_below_the_limit_are_taken() -> None:
    async def run() -> None:
        async with Server(HotProtocol) as server:
            data = request(GOOD, *(f"x-{i}: {'y' * 4000}" for i in range(12)))
            for size in (len(data), 1500):  # at once, and in pieces
                pieces = [data[i : i + size] for i in range(0, len(data), size)]
                assert await talk(server.port, *pieces, count=1) == [(200, HOT)]

    asyncio.run(run())


@pytest.mark.parametrize(
    ("pieces", "status"),
    [
        ([b"POST /api/v1/features/online HTTP/1.1\r\nhost"], b"HTTP/1.1 408 "),
        ([], b""),
        ([b"\r\n"], b""),
        ([request(GOOD) + b"\r\n"], b"HTTP/1.1 200 "),
        ([request(GOOD) + b"GET /he"], b"HTTP/1.1 200 "),
    ],
    ids=["half", "nothing", "empty lines", "idle after one", "half after one"],
)
def test_a_head_that_does_not_come_is_hung_up_on(
    pieces: list[bytes], status: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(HotProtocol, "head_seconds", 0.3)

    async def run() -> None:
        async with Server(HotProtocol) as server:
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.writelines(pieces)
            async with asyncio.timeout(30):
                answer = await reader.read()  # until the server hangs up
            assert answer.startswith(status)
            assert bool(answer) == bool(status)
            assert not server.uvicorn.server_state.connections
            writer.close()

    asyncio.run(run())


def test_a_slow_body_after_a_quick_head_is_not_a_late_head(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(HotProtocol, "head_seconds", 0.2)

    async def run() -> None:
        async with Server(HotProtocol) as server:
            head, brace, rest = request(GOOD).partition(b"{")
            reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
            writer.write(head)
            await asyncio.sleep(0.6)  # well over what a head may take
            writer.write(brace + rest)
            async with asyncio.timeout(20):
                assert (await reader.readuntil(HOT)).startswith(b"HTTP/1.1 200 ")
            writer.close()

    asyncio.run(run())


@pytest.mark.parametrize("path", ["/api/v1/features/online", "/api/v1/features/historical", "/push"])
def test_a_client_that_leaves_amid_its_body_is_no_fault_of_the_servers(
    path: str, caplog: pytest.LogCaptureFixture
) -> None:
    async def run() -> None:
        app = Application()
        config = uvicorn.Config(app.app, port=0, http=HotProtocol, loop="asyncio", lifespan="off", log_config=None)
        server = uvicorn.Server(config)
        config.load()
        server.lifespan = config.lifespan_class(config)
        await server.startup()
        port = server.servers[0].sockets[0].getsockname()[1]
        _, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(request(GOOD, path=path)[:-5])
        await until(lambda: "predictflow_requests_in_flight 1.0" in app.metrics.expose().decode())
        writer.close()
        await until(lambda: "predictflow_requests_in_flight 0.0" in app.metrics.expose().decode())
        counted = re.findall(r'request_seconds_count\{.*status="(\d+)"\} 1.0', app.metrics.expose().decode())
        assert counted in (["499"], ["400"])  # 400: where the framework reads the body itself
        await server.shutdown()

    asyncio.run(run())
    assert [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING] == []
