"""The gRPC server: Feast's `ServingService` and `GrpcFeatureServer`, health and reflection, beside REST in one process.

Requests are parsed here and answers written as bytes (`grpc_wire`), so stored values are never decoded to be encoded
again. An error is a gRPC status with the message that REST would give, its code in the trailing metadata.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol
from urllib.parse import unquote

import grpc
from feast.protos.feast.serving import GrpcServer_pb2 as feast_server
from feast.protos.feast.serving import ServingService_pb2 as feast_serving
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection
from redis.exceptions import ConnectionError as RedisConnectionError
from redis.exceptions import TimeoutError as RedisTimeoutError

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving.errors import RETRY_AFTER_SECONDS, redis_unavailable
from serving.grpc_wire import Heads, encode
from serving.middleware import access, request_id_of
from serving.ports import cannot_listen
from serving.push import PUSH_THREADS
from serving.wire_plan import Wires

if TYPE_CHECKING:
    from serving.access import ApiKey
    from serving.grpc_push import RowWriter
    from serving.metrics import Metrics
    from serving.online import OnlineService

log = logging.getLogger(__name__)

DEFAULT_PORT = 50051
SERVING = "feast.serving.ServingService"
FEATURE_SERVER = "GrpcFeatureServer"
SPARE_RPCS = 64
"""Calls at a time beyond what the gate lets in: health checks, reflection, and requests that the gate refuses."""
_CODES = {
    "unauthorized": grpc.StatusCode.UNAUTHENTICATED,
    "forbidden": grpc.StatusCode.PERMISSION_DENIED,
    "overloaded": grpc.StatusCode.RESOURCE_EXHAUSTED,
    "timeout": grpc.StatusCode.DEADLINE_EXCEEDED,
}


class Gate(Protocol):
    """Who may call, and how many (`concurrent`) at a time; the one REST asks. `headers`: metadata, names in lower case."""

    concurrent: int

    def caller(self, headers: Mapping[bytes, bytes]) -> ApiKey | None: ...

    def guard(self, headers: Mapping[bytes, bytes], scope_needed: str) -> PredictFlowError | None: ...

    def acquire(self) -> PredictFlowError | None: ...

    def release(self) -> None: ...


class OpenGate:
    """Open to everyone; at most `concurrent` requests at a time."""

    def __init__(self, concurrent: int = 256) -> None:
        self.concurrent = concurrent
        self._free = concurrent

    def caller(self, headers: Mapping[bytes, bytes]) -> ApiKey | None:
        return None

    def guard(self, headers: Mapping[bytes, bytes], scope_needed: str) -> PredictFlowError | None:
        return None

    def acquire(self) -> PredictFlowError | None:
        if self._free <= 0:
            return OverloadedError("too many requests at a time", next_step="try again")
        self._free -= 1
        return None

    def release(self) -> None:
        self._free += 1


class OverloadedError(UnavailableError):
    """More requests at a time than the server allows: RESOURCE_EXHAUSTED, try again."""

    code = "overloaded"


@dataclass(frozen=True)
class GrpcOptions:
    """`port` 0: any free one. `tls`: (private key, certificate chain) in PEM. `seconds`: the most that a request may
    take, whatever its deadline. `drain_seconds`: what requests under way have left when the server stops."""

    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    tls: tuple[bytes, bytes] | None = None
    request_bytes: int = 4 * 1024 * 1024
    seconds: float = 30.0
    drain_seconds: float = 5.0
    health_seconds: float = 1.0


class GrpcServer:
    """One server of one event loop; several processes may listen on one port (SO_REUSEPORT)."""

    def __init__(
        self,
        online: OnlineService,
        writer: RowWriter,
        metrics: Metrics,
        ready: Callable[[], Awaitable[bool]],
        options: GrpcOptions,
        gate: Gate | None = None,
    ) -> None:
        """`ready`: whether Redis, registry and model can serve; asked every `health_seconds` for the health service."""
        self._online = online
        self._writer = writer
        self._metrics = metrics
        self._ready = ready
        self._options = options
        self._gate = gate or OpenGate()
        self._heads = Heads()
        self._wires = Wires()
        self._server: grpc.aio.Server | None = None
        self._health = health.aio.HealthServicer()
        self._watch: asyncio.Task[None] | None = None
        self._pushes = ThreadPoolExecutor(PUSH_THREADS, thread_name_prefix="grpc-push")
        self.port = 0

    async def start(self) -> None:
        """Listens; PredictFlowError when the port is taken."""
        options = self._options
        server = grpc.aio.server(
            # Refused before their messages are read; the gate, which sees them after, tells why and when to try again.
            maximum_concurrent_rpcs=self._gate.concurrent + SPARE_RPCS,
            options=[
                ("grpc.so_reuseport", 1),
                ("grpc.max_receive_message_length", options.request_bytes),
                ("grpc.max_send_message_length", -1),
                ("grpc.keepalive_permit_without_calls", 1),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
            ],
        )
        online = self._method(self._features, "read")
        info = self._method(self._info, None)
        push, write = self._method(self._push, "write"), self._method(self._write, "write")
        server.add_generic_rpc_handlers(
            (
                _handlers(SERVING, {"GetFeastServingInfo": info, "GetOnlineFeatures": online}),
                _handlers(FEATURE_SERVER, {"Push": push, "WriteToOnlineStore": write, "GetOnlineFeatures": online}),
            )
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, server)
        reflection.enable_server_reflection(
            (SERVING, FEATURE_SERVER, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        address = f"{'[' + options.host + ']' if ':' in options.host else options.host}:{options.port}"
        try:
            if options.tls is None:
                self.port = server.add_insecure_port(address)
            else:
                self.port = server.add_secure_port(address, grpc.ssl_server_credentials([options.tls]))
        except RuntimeError as e:
            raise cannot_listen(options.host, options.port, "in use, or no such address") from e
        await server.start()
        self._server = server
        await self._tell_health(await self._ready())
        self._watch = asyncio.create_task(self._watch_health())
        log.info("gRPC listens on %s:%s", options.host, self.port)

    async def stop(self) -> None:
        """Takes no new requests, lets those under way finish within `drain_seconds`. Safe to call twice."""
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
            self._watch = None
        if self._server is not None:
            await self._health.enter_graceful_shutdown()
            await self._server.stop(self._options.drain_seconds)
            self._server = None
        self._pushes.shutdown(wait=False, cancel_futures=True)

    async def _watch_health(self) -> None:
        while True:
            await asyncio.sleep(self._options.health_seconds)
            try:
                await self._tell_health(await self._ready())
            except Exception:  # health must go on being told, whatever one look at it met
                log.exception("gRPC health: the check failed")
                await self._tell_health(False)

    async def _tell_health(self, ready: bool) -> None:
        status = health_pb2.HealthCheckResponse.SERVING if ready else health_pb2.HealthCheckResponse.NOT_SERVING
        await self._health.set("", health_pb2.HealthCheckResponse.SERVING)  # the process is alive
        for name in (SERVING, FEATURE_SERVER):
            await self._health.set(name, status)

    def _method(self, answer: Callable[[bytes, str], Awaitable[bytes]], scope: str | None) -> Any:
        """A handler of raw messages: key, slot, time budget, then `answer`; every error becomes a status."""

        async def handle(body: bytes, context: Any) -> bytes:
            started = time.perf_counter()
            metadata = {key.encode(): _bytes(value) for key, value in context.invocation_metadata() or ()}
            request_id = request_id_of(metadata.get(b"x-request-id"))
            status = grpc.StatusCode.CANCELLED
            caller = self._gate.caller(metadata)
            who = (client_of(context.peer()), None if caller is None else caller.name)
            refused = self._gate.guard(metadata, scope) if scope is not None else None
            held = False
            try:
                if refused is None:
                    refused = self._gate.acquire()
                    held = refused is None
                if refused is not None:
                    raise refused
                async with asyncio.timeout(self._options.seconds):
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
                if held:
                    self._gate.release()
                self._finish(answer.__name__, request_id, status, time.perf_counter() - started, who)

        return grpc.unary_unary_rpc_method_handler(handle)

    def _finish(
        self,
        method: str,
        request_id: str,
        status: grpc.StatusCode,
        seconds: float,
        who: tuple[str | None, str | None],
    ) -> None:
        route = _ROUTES[method]
        self._metrics.request_seconds.labels("GRPC", route, status.name).observe(seconds)
        if access.isEnabledFor(logging.INFO):
            fields = {
                "request_id": request_id,
                "method": "GRPC",
                "path": route,
                "status": status.name,
                "ms": round(seconds * 1000, 3),
                "client": who[0],
                "key": who[1],
            }
            access.log(logging.INFO, "GRPC %s %s", route, status.name, extra=fields)

    async def _info(self, body: bytes, request_id: str) -> bytes:
        from importlib.metadata import version

        feast_serving.GetFeastServingInfoRequest.FromString(body)
        return feast_serving.GetFeastServingInfoResponse(version=version("feast")).SerializeToString()

    async def _features(self, body: bytes, request_id: str) -> bytes:
        request = feast_serving.GetOnlineFeaturesRequest.FromString(body)
        kind = request.WhichOneof("kind")
        if kind is None:
            raise UsageError("neither feature_service nor features is given")
        if request.request_context:
            raise UsageError("request_context has no use here", value=sorted(request.request_context))
        asked = request.feature_service if kind == "feature_service" else tuple(request.features.val)
        entities = {name: [_scalar(v) for v in values.val] for name, values in request.entities.items()}
        names, versions = request.full_feature_names, request.include_feature_view_version_metadata
        stored = await self._online.stored(entities, asked, names)
        if stored is None:
            read = await self._online.cells(entities, asked, None, names, request_id)
            return encode(read, self._heads, request.entities, versions)
        wire = self._wires.of(stored.plan.reader.plan)
        answer, counts = wire.answer(self._heads, stored.replies, stored.t_us, request.entities, versions)
        self._online.served(stored, counts, request_id)
        return answer

    async def _push(self, body: bytes, request_id: str) -> bytes:
        request = feast_server.PushRequest.FromString(body)
        await self._in_thread(self._writer.push, request.stream_feature_view, _row(request), request.to)
        return feast_server.PushResponse(status=True).SerializeToString()

    async def _write(self, body: bytes, request_id: str) -> bytes:
        request = feast_server.WriteToOnlineStoreRequest.FromString(body)
        await self._in_thread(self._writer.write, request.feature_view_name, _row(request))
        return feast_server.WriteToOnlineStoreResponse(status=True).SerializeToString()

    async def _in_thread(self, write: Callable[..., None], *args: Any) -> None:
        await asyncio.get_running_loop().run_in_executor(self._pushes, write, *args)


_ROUTES = {
    "_info": "grpc:GetFeastServingInfo",
    "_features": "grpc:GetOnlineFeatures",
    "_push": "grpc:Push",
    "_write": "grpc:WriteToOnlineStore",
}


def _handlers(service: str, methods: Mapping[str, Any]) -> Any:
    return grpc.method_handlers_generic_handler(service, dict(methods))


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


def client_of(peer: str) -> str | None:
    """The address in gRPC's name of a peer (`ipv4:1.2.3.4:5`, `ipv6:[::1]:5`, percent-encoded); None for other peers."""
    kind, _, rest = unquote(peer).partition(":")
    return rest.rpartition(":")[0].strip("[]") if kind in ("ipv4", "ipv6") else None


