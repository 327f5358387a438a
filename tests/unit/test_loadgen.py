"""The load generator of the online bench: it counts every answer, and a stall is paid for by the requests it delays."""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from benchmarks.loadgen import Job, run
from benchmarks.online import percentile

STALL = 0.4


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()
    seen: list[bytes]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        with self.lock:  # one at a time, so that one slow request holds up all others
            self.seen.append(body)
            if body == b"stall" and self.seen.count(b"stall") == 1:
                time.sleep(STALL)
        self.send_response(500 if body == b"bad" else 200)
        self.send_header("Content-Length", "5")
        self.end_headers()
        self.wfile.write(b"fine.")

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def port() -> Iterator[int]:
    Handler.seen = []
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


def job(port: int, *bodies: bytes, **how: Any) -> Job:
    return Job("http", "127.0.0.1", port, "/x", [base64.b64encode(b).decode() for b in bodies], **how)


def test_a_closed_loop_counts_each_answer_and_sends_the_bodies_in_turn(port: int) -> None:
    result = run(job(port, b"a", b"b", callers=3, seconds=0.0, least=30))
    assert len(result.latencies) == len(Handler.seen) >= 30
    assert result.errors == 0
    assert abs(Handler.seen.count(b"a") - Handler.seen.count(b"b")) <= 1


def test_errors_are_counted_with_the_first_answer(port: int) -> None:
    result = run(job(port, b"bad", seconds=0.0, least=2))
    assert result.errors == len(result.latencies)
    assert "500" in result.first_error


def test_an_open_loop_counts_latency_from_the_intended_start(port: int) -> None:
    bodies = [b"stall", *[b"a"] * 200]
    result = run(job(port, *bodies, rate=200.0, seconds=0.6, least=1))
    # All that were due during the stall waited for its end, though few of them had a connection to be sent on.
    delayed = sum(seconds > STALL / 4 for seconds in result.latencies)
    assert delayed > 200 * STALL / 3
    assert percentile(result.latencies, 99) > STALL / 2


def test_percentile() -> None:
    assert (percentile([3.0, 1.0, 2.0], 50), percentile(list(range(1, 101)), 99), percentile([1.0], 99)) == (2, 99, 1)
