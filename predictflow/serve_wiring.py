"""Wires the REST server from settings: registry, Redis, MLflow, Kafka, jobs, keys. Everything else is passed in."""

from __future__ import annotations

import os
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from predictflow.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore
    from redis.asyncio import Redis
    from starlette.types import ASGIApp

    from feature_store.redis_stream import RedisStream
    from serving.models import Model, Models
    from serving.plans import Column, Plans
    from serving.served_log import ServedLog

REDIS_SECONDS = 1.0
"""How long a request waits for Redis before it answers 503."""
REDIS_CONNECTIONS = 64
HISTORICAL_THREADS = 2


@dataclass(frozen=True)
class ServeOptions:
    """What the command line says beyond the settings; sent to worker processes."""

    served_log: bool
    models: tuple[str, ...]
    max_rows: int
    workers: int
    registry_seconds: float = 10.0
    model_seconds: float = 3.0
    log_sample: float = 1.0
    grpc: tuple[str, int] | None = None
    """Address of the gRPC server; None: no gRPC."""
    max_concurrent: int = 256
    seconds: float = 30.0
    job_rows: int = 10_000
    api_keys: Path | None = None
    tls_cert: Path | None = None
    tls_key: Path | None = None


def build_app(settings: Settings, options: ServeOptions) -> ASGIApp:
    """The application on real servers. The registry must answer now; Redis, Kafka and MLflow may come later."""
    from concurrent.futures import ThreadPoolExecutor
    from importlib.metadata import version

    from feature_store.online_reader import OnlineReader
    from feature_store.read_plan import ReadPlan
    from feature_store.redis_connection import answering
    from feature_store.redis_settings import warn_of_settings
    from predictflow.serve_grpc import with_grpc
    from predictflow.wiring import feast_store
    from serving.access import Keys, scope_of
    from serving.app import Dependencies, create_app
    from serving.catalogue import FeatureCatalogue
    from serving.historical import Historical, HistoricalLimits
    from serving.hot import PATH, PREDICT_PATH, HotRoutes
    from serving.jobs import Jobs
    from serving.limits import Admission, Gate, RequestLimits
    from serving.logs import use_json
    from serving.metrics import Metrics
    from serving.online import FUNCTION_THREADS, OnlineService
    from serving.online_types import Limits
    from serving.plans import Plans
    from serving.push import Pusher

    use_json()
    store = feast_store(settings)
    metrics = Metrics(merge=options.workers > 1)
    if settings.allow_pickled_functions:
        store.config.online_store.pickled_functions = "run"
    redis = _redis(settings.need("redis_url"), store)

    def reader(plan: ReadPlan) -> OnlineReader:
        return OnlineReader(plan, redis, store.project, settings.clock)

    plans = Plans(store, reader, metrics)
    models = _models(settings, options, plans, metrics)
    served_log = _served_log(settings, options, metrics)
    limits = Limits(rows=options.max_rows)
    keys = Keys(options.api_keys) if options.api_keys else None
    reads = ThreadPoolExecutor(max_workers=HISTORICAL_THREADS, thread_name_prefix="historical")
    threads = ThreadPoolExecutor(max_workers=min(4, os.cpu_count() or 1), thread_name_prefix="predict")
    functions = ThreadPoolExecutor(FUNCTION_THREADS, thread_name_prefix="on-demand")
    gate = Gate(keys, options.max_concurrent)
    online = OnlineService(
        plans, models, served_log, metrics, threads, lambda: datetime.now(UTC), limits, gate, functions
    )

    async def ping() -> None:
        with answering(redis):
            await cast(Awaitable[object], redis.ping())

    async def close() -> None:
        threads.shutdown(wait=False, cancel_futures=True)
        functions.shutdown(wait=False, cancel_futures=True)
        reads.shutdown(wait=False, cancel_futures=True)
        await redis.aclose()

    pusher = Pusher(store, _clock(settings, store), gate=gate)
    app = create_app(
        Dependencies(
            online=online,
            plans=plans,
            models=models,
            catalogue=FeatureCatalogue(store),
            push=pusher,
            historical=Historical(store, HistoricalLimits(inline_rows=options.job_rows)),
            jobs=Jobs(settings.home / "serving" / "jobs", lambda: datetime.now(UTC)),
            reads=reads,
            served_log=served_log,
            metrics=metrics,
            ping=ping,
            close=close,
            gate=gate,
            request_limits=RequestLimits(options.max_concurrent, options.seconds, limits.body_bytes),
            version=version("predictflow"),
            check_settings=partial(warn_of_settings, store),
            registry_seconds=options.registry_seconds,
            model_seconds=options.model_seconds,
        )
    )
    guards = [Admission(gate, scope_of(path)) for path in (PATH, PREDICT_PATH)]
    hot = HotRoutes(app, online, metrics, limits, guards[0], options.seconds, guards[1])
    return with_grpc(
        hot,
        options.grpc,
        store,
        online,
        plans,
        models,
        metrics,
        ping,
        gate=gate,
        push=pusher.push,
        tls=(options.tls_cert, options.tls_key) if options.tls_cert and options.tls_key else None,
        seconds=options.seconds,
        request_bytes=limits.body_bytes,
    )