def _bytes(value: str | bytes) -> bytes:
    return value.encode() if isinstance(value, str) else value


def _scalar(value: Any) -> object:
    """The Python value of an entity's `Value`; None for a null."""
    kind = value.WhichOneof("val")
    if kind is None or kind == "null_val":
        return None
    found = getattr(value, kind)
    return found if isinstance(found, str | int | float | bytes) else _refuse_entity(kind)


def _refuse_entity(kind: str) -> object:
    raise UsageError("a join key is a scalar", value=kind)


def _row(request: Any) -> dict[str, object]:
    """The columns of a push: `features` (texts) or `typed_features` (Values), not both."""
    if request.features and request.typed_features:
        raise UsageError("only one of features and typed_features may be set")
    if not request.features and not request.typed_features:
        raise UsageError("the row is empty", next_step="set features or typed_features")
    if request.features:
        return dict(request.features)
    from feast.type_map import feast_value_type_to_python_type

    row: dict[str, object] = {}
    for name, value in request.typed_features.items():
        kind = value.WhichOneof("val")
        try:
            row[name] = None if kind in (None, "null_val") else feast_value_type_to_python_type(value)
        except (ValueError, ArithmeticError, OSError) as e:  # a year beyond 9999, a UUID that is none
            raise UsageError(f"column {name}: a value out of range, or malformed", value=kind) from e
    return row
