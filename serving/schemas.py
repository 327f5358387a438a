"""Bodies of the REST interface, as OpenAPI shows them and the Python client reads them. Times are ISO 8601, UTC."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

Status = Literal["PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE", "INVALID"]

_INT64 = 2**63


def _iso_text(value: Any) -> Any:
    if not isinstance(value, str) or not re.match(r"\d{4}-\d\d-\d\d[Tt ]", value):
        raise ValueError("give an ISO 8601 time, for example 2026-01-01T00:00:00Z")
    return value


def _as_utc(value: datetime) -> datetime:
    return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


At = Annotated[
    datetime,
    BeforeValidator(_iso_text),
    AfterValidator(_as_utc),
]
"""A time in a request; one without an offset is UTC; digits below the microsecond are cut off (never into the future)."""

Int64 = Annotated[int, Field(strict=True, ge=-_INT64, lt=_INT64)]


def _no_whole_number(value: Any) -> Any:
    if not isinstance(value, float):  # else a whole number too large for a join key would pass as a float
        raise ValueError("Input should be a number with a fraction")
    return value


Input = Annotated[float, BeforeValidator(_no_whole_number), Field(strict=True, allow_inf_nan=False)]
"""No join key is one; on-demand views take them from the request."""
Key = Annotated[str, Field(strict=True)] | Annotated[bool, Field(strict=True)] | Int64 | Input | None
Entities = Annotated[
    dict[str, list[Key]],
    Field(
        description="Join key to its values; all lists have one length, one result row per position.",
        examples=[{"customer_id": ["C1", "C2"]}],
        min_length=1,
    ),
]


class Body(BaseModel):
    """A request body: unknown fields are refused, so that a typing error is not silently ignored."""

    model_config = ConfigDict(extra="forbid")


class OnlineRequest(Body):
    feature_service: str | None = Field(None, description="Name of a feature service; or give `features`.")
    features: list[str] | None = Field(
        None, description="Feature references `view:feature`; or give `feature_service`."
    )
    entities: Entities
    at: At | None = Field(None, description="Read as of this time: only under the replay clock, not before it.")
    full_feature_names: bool = Field(False, description="Name features `view__feature` instead of `feature`.")


class PredictRequest(Body):
    entities: Entities
    at: At | None = Field(None, description="Predict as of this time: only under the replay clock, not before it.")


class FeatureRow(BaseModel):
    """Values of one entity. Every status but PRESENT goes with a null value."""

    entity: dict[str, JsonValue]
    values: dict[str, JsonValue]
    statuses: dict[str, Status]
    offsets: dict[str, dict[str, int]] = Field(
        description="Windowed view to (partition to last Kafka offset included; partition -1: history)."
    )
    event_timestamps: dict[str, datetime | None]


class OnlineResponse(BaseModel):
    t: datetime = Field(description="The time as of which the values hold.")
    feature_service: str | None
    feature_names: list[str]
    feature_types: list[str] = Field(
        description="Feast's value types of the features, in that order: DOUBLE, INT64_LIST, ..."
    )
    rows: list[FeatureRow] = Field(description="One per entity, in the request's order.")


class Prediction(FeatureRow):
    probability: float


class PredictResponse(BaseModel):
    model: str
    version: str
    feature_service: str
    feature_types: dict[str, str] = Field(description="Feature to its Feast value type: DOUBLE, INT64_LIST, ...")
    t: datetime = Field(description="The time as of which the features hold.")
    predictions: list[Prediction] = Field(description="One per entity, in the request's order.")


Columns = Annotated[
    dict[str, list[JsonValue]],
    Field(description="Column name to its values; all lists have one length, one row per position.", min_length=1),
]
To = Literal["online", "offline", "online_and_offline"]


class PushRequest(Body):
    feature_view: str | None = Field(None, description="Name of a feature view; or give `push_source`.")
    push_source: str | None = Field(None, description="Name of a push source; or give `feature_view`.")
    columns: Annotated[
        Columns,
        Field(
            description="Join keys, features and `event_timestamp`; `created` is the server's clock where it is missing.",
            examples=[{"customer_id": ["C1"], "event_timestamp": ["2026-01-01T00:00:00Z"], "tenure_months": [12.5]}],
        ),
    ]
    to: To = Field(
        "online_and_offline", description="Which stores to write to. Rows that are only online cannot be audited."
    )


class PushResponse(BaseModel):
    rows: int = Field(description="Rows of the request that were written.")
    feature_views: list[str] = Field(description="The views they were written to.")
    to: To


class HistoricalRequest(Body):
    feature_service: str | None = Field(None, description="Name of a feature service; or give `features`.")
    features: list[str] | None = Field(
        None, description="Feature references `view:feature`; or give `feature_service`."
    )
    entities: Annotated[
        Columns,
        Field(
            description="Join keys, `event_timestamp` (each row's own time) and other columns, which come back as they are.",
            examples=[{"customer_id": ["C1"], "event_timestamp": ["2026-01-01T00:00:00Z"]}],
        ),
    ]
    as_known: bool = Field(True, description="Only what was known (`created`) by each row's time.")
    full_feature_names: bool = Field(False, description="Name features `view__feature` instead of `feature`.")


class HistoricalResponse(BaseModel):
    feature_service: str | None
    feature_names: list[str]
    rows: int
    columns: dict[str, list[JsonValue]] = Field(
        description="The request's columns, then the features; one value per entity row, in the request's order."
    )


class JobError(BaseModel):
    code: str
    message: str


class JobInfo(BaseModel):
    id: str
    status: Literal["queued", "running", "done", "failed"]
    rows_done: int
    rows_total: int
    created_at: datetime
    finished_at: datetime | None
    error: JobError | None = Field(description="Why it failed.")


class ErrorDetail(BaseModel):
    code: str
    message: str
    valid: list[str] | None
    next: str | None


class ErrorResponse(BaseModel):
    error: ErrorDetail


class Health(BaseModel):
    status: Literal["ok"]


class Check(BaseModel):
    ok: bool
    detail: str


class Readiness(BaseModel):
    status: Literal["ready", "not_ready"]
    checks: dict[str, Check]


class FeatureInfo(BaseModel):
    name: str
    type: str
    description: str
    unit: str | None


class RequestInput(BaseModel):
    name: str
    type: str


class ViewInfo(BaseModel):
    name: str
    kind: Literal["feature", "stream", "on_demand", "label"] = "feature"
    description: str
    owner: str
    ttl_seconds: float | None = Field(description="Age beyond which a value is not served; null: no limit.")
    join_keys: list[str] = Field(description="Of an on-demand view: those of the views that it reads.")
    request: list[RequestInput] = Field(
        [], description="What an on-demand view takes from the request, beside the join keys."
    )
    windowed: bool
    topic: str | None = Field(description="Kafka topic that keeps a windowed view current.")
    features: list[FeatureInfo]


class ServiceInfo(BaseModel):
    name: str
    description: str
    owner: str
    features: list[str]


class Catalogue(BaseModel):
    project: str
    views: list[ViewInfo]
    feature_services: list[ServiceInfo]
