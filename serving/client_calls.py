"""What the Python client asks and how it reads answers, apart from how they travel: calls, errors, retries. No I/O."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar
from urllib.parse import quote

from pydantic import TypeAdapter, ValidationError

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving import schemas
from serving.client_kinds import decode
from serving.client_types import FeatureRow, HistoricalJob, OnlineFeatures, Prediction, Predictions, Pushed
from serving.client_values import arrow_stream, python_columns
from serving.encoding import dumps, plain

if TYPE_CHECKING:
    import httpx
    import pyarrow as pa

    from serving.client_grpc import GrpcCall

BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0
ARROW = "application/vnd.apache.arrow.stream"
To = Literal["online", "offline", "online_and_offline"]
Columns = Mapping[str, Iterable[object]]
T = TypeVar("T")


@dataclass(frozen=True)
class Call(Generic[T]):
    """One request over either transport; `over_grpc` makes its gRPC form, None where there is none. Safe to repeat.

    `starts_work`: it may start a job, so once it was sent no answer does not mean that it may be sent again: the job may run.
    """

    what: str
    path: str
    parse: Callable[[httpx.Response], T]
    method: str = "POST"
    content: bytes | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    params: Mapping[str, Any] = field(default_factory=dict)
    over_grpc: Callable[[], GrpcCall[T]] | None = None
    starts_work: bool = False


@dataclass(frozen=True)
class Failure:
    """A call that failed; `wait`: seconds that the server asked for before the next try; `final`: there is none."""

    error: PredictFlowError
    wait: float = 0.0
    final: bool = False


def pause(failure: Failure, attempt: int, retries: int) -> float:
    """Seconds before the next try: random, growing, and what the server asked for. Raises the error when there is none."""
    if failure.final or not isinstance(failure.error, UnavailableError) or attempt >= retries:
        raise failure.error
    backoff = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**attempt)
    return min(failure.wait, MAX_BACKOFF_SECONDS) + random.uniform(0, backoff)


def online(
    entities: Columns,
    feature_service: str | None,
    features: Sequence[str] | None,
    at: datetime | None,
    full_feature_names: bool,
    request_id: str | None,
) -> Call[OnlineFeatures]:
    keys = python_columns(entities, keys=True)
    body: dict[str, Any] = {"entities": keys}
    if feature_service is not None:
        body["feature_service"] = feature_service
    if features is not None:
        body["features"] = list(features)
    if full_feature_names:
        body["full_feature_names"] = True

    def over_grpc() -> GrpcCall[OnlineFeatures]:
        from serving.client_grpc import online_call

        return online_call(keys, feature_service, features, full_feature_names)

    path = "/api/v1/features/online"
    call = _json("get_online_features", path, body, at, request_id, OnlineFeatures, None if at else over_grpc)
    return replace(call, parse=partial(_features, keys))


def predict(model: str, entities: Columns, at: datetime | None, request_id: str | None) -> Call[Predictions]:
    path = f"/api/v1/predict/{quote(model, safe='')}"
    keys = python_columns(entities, keys=True)
    call = _json("predict", path, {"entities": keys}, at, request_id, Predictions)
    return replace(call, parse=partial(_predictions, keys))


def push(
    columns: Columns, feature_view: str | None, push_source: str | None, to: To, request_id: str | None
) -> Call[Pushed]:
    values = python_columns(columns)
    body: dict[str, Any] = {"columns": {k: [plain(v) for v in vs] for k, vs in values.items()}, "to": to}
    if feature_view is not None:
        body["feature_view"] = feature_view
    if push_source is not None:
        body["push_source"] = push_source

    def over_grpc() -> GrpcCall[Pushed]:
        from serving.client_grpc import push_call

        return push_call(values, feature_view, push_source, to)

    return _json("push", "/api/v1/features/push", body, None, request_id, Pushed, over_grpc)


def catalogue() -> Call[schemas.Catalogue]:
    return Call("catalogue", "/api/v1/features", _reader(schemas.Catalogue), "GET")


def historical(
    entities: Any, feature_service: str | None, features: Sequence[str] | None, as_known: bool, full_feature_names: bool
) -> Call[pa.Table | HistoricalJob]:
    """`entities`: Arrow table, data frame, or columns."""
    params: dict[str, Any] = {"as_known": as_known, "full_feature_names": full_feature_names}
    if feature_service is not None:
        params["feature_service"] = feature_service
    if features is not None:
        params["features"] = list(features)
    return Call(
        "get_historical_features",
        "/api/v1/features/historical",
        _table_or_job,
        content=arrow_stream(entities),
        headers={"Content-Type": ARROW, "Accept": ARROW},
        params=params,
        starts_work=True,
    )


def job(job_id: str) -> Call[HistoricalJob]:
    return Call("get_historical_features", f"/api/v1/jobs/{quote(job_id, safe='')}", _reader(HistoricalJob), "GET")


def job_result(job_id: str) -> Call[pa.Table]:
    path = f"/api/v1/jobs/{quote(job_id, safe='')}/result"
    return Call("get_historical_features", path, _table, "GET", headers={"Accept": ARROW})


def _json(
    what: str,
    path: str,
    body: dict[str, Any],
    at: datetime | None,
    request_id: str | None,
    kind: type[T],
    over_grpc: Callable[[], GrpcCall[T]] | None = None,
) -> Call[T]:
    if at is not None:
        body["at"] = (at if at.tzinfo else at.replace(tzinfo=UTC)).isoformat()
    headers = {"Content-Type": "application/json"}
    if request_id:
        headers["X-Request-Id"] = request_id
    return Call(what, path, _reader(kind), content=dumps(body), headers=headers, over_grpc=over_grpc)


_readers: dict[Any, TypeAdapter[Any]] = {}


def _reader(kind: type[T]) -> Callable[[httpx.Response], T]:
    def read(response: httpx.Response) -> T:
        reader = _readers.get(kind)
        if reader is None:
            reader = _readers[kind] = TypeAdapter(kind)
        try:
            found: T = reader.validate_json(response.content)
        except ValidationError as e:
            raise _not_ours(response) from e
        return found

    return read


def _features(keys: Mapping[str, Sequence[object]], response: httpx.Response) -> OnlineFeatures:
    answer = _reader(OnlineFeatures)(response)
    _decode(keys, response, answer.rows, zip(answer.feature_names, answer.feature_types))
    return answer


def _predictions(keys: Mapping[str, Sequence[object]], response: httpx.Response) -> Predictions:
    answer = _reader(Predictions)(response)
    _decode(keys, response, answer.predictions, answer.feature_types.items())
    return answer


def _decode(
    keys: Mapping[str, Sequence[object]],
    response: httpx.Response,
    rows: Sequence[FeatureRow | Prediction],
    types: Iterable[tuple[str, str]],
) -> None:
    """As gRPC gives them: values of their declared types, and keys of bytes as they were given."""
    try:
        decode([row.values for row in rows], types)
    except (TypeError, ValueError, ArithmeticError) as e:
        raise _not_ours(response) from e
    for name, given in keys.items():
        for row, value in zip(rows, given):
            if isinstance(value, bytes):
                row.entity[name] = value


def _table_or_job(response: httpx.Response) -> pa.Table | HistoricalJob:
    return _reader(HistoricalJob)(response) if response.status_code == 202 else _table(response)


def _table(response: httpx.Response) -> pa.Table:
    import pyarrow as pa

    try:
        with pa.ipc.open_stream(response.content) as reader:
            return reader.read_all()
    except pa.ArrowInvalid as e:
        raise _not_ours(response) from e


def _not_ours(response: httpx.Response) -> PredictFlowError:
    return PredictFlowError(
        "the answer is not PredictFlow's",
        value=response.content[:200].decode(errors="replace"),
        next_step="check the base URL, and that client and server have the same version",
    )


def refusal(response: httpx.Response) -> Failure:
    """The error that a response with a status of 400 or more says."""
    status = response.status_code
    try:
        fault = schemas.ErrorResponse.model_validate_json(response.content).error
    except ValidationError:
        said = response.content[:200].decode(errors="replace")
        fault = schemas.ErrorDetail(code="failure", message=f"HTTP {status}: {said}", valid=None, next=None)
    kinds: dict[int, type[PredictFlowError]] = {404: NotFoundError, 429: UnavailableError, 503: UnavailableError}
    usage = UsageError if 400 <= status < 500 else PredictFlowError
    error = kinds.get(status, usage)(fault.message, valid=fault.valid, next_step=fault.next)
    error.code = fault.code
    text = response.headers.get("Retry-After", "")
    return Failure(error, float(text) if text.isdigit() else 0.0)


def no_answer(url: str, error: Exception) -> Failure:
    """The error of a server that cannot be reached or does not answer."""
    return Failure(
        UnavailableError(
            f"the server does not answer ({type(error).__name__})",
            value=url,
            next_step="predictflow serve, or check the base URL",
        )
    )


def maybe_started(url: str, error: Exception) -> Failure:
    """The error of a call that starts work, was sent, and had no answer: not to be sent again unseen."""
    return Failure(
        UnavailableError(
            f"no answer came ({type(error).__name__}), and the server may still be working on the request",
            value=url,
            next_step="ask again when it has had time to finish, or pass a longer timeout= to the client",
        ),
        final=True,
    )
