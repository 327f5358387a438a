"""What surrounds every request: its id, its API key, a slot, the body and time limits, latency metrics, one JSON
access-log line, and the last resort for an unexpected error (500 in the one error shape, the traceback in the log under
the request's id).
"""

from __future__ import annotations

import asyncio
import logging
import os
import re
import time
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.access import scope_of
from serving.errors import error_response, response_of
from serving.limits import HISTORICAL_PATH, Gate, RequestLimits, TimeBudgetError

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from feature_store.errors import PredictFlowError
    from serving.metrics import Metrics

access = logging.getLogger("predictflow.access")
log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
ABORT = "predictflow.abort"
"""ASGI extension of `hot_protocol`: closes the connection at once, whatever waits to be sent."""
JOBS_PATH = "/api/v1/jobs/"
QUIET_ROUTES = ("/healthz", "/readyz", "/metrics", "/health")
"""Polled every few seconds: logged at DEBUG."""
UNMATCHED = "unmatched"
CLIENT_LEFT = 499
"""In metrics and access lines only, as nginx has it."""


class RequestScope:
    """ASGI middleware. `X-Request-Id` is taken from the request when it is well formed, else made, and always returned."""

    def __init__(self, app: ASGIApp, metrics: Metrics, gate: Gate, limits: RequestLimits) -> None:
        self._app = app
        self._metrics = metrics
        self._gate = gate
        # Answers that last as long as their reader: apart, so that slow readers leave the other slots to the rest.
        self._downloads = Gate(None, max(1, gate.concurrent // 4))
        self._limits = limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id"))
        caller = self._gate.caller(headers)
        scope.setdefault("state", {}).update(request_id=request_id, caller=caller)
        status = 0
        download = _is_download(scope["path"])
        budget = asyncio.timeout(self._limits.seconds)

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
                if download and not budget.expired():
                    budget.reschedule(None)  # it may take as long as its reader does, in a slot of its own
            await send(message)

        async def refuse(error: PredictFlowError) -> None:
            await response_of(error, scope["path"])(scope, receive, send_with_id)

        with self._metrics.in_flight.track_inprogress():
            try:
                async with budget:
                    await self._admit(scope, headers, receive, send_with_id, refuse)
            except ClientDisconnect:  # amid its body: nobody is there to answer, and it is no fault of ours
                status = status or CLIENT_LEFT
            except Exception as error:  # nothing may leave a client without an answer in the documented shape
                late = isinstance(error, TimeoutError) and budget.expired()
                if late and status == 0:
                    await refuse(TimeBudgetError.after(self._limits.seconds))
                elif late:  # a reader that does not read; the server closes what is left without its end
                    log.warning("the answer was not read in time", extra={"request_id": request_id})
                    scope.get("extensions", {}).get(ABORT, _leave)()
                else:
                    log.exception("request failed", extra={"request_id": request_id})
                    if status == 0:
                        message = f"unexpected error; request id {request_id}"
                        response = error_response(500, "internal", message, path=scope["path"])
                        await response(scope, receive, send_with_id)
            finally:
                self._finish(scope, request_id, status, time.perf_counter() - started)

    async def _admit(
        self,
        scope: Scope,
        headers: dict[bytes, bytes],
        receive: Receive,
        send: Send,
        refuse: Callable[[PredictFlowError], Awaitable[None]],
    ) -> None:
        path = scope["path"]
        needed = scope_of(path)
        if needed is None:  # probes must be answered however busy the server is
            await self._app(scope, self._limited(receive, self._limits.body_bytes), send)
            return
        slots = scope["state"]["slots"] = self._downloads if _is_download(path) else self._gate
        refused = self._gate.judge(scope["state"]["caller"], headers, needed) or slots.acquire()
        if refused is not None:
            await refuse(refused)
            return
        try:
            most = self._limits.body_of(path)
            if _declared_length(headers) > most:
                response = error_response(413, "body_too_large", _too_large(most), path=path)
                await response(scope, receive, send)
            else:
                await self._app(scope, self._limited(receive, most), send)
        finally:
            slots.release()

    def _finish(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = route_of(scope)
        method = scope["method"] if route != UNMATCHED else "ANY"
        self._metrics.request_seconds.labels(method, route, str(status)).observe(seconds)
        level = logging.DEBUG if route in QUIET_ROUTES else logging.INFO
        if access.isEnabledFor(level):
            fields: dict[str, Any] = {
                "request_id": request_id,
                "method": scope["method"],
                "path": scope["path"],
                "status": status,
                "ms": round(seconds * 1000, 3),
                "client": scope["client"][0] if scope.get("client") else None,
                "key": caller.name if (caller := scope["state"]["caller"]) else None,
            }
            access.log(level, "%s %s %s", scope["method"], scope["path"], status, extra=fields)

    @staticmethod
    def _limited(receive: Receive, most: int) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > most:
                raise HTTPException(413, _too_large(most))
            return message

        return counted


def _leave() -> None:
    """Where the server offers no more: it closes a connection whose answer is not complete, once that is sent."""


def _is_download(path: str) -> bool:
    return path == HISTORICAL_PATH or (path.startswith(JOBS_PATH) and path.endswith("/result"))


def _too_large(most: int) -> str:
    return f"the body is larger than {most} bytes; split the request"


def route_of(scope: Scope) -> str:
    """What metrics call a request's route: its template, so that they hold no names that clients made up."""
    return str(getattr(scope.get("route"), "path", UNMATCHED))


def request_id_of(given: bytes | None) -> str:
    """The id of a request: the one it came with when that is well formed, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return os.urandom(16).hex()


def _declared_length(headers: dict[bytes, bytes]) -> int:
    text = headers.get(b"content-length", b"0")
    return int(text) if text.isdigit() else 0
