"""A load generator: HTTP/1.1 or gRPC over plain sockets, closed loop (c callers) or open loop (a fixed rate).

One process, no event loop and no client library, so that it costs a small part of what a server costs per request. It
reports its own CPU share: near 1 it would be the bottleneck, and the figure void. In the open loop requests start at random
times drawn ahead (Poisson), and latency counts from the intended start, also when every connection is busy then: a
server that stalls cannot hide the requests that it kept from being sent (coordinated omission).

    python -m benchmarks.loadgen < job.json > result.json
"""

from __future__ import annotations

import base64
import json
import random
import select
import socket
import struct
import sys
import time
from collections import deque
from dataclasses import asdict, dataclass, field

CHUNK = 1 << 20
OPEN_CONNECTIONS = 64


@dataclass
class Job:
    """What to send where. `bodies` (base64) are sent in turn; `rate` None: closed loop of `callers` connections.

    A closed loop runs for `seconds`, and on to `least` answers, but not beyond `most_seconds`.
    """

    protocol: str
    host: str
    port: int
    path: str
    bodies: list[str]
    callers: int = 1
    rate: float | None = None
    seconds: float = 1.0
    least: int = 20
    most_seconds: float = 20.0
    seed: int = 1


@dataclass
class Result:
    """Latencies in seconds, one per answer; `cpu`: CPU seconds of this process per second of the run.

    `server_cpu`: CPU seconds of the server per answer, filled in by who knows the server's process.
    """

    latencies: list[float] = field(default_factory=list)
    errors: int = 0
    first_error: str = ""
    seconds: float = 0.0
    cpu: float = 0.0
    server_cpu: float = 0.0


