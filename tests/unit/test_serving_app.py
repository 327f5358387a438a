"""The REST application over fakes of its own ports: reader, models and served log."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from redis.exceptions import ConnectionError as RedisConnectionError
from starlette.testclient import TestClient

from feature_store.errors import DataError, NotFoundError, PredictFlowError, UnavailableError, UsageError
from feature_store.read_plan import OnlineRow, OnlineRows, ViewRead
from serving import schemas
from serving.access import Keys
from serving.app import Dependencies, create_app
from serving.historical import HistoricalLimits
from serving.limits import HISTORICAL_PATH, Gate, RequestLimits
from serving.metrics import Metrics
from serving.middleware import RequestScope
from serving.models import Model
from serving.online import OnlineService
from serving.online_types import Limits
from serving.plans import Asked, Column, ServicePlan
from serving.served_log import Served, records

T = datetime(2026, 1, 1, 12, 0, 0, 1, tzinfo=UTC)
SERVED_AT = datetime(2026, 5, 5, tzinfo=UTC)
WATERMARK = datetime(2026, 1, 1, 11, 30, tzinfo=UTC)
COLUMNS = (Column("charges", "account", "charges", True), Column("method", "account", "method", False))


class FakeReader:
    def __init__(self) -> None:
        self.error: Exception | None = None
        self.at: datetime | None = None

    async def aread(self, entities: Sequence[Mapping[str, object]], at: datetime | None = None) -> OnlineRows:
        if self.error is not None:
            raise self.error
        self.at = at
        rows = [
            OnlineRow(
                dict(entity),
                {"charges": 0.1 + 0.2, "method": None},
                {"charges": "PRESENT", "method": "NULL_VALUE"},
                {"charges": T, "method": T},
                {"account": ViewRead(T, None, {-1: 9, 0: 2**53 + 1}, T, WATERMARK)},
            )
            for entity in entities
        ]
        return OnlineRows(at or T, rows)


class FakePlans:
    project = "p"

    def __init__(self, reader: FakeReader) -> None:
        self.plan = ServicePlan("s", COLUMNS, ("id",), reader)
        self.refreshed = 0

    def cached(self, asked: Asked, full_names: bool) -> ServicePlan | None:
        return None

    def get(self, asked: Asked, full_names: bool) -> ServicePlan:
        if asked == "s":
            return self.plan
        raise NotFoundError("unknown feature service", value=asked, valid=["s"], next_step="feast apply")

    def refresh(self) -> bool:
        self.refreshed += 1
        if self.refreshed == 1:
            raise UnavailableError("the feature registry does not answer")
        return True

    def check(self) -> tuple[bool, str]:
        return True, "fine"


class Pipeline:
    def predict_proba(self, frame: Any) -> Any:
        return frame[["charges", "charges"]].to_numpy()


class FakeModels:
    ready = True

    def cached(self, name: str) -> Model | None:
        return Model("m", "7", "s", Pipeline(), 1, ("charges",)) if name == "m" else None

    def get(self, name: str) -> Model:
        raise NotFoundError("no model version with alias 'champion'", value=name, next_step="predictflow train")

    def refresh(self) -> None:
        pass

    def check(self) -> tuple[bool, str]:
        return self.ready, "m: version 7"


class FakeLog:
    def __init__(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.closed = self.drained = False

    def write(
        self, served: Served, plan: ServicePlan, rows: OnlineRows, probabilities: Sequence[float] | None = None
    ) -> None:
        self.records += records(served, plan, rows, probabilities)

    def poll(self) -> None:
        pass

    def drain(self) -> None:
        asyncio.get_running_loop()  # raises in a thread
        self.drained = True

    def close(self, timeout: float) -> None:
        assert self.drained
        self.closed = True


class NoJobs:
    def __init__(self, log: FakeLog) -> None:
        self.log = log
        self.closed = False

    def sweep(self) -> None:
        pass

    def close(self) -> None:
        assert self.log.closed, "a job may take long to stop: the log comes first"
        self.closed = True


class Server:
    def __init__(self, keys: Keys | None = None, **request_limits: Any) -> None:
        self.reader, self.models, self.log, self.metrics = FakeReader(), FakeModels(), FakeLog(), Metrics()
        self.plans = FakePlans(self.reader)
        self.jobs = NoJobs(self.log)
        self.redis_error: Exception | None = None
        self.closed = False
        self.checked = 0
        limits = Limits(rows=3, features=2)
        self.gate = Gate(keys, request_limits.get("concurrent", 8))
        online = OnlineService(
            self.plans,  # type: ignore[arg-type]
            self.models,
            self.log,
            self.metrics,
            ThreadPoolExecutor(1),
            lambda: SERVED_AT,
            limits,
        )
        self.deps = Dependencies(
            online=online,
            plans=self.plans,  # type: ignore[arg-type]
            models=self.models,
            catalogue=None,  # type: ignore[arg-type]  # no test here asks for it
            push=None,  # type: ignore[arg-type]  # nor for this
            historical=None,  # type: ignore[arg-type]  # nor for this
            jobs=self.jobs,  # type: ignore[arg-type]
            reads=ThreadPoolExecutor(1),
            served_log=self.log,
            metrics=self.metrics,
            ping=self.ping,
            close=self.close,
            check_settings=self.check_settings,
            registry_seconds=0.02,
            gate=self.gate,
            request_limits=RequestLimits(**{"body_bytes": 2000, **request_limits}),
        )
        self.app = create_app(self.deps)

    def check_settings(self) -> None:
        self.checked += 1
        if self.checked == 1:
            raise UnavailableError("Redis does not answer")

    async def ping(self) -> None:
        if self.redis_error:
            raise self.redis_error

    async def close(self) -> None:
        self.closed = True


@pytest.fixture
def server() -> Server:
    return Server()


@pytest.fixture
def client(server: Server) -> Iterator[TestClient]:
    with TestClient(server.app, raise_server_exceptions=False) as client:
        yield client


def ask(client: TestClient, **body: Any) -> Any:
    return client.post("/api/v1/features/online", json={"feature_service": "s", "entities": {"id": ["a"]}, **body})


def test_a_join_key_of_bytes_is_read_from_base64_and_answered_as_that() -> None:
    server = Server()
    server.plans.plan = replace(server.plans.plan, texts={"id": "BYTES"})
    with TestClient(server.app) as client:
        for path, of in (("/api/v1/features/online", {"feature_service": "s"}), ("/api/v1/predict/m", {})):
            answer = client.post(path, json={**of, "entities": {"id": ["AP8="]}})
            assert answer.status_code == 200, answer.text
            (row,) = answer.json().get("rows") or answer.json()["predictions"]
            assert row["entity"] == {"id": "AP8="}
            refused = client.post(path, json={**of, "entities": {"id": ["?"]}})
            assert (refused.status_code, refused.json()["error"]["code"]) == (400, "column")


def test_answers_have_the_documented_models(client: TestClient) -> None:
    features = schemas.OnlineResponse.model_validate(ask(client).json())
    predictions = schemas.PredictResponse.model_validate(
        client.post("/api/v1/predict/m", json={"entities": {"id": ["a", "b"]}}).json()
    )

    assert features.t == T
    assert features.rows[0].values == {"charges": 0.1 + 0.2, "method": None}
    assert features.rows[0].offsets == {"account": {"-1": 9, "0": 2**53 + 1}}
    assert (predictions.model, predictions.version, predictions.feature_service) == ("m", "7", "s")
    assert [(p.entity["id"], p.probability) for p in predictions.predictions] == [("a", 0.1 + 0.2), ("b", 0.1 + 0.2)]


def test_a_time_without_an_offset_is_utc(server: Server, client: TestClient) -> None:
    ask(client, at="2026-01-02T03:04:05.123456")
    assert server.reader.at == datetime(2026, 1, 2, 3, 4, 5, 123456, tzinfo=UTC)
    ask(client, at="2026-01-02T03:04:05+02:00")
    assert server.reader.at == datetime(2026, 1, 2, 1, 4, 5, tzinfo=UTC)


def test_what_was_served_is_logged_with_the_request_id(server: Server, client: TestClient) -> None:
    body = {"entities": {"id": ["a"]}}
    client.post("/api/v1/predict/m", json=body, headers={"X-Request-Id": "r1"})

    assert json.loads(json.dumps(server.log.records, default=str)) == [
        {
            "request_id": "r1",
            "served_at": str(SERVED_AT),
            "t": str(T),
            "project": "p",
            "feature_service": "s",
            "entity": {"id": "a"},
            "features": {
                "charges": {
                    "view": "account",
                    "feature": "charges",
                    "value": 0.1 + 0.2,
                    "status": "PRESENT",
                    "event_timestamp": str(T),
                },
                "method": {
                    "view": "account",
                    "feature": "method",
                    "value": None,
                    "status": "NULL_VALUE",
                    "event_timestamp": str(T),
                },
            },
            "views": {
                "account": {
                    "event_timestamp": str(T),
                    "created": None,
                    "offsets": {"-1": 9, "0": 2**53 + 1},
                    "visible_at": str(T),
                    "watermark": str(WATERMARK),
                }
            },
            "model": "m",
            "version": "7",
            "probability": 0.1 + 0.2,
        }
    ]


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (UnavailableError("Redis does not answer"), 503, "unavailable"),
        (RedisConnectionError("gone"), 503, "unavailable"),
        (DataError("broken"), 500, "data"),
        (PredictFlowError("no"), 500, "failure"),
        (RuntimeError("a bug"), 500, "internal"),
    ],
)
def test_errors_of_the_reader_become_answers(
    server: Server, client: TestClient, error: Exception, status: int, code: str
) -> None:
    server.reader.error = error
    answer = ask(client)

    assert (answer.status_code, schemas.ErrorResponse.model_validate(answer.json()).error.code) == (status, code)
    assert ("Retry-After" in answer.headers) == (status == 503)
    assert answer.headers["X-Request-Id"]
    assert "a bug" not in answer.text
    assert server.log.records == []


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        ({"entities": {"id": ["a"] * 4}}, 413, "too_many_rows"),
        ({"feature_service": None, "features": ["v:a", "v:b", "v:c"]}, 413, "too_many_features"),
        ({"feature_service": None}, 400, "usage"),
        ({"entities": {"id": ["a"], "other": ["a", "b"]}}, 400, "usage"),
        ({"entities": {}}, 422, "invalid_body"),
        ({"feature_service": "t"}, 404, "not_found"),
    ],
)
def test_limits_and_names_are_checked(client: TestClient, body: dict[str, Any], status: int, code: str) -> None:
    answer = ask(client, **body)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)


def test_a_not_found_answer_lists_the_valid_names(client: TestClient) -> None:
    error = schemas.ErrorResponse.model_validate(ask(client, feature_service="t").json()).error
    assert (error.valid, error.next) == (["s"], "feast apply")


def test_a_body_over_the_limit_is_refused_with_and_without_its_length(client: TestClient) -> None:
    big = json.dumps({"feature_service": "s", "entities": {"id": ["a" * 3000]}}).encode()
    headers = {"content-type": "application/json"}

    declared = client.post("/api/v1/features/online", content=big, headers=headers)
    streamed = client.post("/api/v1/features/online", content=iter([big[:1500], big[1500:]]), headers=headers)

    assert [a.status_code for a in (declared, streamed)] == [413, 413]
    assert {a.json()["error"]["code"] for a in (declared, streamed)} == {"body_too_large"}


def test_readiness_names_what_is_missing(server: Server, client: TestClient) -> None:
    assert client.get("/readyz").json()["status"] == "ready"
    server.redis_error = RedisConnectionError("gone")
    server.models.ready = False
    answer = client.get("/readyz")

    assert answer.status_code == 503
    assert {name: c.ok for name, c in schemas.Readiness.model_validate(answer.json()).checks.items()} == {
        "redis": False,
        "registry": True,
        "model": False,
    }
    assert client.get("/healthz").status_code == 200


def test_a_failed_first_read_of_the_registry_does_not_stop_the_server(server: Server, client: TestClient) -> None:
    assert ask(client).status_code == 200
    assert 'predictflow_refresh_failures_total{what="registry"} 1.0' in client.get("/metrics").text


def test_stopping_flushes_the_log_and_closes_connections(server: Server) -> None:
    with TestClient(server.app):
        assert not server.log.closed
    assert server.log.closed
    assert server.jobs.closed
    assert server.closed


def test_the_openapi_document_shows_every_status_that_a_route_answers(client: TestClient) -> None:
    document = client.get("/openapi.json").json()
    online = document["paths"]["/api/v1/features/online"]["post"]["responses"]
    refused = {"400", "401", "403", "404", "405", "408", "413", "422", "431"}
    assert set(online) == {"200", *refused, "500", "503", "504"}
    for status in set(online) - {"200"}:
        assert online[status]["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorResponse")
    assert "HTTPValidationError" not in document["components"]["schemas"]
    at = document["components"]["schemas"]["PredictRequest"]["properties"]["at"]
    assert {"type": "string", "format": "date-time"} in [
        {k: v for k, v in option.items() if k in ("type", "format")} for option in at["anyOf"]
    ]


def test_unknown_routes_and_methods_share_the_error_shape(client: TestClient) -> None:
    for answer, status in ((client.get("/nowhere"), 404), (client.get("/api/v1/predict/m"), 405)):
        assert answer.status_code == status
        assert schemas.ErrorResponse.model_validate(answer.json())
    assert 'route="unmatched",status="404"' in client.get("/metrics").text


def test_downloads_leave_the_other_slots_to_the_rest() -> None:
    async def run() -> None:
        going = asyncio.Event()

        async def app(scope: Any, receive: Any, send: Any) -> None:
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if scope["path"] == HISTORICAL_PATH:
                await going.wait()  # a reader that takes its time
            await send({"type": "http.response.body", "body": b""})

        scope_of_requests = RequestScope(app, Metrics(), Gate(None, 4), RequestLimits(4))

        async def ask(path: str) -> int:
            sent: list[Any] = []

            async def receive() -> Any:
                return {"type": "http.request", "body": b""}

            async def send(message: Any) -> None:
                sent.append(message)

            scope = {"type": "http", "method": "POST", "path": path, "headers": [], "client": None}
            await scope_of_requests(scope, receive, send)
            return int(sent[0]["status"])

        slow = [asyncio.create_task(ask(HISTORICAL_PATH)) for _ in range(4)]
        await asyncio.sleep(0)
        assert await ask("/api/v1/features/online") == 200
        going.set()
        assert sorted(await asyncio.gather(*slow)) == [200, 503, 503, 503]

    asyncio.run(run())


def test_a_historical_read_that_was_given_up_keeps_its_slot_until_it_ends() -> None:
    server = Server(concurrent=4, seconds=0.1)  # one slot is for historical reads
    going, ended = threading.Event(), threading.Event()

    class Slow:
        limits = HistoricalLimits()

        def wanted(self, *_: Any) -> Any:
            going.wait(30)
            ended.set()
            raise UsageError("asked too late")

    slow: Any = Slow()
    deps = replace(server.deps, historical=slow)
    body = {"feature_service": "s", "entities": {"id": ["a"], "event_timestamp": [T.isoformat()]}}
    with TestClient(create_app(deps)) as client:

        def ask() -> int:
            return client.post(HISTORICAL_PATH, json=body).status_code

        try:
            assert [ask(), ask()] == [504, 503]
        finally:
            going.set()
        assert ended.wait(30)
        deadline = time.monotonic() + 20
        while (status := ask()) == 503:
            assert time.monotonic() < deadline
        assert status == 400


def test_functions_of_on_demand_views_do_not_run_on_the_event_loop() -> None:
    ran: list[int] = []

    class Computed:
        """A plan's reader and its `plan` in one: `decode` and `at` run the functions."""

        async def afetch(self, entities: Sequence[Any], at: datetime | None = None) -> tuple[list[Any], int]:
            return [], 0

        def decode(self, entities: Sequence[Mapping[str, object]], replies: list[Any], t_us: int) -> OnlineRows:
            ran.append(threading.get_ident())
            return OnlineRows(T, [])

        def at(self, replies: list[Any], t_us: int, entities: Sequence[Any]) -> tuple[int, list[Any]]:
            ran.append(threading.get_ident())
            return t_us, []

        def rows(self, entities: Sequence[Any], t_us: int, answers: list[Any]) -> OnlineRows:
            return OnlineRows(T, [])

    reader: Any = Computed()
    reader.plan = reader
    plans: Any = FakePlans(FakeReader())
    plans.plan = ServicePlan("s", (), ("id",), reader, None, True)
    online = OnlineService(
        plans, FakeModels(), FakeLog(), Metrics(), ThreadPoolExecutor(1), lambda: SERVED_AT, Limits()
    )

    async def run() -> None:
        await online.features({"id": ["a"]}, "s", None, None, False, "r", "here")
        await online.cells({"id": ["a"]}, "s", None, False, "r", "here")

    asyncio.run(run())
    assert len(ran) == 2
    assert threading.get_ident() not in ran


def test_settings_are_looked_at_until_redis_answers_and_then_no_more(server: Server, client: TestClient) -> None:
    deadline = time.monotonic() + 20
    while server.checked < 2:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    time.sleep(0.2)
    assert server.checked == 2
