"""The common requests, answered before the web framework sees them: `POST /api/v1/features/online` and
`POST /api/v1/predict/{model}`, both without `at`.

`HotRoutes` wraps the application. It answers only what it fully understands; every other request (another route, an
unusual header, a body that is not exactly as documented, a plan that is not compiled yet) goes to the application
unchanged, so that there is one place for documents, validation and their errors. `hot_protocol.py` calls the same code
below ASGI.
"""

from __future__ import annotations

import asyncio
import logging
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_store.errors import PredictFlowError
from serving.access_lines import AccessLines
from serving.errors import error_response, response_of
from serving.hot_body import online_body, predict_body
from serving.limits import Admitted, TimeBudgetError
from serving.middleware import request_id_of

if TYPE_CHECKING:
    from serving.metrics import Metrics
    from serving.online import OnlineService
    from serving.online_types import Begun, Done, Limits

log = logging.getLogger(__name__)

PATH = "/api/v1/features/online"
PREDICT_PATH = "/api/v1/predict/"
_MODEL = re.compile(r"[A-Za-z0-9._~-]+")
"""Names that look the same in a URL; the application decodes the others."""
_JSON = b"application/json"
_UNUSUAL = frozenset((b"expect", b"content-encoding", b"transfer-encoding", b"upgrade"))

Headers = Sequence[tuple[bytes, bytes]]
Answer = Callable[[int, bytes, str, Headers], None]
"""Called once with status, body, request id and further headers."""


class Guard(Protocol):
    """Who may ask, and how many at once. A request that is not admitted goes to the application, which says why."""

    def admit(self, headers: Headers) -> Admitted | None: ...

    def release(self) -> None:
        """One admitted request has been answered, or handed to the application."""
        ...


class _Open:
    """Lets everyone in."""

    def admit(self, headers: Headers) -> Admitted:
        return Admitted()

    def release(self) -> None:
        pass


@dataclass(frozen=True, slots=True)
class Hot:
    """A hot request's way: its path, the route it counts as, the model it names (None: features), who guards it."""

    path: str
    template: str
    model: str | None
    guard: Guard