def _redis_kind(store: FeatureStore) -> tuple[str, str]:
    """What feature_store.yaml says REDIS_URL leads to (a server, a Cluster, Sentinels), and the Sentinels' master."""
    config: Any = store.config.online_store
    kind = getattr(config, "redis_type", "redis")
    return str(getattr(kind, "value", kind)), str(getattr(config, "sentinel_master", "mymaster"))


def _redis(url: str, store: FeatureStore) -> RedisStream | Redis:
    """A client for the event loop that gives up within a second and reconnects by itself; a read may be repeated once.

    Our own for a single server, where its options are known.
    """
    from redis.asyncio import BlockingConnectionPool, Connection, Redis, SSLConnection
    from redis.asyncio.retry import Retry
    from redis.backoff import NoBackoff

    from feature_store.redis_connection import connect_async, connection_options
    from feature_store.redis_stream import RedisStream
    from feature_store.redis_wire import address_from

    server, master = _redis_kind(store)
    if server != "redis":
        return connect_async(url, server, master, timeout=REDIS_SECONDS, retries=1)
    given = connection_options(url, REDIS_SECONDS)
    address = address_from(given)
    if address is not None:
        return RedisStream(address)
    kind = SSLConnection if given.pop("ssl", False) else Connection
    given.setdefault("max_connections", REDIS_CONNECTIONS)
    pool = BlockingConnectionPool(connection_class=kind, timeout=REDIS_SECONDS, retry=Retry(NoBackoff(), 1), **given)
    return Redis(connection_pool=pool)


def _clock(settings: Settings, store: FeatureStore) -> Callable[[], datetime]:
    """What time it is for rows that are pushed: the machine's, or the replay clock, which is in Redis."""
    if settings.clock == "wall":
        return lambda: datetime.now(UTC)
    from feature_store.clock import from_micros, replay_clock_key
    from feature_store.online_reader import ClockNotSetError
    from feature_store.redis_connection import answering, connect

    redis = connect(settings.need("redis_url"), *_redis_kind(store))

    def now() -> datetime:
        with answering(redis):
            value = cast("bytes | None", redis.get(replay_clock_key(store.project)))
        if value is None:
            raise ClockNotSetError(
                f"the replay clock of project {store.project} is not set",
                next_step="`predictflow windows bootstrap --known-by TIME` sets it; PREDICTFLOW_CLOCK=wall uses the machine's",
            )
        return from_micros(int(value))

    return now


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
    return KafkaServedLog.connect(
        settings.need("kafka_bootstrap_servers"), settings.served_topic, metrics, options.log_sample
    )
