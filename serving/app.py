"""The REST application: routes, documents, background refreshes. Everything it depends on is passed in."""

from __future__ import annotations

import asyncio
import gc
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field

from fastapi import FastAPI, Request, Response

from feature_store.errors import PredictFlowError
from serving import errors, feast_rest, historical_routes, schemas
from serving.catalogue import FeatureCatalogue
from serving.encoding import JSONBytes
from serving.historical import Historical
from serving.jobs import Jobs
from serving.limits import Gate, RequestLimits
from serving.metrics import Metrics
from serving.middleware import RequestScope, route_of
from serving.models import Models
from serving.online import OnlineService
from serving.openapi import DESCRIPTION, complete, faults, probe_faults
from serving.plans import Plans
from serving.push import Pusher
from serving.served_log import ServedLog

log = logging.getLogger(__name__)

TITLE = "PredictFlow"
DRAIN_SECONDS = 5.0
KEYS_SECONDS = 2.0
"""How soon a key that was added or dropped counts."""
SWEEP_SECONDS = 300.0


@dataclass(frozen=True)
class Dependencies:
    """What a server is made of. `ping` returns when Redis answers, else raises; `close` frees connections; `reads`:
    where historical features are read.
    """

    online: OnlineService
    plans: Plans
    models: Models
    catalogue: FeatureCatalogue
    push: Pusher
    historical: Historical
    jobs: Jobs
    reads: ThreadPoolExecutor
    served_log: ServedLog
    metrics: Metrics
    ping: Callable[[], Awaitable[None]]
    close: Callable[[], Awaitable[None]]
    gate: Gate = field(default_factory=Gate)
    request_limits: RequestLimits = field(default_factory=RequestLimits)
    version: str = "0"
    check_settings: Callable[[], object] = lambda: None
    """Looked at once, when what it looks at answers; UnavailableError: not yet."""
    registry_seconds: float = 10.0
    model_seconds: float = 3.0