class HotRoutes:
    """ASGI application around `app`."""

    def __init__(
        self,
        app: ASGIApp,
        online: OnlineService,
        metrics: Metrics,
        limits: Limits,
        guard: Guard | None = None,
        seconds: float = 30.0,
        predict_guard: Guard | None = None,
    ) -> None:
        """`seconds`: how long a body may take to arrive, and a model to answer. The guards are of the two routes."""
        self.app = app
        self._online = online
        self._metrics = metrics
        self._limits = limits
        self._features = Hot(PATH, PATH, None, guard or _Open())
        self._predict_guard = predict_guard or guard or _Open()
        self.seconds = seconds
        self._lines = AccessLines()

    @property
    def max_body(self) -> int:
        return self._limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        hot = self.route(scope["path"]) if scope["type"] == "http" and scope["method"] == "POST" else None
        if hot is None:
            await self.app(scope, receive, send)
            if scope["type"] == "lifespan":
                self._lines.flush()
            return
        started = time.perf_counter()
        admitted = hot.guard.admit(scope["headers"])
        message = None if admitted is None else await self._first(hot, receive)
        if message is None:  # the application says what was wrong, or goes on waiting
            await self.app(scope, receive, send)
            return
        if message["type"] != "http.request" or message.get("more_body"):
            hot.guard.release()
        else:
            answered: asyncio.Future[tuple[int, bytes, str, Headers]] = asyncio.get_running_loop().create_future()

            def answer(status: int, body: bytes, request_id: str, more: Headers) -> None:
                if not answered.done():
                    answered.set_result((status, body, request_id, more))

            client = scope["client"][0] if scope.get("client") else None
            if self.begin(hot, scope["headers"], message.get("body", b""), client, answer, admitted, started):
                status, body, request_id, more = await answered
                headers = [
                    (b"content-type", _JSON),
                    (b"content-length", b"%d" % len(body)),
                    *more,
                    (b"x-request-id", request_id.encode()),
                ]
                await send({"type": "http.response.start", "status": status, "headers": headers})
                await send({"type": "http.response.body", "body": body})
                return
        await self.app(scope, _replayed(message, receive), send)

    async def _first(self, hot: Hot, receive: Receive) -> Message | None:
        """The first message of an admitted request; None, and its slot is free again, when it takes too long."""
        message = None
        try:
            async with asyncio.timeout(self.seconds):
                message = await receive()
        except TimeoutError:
            pass
        finally:
            if message is None:
                hot.guard.release()
        return message

    def route(self, path: str) -> Hot | None:
        """The way of a POST to this path, as the URL has it; None where it is the application's."""
        if path == PATH:
            return self._features
        if path.startswith(PREDICT_PATH):
            name = path[len(PREDICT_PATH) :]
            if _MODEL.fullmatch(name):
                return Hot(path, PREDICT_PATH + "{model}", name, self._predict_guard)
        return None

    def begin(
        self,
        hot: Hot,
        headers: Headers,
        body: bytes,
        client: str | None,
        answer: Answer,
        admitted: Admitted | None = None,
        started: float | None = None,
    ) -> bool:
        """Starts to answer a request whose body is complete. False: nothing was done, the application must.

        `headers`: names in lower case, as ASGI gives them. `answer` is called on the event loop, perhaps at once.
        `admitted`: the slot that `hot.guard` gave; it is given back here, whatever happens.
        `started`: `time.perf_counter()` when its headers were complete, where that was before the call.
        """
        started = time.perf_counter() if started is None else started
        admitted = admitted or hot.guard.admit(headers)
        if admitted is None:
            return False
        begun = False
        try:
            begun = self._begin(hot, headers, body, client, answer, admitted.key, started)
        finally:
            if not begun:
                hot.guard.release()
        return begun

    def _begin(
        self,
        hot: Hot,
        headers: Headers,
        body: bytes,
        client: str | None,
        answer: Answer,
        key: str | None,
        started: float,
    ) -> bool:
        given: bytes | None = None
        is_json = False
        for name, value in headers:
            if name == b"content-type":
                is_json = value == _JSON or value.partition(b";")[0].strip().lower() == _JSON
            elif name == b"x-request-id":
                given = value
            elif name in _UNUSUAL:
                return False
        if not is_json or len(body) > self._limits.body_bytes:
            return False
        request_id = request_id_of(given)
        in_flight = self._metrics.in_flight
        told = False
        budget: asyncio.TimerHandle | None = None
        cancel: Callable[[], bool] | None = None

        def begun(drop: Callable[[], bool]) -> None:
            nonlocal cancel
            cancel = drop
            if told and drop():  # the read alone took too long
                hot.guard.release()

        def tell(content: bytes | None, error: Exception | None) -> None:
            nonlocal told
            told = True
            status, more = 200, _NONE
            if content is None:
                status, content, more = _failure(error, request_id)
            in_flight.dec()
            answer(status, content, request_id, more)
            seconds = time.perf_counter() - started
            self._metrics.observe("POST", hot.template, status, seconds)
            self._lines.add(request_id, "POST", hot.path, status, seconds, client, key)

        def done(content: bytes | None, error: Exception | None) -> None:
            hot.guard.release()  # not before a model has ended that took too long: its thread is what the slot is for
            if budget is not None:
                budget.cancel()
            if not told:
                tell(content, error)

        def too_late() -> None:
            if not told:
                tell(None, TimeBudgetError.after(self.seconds))
                if cancel is not None and cancel():  # it waited: nothing runs that the slot is for
                    hot.guard.release()

        in_flight.inc()
        if self._start(hot, body, request_id, done, begun):
            if hot.model is not None and not told:  # reads have a time limit of their own
                budget = asyncio.get_running_loop().call_later(self.seconds, too_late)
            return True
        in_flight.dec()
        return False

    def _start(self, hot: Hot, body: bytes, request_id: str, done: Done, begun: Begun) -> bool:
        if hot.model is not None:
            rows = predict_body(body, self._limits.rows)
            return rows is not None and self._online.begin_predict(
                hot.model, rows, request_id, hot.template, done, begun
            )
        asked = online_body(body, self._limits.rows)
        return asked is not None and self._online.begin(*asked, request_id, hot.template, done)


_NONE: Headers = ()


def _failure(error: Exception | None, request_id: str) -> tuple[int, bytes, Headers]:
    if isinstance(error, PredictFlowError):
        response = response_of(error)
    else:
        log.error("request failed", extra={"request_id": request_id}, exc_info=error)
        response = error_response(500, "internal", f"unexpected error; request id {request_id}")
    more = [(k, v) for k, v in response.raw_headers if k not in (b"content-type", b"content-length")]
    return response.status_code, bytes(response.body), more


def _replayed(first: Message, receive: Receive) -> Receive:
    """`receive` as it was before its first message was taken."""
    taken = False

    async def again() -> Message:
        nonlocal taken
        if taken:
            return await receive()
        taken = True
        return first

    return again
