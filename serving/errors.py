"""How an error becomes an HTTP answer: one JSON shape for all of them, a status for each kind.

`{"error": {"code", "message", "valid", "next"}}`: `code` is stable, `valid` lists accepted values, `next` says what to do.
On the routes of Feast's own server it is a JSON text as Feast writes it, from which its client makes its exceptions.
"""

from __future__ import annotations

import logging
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError
from starlette.exceptions import HTTPException
from starlette.responses import Response

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.encoding import JSONBytes, dumps

log = logging.getLogger(__name__)

RETRY_AFTER_SECONDS = 1
STATUS_OF_CODE = {
    "unauthorized": 401,
    "forbidden": 403,
    "no_result": 409,
    "body_too_large": 413,
    "too_many_rows": 413,
    "too_many_features": 413,
    "too_many_jobs": 429,
    "timeout": 504,
}
HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "body_too_large"}
FEAST_PATHS = frozenset({"/get-online-features", "/push", "/write-to-online-store", "/health"})
_FEAST_CLASSES = {401: "FeastPermissionError", 403: "FeastPermissionError", 404: "FeastObjectNotFoundException"}


class TooManyError(UsageError):
    """A request asks for more than the server's limit allows: HTTP 413."""

    def __init__(self, what: str, asked: int, limit: int) -> None:
        super().__init__(
            f"too many {what} in one request: {asked}, limit {limit}", next_step=f"split it into requests of {limit}"
        )
        self.code = f"too_many_{what}"


class BodyTooLargeError(UsageError):
    """A body over the limit of its kind: HTTP 413."""

    code = "body_too_large"

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes", next_step="split the request")


def status_of(error: PredictFlowError) -> int:
    """The HTTP status of an error: 400 usage, 404 not found, 413 over a limit, 503 a server is down, else 500;
    401, 403, 429 and 504 by code."""
    if error.code in STATUS_OF_CODE:
        return STATUS_OF_CODE[error.code]
    if isinstance(error, NotFoundError):
        return 404
    if isinstance(error, UsageError):
        return 400
    if isinstance(error, UnavailableError):
        return 503
    return 500


def error_response(
    status: int,
    code: str,
    message: str,
    valid: list[str] | None = None,
    next_step: str | None = None,
    *,
    path: str = "",
) -> Response:
    """An answer in the error shape of `path`; 429 and 503 carry Retry-After (seconds), 401 WWW-Authenticate."""
    headers = {"Retry-After": str(RETRY_AFTER_SECONDS)} if status in (429, 503) else {}
    if status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    if path in FEAST_PATHS:
        said = "; ".join(part for part in (message, valid and f"valid: {', '.join(valid)}", next_step) if part)
        name = _FEAST_CLASSES.get(status, "FeastError")
        text = dumps({"module": "feast.errors", "class": name, "message": said}).decode()
        return JSONBytes(text, status_code=status, headers=headers)
    body = {"error": {"code": code, "message": message, "valid": valid, "next": next_step}}
    return JSONBytes(body, status_code=status, headers=headers)


def response_of(error: PredictFlowError, path: str = "") -> Response:
    """The answer that says `error`, in the shape of `path`."""
    message = error.what if error.value is None else f"{error.what}: {error.value!r}"
    return error_response(status_of(error), error.code, message, error.valid, error.next_step, path=path)


def redis_unavailable(error: Exception) -> UnavailableError:
    """Redis did not answer; the reason is named, its address (which may hold a password) is not."""
    return UnavailableError(
        f"Redis does not answer ({type(error).__name__})", next_step="check REDIS_URL and `predictflow status`"
    )


def install(app: FastAPI) -> None:
    """Registers the handlers that turn every error of a request into the one shape."""

    @app.exception_handler(PredictFlowError)
    async def predictflow_error(request: Request, error: PredictFlowError) -> Response:
        if status_of(error) == 500:  # not the request's fault: where it came from is for who runs the server
            id_ = getattr(request.state, "request_id", None)
            log.error("request failed: %s", error.what, exc_info=error, extra={"request_id": id_})
        return response_of(error, request.url.path)

    @app.exception_handler(RedisConnectionError)
    @app.exception_handler(RedisTimeoutError)
    async def redis_error(request: Request, error: Exception) -> Response:
        return response_of(redis_unavailable(error), request.url.path)

    @app.exception_handler(RequestValidationError)
    async def invalid_body(request: Request, error: RequestValidationError) -> Response:
        message, next_step = _first_fault(error.errors()), "see /docs for the body's schema"
        return error_response(422, "invalid_body", message, None, next_step, path=request.url.path)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        code = HTTP_CODES.get(error.status_code, "usage")
        message = f"{error.detail}: {request.method} {path}" if code != "body_too_large" else error.detail
        response = error_response(error.status_code, code, message, None, "see /docs for the routes", path=path)
        for name, value in (error.headers or {}).items():
            response.headers[name] = value
        return response


def _first_fault(faults: Any) -> str:
    fault = faults[0]
    where = ".".join(str(part) for part in fault["loc"] if part != "body")
    more = f" (and {len(faults) - 1} more)" if len(faults) > 1 else ""
    return f"{where or 'body'}: {fault['msg']}{more}"