class Http1:
    """One keep-alive connection with at most one request under way."""

    def __init__(self, job: Job) -> None:
        self.socket = socket.create_connection((job.host, job.port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = f"POST {job.path} HTTP/1.1\r\nHost: {job.host}:{job.port}\r\nContent-Type: application/json\r\n"
        self._received = b""
        self._left = -1  # bytes of the body still to come; -1: in the head
        self.fault = ""

    def send(self, body: bytes) -> None:
        self.socket.sendall(f"{self._head}Content-Length: {len(body)}\r\n\r\n".encode() + body)

    def receive(self) -> bool:
        """Reads what has come; True when the answer is complete, `fault` then says what is wrong with it."""
        data = self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError("the server closed the connection")
        if self._left < 0:
            self._received += data
            head, end, rest = self._received.partition(b"\r\n\r\n")
            if not end:
                return False
            self.fault = "" if head[9:12] == b"200" else self._received[:300].decode(errors="replace")
            _, found, length = head.lower().partition(b"content-length:")
            if not found:
                raise ConnectionError("an answer without Content-Length")
            self._left = int(length.partition(b"\r\n")[0]) - len(rest)
            self._received = b""
        else:
            self._left -= len(data)
        if self._left > 0:
            return False
        self._left = -1
        return True


class Grpc:
    """One HTTP/2 connection with at most one call under way; just enough of RFC 9113 for a gRPC server."""

    WINDOW = 2**31 - 1

    def __init__(self, job: Job) -> None:
        self.socket = socket.create_connection((job.host, job.port), 30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # No header table (so the status in the trailers is plain text), no push, large windows and frames.
        settings = b"".join(struct.pack(">HI", *s) for s in ((1, 0), (2, 0), (4, self.WINDOW), (5, 2**24 - 1)))
        hello = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + _frame(4, 0, 0, settings)
        self.socket.sendall(hello + _frame(8, 0, 0, struct.pack(">I", self.WINDOW - 65535)))
        path, authority = job.path.encode(), f"{job.host}:{job.port}".encode()
        self._headers = b"\x83\x86\x04" + _text(path) + b"\x01" + _text(authority)
        self._headers += b"\x0f\x10" + _text(b"application/grpc") + b"\x00" + _text(b"te") + _text(b"trailers")
        self._stream = -1
        self._received = bytearray()
        self._unacknowledged = 0
        self.fault = ""

    def send(self, body: bytes) -> None:
        self._stream += 2
        message = b"\x00" + struct.pack(">I", len(body)) + body
        self.socket.sendall(_frame(1, 4, self._stream, self._headers) + _frame(0, 1, self._stream, message))

    def receive(self) -> bool:
        """As `Http1.receive`."""
        data = self.socket.recv(CHUNK)
        if not data:
            raise ConnectionError("the server closed the connection")
        received = self._received
        received += data
        at, done = 0, False
        while len(received) - at >= 9:
            size = int.from_bytes(received[at : at + 3], "big")
            if len(received) - at < 9 + size:
                break
            kind, flags = received[at + 3], received[at + 4]
            payload = received[at + 9 : at + 9 + size] if kind else b""
            at += 9 + size
            if kind == 0:
                self._unacknowledged += size
            elif kind == 1 and flags & 1:
                self.fault = "" if b"grpc-status\x010" in payload else bytes(payload).decode(errors="replace")
                done = True
            elif kind == 4 and not flags & 1:
                self.socket.sendall(_frame(4, 1, 0, b""))
            elif kind == 6 and not flags & 1:
                self.socket.sendall(_frame(6, 1, 0, bytes(payload)))
            elif kind in (3, 7):
                raise ConnectionError(f"the server ended the {'stream' if kind == 3 else 'connection'}: {payload!r}")
        del received[:at]
        if self._unacknowledged > self.WINDOW // 2:
            self.socket.sendall(_frame(8, 0, 0, struct.pack(">I", self._unacknowledged)))
            self._unacknowledged = 0
        return done


def _frame(kind: int, flags: int, stream: int, payload: bytes) -> bytes:
    return len(payload).to_bytes(3, "big") + bytes((kind, flags)) + struct.pack(">I", stream) + payload


def _text(text: bytes) -> bytes:
    """An HPACK string, not Huffman-coded, of less than 127 bytes."""
    return bytes((len(text),)) + text


def run(job: Job) -> Result:
    """Runs the job in this process."""
    kind = {"http": Http1, "grpc": Grpc}[job.protocol]
    bodies = [base64.b64decode(b) for b in job.bodies]
    connections = [kind(job) for _ in range(job.callers if job.rate is None else OPEN_CONNECTIONS)]
    by_socket = {c.socket: c for c in connections}
    result = Result()
    cpu, began = time.process_time(), time.perf_counter()
    try:
        if job.rate is None:
            _closed(job, by_socket, bodies, result, began)
        else:
            _open(job, by_socket, bodies, result, began)
    finally:
        for connection in by_socket.values():
            connection.socket.close()
    result.seconds = time.perf_counter() - began
    result.cpu = (time.process_time() - cpu) / result.seconds
    return result


def _closed(
    job: Job, by_socket: dict[socket.socket, Http1 | Grpc], bodies: list[bytes], result: Result, began: float
) -> None:
    now = time.perf_counter
    sockets = list(by_socket)
    started = {}
    n = 0
    for connection in sockets:
        started[connection] = now()
        by_socket[connection].send(bodies[n % len(bodies)])
        n += 1
    while sockets:
        for ready in select.select(sockets, (), (), 30)[0]:
            connection = by_socket[ready]
            if not connection.receive():
                continue
            time_now = now()
            _record(result, connection, time_now - started[ready])
            passed = time_now - began
            if passed < job.seconds or (len(result.latencies) < job.least and passed < job.most_seconds):
                started[ready] = now()
                connection.send(bodies[n % len(bodies)])
                n += 1
            else:
                sockets.remove(ready)


def _open(
    job: Job, by_socket: dict[socket.socket, Http1 | Grpc], bodies: list[bytes], result: Result, began: float
) -> None:
    assert job.rate is not None
    rng = random.Random(job.seed)
    starts, at = [], 0.0
    while (at := at + rng.expovariate(job.rate)) < job.seconds or len(starts) < job.least:
        starts.append(began + at)
    now = time.perf_counter
    due = deque(starts)
    idle = deque(by_socket)
    busy: dict[socket.socket, float] = {}
    n = 0
    while due or busy:
        while due and idle and due[0] <= now():
            free = _open_still(idle.popleft(), job, by_socket)
            busy[free] = due.popleft()  # the intended start, however late it is sent
            by_socket[free].send(bodies[n % len(bodies)])
            n += 1
        # select() waits in microseconds; epoll and asyncio would round up to milliseconds.
        wait = max(0.0, due[0] - now()) if due and idle else 30.0
        for ready in select.select(list(busy), (), (), wait)[0]:
            connection = by_socket[ready]
            if connection.receive():
                _record(result, connection, now() - busy.pop(ready))
                idle.append(ready)
        if now() - began > job.seconds + job.most_seconds:
            result.errors += len(due) + len(busy)
            result.first_error = result.first_error or "the server fell behind the rate for good"
            break


def _open_still(free: socket.socket, job: Job, by_socket: dict[socket.socket, Http1 | Grpc]) -> socket.socket:
    """`free`, or a new connection in its place where a server has closed it for having been idle for too long."""
    if not select.select([free], (), (), 0)[0] or job.protocol != "http":
        return free
    by_socket.pop(free).socket.close()
    fresh = Http1(job)
    by_socket[fresh.socket] = fresh
    return fresh.socket


def _record(result: Result, connection: Http1 | Grpc, seconds: float) -> None:
    result.latencies.append(seconds)
    if connection.fault:
        result.errors += 1
        result.first_error = result.first_error or connection.fault


if __name__ == "__main__":
    print(json.dumps(asdict(run(Job(**json.load(sys.stdin))))))
