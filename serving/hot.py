"""The common request, answered before the web framework sees it: `POST /api/v1/features/online` without `at`.

`HotRoutes` wraps the application. It answers only what it fully understands; every other request (another route, an
unusual header, a body that is not exactly as documented, a plan that is not compiled yet) goes to the application
unchanged, so that there is one place for documents, validation and their errors. `hot_protocol.py` calls the same code
below ASGI.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Protocol

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from feature_store.errors import PredictFlowError
from serving.access_lines import AccessLines
from serving.errors import error_response, response_of
from serving.limits import Admitted
from serving.middleware import _REQUEST_ID as WELL_FORMED_ID

if TYPE_CHECKING:
    from serving.metrics import Metrics
    from serving.online import Limits, OnlineService
    from serving.plans import Asked

log = logging.getLogger(__name__)

PATH = "/api/v1/features/online"
_JSON = b"application/json"
_UNUSUAL = frozenset((b"expect", b"content-encoding", b"transfer-encoding", b"upgrade"))
_FIELDS = frozenset(("feature_service", "features", "entities", "at", "full_feature_names"))
_INT64 = 2**63

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
    ) -> None:
        """`seconds`: how long a body may take to arrive."""
        self.app = app
        self._online = online
        self._metrics = metrics
        self._limits = limits
        self._guard = guard or _Open()
        self.seconds = seconds
        self._lines = AccessLines()

    @property
    def max_body(self) -> int:
        return self._limits.body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] != PATH or scope["method"] != "POST":
            await self.app(scope, receive, send)
            if scope["type"] == "lifespan":
                self._lines.flush()
            return
        admitted = self._guard.admit(scope["headers"])
        message = None if admitted is None else await self._first(receive)
        if message is None:  # the application says what was wrong, or goes on waiting
            await self.app(scope, receive, send)
            return
        if message["type"] != "http.request" or message.get("more_body"):
            self._guard.release()
        else:
            answered: asyncio.Future[tuple[int, bytes, str, Headers]] = asyncio.get_running_loop().create_future()

            def answer(status: int, body: bytes, request_id: str, more: Headers) -> None:
                if not answered.done():
                    answered.set_result((status, body, request_id, more))

            client = scope["client"][0] if scope.get("client") else None
            if self.begin(scope["headers"], message.get("body", b""), client, answer, admitted):
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

    async def _first(self, receive: Receive) -> Message | None:
        """The first message of an admitted request; None, and its slot is free again, when it takes too long."""
        message = None
        try:
            async with asyncio.timeout(self.seconds):
                message = await receive()
        except TimeoutError:
            pass
        finally:
            if message is None:
                self._guard.release()
        return message

    def admit(self, headers: Headers) -> Admitted | None:
        """Takes a slot for a request whose body has yet to come: give it to `begin`, or `release` it."""
        return self._guard.admit(headers)

    def release(self) -> None:
        """Gives such a slot back."""
        self._guard.release()

    def begin(
        self, headers: Headers, body: bytes, client: str | None, answer: Answer, admitted: Admitted | None = None
    ) -> bool:
        """Starts to answer a request for `PATH` whose body is complete. False: nothing was done, the application must.

        `headers`: names in lower case, as ASGI gives them. `answer` is called on the event loop, perhaps at once.
        `admitted`: the slot that `admit` took; it is given back here, whatever happens.
        """
        started = time.perf_counter()
        admitted = admitted or self._guard.admit(headers)
        if admitted is None:
            return False
        begun = False
        try:
            begun = self._begin(headers, body, client, answer, admitted.key, started)
        finally:
            if not begun:
                self._guard.release()
        return begun

    def _begin(
        self, headers: Headers, body: bytes, client: str | None, answer: Answer, key: str | None, started: float
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
        asked = _parse(body, self._limits.rows)
        if asked is None:
            return False
        if given is not None and WELL_FORMED_ID.fullmatch(given):
            request_id = given.decode()
        else:
            request_id = os.urandom(16).hex()
        in_flight, guard = self._metrics.in_flight, self._guard

        def done(content: bytes | None, error: Exception | None) -> None:
            status, more = 200, _NONE
            if content is None:
                status, content, more = _failure(error, request_id)
            in_flight.dec()
            guard.release()
            answer(status, content, request_id, more)
            seconds = time.perf_counter() - started
            self._metrics.observe("POST", PATH, status, seconds)
            self._lines.add(request_id, "POST", PATH, status, seconds, client, key)

        in_flight.inc()
        if self._online.begin(asked[0], asked[1], asked[2], request_id, done):
            return True
        in_flight.dec()
        return False


_NONE: Headers = ()


def _failure(error: Exception | None, request_id: str) -> tuple[int, bytes, Headers]:
    if isinstance(error, PredictFlowError):
        response = response_of(error)
    else:
        log.error("request failed", extra={"request_id": request_id}, exc_info=error)
        response = error_response(500, "internal", f"unexpected error; request id {request_id}")
    more = [(k, v) for k, v in response.raw_headers if k not in (b"content-type", b"content-length")]
    return response.status_code, bytes(response.body), more


def _parse(body: bytes, max_rows: int) -> tuple[list[dict[str, object]], Asked, bool] | None:
    """(entity rows, feature service or references, full names) of a body that is exactly as documented; else None."""
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if type(request) is not dict or not request.keys() <= _FIELDS or request.get("at") is not None:
        return None
    service, references = request.get("feature_service"), request.get("features")
    entities, full_names = request.get("entities"), request.get("full_feature_names", False)
    asked: Asked
    if type(service) is str and references is None:
        asked = service
    elif service is None and type(references) is list and all(type(r) is str for r in references):
        asked = tuple(references)
    else:
        return None
    if type(entities) is not dict or not entities or type(full_names) is not bool:
        return None
    n = -1
    for values in entities.values():
        if type(values) is not list or not values or len(values) > max_rows or n not in (-1, len(values)):
            return None
        n = len(values)
        for value in values:
            if type(value) is str or value is None or type(value) is bool:
                continue
            if type(value) is not int or not -_INT64 <= value < _INT64:
                return None
    if len(entities) == 1:
        ((key, values),) = entities.items()
        rows: list[dict[str, Any]] = [{key: v} for v in values]
    else:
        rows = [dict(zip(entities, row)) for row in zip(*entities.values())]
    return rows, asked, full_names


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
