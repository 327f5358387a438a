"""A gRPC server on a real Redis and a file registry, in a thread of this process."""

from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_source import PushSource
from feast.types import Array, Bool, Float64, Int64, String, UnixTimestamp

from feature_store.online_reader import OnlineReader
from feature_store.redis_connection import connect_async
from feature_store.windows.declare import event_source, windowed_feature_view
from serving.grpc_push import StoreWriter
from serving.grpc_server import GrpcOptions, GrpcServer
from serving.metrics import Metrics
from serving.models import NoModels
from serving.online import OnlineService
from serving.online_types import Limits
from serving.plans import Plans
from serving.push import Pusher
from serving.served_log import NoServedLog

NOW = datetime.now(UTC).replace(microsecond=123_456)
DAY = timedelta(days=1)
LIMITS = Limits(rows=120, features=8)

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)


def _source(home: Path, name: str) -> FileSource:
    path = str(home / f"{name}.parquet")
    return FileSource(name=name, path=path, timestamp_field="event_timestamp", created_timestamp_column="created")


class Repo:
    """Two row views and a windowed one; C1 is complete, C2 holds nulls, C3 has expired, C9 was never written."""

    def __init__(self, home: Path, redis_url: str) -> None:
        self.redis_url = redis_url
        self.account = FeatureView(
            name="account",
            entities=[customer],
            ttl=DAY,
            schema=[
                Field(name="charges", dtype=Float64),
                Field(name="plan", dtype=String),
                Field(name="since", dtype=UnixTimestamp),
                Field(name="tags", dtype=Array(String)),
                Field(name="active", dtype=Bool),
            ],
            source=PushSource(name="account_push", batch_source=_source(home, "account")),
        )
        self.visits = FeatureView(
            name="visits",
            entities=[customer],
            ttl=timedelta(0),
            schema=[Field(name="visits", dtype=Int64)],
            source=_source(home, "visits"),
        )
        self.behavior = windowed_feature_view(
            name="behavior",
            entity=customer,
            source=event_source(topic="events", columns={"amount": "int64"}),
            path=str(home / "behavior"),
            sql="""SELECT customer_id, COUNT(*) OVER (PARTITION BY customer_id ORDER BY event_timestamp
                   RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW) AS events_7d FROM events""",
            ttl=30 * DAY,
        )
        views = [self.account, self.visits, self.behavior]
        self.store = FeatureStore(
            config=RepoConfig(
                project="shop",
                provider="local",
                registry=str(home / "registry.db"),
                online_store={
                    "type": "feature_store.online_store.PredictFlowOnlineStore",
                    "connection_string": redis_url,
                },
                entity_key_serialization_version=3,
            )
        )
        self.store.apply([customer, *views, FeatureService(name="all", features=views)])
        rows: list[dict[str, Any]] = [
            {"charges": -0.5, "plan": "x" * 3000, "since": NOW, "tags": ["a", ""], "active": True, "age": 0},
            {"charges": None, "plan": "", "since": None, "tags": None, "active": False, "age": 0},
            {"charges": 1.0, "plan": "old", "since": NOW, "tags": [], "active": True, "age": 2},
        ]
        for i, row in enumerate(rows, 1):
            event = NOW - row.pop("age") * DAY
            frame = pd.DataFrame([{"customer_id": f"C{i}", "event_timestamp": event, "created": event, **row}])
            self.store.write_to_online_store("account", frame)
        frame = pd.DataFrame([{"customer_id": "C1", "event_timestamp": NOW, "created": NOW, "visits": -(2**53) - 1}])
        self.store.write_to_online_store("visits", frame)


@contextmanager
def serving(repo: Repo, gate: Any = None, **options: Any) -> Iterator[tuple[str, GrpcServer]]:
    """The server's address and itself, until the block ends."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever)
    thread.start()

    def run(work: Any) -> Any:
        return asyncio.run_coroutine_threadsafe(work, loop).result(30)

    async def make() -> GrpcServer:
        redis = await connect_async(repo.redis_url)
        plans = Plans(repo.store, lambda plan: OnlineReader(plan, redis, "shop", "wall"))
        plans.refresh()
        metrics = Metrics()
        service = OnlineService(
            plans,
            NoModels(),
            NoServedLog(),
            metrics,
            ThreadPoolExecutor(1),
            lambda: datetime.now(UTC),
            LIMITS,
        )

        async def ready() -> bool:
            return True

        chosen = replace(GrpcOptions(port=0, drain_seconds=2), **options)
        writer = StoreWriter(repo.store, Pusher(repo.store, lambda: datetime.now(UTC)).push)
        server = GrpcServer(service, writer, metrics, ready, chosen, gate)
        await server.start()
        server.client = redis  # type: ignore[attr-defined]  # closed below
        server.rest = loop, service, plans, metrics  # type: ignore[attr-defined]  # for `serving_rest`
        return server

    server = run(make())
    try:
        yield f"127.0.0.1:{server.port}", server
    finally:
        run(server.stop())
        run(server.client.aclose())
        loop.call_soon_threadsafe(loop.stop)
        thread.join(10)
        loop.close()


@contextmanager
def serving_rest(server: GrpcServer, hot: bool) -> Iterator[str]:
    """The URL of REST online reads by the service of a gRPC server; `hot`: with the short cut for plain requests."""
    import uvicorn

    from serving.app import Dependencies, create_app
    from serving.hot import HotRoutes

    loop, online, plans, metrics = server.rest  # type: ignore[attr-defined]  # see `serving`
    nothing: Any = None
    made: Any = create_app(Dependencies(online, plans, *[nothing] * 7, metrics, nothing, nothing))
    if hot:
        made = HotRoutes(made, online, metrics, LIMITS)
    rest = uvicorn.Server(uvicorn.Config(made, log_config=None, access_log=False, lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        done = asyncio.run_coroutine_threadsafe(rest.serve([listener]), loop)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            rest.should_exit = True
            done.result(10)