def create_app(deps: Dependencies) -> FastAPI:
    """The ASGI application; it owns `deps` from its start-up to its shutdown."""

    keys = deps.gate.keys

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        await _attempt("registry", deps.plans.refresh, deps.metrics)
        tasks = [
            asyncio.create_task(_repeat("registry", deps.plans.refresh, deps.registry_seconds, deps.metrics)),
            asyncio.create_task(_warm_then_repeat(deps)),
            asyncio.create_task(_repeat("served log", deps.served_log.poll, 1.0, deps.metrics)),
            asyncio.create_task(_once("settings", deps.check_settings, deps.registry_seconds, deps.metrics)),
            asyncio.create_task(_repeat("jobs", deps.jobs.sweep, SWEEP_SECONDS, deps.metrics)),
            *([asyncio.create_task(_repeat("keys", keys.refresh, KEYS_SECONDS, deps.metrics))] if keys else []),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            deps.served_log.drain()  # on the loop that wrote it; what is queued then is not lost if a job takes long
            await asyncio.to_thread(deps.served_log.close, DRAIN_SECONDS)
            await asyncio.to_thread(deps.jobs.close)
            await deps.close()
            gc.unfreeze()

    app = FastAPI(
        title=TITLE,
        version=deps.version,
        description=DESCRIPTION,
        lifespan=lifespan,
        docs_url="/docs",
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(RequestScope, metrics=deps.metrics, gate=deps.gate, limits=deps.request_limits)
    errors.install(app)
    _feature_routes(app, deps)
    _write_routes(app, deps)
    historical_routes.add_routes(app, deps.historical, deps.jobs, deps.reads, deps.request_limits, deps.metrics)
    feast_rest.add_routes(app, deps.online, deps.plans, deps.push)
    _operation_routes(app, deps)
    complete(app)
    return app


def _feature_routes(app: FastAPI, deps: Dependencies) -> None:
    @app.post(
        "/api/v1/features/online",
        response_model=schemas.OnlineResponse,
        responses=faults(400, 404, 413, 422),
        tags=["features"],
        summary="Current feature values of entities",
    )
    async def online(body: schemas.OnlineRequest, request: Request) -> Response:
        """One row per entity, in order. A missing or expired value is null, and its status says why."""
        answer = await deps.online.features(
            body.entities,
            body.feature_service,
            body.features,
            body.at,
            body.full_feature_names,
            request.state.request_id,
            route_of(request.scope),
        )
        return JSONBytes(answer)

    @app.post(
        "/api/v1/predict/{model}",
        response_model=schemas.PredictResponse,
        responses=faults(400, 404, 413, 422),
        tags=["predictions"],
        summary="Predict from the current features of entities",
    )
    async def predict(model: str, body: schemas.PredictRequest, request: Request) -> Response:
        """Uses the model version with alias `champion`; promotion swaps it without a dropped request."""
        id_, route = request.state.request_id, route_of(request.scope)
        return JSONBytes(await deps.online.predict(model, body.entities, body.at, id_, route))

    @app.get(
        "/api/v1/features",
        response_model=schemas.Catalogue,
        responses=faults(),
        tags=["features"],
        summary="Feature views and services, with meaning, unit and owner",
    )
    def catalogue() -> Response:
        return JSONBytes(deps.catalogue.all().model_dump())

    @app.get(
        "/api/v1/features/{view}",
        response_model=schemas.ViewInfo,
        responses=faults(404, 422),
        tags=["features"],
        summary="One feature view",
    )
    def catalogue_view(view: str) -> Response:
        return JSONBytes(deps.catalogue.view(view).model_dump())


def _write_routes(app: FastAPI, deps: Dependencies) -> None:
    @app.post(
        "/api/v1/features/push",
        response_model=schemas.PushResponse,
        responses=faults(400, 404, 413, 422),
        tags=["features"],
        summary="Write feature rows to the online store, the offline store or both",
    )
    async def push(body: schemas.PushRequest) -> Response:
        """The newest (event_timestamp, created) of an entity stays. Safe to repeat; a windowed view is refused."""
        pushed = await deps.push.apush(body.feature_view, body.push_source, body.columns, body.to)
        return JSONBytes({"rows": pushed.rows, "feature_views": pushed.feature_views, "to": body.to})


def _operation_routes(app: FastAPI, deps: Dependencies) -> None:
    @app.get(
        "/healthz",
        response_model=schemas.Health,
        responses=probe_faults(),
        tags=["operation"],
        summary="The process is alive",
    )
    async def healthz() -> Response:
        return JSONBytes({"status": "ok"})

    @app.get(
        "/readyz",
        response_model=schemas.Readiness,
        responses={
            503: {"model": schemas.Readiness, "description": "Not ready; the checks say why"},
            **probe_faults(),
        },
        tags=["operation"],
        summary="Redis, registry and model can serve requests",
    )
    async def readyz() -> Response:
        registry_ok, registry = deps.plans.check()
        model_ok, model = deps.models.check()
        redis_ok, redis = await _redis_check(deps.ping)
        checks = {
            "redis": {"ok": redis_ok, "detail": redis},
            "registry": {"ok": registry_ok, "detail": registry},
            "model": {"ok": model_ok, "detail": model},
        }
        ready = redis_ok and registry_ok and model_ok
        body = {"status": "ready" if ready else "not_ready", "checks": checks}
        return JSONBytes(body, status_code=200 if ready else 503)

    @app.get(
        "/metrics",
        response_class=Response,
        responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **faults()},
        tags=["operation"],
        summary="Prometheus metrics",
    )
    def metrics() -> Response:
        return Response(deps.metrics.expose(), media_type=deps.metrics.content_type)


async def _redis_check(ping: Callable[[], Awaitable[None]]) -> tuple[bool, str]:
    try:
        await ping()
    except Exception as e:  # readiness reports whatever keeps Redis from answering
        log.info("readiness: Redis does not answer: %s", type(e).__name__, exc_info=log.isEnabledFor(logging.DEBUG))
        return False, f"does not answer ({type(e).__name__}); check REDIS_URL"
    return True, "answers"


async def _attempt(what: str, step: Callable[[], object], metrics: Metrics) -> bool:
    """Runs one refresh in a thread; a failure is counted and logged, and tried again at the next turn. True: it ran."""
    try:
        await asyncio.to_thread(step)
        return True
    except PredictFlowError as e:
        metrics.refresh_failures.labels(what).inc()
        log.warning("%s: %s", what, e.format_message())
    except Exception:  # the loop that keeps a server current must outlive any one failure
        metrics.refresh_failures.labels(what).inc()
        log.exception("%s: refresh failed", what)
    return False


async def _once(what: str, step: Callable[[], object], seconds: float, metrics: Metrics) -> None:
    while not await _attempt(what, step, metrics):
        await asyncio.sleep(seconds)


async def _repeat(what: str, step: Callable[[], object], seconds: float, metrics: Metrics) -> None:
    while True:
        await asyncio.sleep(seconds)
        await _attempt(what, step, metrics)


async def _warm_then_repeat(deps: Dependencies) -> None:
    await _attempt("model", deps.models.refresh, deps.metrics)
    # What start-up made lives as long as the process: keep the collector from walking it during requests.
    gc.collect()
    gc.freeze()
    await _repeat("model", deps.models.refresh, deps.model_seconds, deps.metrics)
