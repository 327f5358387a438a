"""How to reach Redis: clients from REDIS_URL (a URL, or Feast's own connection string), and one clear error when it is down."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from feature_store.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from redis import Redis
    from redis.asyncio import Redis as AsyncRedis

_TIMEOUTS: dict[str, Any] = {"socket_connect_timeout": 5.0, "socket_timeout": 10.0}
"""Seconds; without them a server that vanished blocks a request for ever. A connection string may set its own."""
_RETRIES = 3


def connect(connection_string: str, kind: str = "redis", sentinel_master: str = "mymaster") -> Redis:
    """A client of one Redis server, of a Cluster (`host:port,...`: any of its nodes) or of a Sentinel's master.

    UsageError for a string that is no address. A server, and a Sentinel's master, are connected to on first use; a Cluster
    at once, since its slots must be known: UnavailableError. A lost connection is retried for about half a second: every
    command of ours may be repeated.
    """
    from redis import Redis
    from redis.cluster import ClusterNode, RedisCluster
    from redis.retry import Retry
    from redis.sentinel import Sentinel

    retry = Retry(_backoff(), _RETRIES)
    with _known_options():
        if kind == "redis":
            return Redis(**connection_options(connection_string), retry=retry)
        nodes, options = _nodes_and_options(connection_string)
        if kind == "redis_sentinel":
            sentinels = Sentinel(nodes, sentinel_kwargs=_of_sentinels(options), **options, retry=retry)
            return sentinels.master_for(sentinel_master)
        _no_database(options)
        with _cluster_answering(nodes):
            # The client also serves what this module's callers ask of a single server.
            return cast("Redis", RedisCluster(startup_nodes=[ClusterNode(*n) for n in nodes], **options, retry=retry))


def connect_async(
    connection_string: str,
    kind: str = "redis",
    sentinel_master: str = "mymaster",
    *,
    timeout: float | None = None,
    retries: int = _RETRIES,
) -> AsyncRedis:
    """As `connect`, for the event loop that first uses it; a Cluster too is connected to on first use.

    `timeout`: seconds to connect and to answer, where the string says nothing; `retries` of a lost connection.
    """
    from redis.asyncio import Redis
    from redis.asyncio.cluster import ClusterNode, RedisCluster
    from redis.asyncio.retry import Retry
    from redis.asyncio.sentinel import Sentinel

    retry = Retry(_backoff(), retries)
    with _known_options():
        if kind == "redis":
            return Redis(**connection_options(connection_string, timeout), retry=retry)
        nodes, options = _nodes_and_options(connection_string, timeout)
        if kind == "redis_sentinel":
            sentinels = Sentinel(nodes, sentinel_kwargs=_of_sentinels(options), **options, retry=retry)
            return sentinels.master_for(sentinel_master)
        _no_database(options)
        return cast("AsyncRedis", RedisCluster(startup_nodes=[ClusterNode(*n) for n in nodes], **options, retry=retry))


def _nodes_and_options(
    connection_string: str, timeout: float | None = None
) -> tuple[list[tuple[str, int]], dict[str, Any]]:
    """Addresses, and options without one: of `host:port,host:port,option=value`, or a URL of one node."""
    text = connection_string.strip()
    if "://" in text:
        options = connection_options(text, timeout)
        return [(str(options.pop("host")), int(options.pop("port")))], options
    addresses = [part for part in text.split(",") if "=" not in part]
    if not addresses:
        raise UsageError("REDIS_URL names no server", next_step="use host:port,host:port,...")
    settings = [part for part in text.split(",") if "=" in part]
    nodes = []
    for address in addresses:
        options = connection_options(",".join([address, *settings]), timeout)
        nodes.append((str(options.pop("host")), int(options.pop("port"))))
    return nodes, options


def _of_sentinels(options: dict[str, Any]) -> dict[str, Any]:
    """What holds for the Sentinels too: timeouts and TLS. Their own user and password are `sentinel_username` and
    `sentinel_password` of the connection string; the master's are not theirs."""
    own = {k: v for k, v in options.items() if k.startswith(("socket_", "ssl"))}
    for name in ("username", "password"):
        value = options.pop(f"sentinel_{name}", None)
        if value is not None:
            own[name] = str(value)
    return own


def _no_database(options: dict[str, Any]) -> None:
    if options.pop("db", 0):
        raise UsageError("REDIS_URL: a Redis Cluster has no databases", next_step="remove db")


@contextmanager
def _cluster_answering(nodes: list[tuple[str, int]]) -> Iterator[None]:
    from redis.exceptions import RedisClusterException, RedisError

    try:
        yield
    except (RedisError, RedisClusterException) as e:
        raise UnavailableError(
            f"no node of the Redis Cluster at {', '.join(f'{h}:{p}' for h, p in nodes)} (REDIS_URL) answers "
            f"({str(e).rstrip('.')})",
            next_step="start it, and check REDIS_URL and redis_type",
        ) from e


def _backoff() -> Any:
    from redis.backoff import ExponentialWithJitterBackoff

    return ExponentialWithJitterBackoff(base=0.05, cap=0.3)


@contextmanager
def _known_options() -> Iterator[None]:
    try:
        yield
    except TypeError as e:  # the message names the option, never its value
        raise UsageError(f"REDIS_URL has an option that the Redis client does not know ({e})") from e


def connection_options(connection_string: str, timeout: float | None = None) -> dict[str, Any]:
    """Client options of `redis[s]://[user:password@]host:port/db?...` or Feast's `host:port,db=0,password=...`.

    `timeout`: seconds to connect and to answer, where the string says nothing; None: ours.
    """
    text = connection_string.strip()
    if "://" in text:
        options = _of_url(text)
    else:
        options = _of_feast(text)
    if options.get("decode_responses"):
        raise UsageError("REDIS_URL: decode_responses cannot be used, values are bytes")
    defaults = _TIMEOUTS if timeout is None else dict.fromkeys(_TIMEOUTS, timeout)
    return {**defaults, **options}


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
    for name in options.keys() & {"username", "password", "sentinel_username", "sentinel_password"}:
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
    """Turns a Redis that does not answer, refuses to write, or forbids its user a command, into UnavailableError naming
    REDIS_URL and its address."""
    from redis import exceptions

    try:
        yield
    except (
        exceptions.ConnectionError,
        exceptions.TimeoutError,
        exceptions.OutOfMemoryError,
        exceptions.ReadOnlyError,
        exceptions.ClusterDownError,
        exceptions.RedisClusterException,
    ) as e:
        raise UnavailableError(
            f"Redis at {address_of(client)} (REDIS_URL) does not answer ({str(e).rstrip('.')})",
            next_step="start it, or `predictflow up`, and check REDIS_URL",
        ) from e
    except exceptions.ResponseError as e:
        raise_forbidden(client, e)
        raise


def raise_forbidden(client: Any, error: Exception) -> None:
    """UnavailableError where an error reply says that the user may not run a command; returns for any other."""
    from redis.exceptions import NoPermissionError

    # Within a script it is an error of the script: of Redis 7, and of 6.
    text = str(error)
    if isinstance(error, NoPermissionError) or "ACL failure in script" in text or "user executing the script" in text:
        raise UnavailableError(
            f"the user of REDIS_URL at {address_of(client)} may not do this ({text[:160].rstrip('.')})",
            next_step="give it the commands of docs/reference/online-store.md (ACL SETUSER)",
        ) from error
