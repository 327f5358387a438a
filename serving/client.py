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

from feature_store.errors import PredictFlowError, UnavailableError, UsageError
from serving import client_calls as calls
from serving import schemas
from serving.client_calls import Call, Columns, Failure, To
from serving.client_types import FeatureRow, HistoricalJob, OnlineFeatures, Prediction, Predictions, Pushed

if TYPE_CHECKING:
    import httpx
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
DEFAULT_URL = "http://127.0.0.1:9094"
_GRPC_SCHEMES = {"grpc": False, "grpcs": True}
POLL_SECONDS = (0.2, 2.0)
"""First and longest pause between looks at a historical job."""


class FeatureClient:
    """A client of one PredictFlow server; safe to share between threads.

    `base_url`: `http://` or `https://` for REST, `grpc://host:port` or `grpcs://` for gRPC, which carries online features
    and pushes only. `timeout` in seconds, for connecting and for each wait on an answer. Every call is safe to repeat, so an
    overloaded or unavailable server and a broken connection are tried again up to `retries` times, after a random pause
    that grows and honours Retry-After; historical features that are not answered in time are not, as each try may start a job. `ca_file`: certificates (PEM) to trust instead of the system's.

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
        self._transport = _transport(base_url, timeout, api_key, ca_file, asynchronous=False)
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
        self._transport = _transport(base_url, timeout, api_key, ca_file, asynchronous=True)
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


class _Http:
    """REST over httpx, blocking or for the event loop."""

    def __init__(
        self, base_url: str, timeout: float, api_key: str | None, ca_file: str | Path | None, asynchronous: bool
    ) -> None:
        import ssl

        import httpx

        verify: Any = ssl.create_default_context(cafile=str(ca_file)) if ca_file else True
        self._base = base_url.rstrip("/")
        headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        kind: Any = httpx.AsyncClient if asynchronous else httpx.Client
        self._client: Any = kind(timeout=timeout, verify=verify, headers=headers)

    def send(self, call: Call[T]) -> T | Failure:
        import httpx

        try:
            response = self._client.request(call.method, self._base + call.path, **_request(call))
        except httpx.HTTPError as e:
            return self._failed(e, call)
        except httpx.InvalidURL as e:
            raise UsageError("not a URL", value=self._base, next_step=f"for example {DEFAULT_URL}") from e
        return call.parse(response) if response.status_code < 400 else calls.refusal(response)

    async def asend(self, call: Call[T]) -> T | Failure:
        import httpx

        try:
            response = await self._client.request(call.method, self._base + call.path, **_request(call))
        except httpx.HTTPError as e:
            return self._failed(e, call)
        except httpx.InvalidURL as e:
            raise UsageError("not a URL", value=self._base, next_step=f"for example {DEFAULT_URL}") from e
        return call.parse(response) if response.status_code < 400 else calls.refusal(response)

    def close(self) -> Any:
        """Closes it; to be awaited on the event loop."""
        return self._client.aclose() if hasattr(self._client, "aclose") else self._client.close()

    def _failed(self, error: httpx.HTTPError, call: Call[Any]) -> Failure:
        import httpx

        if isinstance(error, httpx.UnsupportedProtocol):
            raise UsageError(f"the request cannot be sent ({error})", value=self._base) from error
        if call.starts_work and isinstance(error, httpx.ReadTimeout):
            return calls.too_late(self._base)
        return calls.no_answer(self._base, error)


def _request(call: Call[Any]) -> dict[str, Any]:
    return {"content": call.content, "headers": dict(call.headers), "params": dict(call.params) or None}


def _transport(
    base_url: str, timeout: float, api_key: str | None, ca_file: str | Path | None, asynchronous: bool
) -> Any:
    scheme, separator, target = base_url.partition("://")
    if not separator or scheme not in ("http", "https", *_GRPC_SCHEMES):
        schemes = ("http", "https", *_GRPC_SCHEMES)
        raise UsageError("not a server's URL", value=base_url, valid=[f"{s}://host:port" for s in schemes])
    if scheme in _GRPC_SCHEMES:
        from serving.client_grpc import Channel

        return Channel(target.rstrip("/"), timeout, api_key, ca_file, _GRPC_SCHEMES[scheme], asynchronous)
    return _Http(base_url, timeout, api_key, ca_file, asynchronous)


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
