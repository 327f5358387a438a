"""How a client's calls travel: REST over httpx, or the channel of `client_grpc`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from feature_store.errors import UsageError
from serving import client_calls as calls
from serving.client_calls import Call, Failure

if TYPE_CHECKING:
    import httpx

T = TypeVar("T")
DEFAULT_URL = "http://127.0.0.1:9094"
_GRPC_SCHEMES = {"grpc": False, "grpcs": True}


class Http:
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
        before_it = (httpx.ConnectError, httpx.ConnectTimeout, httpx.PoolTimeout)
        if call.starts_work and not isinstance(error, before_it):
            return calls.maybe_started(self._base, error)
        return calls.no_answer(self._base, error)


def _request(call: Call[Any]) -> dict[str, Any]:
    return {"content": call.content, "headers": dict(call.headers), "params": dict(call.params) or None}


def transport(
    base_url: str, timeout: float, api_key: str | None, ca_file: str | Path | None, asynchronous: bool
) -> Any:
    """What carries the calls of a client; UsageError for a URL that is no server's."""
    scheme, separator, target = base_url.partition("://")
    if not separator or scheme not in ("http", "https", *_GRPC_SCHEMES):
        schemes = ("http", "https", *_GRPC_SCHEMES)
        raise UsageError("not a server's URL", value=base_url, valid=[f"{s}://host:port" for s in schemes])
    if scheme in _GRPC_SCHEMES:
        from serving.client_grpc import Channel

        return Channel(target.rstrip("/"), timeout, api_key, ca_file, _GRPC_SCHEMES[scheme], asynchronous)
    return Http(base_url, timeout, api_key, ca_file, asynchronous)
