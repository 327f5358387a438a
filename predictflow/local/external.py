"""Servers that are there already: used when their variable is set, refused with one line when they do not answer."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from feature_store.config_check import require_database_url
from feature_store.errors import UnavailableError, UsageError
from feature_store.masking import masked
from feature_store.postgres import Postgres
from predictflow.local import kafka, postgres

if TYPE_CHECKING:
    from redis import Redis


def check_postgres(url: str) -> None:
    """`UsageError` for a URL of another kind, `UnavailableError` when no connection comes about."""
    import psycopg2

    if not re.match(r"postgres(ql)?(\+psycopg2)?://", url):
        raise UsageError(
            f"POSTGRES_URL is not a Postgres URL: {masked(url)}",
            next_step="set it like postgresql+psycopg2://user:password@host:5432/database",
        )
    require_database_url(url)  # as every command that loads feature_store.yaml does
    Postgres(url).address  # noqa: B018  # refuses a URL whose password libpq would quote
    try:
        postgres.connect(url).close()
    except psycopg2.OperationalError as error:
        raise _silent("POSTGRES_URL", url, str(error)) from error


def check_redis(url: str) -> None:
    """`UsageError` for a URL of another kind, `UnavailableError` when there is no answer to PING."""
    import redis

    try:
        client = _redis_client(url)
    except ValueError as error:
        raise UsageError(
            f"REDIS_URL is not a Redis URL: {masked(url)}",
            next_step="set it like redis://host:6379/0 (or Feast's form host:6379,db=0)",
        ) from error
    try:
        client.ping()
    except redis.RedisError as error:
        raise _silent("REDIS_URL", url, str(error)) from error
    finally:
        client.close()


def check_kafka(bootstrap_servers: str) -> None:
    """`UnavailableError` when no broker there answers a metadata request."""
    if not kafka.serves(bootstrap_servers):
        raise _silent("KAFKA_BOOTSTRAP_SERVERS", bootstrap_servers, "no broker answered within 2 s")


CHECKS: dict[str, Callable[[str], None]] = {"postgres": check_postgres, "redis": check_redis, "kafka": check_kafka}


def answers(name: str, url: str) -> bool:
    """Whether the server of that name answers at its URL."""
    try:
        CHECKS[name](url)
    except UnavailableError:
        return False
    return True


def _redis_client(url: str) -> Redis:
    import redis
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    once: dict[str, Any] = {"socket_connect_timeout": 2, "socket_timeout": 2, "retry": Retry(NoBackoff(), 0)}
    if "://" in url:
        return redis.Redis.from_url(url, **once)
    address, *options = url.split(",")
    host, _, port = address.partition(":")
    given = dict(option.split("=", 1) for option in options)
    return redis.Redis(
        host=host,
        port=int(port or 6379),
        db=int(given.get("db", 0)),
        username=given.get("username"),
        password=given.get("password"),
        ssl=given.get("ssl", "false").lower() == "true",
        **once,
    )


def _silent(variable: str, url: str, reason: str) -> UnavailableError:
    first_line = reason.strip().splitlines()[0] if reason.strip() else "no answer"
    return UnavailableError(
        f"{variable} is set to {masked(url)}, and that server does not answer ({first_line})",
        next_step=f"start that server, or run `unset {variable}` to use a private one",
    )
