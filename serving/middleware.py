"""What surrounds every request: its id, the body limit, latency metrics, one JSON access-log line, and the last resort
for an unexpected error (500 in the one error shape, the traceback in the log under the request's id).
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from typing import TYPE_CHECKING, Any

from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.errors import error_response

if TYPE_CHECKING:
    from serving.metrics import Metrics

access = logging.getLogger("predictflow.access")
log = logging.getLogger(__name__)

_REQUEST_ID = re.compile(rb"[A-Za-z0-9._:/+=@-]{1,128}")
QUIET_ROUTES = ("/healthz", "/readyz", "/metrics")
"""Polled every few seconds: logged at DEBUG."""


class RequestScope:
    """ASGI middleware. `X-Request-Id` is taken from the request when it is well formed, else made, and always returned."""

    def __init__(self, app: ASGIApp, metrics: Metrics, max_body_bytes: int) -> None:
        self._app = app
        self._metrics = metrics
        self._max_body = max_body_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        request_id = request_id_of(headers.get(b"x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], (b"x-request-id", request_id.encode())]}
            await send(message)

        with self._metrics.in_flight.track_inprogress():
            try:
                if _declared_length(headers) > self._max_body:
                    response = error_response(413, "body_too_large", self._too_large())
                    await response(scope, receive, send_with_id)
                else:
                    await self._app(scope, self._limited(receive), send_with_id)
            except Exception:  # nothing may leave a client without an answer in the documented shape
                log.exception("request failed", extra={"request_id": request_id})
                if status == 0:
                    response = error_response(500, "internal", f"unexpected error; request id {request_id}")
                    await response(scope, receive, send_with_id)
            finally:
                self._finish(scope, request_id, status, time.perf_counter() - started)

    def _finish(self, scope: Scope, request_id: str, status: int, seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "unmatched")
        method = scope["method"] if route != "unmatched" else "ANY"
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
            }
            access.log(level, "%s %s %s", scope["method"], scope["path"], status, extra=fields)

    def _limited(self, receive: Receive) -> Receive:
        size = 0

        async def counted() -> Message:
            nonlocal size
            message = await receive()
            size += len(message.get("body", b""))
            if size > self._max_body:
                raise HTTPException(413, self._too_large())
            return message

        return counted

    def _too_large(self) -> str:
        return f"the body is larger than {self._max_body} bytes; split the request"


def request_id_of(given: bytes | None) -> str:
    """The id that a request came with when it is well formed, else a new one."""
    if given is not None and _REQUEST_ID.fullmatch(given):
        return given.decode()
    return uuid.uuid4().hex


def _declared_length(headers: dict[bytes, bytes]) -> int:
    text = headers.get(b"content-length", b"0")
    return int(text) if text.isdigit() else 0
