"""`predictflow serve`'s gRPC part: the port held while workers start, the server beside the REST application."""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.errors import PredictFlowError
from serving.ports import reserve_port

if TYPE_CHECKING:
    from feast import FeatureStore
    from starlette.types import ASGIApp

    from serving.grpc_push import Push
    from serving.limits import Gate
    from serving.metrics import Metrics
    from serving.models import Models
    from serving.online import OnlineService
    from serving.plans import Plans

log = logging.getLogger(__name__)


def reserve(address: tuple[str, int] | None) -> AbstractContextManager[object]:
    """Holds the gRPC port, so that a busy one is told before anything slow is imported; nothing for None."""
    return nullcontext() if address is None else reserve_port(*address)


def with_grpc(
    app: ASGIApp,
    address: tuple[str, int] | None,
    store: FeatureStore,
    online: OnlineService,
    plans: Plans,
    models: Models,
    metrics: Metrics,
    ping: Callable[[], Awaitable[None]],
    *,
    push: Push,
    gate: Gate | None = None,
    tls: tuple[Path, Path] | None = None,
    seconds: float = 30.0,
    request_bytes: int = 4 * 1024 * 1024,
) -> ASGIApp:
    """`app` with a gRPC server that starts and stops with it; `app` itself for None.

    `gate`, `push`, `seconds` and `request_bytes` are what REST has too; `tls`: files of the certificate chain and its key.
    """
    if address is None:
        return app
    from redis.exceptions import RedisError

    from serving.grpc_push import StoreWriter
    from serving.grpc_server import GrpcOptions, GrpcServer
    from serving.lifespan import WithService

    async def ready() -> bool:
        try:
            await ping()
        except (PredictFlowError, RedisError, OSError) as e:
            log.debug("gRPC health: Redis does not answer: %s", type(e).__name__)
            return False
        return plans.check()[0] and models.check()[0]

    pair = None if tls is None else (tls[1].read_bytes(), tls[0].read_bytes())
    options = GrpcOptions(*address, tls=pair, seconds=seconds, request_bytes=request_bytes)
    return WithService(app, GrpcServer(online, StoreWriter(store, push), metrics, ready, options, gate))
