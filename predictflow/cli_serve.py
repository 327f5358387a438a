"""`predictflow serve`: wires the REST server from settings and runs it until SIGTERM or Ctrl-C."""

from __future__ import annotations

import functools
import ipaddress
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, cast

import click

from feature_store.errors import PredictFlowError, UsageError
from predictflow.settings import Settings

if TYPE_CHECKING:
    from redis.asyncio import Redis
    from starlette.types import ASGIApp

    from serving.models import Model, Models
    from serving.plans import Column, Plans
    from serving.served_log import ServedLog

DEFAULT_PORT = 9094
DEFAULT_MODEL = "churn-predictor"
REDIS_SECONDS = 1.0
"""How long a request waits for Redis before it answers 503."""
REDIS_CONNECTIONS = 64
STARTUP_FAILURE = 3
"""The exit code by which a worker tells uvicorn's supervisor that restarting it is no use."""


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says beyond the settings; sent to worker processes."""

    served_log: bool
    models: tuple[str, ...]
    max_rows: int
    workers: int
    registry_seconds: float = 10.0
    model_seconds: float = 3.0
    grpc: tuple[str, int] | None = None
    """Address of the gRPC server; None: no gRPC."""


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=DEFAULT_PORT, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes that share the port."
)
@click.option(
    "--model", "models", multiple=True, default=(DEFAULT_MODEL,), show_default=True, help="Ready once loaded."
)
@click.option("--no-model", is_flag=True, help="Be ready without a model (features only).")
@click.option(
    "--grpc-port", default=50051, show_default=True, type=click.IntRange(0, 65535), help="gRPC port; 0: no gRPC."
)
@click.option("--no-served-log", is_flag=True, help="Do not log what is served to Kafka.")
@click.option("--max-rows", default=1000, show_default=True, type=click.IntRange(1), help="Entities per request.")
@click.option(
    "--allow-remote",
    is_flag=True,
    envvar="PREDICTFLOW_ALLOW_REMOTE",
    help="Listen on more than the loopback interface: there are no API keys, so put it behind something that has.",
)
def serve(
    host: str,
    port: int,
    workers: int,
    grpc_port: int,
    models: tuple[str, ...],
    no_model: bool,
    no_served_log: bool,
    max_rows: int,
    allow_remote: bool,
) -> None:
    """Serve features and predictions over REST, and features over gRPC."""
    from predictflow.serve_grpc import reserve

    settings = Settings.from_environ()
    _check_host(host, allow_remote)
    for name in ("postgres_url", "redis_url", "offline_path"):
        settings.need(name)
    if not no_served_log:
        settings.need("kafka_bootstrap_servers")
    if not no_model:
        settings.need("mlflow_tracking_uri")
    grpc = (host, grpc_port) if grpc_port else None
    options = ServeOptions(not no_served_log, () if no_model else models, max_rows, workers, grpc=grpc)
    with _listen(host, port) as listener, reserve(grpc):
        address = f"http://{'[' + host + ']' if ':' in host else host}:{listener.getsockname()[1]}"
        click.echo(f"PredictFlow serves on {address} (documents: {address}/docs)", err=True)
        if grpc is not None:
            click.echo(f"gRPC on {address.rpartition(':')[0].removeprefix('http://')}:{grpc_port}", err=True)
        if workers == 1:
            _run_one(settings, options, listener)
        else:
            _run_workers(settings, options, listener)


COMMANDS: list[click.Command] = [serve]


def _check_host(host: str, allow_remote: bool) -> None:
    if allow_remote or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            "refusing to listen beyond this machine: the server asks no one for a key",
            value=host,
            next_step="use --host 127.0.0.1, or --allow-remote (PREDICTFLOW_ALLOW_REMOTE=1)",
        )


def _listen(host: str, port: int) -> socket.socket:
    """The listening socket, before anything slow is imported: a busy port is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Now, not when the application is ready: two servers may both bind a port on which nobody listens yet.
        listener.listen(2048)
    except OSError as e:
        raise PredictFlowError(
            f"cannot listen on {host}:{port} ({os.strerror(e.errno) if e.errno and e.errno > 0 else e})",
            next_step="stop what listens there, or choose another --port",
        ) from e
    listener.set_inheritable(True)
    return listener


def _config(app: Callable[[], ASGIApp], workers: int) -> Any:
    import uvicorn

    return uvicorn.Config(
        app,  # a factory
        factory=True,
        loop="uvloop",
        http="httptools",
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=15,
        timeout_worker_healthcheck=60,  # a worker that is still importing must not be taken for a hung one
        workers=workers,
    )


