"""HotRoutes behind a real uvicorn, over stand-ins for reader, plans and models; and a client of bytes."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from typing import Any

import numpy as np
import uvicorn
from fastapi import FastAPI, Request
from starlette.requests import ClientDisconnect
from starlette.responses import PlainTextResponse

from feature_store.errors import PredictFlowError
from serving.hot import PATH, PREDICT_PATH, Headers, HotRoutes
from serving.limits import Admitted
from serving.metrics import Metrics
from serving.models import Model
from serving.online import OnlineService
from serving.online_types import Limits
from serving.plans import Column, ServicePlan
from serving.served_log import NoServedLog

T = datetime(2026, 1, 1, tzinfo=UTC)


class Reader:
    """Answers when told to: `waiting` are the reads under way."""

    plan: Any = None

    def __init__(self) -> None:
        self.waiting: list[Callable[..., None]] = []
        self.hold = False
        self.error: PredictFlowError | None = None

    def start(self, entities: Sequence[Any], done: Callable[..., None]) -> bool:
        def answer() -> None:
            done(None if self.error else list(entities), self.error)

        if self.hold:
            self.waiting.append(answer)
        else:
            asyncio.get_running_loop().call_soon(answer)
        return True

    def replied(self, replies: list[Any]) -> tuple[list[Any], int]:
        return replies, 0


class Json:
    """In place of a JsonPlan: the body is the entities."""

    plan: Any = None

    def answered(self, entities: Any, replies: list[Any], t_us: int) -> Any:
        return Read(self, replies)

    def body(self, read: Read) -> bytes:
        return json.dumps({"hot": read.rows}).encode()

    def inputs(self, read: Read) -> list[list[Any]]:
        return [[len(row["id"])] for row in read.rows]

    def predictions(self, read: Read, probabilities: Sequence[float], model: str, version: str) -> bytes:
        return json.dumps({"hot": [model, version, *probabilities]}).encode()

    def count(self, read: Read, add: Callable[[str, str, int], None]) -> None:
        add("v", "PRESENT", len(read))

    def ages(self, read: Read, add: Callable[[str, float], None]) -> None:
        add("v", 1.0)


class Read:
    probabilities: Sequence[float] | None = None

    def __init__(self, plan: Any, rows: list[Any]) -> None:
        self.plan, self.rows = plan, rows

    def __len__(self) -> int:
        return len(self.rows)


class Plans:
    project = "p"

    def __init__(self, reader: Reader) -> None:
        columns = (Column("length", "v", "length", True),)
        self._plan = ServicePlan("s", columns, ("id",), reader, Json())  # type: ignore[arg-type]  # stand-ins

    def cached(self, asked: Any, full_names: bool) -> ServicePlan | None:
        return self._plan if asked == "s" else None


class Pipeline:
    """Runs once `go` is set; predicts the feature's value, and fails for 13."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.go.set()
        self.calls: list[list[float]] = []

    def predict_proba(self, frame: Any) -> Any:
        given = frame["length"].to_numpy()
        self.calls.append(given.tolist())
        assert self.go.wait(20)
        if 13 in given:
            raise ValueError("unlucky")
        return np.column_stack([-given, given])


class Models:
    def __init__(self, pipeline: Pipeline) -> None:
        self._model = Model("m", "7", "s", pipeline, 1, ("length",))

    def cached(self, name: str) -> Model | None:
        return self._model if name == "m" else None


class Guard:
    def __init__(self) -> None:
        self.open = True
        self.inside = 0

    def admit(self, headers: Headers) -> Admitted | None:
        self.inside += self.open
        return Admitted("mine") if self.open else None

    def release(self) -> None:
        self.inside -= 1


class Server:
    """HotRoutes in front of an application that says what it was given, behind uvicorn with HotProtocol or its own."""

    def __init__(self, http: Any, seconds: float = 30.0) -> None:
        self.seen = 0
        self.reader, self.guard, self.metrics, self.pipeline = Reader(), Guard(), Metrics(), Pipeline()
        limits = Limits(rows=3, body_bytes=5_000)
        online = OnlineService(
            Plans(self.reader),  # type: ignore[arg-type]  # stand-ins, these two
            Models(self.pipeline),  # type: ignore[arg-type]
            NoServedLog(),
            self.metrics,
            ThreadPoolExecutor(1),
            lambda: T,
            limits,
        )
        app = FastAPI()

        @app.post(PATH)
        async def slow(request: Request) -> PlainTextResponse:
            try:
                return PlainTextResponse("slow " + (await request.body()).decode(errors="replace"))
            except ClientDisconnect:
                return PlainTextResponse("nobody reads this")

        @app.post(PREDICT_PATH + "{model}")
        async def slow_prediction(model: str, request: Request) -> PlainTextResponse:
            return PlainTextResponse(f"slow {model} " + (await request.body()).decode())

        async def counted(scope: Any, receive: Any, send: Any) -> None:
            self.seen += 1
            await app(scope, receive, send)

        self.hot = HotRoutes(counted, online, self.metrics, limits, self.guard, seconds)
        config = uvicorn.Config(
            self.hot, port=0, http=http, loop="asyncio", lifespan="off", log_config=None, access_log=False
        )
        self.uvicorn = uvicorn.Server(config)
        self.config = config

    async def __aenter__(self) -> Server:
        self.config.load()
        self.uvicorn.lifespan = self.config.lifespan_class(self.config)
        await self.uvicorn.startup()
        self.port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.uvicorn.shutdown()


def request(body: dict[str, Any] | bytes, *headers: str, path: str = PATH) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    lines = [f"POST {path} HTTP/1.1", "host: x", "content-type: application/json", f"content-length: {len(data)}"]
    return "\r\n".join([*lines, *headers, "", ""]).encode() + data


GOOD: dict[str, Any] = {"feature_service": "s", "entities": {"id": ["a"]}}
HOT = b'{"hot": [{"id": "a"}]}'
"""The answer to it, by the short cut."""


def answers(data: bytes) -> list[tuple[int, bytes]]:
    out = []
    while data:
        head, _, rest = data.partition(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        out.append((int(head.split()[1]), rest[:length]))
        data = rest[length:]
    return out


async def talk(port: int, *pieces: bytes, count: int) -> list[tuple[int, bytes]]:
    """Sends pieces one by one, reads `count` answers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    for piece in pieces:
        writer.write(piece)
        await writer.drain()
        await asyncio.sleep(0.01)
    data = b""
    async with asyncio.timeout(20):
        while True:
            try:
                found = answers(data)
            except (IndexError, ValueError):
                found = []
            if len(found) == count and sum(map(len, (b for _, b in found))):
                break
            chunk = await reader.read(65536)
            if not chunk:
                break
            data += chunk
    writer.close()
    return answers(data)


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not what():
            await asyncio.sleep(0.005)
