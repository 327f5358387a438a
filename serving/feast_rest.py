"""The routes of Feast's own feature server, so that a stock Feast client (`online_store: {type: remote}`) works unchanged.

Bodies, answers and errors are Feast's (feast/feature_server.py, 0.67); statuses, ttl and newest-wins are ours.
"""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import FastAPI, Request, Response
from pydantic import BaseModel, Field, JsonValue

from feature_store.errors import UsageError
from serving import schemas
from serving.encoding import JSONBytes
from serving.feast_answer import feast_answer
from serving.middleware import route_of
from serving.online import OnlineService
from serving.openapi import feast_faults, probe_faults
from serving.plans import Asked, Plans
from serving.push import Pusher

TAG = "feast"


class FeastOnlineRequest(BaseModel):
    """Feast's GetOnlineFeaturesRequest; as there, unknown fields and columns that are no join key are ignored."""

    entities: dict[str, list[schemas.Key]]
    feature_service: str | None = None
    features: list[str] = Field(default=[])
    full_feature_names: bool = False
    include_feature_view_version_metadata: bool = False


class FeastViewMetadata(BaseModel):
    name: str = ""
    version: int = 0


class FeastMetadata(BaseModel):
    feature_names: list[str]
    feature_view_metadata: list[FeastViewMetadata] = Field(default=[])


class FeastVector(BaseModel):
    """One join key or feature over all entity rows."""

    values: list[JsonValue]
    statuses: list[schemas.Status]
    event_timestamps: list[str]


class FeastOnlineResponse(BaseModel):
    metadata: FeastMetadata
    results: list[FeastVector]


class FeastPush(BaseModel):
    """Feast's PushFeaturesRequest. Rows are not transformed: on-demand views are not pushed to."""

    push_source_name: str
    df: schemas.Columns
    allow_registry_cache: bool = True
    to: schemas.To = "online"
    transform_on_write: bool = True


class FeastWrite(BaseModel):
    """Feast's WriteToFeatureStoreRequest."""

    feature_view_name: str
    df: schemas.Columns
    allow_registry_cache: bool = True
    transform_on_write: bool = True


_BODY = (400, 404, 413, 422)
_EMPTY: dict[int | str, dict[str, Any]] = {200: {"description": "Written"}}


def add_routes(app: FastAPI, online: OnlineService, plans: Plans, push: Pusher) -> None:
    """Feast's four routes."""

    @app.post(
        "/get-online-features",
        response_model=FeastOnlineResponse,
        responses=feast_faults(*_BODY),
        tags=[TAG],
        summary="Online features in Feast's own format",
    )
    async def get_online_features(body: FeastOnlineRequest, request: Request) -> Response:
        if (body.feature_service is None) == (not body.features):
            raise UsageError("give either feature_service or features")
        asked: Asked = body.feature_service or tuple(body.features)
        names = body.full_feature_names
        plan = plans.cached(asked, names)
        if plan is None:
            plan = await asyncio.to_thread(plans.get, asked, names)
        # Before the read: what Feast ignores must not be refused by it. A missing join key is.
        entities = {k: v for k, v in body.entities.items() if k in plan.join_keys} or body.entities
        read = await online.cells(entities, asked, None, names, request.state.request_id, route_of(request.scope))
        compiled = read.plan.reader.plan
        columns = {key: [row[key] for row in read.entities] for key in compiled.join_keys}
        return JSONBytes(feast_answer(compiled, columns, read.rows, body.include_feature_view_version_metadata))

    @app.post(
        "/push",
        response_class=Response,
        responses={**_EMPTY, **feast_faults(*_BODY)},
        tags=[TAG],
        summary="Push rows to the views of a push source, as Feast's push does",
    )
    async def feast_push(body: FeastPush) -> Response:
        await push.apush(None, body.push_source_name, body.df, body.to)
        return Response()

    @app.post(
        "/write-to-online-store",
        response_class=Response,
        responses={**_EMPTY, **feast_faults(*_BODY)},
        tags=[TAG],
        summary="Write rows of one feature view to the online store, as Feast's remote client does",
    )
    async def write_to_online_store(body: FeastWrite) -> Response:
        await push.apush(body.feature_view_name, None, body.df, "online")
        return Response()

    @app.get(
        "/health",
        response_class=Response,
        responses={
            200: {"description": "Features can be read"},
            503: {"description": "No feature service is compiled"},
            **probe_faults(feast=True),
        },
        tags=[TAG],
        summary="Feast's health check: the registry was read",
    )
    async def health() -> Response:
        ok, _ = plans.check()
        return Response(status_code=200 if ok else 503)
