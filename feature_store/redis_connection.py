"""How to reach Redis: clients from REDIS_URL (a URL, or Feast's own connection string), and one clear error when it is down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from feature_store.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

_TIMEOUTS: dict[str, Any] = {"socket_connect_timeout": 5.0, "socket_timeout": 10.0}
"""Seconds; without them a server that vanished blocks a request for ever. A connection string may set its own."""
_RETRIES = 3


def connect(connection_string: str) -> Redis:
    """A client of one Redis server; it connects on first use. UsageError for a string that is no address.

    A lost connection is retried for about half a second: every command of ours may be repeated.
    """
    from redis import Redis
    from redis.retry import Retry

    with _known_options():
        return Redis(**connection_options(connection_string), retry=Retry(_backoff(), _RETRIES))


def connect_async(connection_string: str) -> AsyncRedis:
    """As `connect`, for the event loop that first uses it."""
    from redis.asyncio import Redis
    from redis.asyncio.retry import Retry

    with _known_options():
        return Redis(**connection_options(connection_string), retry=Retry(_backoff(), _RETRIES))


def _backoff() -> Any:
    from redis.backoff import ExponentialWithJitterBackoff

    return ExponentialWithJitterBackoff(base=0.05, cap=0.3)


@contextmanager
def _known_options() -> Iterator[None]:
    try:
        yield
    except TypeError as e:  # the message names the option, never its value
        raise UsageError(f"REDIS_URL has an option that the Redis client does not know ({e})") from e


def connection_options(connection_string: str) -> dict[str, Any]:
    """Client options of `redis[s]://[user:password@]host:port/db?...` or Feast's `host:port,db=0,password=...`."""
    text = connection_string.strip()
    if "://" in text:
        options = _of_url(text)
    else:
        options = _of_feast(text)
    if options.get("decode_responses"):
        raise UsageError("REDIS_URL: decode_responses cannot be used, values are bytes")
    return {**_TIMEOUTS, **options}


def _of_url(text: str) -> dict[str, Any]:
    from redis.connection import parse_url

    scheme = text.split("://", 1)[0]
    if scheme not in ("redis", "rediss"):
        raise UsageError("REDIS_URL: unknown scheme", value=scheme, valid=["redis", "rediss"])
    try:
        options = dict(parse_url(text))
    except ValueError as e:
        raise UsageError(f"REDIS_URL cannot be read ({e})", next_step="use redis://host:port/db") from e
    options.pop("connection_class", None)
    if scheme == "rediss":
        options["ssl"] = True
    return {"host": "localhost", "port": 6379, **options}


def _of_feast(text: str) -> dict[str, Any]:
    from feast.infra.online_stores.redis import RedisOnlineStore

    nodes, options = RedisOnlineStore._parse_connection_string(text)
    for name in options.keys() & {"username", "password"}:
        options[name] = str(options[name])  # Feast reads a password of digits as a number
    try:
        (node,) = nodes
        return {**options, "host": node["host"], "port": int(node.get("port", 6379))}
    except ValueError as e:
        raise UsageError(
            "REDIS_URL is no address of one Redis server", next_step="use redis://host:port/db or host:port,db=0"
        ) from e


def address_of(client: Any) -> str:
    """`host:port` of a client, never its password."""
    pool: Any = getattr(client, "connection_pool", None)
    options = getattr(pool, "connection_kwargs", None) or {}
    if "path" in options:
        return str(options["path"])
    if "host" in options:
        return f"{options['host']}:{options.get('port', 6379)}"
    if hasattr(pool, "service_name"):
        return f"sentinel master {pool.service_name}"
    nodes = getattr(getattr(client, "nodes_manager", None), "startup_nodes", None) or ["cluster"]
    return ",".join(str(n) for n in nodes)


@contextmanager
def answering(client: Any) -> Iterator[None]:
    """Turns a Redis that does not answer, or refuses to write, into UnavailableError naming REDIS_URL and its address."""
    from redis import exceptions

    try:
        yield
    except (
        exceptions.ConnectionError,
        exceptions.TimeoutError,
        exceptions.OutOfMemoryError,
        exceptions.ReadOnlyError,
        exceptions.ClusterDownError,
    ) as e:
        raise UnavailableError(
            f"Redis at {address_of(client)} (REDIS_URL) does not answer ({str(e).rstrip('.')})",
            next_step="start it, or `predictflow up`, and check REDIS_URL",
        ) from e
