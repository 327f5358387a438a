"""The gRPC server: Feast's `ServingService` and `GrpcFeatureServer`, health and reflection, beside REST in one process.

Requests are parsed here and answers written as bytes (`wire_plan`, `grpc_wire`), so stored values are never decoded to be
encoded again. What surrounds a call: `grpc_calls`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import grpc
from feast.protos.feast.serving import GrpcServer_pb2 as feast_server
from feast.protos.feast.serving import ServingService_pb2 as feast_serving
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from feature_store.errors import UsageError
from serving.grpc_calls import Calls
from serving.grpc_wire import Heads, encode
from serving.limits import Gate, in_thread
from serving.ports import cannot_listen
from serving.push import PUSH_THREADS
from serving.wire_plan import Wires

if TYPE_CHECKING:
    from serving.grpc_push import RowWriter
    from serving.metrics import Metrics
    from serving.online import OnlineService

log = logging.getLogger(__name__)

DEFAULT_PORT = 50051
SERVING = "feast.serving.ServingService"
FEATURE_SERVER = "GrpcFeatureServer"
SPARE_RPCS = 64
"""Calls at a time beyond what the gate lets in: health checks, reflection, and requests that the gate refuses."""


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
        self._ready = ready
        self._options = options
        self._gate = gate or Gate()
        self._calls = Calls(self._gate, metrics, options.seconds)
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
        method = self._calls.method
        info = method(self._info, None, "grpc:ServingService/GetFeastServingInfo")
        push = method(self._push, "write", "grpc:GrpcFeatureServer/Push")
        write = method(self._write, "write", "grpc:GrpcFeatureServer/WriteToOnlineStore")

        def online(route: str) -> Any:
            return method(partial(self._features, route), "read", route)

        serving_read = online("grpc:ServingService/GetOnlineFeatures")
        feature_read = online("grpc:GrpcFeatureServer/GetOnlineFeatures")
        server.add_generic_rpc_handlers(
            (
                _handlers(SERVING, {"GetFeastServingInfo": info, "GetOnlineFeatures": serving_read}),
                _handlers(
                    FEATURE_SERVER, {"Push": push, "WriteToOnlineStore": write, "GetOnlineFeatures": feature_read}
                ),
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
        self._calls.flush()
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

    async def _info(self, body: bytes, request_id: str) -> bytes:
        from importlib.metadata import version

        feast_serving.GetFeastServingInfoRequest.FromString(body)
        return feast_serving.GetFeastServingInfoResponse(version=version("feast")).SerializeToString()

    async def _features(self, route: str, body: bytes, request_id: str) -> bytes:
        request = feast_serving.GetOnlineFeaturesRequest.FromString(body)
        kind = request.WhichOneof("kind")
        if kind is None:
            raise UsageError("neither feature_service nor features is given")
        if request.request_context:
            raise UsageError("request_context has no use here", value=sorted(request.request_context))
        asked = request.feature_service if kind == "feature_service" else tuple(request.features.val)
        entities = {name: [_scalar(v) for v in values.val] for name, values in request.entities.items()}
        names, versions = request.full_feature_names, request.include_feature_view_version_metadata
        stored = await self._online.stored(entities, asked, names, route)
        if stored is None:
            read = await self._online.cells(entities, asked, None, names, request_id, route)
            return encode(read, self._heads, request.entities, versions)
        plan = stored.plan.reader.plan
        wire = self._wires.of(plan)
        answer, counts, windowed = wire.answer(
            plan, self._heads, stored.replies, stored.t_us, request.entities, versions
        )
        self._online.served(stored, counts, request_id, windowed)
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
        await in_thread(self._gate, self._pushes, write, *args)


def _handlers(service: str, methods: Mapping[str, Any]) -> Any:
    return grpc.method_handlers_generic_handler(service, dict(methods))


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
