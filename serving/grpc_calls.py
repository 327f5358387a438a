"""What surrounds a gRPC call: its id, its API key, a slot, a time budget, metrics, one access line, and a status for every
error, with the message that REST would give and its code in the trailing metadata.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote

import grpc
from google.protobuf.message import DecodeError
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.access_lines import AccessLines
from serving.errors import RETRY_AFTER_SECONDS, redis_unavailable
from serving.middleware import request_id_of

if TYPE_CHECKING:
    from serving.limits import Gate
    from serving.metrics import Metrics

log = logging.getLogger(__name__)

_CODES = {
    "unauthorized": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Calls:
    """Of one event loop; `gate` is the one REST asks too. `seconds`: the most that a call may take."""

    def __init__(self, gate: Gate, metrics: Metrics, seconds: float) -> None:
        self._gate = gate
        self._metrics = metrics
        self._seconds = seconds
        self._lines = AccessLines()

    def flush(self) -> None:
        """Writes the access lines that wait."""
        self._lines.flush()

    def method(self, answer: Callable[[bytes, str], Awaitable[bytes]], scope: str | None, route: str) -> Any:
        """A handler of raw messages: key, slot, time budget, then `answer` with the call's id; every error becomes a
        status. `scope` None: open to everyone; `route`: what metrics and access lines call it."""

        async def handle(body: bytes, context: Any) -> bytes:
            started = time.perf_counter()
            metadata = {key.encode(): _bytes(value) for key, value in context.invocation_metadata() or ()}
            request_id = request_id_of(metadata.get(b"x-request-id"))
            status = grpc.StatusCode.CANCELLED
            caller = self._gate.caller(metadata)
            refused = None if scope is None else self._gate.judge(caller, metadata, scope)
            held = False
            self._metrics.in_flight.inc()
            try:
                if refused is None:
                    refused = self._gate.acquire()
                    held = refused is None
                if refused is not None:
                    raise refused
                async with asyncio.timeout(self._seconds):
                    reply = await answer(body, request_id)
                status = grpc.StatusCode.OK
                return reply
            except Exception as e:  # nothing may leave a client without a status
                fault, status = _fault(e, request_id)
                trailing = [("x-request-id", request_id), ("x-error-code", fault.code)]
                if status in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.RESOURCE_EXHAUSTED):
                    trailing.append(("retry-after", str(RETRY_AFTER_SECONDS)))
                await context.abort(status, fault.format_message(), tuple(trailing))
                raise  # abort raises; this is for the type checker
            finally:
                self._metrics.in_flight.dec()
                if held:
                    self._gate.release()
                seconds = time.perf_counter() - started
                self._metrics.observe("GRPC", route, status.name, seconds)
                client, key = client_of(context.peer()), None if caller is None else caller.name
                self._lines.add(request_id, "GRPC", route, status.name, seconds, client, key)

        return grpc.unary_unary_rpc_method_handler(handle)


def _fault(error: Exception, request_id: str) -> tuple[PredictFlowError, grpc.StatusCode]:
    """The error to tell and its status; what is unexpected goes to the log, under the request's id."""
    if isinstance(error, RedisConnectionError | RedisTimeoutError):
        error = redis_unavailable(error)
    if isinstance(error, DecodeError):
        return UsageError("the message is not of the method's type", next_step="see Feast's protos"), _INVALID
    if isinstance(error, TimeoutError):
        fault = PredictFlowError("the request took too long; ask for less, or try again")
        fault.code = "timeout"
        return fault, grpc.StatusCode.DEADLINE_EXCEEDED
    if isinstance(error, PredictFlowError):
        return error, _status_of(error)
    log.error("gRPC request failed", exc_info=error, extra={"request_id": request_id})
    fault = PredictFlowError(f"unexpected error; request id {request_id}")
    fault.code = "internal"
    return fault, grpc.StatusCode.INTERNAL


_INVALID = grpc.StatusCode.INVALID_ARGUMENT


def _status_of(error: PredictFlowError) -> grpc.StatusCode:
    if error.code in _CODES:
        return _CODES[error.code]
    if isinstance(error, NotFoundError):
        return grpc.StatusCode.NOT_FOUND
    if isinstance(error, UnavailableError):
        return grpc.StatusCode.UNAVAILABLE
    return _INVALID if isinstance(error, UsageError) or error.code == "data" else grpc.StatusCode.INTERNAL


@lru_cache(maxsize=4096)
def client_of(peer: str) -> str | None:
    """The address in gRPC's name of a peer (`ipv4:1.2.3.4:5`, `ipv6:[::1]:5`, percent-encoded); None for other peers."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value