def _run_one(settings: Settings, options: ServeOptions, listener: socket.socket) -> None:
    import uvicorn

    # uvicorn drains on SIGTERM and then raises the signal again; a drained server has ended well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = uvicorn.Server(_config(functools.partial(build_app, settings, options), 1))
    server.run(sockets=[listener])
    if not server.started:
        raise PredictFlowError("the server did not start", next_step="see the log above")


def _run_workers(settings: Settings, options: ServeOptions, listener: socket.socket) -> None:
    from uvicorn.supervisors import Multiprocess

    with tempfile.TemporaryDirectory(prefix="predictflow-metrics-") as metrics:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics  # read by prometheus_client when a worker imports it
        Multiprocess(_config(functools.partial(_worker_app, settings, options), options.workers), [listener]).run()


def _worker_app(settings: Settings, options: ServeOptions) -> ASGIApp:
    try:
        return build_app(settings, options)
    except PredictFlowError as e:
        e.show()
        sys.exit(STARTUP_FAILURE)


def build_app(settings: Settings, options: ServeOptions) -> ASGIApp:
    """The application on real servers. The registry must answer now; Redis, Kafka and MLflow may come later."""
    from concurrent.futures import ThreadPoolExecutor
    from importlib.metadata import version

    from feature_store.read_plan import OnlineReader, ReadPlan
    from predictflow.serve_grpc import with_grpc
    from predictflow.wiring import feast_store
    from serving.app import Dependencies, create_app
    from serving.catalogue import FeatureCatalogue
    from serving.logs import use_json
    from serving.metrics import Metrics
    from serving.online import Limits, OnlineService
    from serving.plans import Plans

    use_json()
    store = feast_store(settings)
    metrics = Metrics(merge=options.workers > 1)
    redis = _redis(settings.need("redis_url"))

    def reader(plan: ReadPlan) -> OnlineReader:
        return OnlineReader(plan, redis, store.project, settings.clock)

    plans = Plans(store, reader)
    models = _models(settings, options, plans, metrics)
    served_log = _served_log(settings, options, metrics)
    limits = Limits(rows=options.max_rows)
    threads = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="predict")
    online = OnlineService(plans, models, served_log, metrics, threads, lambda: datetime.now(UTC), limits)

    async def ping() -> None:
        await cast(Awaitable[bool], redis.ping())

    async def close() -> None:
        threads.shutdown(wait=False, cancel_futures=True)
        await redis.aclose()

    app = create_app(
        Dependencies(
            online=online,
            plans=plans,
            models=models,
            catalogue=FeatureCatalogue(store),
            served_log=served_log,
            metrics=metrics,
            ping=ping,
            close=close,
            limits=limits,
            version=version("predictflow"),
            registry_seconds=options.registry_seconds,
            model_seconds=options.model_seconds,
        )
    )
    return with_grpc(app, options.grpc, store, online, plans, models, metrics, ping)


def _redis(url: str) -> Redis:
    """An asyncio client that gives up within a second and reconnects by itself; a read is safe to repeat once."""
    from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    from feature_store.redis_connection import connection_options

    given = connection_options(url)
    for timeout in ("socket_connect_timeout", "socket_timeout"):
        if timeout not in url:
            given[timeout] = REDIS_SECONDS
    kind = SSLConnection if given.pop("ssl", False) else Connection
    given.setdefault("max_connections", REDIS_CONNECTIONS)
    pool = BlockingConnectionPool(connection_class=kind, timeout=REDIS_SECONDS, retry=Retry(NoBackoff(), 1), **given)
    return Redis(connection_pool=pool)


def _models(settings: Settings, options: ServeOptions, plans: Plans, metrics: Any) -> Models:
    from predictflow.wiring import feature_registry
    from serving.models import MLflowModels, NoModels

    if settings.mlflow_tracking_uri is None:
        return NoModels()

    def record(model: Model) -> None:
        with feature_registry(settings) as registry:
            registry.record_lineage(
                [
                    (
                        ("model_version", f"{model.name}/{model.version}"),
                        ("endpoint", f"POST /api/v1/predict/{model.name}"),
                    )
                ],
                at=datetime.now(UTC),
            )

    def columns(feature_service: str) -> tuple[Column, ...]:
        return plans.get(feature_service, False).columns

    return MLflowModels(settings.mlflow_tracking_uri, options.models, metrics, columns, record)


def _served_log(settings: Settings, options: ServeOptions, metrics: Any) -> ServedLog:
    from serving.served_log import KafkaServedLog, NoServedLog

    if not options.served_log:
        return NoServedLog()
    return KafkaServedLog.connect(settings.need("kafka_bootstrap_servers"), settings.served_topic, metrics)
