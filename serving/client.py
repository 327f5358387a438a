"""`FeatureClient`: features and predictions over REST, with timeouts, retries, typed results and data frames."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote

import requests
from pydantic import BaseModel, ValidationError

from feature_store.errors import NotFoundError, PredictFlowError, UnavailableError, UsageError
from serving import schemas

if TYPE_CHECKING:
    import pandas as pd

BACKOFF_SECONDS = 0.1
MAX_BACKOFF_SECONDS = 2.0

Answer = TypeVar("Answer", bound=BaseModel)


class OnlineFeatures(schemas.OnlineResponse):
    """Feature values, one row per entity in the order asked for; `t` is the UTC time as of which they hold."""

    def to_df(self) -> pd.DataFrame:
        """One row per entity: join keys, then features (missing: None). Statuses are in `rows`."""
        import pandas as pd

        return pd.DataFrame([{**row.entity, **row.values} for row in self.rows], dtype=object).infer_objects()


class Predictions(schemas.PredictResponse):
    """Probabilities, one per entity in the order asked for, with the features they were made from."""

    def to_df(self) -> pd.DataFrame:
        """One row per entity: join keys, features (missing: None), `probability`."""
        import pandas as pd

        rows = [{**p.entity, **p.values, "probability": p.probability} for p in self.predictions]
        return pd.DataFrame(rows, dtype=object).infer_objects()


class FeatureClient:
    """A client of one PredictFlow server. Not for several threads at once: give each its own.

    `timeout` is in seconds, for connecting and for each wait on the answer. Reads are safe to repeat, so a 503 and a
    broken connection are tried again up to `retries` times, after a random pause that grows and honours Retry-After.

    Raises UsageError and NotFoundError (with the valid values) for what the server refuses, UnavailableError when it
    does not answer or a server behind it does not, PredictFlowError for anything else.
    """

    def __init__(
        self,
        base_url: str = "http://127.0.0.1:9094",
        *,
        timeout: float = 5.0,
        retries: int = 3,
        api_key: str | None = None,
        session: requests.Session | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._base = base_url.rstrip("/")
        self._timeout = timeout
        self._retries = retries
        self._session = session or requests.Session()
        self._sleep = sleep
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def __enter__(self) -> FeatureClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections. Safe to call twice."""
        self._session.close()

    def get_online_features(
        self,
        entities: Mapping[str, Sequence[object]],
        *,
        feature_service: str | None = None,
        features: Sequence[str] | None = None,
        at: datetime | None = None,
        full_feature_names: bool = False,
        request_id: str | None = None,
    ) -> OnlineFeatures:
        """Values of a feature service, or of references `view:feature`, for entities `{join key: [values]}`.

        `at` (naive: UTC) reads as of a later time than the clock's; only where the server runs on the replay clock.
        """
        body: dict[str, Any] = {"entities": _lists(entities)}
        if feature_service is not None:
            body["feature_service"] = feature_service
        if features is not None:
            body["features"] = list(features)
        if full_feature_names:
            body["full_feature_names"] = True
        return self._post("/api/v1/features/online", body, at, request_id, OnlineFeatures)

    def predict(
        self,
        model: str,
        entities: Mapping[str, Sequence[object]],
        *,
        at: datetime | None = None,
        request_id: str | None = None,
    ) -> Predictions:
        """Predictions of the champion version of `model`; `at` as in `get_online_features`."""
        path = f"/api/v1/predict/{quote(model, safe='')}"
        return self._post(path, {"entities": _lists(entities)}, at, request_id, Predictions)

    def catalogue(self) -> schemas.Catalogue:
        """Feature views and services, with descriptions, units and owners."""
        return self._send("GET", "/api/v1/features", None, None, schemas.Catalogue)

    def _post(
        self, path: str, body: dict[str, Any], at: datetime | None, request_id: str | None, kind: type[Answer]
    ) -> Answer:
        if at is not None:
            body["at"] = (at if at.tzinfo else at.replace(tzinfo=UTC)).isoformat()
        return self._send("POST", path, body, request_id, kind)

    def _send(
        self, method: str, path: str, body: dict[str, Any] | None, request_id: str | None, kind: type[Answer]
    ) -> Answer:
        headers = {**self._headers, "X-Request-Id": request_id} if request_id else self._headers
        attempt = 0
        while True:
            wait = 0.0
            try:
                response = self._session.request(
                    method, self._base + path, json=body, headers=headers, timeout=self._timeout
                )
            except requests.RequestException as e:
                if not isinstance(e, requests.ConnectionError | requests.Timeout):
                    raise UsageError(f"the request cannot be sent ({type(e).__name__})", value=self._base) from e
                error: PredictFlowError = UnavailableError(
                    f"the server does not answer ({type(e).__name__})",
                    value=self._base,
                    next_step="predictflow serve, or check the base URL",
                )
            else:
                if response.ok:
                    return _parse(response, kind)
                error = _error(response)
                wait = _retry_after(response)
            if not isinstance(error, UnavailableError) or attempt >= self._retries:
                raise error
            pause = min(MAX_BACKOFF_SECONDS, BACKOFF_SECONDS * 2**attempt)
            self._sleep(min(wait, MAX_BACKOFF_SECONDS) + random.uniform(0, pause))
            attempt += 1


def _lists(entities: Mapping[str, Sequence[object]]) -> dict[str, list[object]]:
    return {key: list(values) for key, values in entities.items()}


def _parse(response: requests.Response, kind: type[Answer]) -> Answer:
    try:
        return kind.model_validate_json(response.content)
    except ValidationError as e:
        raise PredictFlowError(
            "the answer is not PredictFlow's",
            value=response.text[:200],
            next_step="check the base URL, and that client and server have the same version",
        ) from e


def _error(response: requests.Response) -> PredictFlowError:
    try:
        fault = schemas.ErrorResponse.model_validate_json(response.content).error
    except ValidationError:
        fault = schemas.ErrorDetail(
            code="failure", message=f"HTTP {response.status_code}: {response.text[:200]}", valid=None, next=None
        )
    kinds: dict[int, type[PredictFlowError]] = {404: NotFoundError, 429: UnavailableError, 503: UnavailableError}
    usage = UsageError if 400 <= response.status_code < 500 else PredictFlowError
    error = kinds.get(response.status_code, usage)(fault.message, valid=fault.valid, next_step=fault.next)
    error.code = fault.code
    return error


def _retry_after(response: requests.Response) -> float:
    text = response.headers.get("Retry-After", "")
    return float(text) if text.isdigit() else 0.0
