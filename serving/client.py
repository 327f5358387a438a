"""`FeatureClient` and `AsyncFeatureClient`: features and predictions over REST or gRPC, with timeouts, retries, typed results.

Importing it loads neither Feast nor pandas; gRPC loads Feast's messages when the first gRPC client is made.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from feature_store.errors import PredictFlowError, UnavailableError
from serving import client_calls as calls
from serving import schemas
from serving.client_calls import Call, Columns, Failure, To
from serving.client_http import DEFAULT_URL, transport
from serving.client_types import FeatureRow, HistoricalJob, OnlineFeatures, Prediction, Predictions, Pushed

if TYPE_CHECKING:
    import pyarrow as pa

    from serving.client_log import FeatureLog

__all__ = [
    "AsyncFeatureClient",
    "FeatureClient",
    "FeatureRow",
    "HistoricalJob",
    "OnlineFeatures",
    "Prediction",
    "Predictions",
    "Pushed",
]

T = TypeVar("T")
POLL_SECONDS = (0.2, 2.0)
"""First and longest pause between looks at a historical job."""


class FeatureClient:
    """A client of one PredictFlow server; safe to share between threads.

    `base_url`: `http://` or `https://` for REST, `grpc://host:port` or `grpcs://` for gRPC, which carries online features
    and pushes only. `timeout` in seconds, for connecting and for each wait on an answer. Every call is safe to repeat, so an
    overloaded or unavailable server and a broken connection are tried again up to `retries` times, after a random pause
    that grows and honours Retry-After; historical features only while there is no connection, as each request may start a job. `ca_file`: certificates (PEM) to trust instead of the system's.

    Raises UsageError and NotFoundError (with the valid values) for what the server refuses, UnavailableError when it
    does not answer or a server behind it does not, PredictFlowError for anything else.
    """

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        feature_log: FeatureLog | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self._transport = transport(base_url, timeout, api_key, ca_file, asynchronous=False)
        self._retries = retries
        self._log = feature_log
        self._sleep = sleep

    def __enter__(self) -> FeatureClient:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes the connections; the feature log is its owner's to close. Safe to call twice."""
        self._transport.close()

    def get_online_features(
        self,
        entities: Columns,
        *,
        feature_service: str | None = None,
        features: Sequence[str] | None = None,
        at: datetime | None = None,
        full_feature_names: bool = False,
        request_id: str | None = None,
    ) -> OnlineFeatures:
        """Values of a feature service, or of references `view:feature`, for entities `{join key: [values]}`.

        `at` (naive: UTC) reads as of a later time than the clock's; only over REST, where the server runs on the replay clock.
        """
        call = calls.online(entities, feature_service, features, at, full_feature_names, request_id)
        return self._logged(self._run(call), request_id)

    def predict(
        self, model: str, entities: Columns, *, at: datetime | None = None, request_id: str | None = None
    ) -> Predictions:
        """Predictions of the champion version of `model`; `at` as in `get_online_features`."""
        return self._logged(self._run(calls.predict(model, entities, at, request_id)), request_id)

    def push(
        self,
        columns: Columns,
        *,
        feature_view: str | None = None,
        push_source: str | None = None,
        to: To = "online_and_offline",
        request_id: str | None = None,
    ) -> Pushed:
        """Writes rows (join keys, features, `event_timestamp`, `created`?) to a view or to all views of a push source."""
        return self._run(calls.push(columns, feature_view, push_source, to, request_id))

    def get_historical_features(
        self,
        entities: Any,
        *,
        feature_service: str | None = None,
        features: Sequence[str] | None = None,
        as_known: bool = True,
        full_feature_names: bool = False,
        wait_seconds: float = 3600.0,
    ) -> pa.Table:
        """The rows of `entities` (Arrow table, data frame or columns, with `event_timestamp`) with their features.

        A large request becomes a job on the server; this waits for it, up to `wait_seconds` (UnavailableError beyond).
        """
        found = self._run(calls.historical(entities, feature_service, features, as_known, full_feature_names))
        if not isinstance(found, HistoricalJob):
            return found
        for pause in _pauses(wait_seconds, found):
            self._sleep(pause)
            if _done(self._run(calls.job(found.id))):
                break
        return self._run(calls.job_result(found.id))

    def catalogue(self) -> schemas.Catalogue:
        """Feature views and services, with descriptions, units and owners."""
        return self._run(calls.catalogue())

    def _run(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            outcome = self._transport.send(call)
            if not isinstance(outcome, Failure):
                return outcome
            self._sleep(calls.pause(outcome, attempt, self._retries))
            attempt += 1

    def _logged(self, answer: T, request_id: str | None) -> T:
        if self._log is not None:
            self._log.write(answer, request_id)
        return answer


class AsyncFeatureClient:
    """As `FeatureClient`, for one event loop: the same arguments and methods, awaited; `async with` closes it."""

    def __init__(
        self,
        base_url: str = DEFAULT_URL,
        *,
        timeout: float = 5.0,
        retries: int = 3,
        api_key: str | None = None,
        ca_file: str | Path | None = None,
        feature_log: FeatureLog | None = None,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._transport = transport(base_url, timeout, api_key, ca_file, asynchronous=True)
        self._retries = retries
        self._log = feature_log
        self._sleep = sleep

    async def __aenter__(self) -> AsyncFeatureClient:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def close(self) -> None:
        """As `FeatureClient.close`."""
        await self._transport.close()

    async def get_online_features(
        self,
        entities: Columns,
        *,
        feature_service: str | None = None,
        features: Sequence[str] | None = None,
        at: datetime | None = None,
        full_feature_names: bool = False,
        request_id: str | None = None,
    ) -> OnlineFeatures:
        """As `FeatureClient.get_online_features`."""
        call = calls.online(entities, feature_service, features, at, full_feature_names, request_id)
        return self._logged(await self._run(call), request_id)

    async def predict(
        self, model: str, entities: Columns, *, at: datetime | None = None, request_id: str | None = None
    ) -> Predictions:
        """As `FeatureClient.predict`."""
        return self._logged(await self._run(calls.predict(model, entities, at, request_id)), request_id)

    async def push(
        self,
        columns: Columns,
        *,
        feature_view: str | None = None,
        push_source: str | None = None,
        to: To = "online_and_offline",
        request_id: str | None = None,
    ) -> Pushed:
        """As `FeatureClient.push`."""
        return await self._run(calls.push(columns, feature_view, push_source, to, request_id))

    async def get_historical_features(
        self,
        entities: Any,
        *,
        feature_service: str | None = None,
        features: Sequence[str] | None = None,
        as_known: bool = True,
        full_feature_names: bool = False,
        wait_seconds: float = 3600.0,
    ) -> pa.Table:
        """As `FeatureClient.get_historical_features`."""
        found = await self._run(calls.historical(entities, feature_service, features, as_known, full_feature_names))
        if not isinstance(found, HistoricalJob):
            return found
        for pause in _pauses(wait_seconds, found):
            await self._sleep(pause)
            if _done(await self._run(calls.job(found.id))):
                break
        return await self._run(calls.job_result(found.id))

    async def catalogue(self) -> schemas.Catalogue:
        """As `FeatureClient.catalogue`."""
        return await self._run(calls.catalogue())

    async def _run(self, call: Call[T]) -> T:
        attempt = 0
        while True:
            outcome = await self._transport.asend(call)
            if not isinstance(outcome, Failure):
                return outcome
            await self._sleep(calls.pause(outcome, attempt, self._retries))
            attempt += 1

    def _logged(self, answer: T, request_id: str | None) -> T:
        if self._log is not None:
            self._log.write(answer, request_id)
        return answer


def _pauses(seconds: float, job: HistoricalJob) -> Any:
    pause, most = POLL_SECONDS
    spent = 0.0
    while spent < seconds:
        yield pause
        spent += pause
        pause = min(most, pause * 1.5)
    raise UnavailableError(f"the job is not done after {seconds:g} s", value=job.id, next_step="wait longer")


def _done(job: HistoricalJob) -> bool:
    if job.status == "failed":
        fault = job.error or {}
        error = PredictFlowError(f"the job failed: {fault.get('message', 'no reason given')}", value=job.id)
        error.code = str(fault.get("code", "failure"))
        raise error
    return job.status == "done"
