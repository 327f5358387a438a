"""Our own Redis clients on real servers: passwords, databases, servers that go away, stand still or come back."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import redis

from feature_store.errors import DataError, UnavailableError
from feature_store.redis_connection import connection_options
from feature_store.redis_socket import RedisSocket
from feature_store.redis_stream import LARGE, RedisStream
from feature_store.redis_wire import Address, address_from, command
from predictflow.local import redis as local_redis
from predictflow.local.ports import HOST, free_port
from predictflow.local.processes import Watched

ECHO = [command(b"ECHO", str(i).encode()) for i in range(3)]


def address(url: str) -> Address:
    made = address_from(connection_options(url))
    assert made is not None
    return made


class Blocking:
    """RedisSocket behind the interface of the tests below."""

    def __init__(self, url: str) -> None:
        self._socket = RedisSocket(address(url))

    def ask(self, payload: bytes, count: int) -> list[Any]:
        return self._socket.ask(payload, count)

    def close(self) -> None:
        self._socket.close()


class Streaming:
    """RedisStream on a loop of its own."""

    def __init__(self, url: str) -> None:
        self._loop = asyncio.new_event_loop()
        self._stream = RedisStream(address(url))

    def ask(self, payload: bytes, count: int) -> list[Any]:
        return self._loop.run_until_complete(self._stream.ask(payload, count))

    def close(self) -> None:
        self._loop.run_until_complete(self._stream.aclose())
        self._loop.close()


@pytest.fixture(params=[Blocking, Streaming], ids=["socket", "stream"])
def client(request: pytest.FixtureRequest) -> Iterator[Callable[[str], Any]]:
    made: list[Any] = []

    def make(url: str) -> Any:
        made.append(request.param(url))
        return made[-1]

    yield make
    for one in made:
        one.close()


class Server:
    """A Redis of one test, which may end it."""

    def __init__(self, watched: Watched, home: Path) -> None:
        self._watched, self._home, self.port = watched, home, free_port()
        self.url = f"redis://{HOST}:{self.port}/0"
        self.start()

    def start(self) -> None:
        local_redis.start(self._watched, self._home, self.port, self._home.with_suffix(".log"), durable=False)
        with redis.Redis(port=self.port) as connection:
            self.pid = int(connection.info("server")["process_id"])

    def kill(self) -> None:
        os.kill(self.pid, signal.SIGKILL)
        while local_redis.answers_ping(HOST, self.port):
            time.sleep(0.01)


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    with Watched() as watched:
        yield Server(watched, tmp_path / "redis")


def test_replies_come_back_to_whom_they_belong(redis_url: str) -> None:
    async def run() -> None:
        stream = RedisStream(address(redis_url))
        asks = [
            stream.ask(b"".join(command(b"ECHO", b"%d-%d" % (i, j)) for j in range(n)), n)
            for i in range(200)
            for n in [1 + i % (2 * LARGE)]
        ]
        got = await asyncio.gather(*asks)
        assert [[b"%d-%d" % (i, j) for j in range(1 + i % (2 * LARGE))] for i in range(200)] == got
        await stream.aclose()

    asyncio.run(run())


def test_threads_share_a_socket(redis_url: str) -> None:
    shared = RedisSocket(address(redis_url))
    wrong: list[object] = []

    def ask(k: int) -> None:
        for i in range(50):
            text = b"%d-%d" % (k, i)
            if shared.ask(command(b"ECHO", text), 1) != [text]:
                wrong.append(text)

    threads = [threading.Thread(target=ask, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert wrong == []
    shared.close()


def test_the_database_of_the_address_is_used(client: Callable[[str], Any], redis_url: str) -> None:
    with redis.Redis.from_url(redis_url) as plain:
        plain.set("k", "v")
    assert client(redis_url).ask(command(b"GET", b"k"), 1) == [b"v"]


def test_user_and_password_are_given_and_a_wrong_one_is_unavailable(
    client: Callable[[str], Any], server: Server
) -> None:
    with redis.Redis(port=server.port) as plain:
        plain.acl_setuser(
            "reader", enabled=True, passwords=["+a b"], keys=["*"], commands=["+get", "+select", "+client"]
        )
        plain.acl_setuser("default", enabled=False)
    one = client(f"redis://reader:a%20b@{HOST}:{server.port}/1")
    assert one.ask(command(b"GET", b"k"), 1) == [None]
    with pytest.raises(UnavailableError, match="NOPERM"):
        one.ask(command(b"SET", b"k", b"v"), 1)
    for url in (f"redis://reader:no@{HOST}:{server.port}/0", f"redis://{HOST}:{server.port}/0"):
        with pytest.raises(UnavailableError, match="REDIS_URL") as e:
            client(url).ask(command(b"GET", b"k"), 1)
        assert "no@" not in e.value.message


def test_a_key_of_another_type_is_a_data_error_and_the_connection_stays_good(
    client: Callable[[str], Any], redis_url: str
) -> None:
    with redis.Redis.from_url(redis_url) as plain:
        plain.set("text", "v")
    one = client(redis_url)
    with pytest.raises(DataError, match="WRONGTYPE"):
        one.ask(command(b"HMGET", b"text", b"f") + ECHO[0], 2)
    assert one.ask(b"".join(ECHO), 3) == [b"0", b"1", b"2"]


def test_a_server_that_comes_back_is_found_by_the_next_read(client: Callable[[str], Any], server: Server) -> None:
    one = client(server.url)
    assert one.ask(ECHO[1], 1) == [b"1"]
    server.kill()
    for _ in range(3):
        with pytest.raises(UnavailableError, match=str(server.port)):
            one.ask(ECHO[1], 1)
    server.start()
    assert one.ask(ECHO[1], 1) == [b"1"]


def test_connections_closed_by_the_server_are_made_again(client: Callable[[str], Any], redis_url: str) -> None:
    one = client(redis_url)
    assert one.ask(ECHO[0], 1) == [b"0"]
    with redis.Redis.from_url(redis_url) as plain:
        plain.client_kill_filter(_type="normal", skipme=True)
    assert one.ask(ECHO[0], 1) == [b"0"]


def test_a_server_that_stands_still_costs_the_timeout_and_no_more(client: Callable[[str], Any], server: Server) -> None:
    one = client(f"{server.url}?socket_timeout=0.3")
    assert one.ask(ECHO[0], 1) == [b"0"]
    os.kill(server.pid, signal.SIGSTOP)
    try:
        with pytest.raises(UnavailableError):
            one.ask(ECHO[0], 1)
    finally:
        os.kill(server.pid, signal.SIGCONT)
    assert one.ask(ECHO[2], 1) == [b"2"]


def test_what_is_not_redis_is_unavailable(client: Callable[[str], Any]) -> None:
    with socket.create_server((HOST, 0)) as listener:

        def serve() -> None:
            for _ in range(2):
                connection, _ = listener.accept()
                connection.recv(100)
                connection.sendall(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                connection.close()

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        with pytest.raises(UnavailableError):
            client(f"redis://{HOST}:{listener.getsockname()[1]}/0?socket_timeout=5").ask(ECHO[0], 1)


def test_an_option_that_is_not_known_here_leaves_the_read_to_the_general_client() -> None:
    assert address_from(connection_options("redis://h:1/0?health_check_interval=3")) is None
    assert address_from(connection_options("h:1,db=2,password=x")) is not None
