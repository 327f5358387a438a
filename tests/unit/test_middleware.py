"""A client that does not read its answer holds a slot no longer than the time budget, but for downloads. No server."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from serving.limits import HISTORICAL_PATH, Gate, RequestLimits
from serving.metrics import Metrics
from serving.middleware import ABORT, RequestScope


@pytest.mark.parametrize("path", ["/get-online-features", HISTORICAL_PATH])
def test_an_answer_that_is_not_read_in_time_is_cut_off_unless_it_is_a_download(path: str) -> None:
    sent: list[str] = []
    aborted: list[bool] = []
    read = asyncio.Event()

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"x"})

    async def send(message: Any) -> None:
        sent.append(message["type"])
        if message["type"] == "http.response.body":
            await read.wait()

    async def receive() -> Any:
        return {"type": "http.request", "body": b""}

    async def run() -> None:
        gate = Gate(None, 4)
        scope: Any = {"type": "http", "method": "POST", "path": path, "headers": []}
        scope["extensions"] = {ABORT: lambda: aborted.append(True)}
        served = RequestScope(app, Metrics(), gate, RequestLimits(4, 0.05))
        task = asyncio.create_task(served(scope, receive, send))
        if path == HISTORICAL_PATH:
            await asyncio.sleep(0.2)
            assert not task.done()
            read.set()
        async with asyncio.timeout(30):
            await task
        assert gate.busy == 0

    asyncio.run(run())
    assert sent == ["http.response.start", "http.response.body"]
    assert aborted == ([] if path == HISTORICAL_PATH else [True])
