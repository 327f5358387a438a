"""Which Redis client a server reads with."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from feast.infra.online_stores.redis import RedisType

from feature_store.redis_stream import RedisStream
from predictflow.serve_wiring import REDIS_SECONDS, _redis


def made(url: str, **online_store: Any) -> Any:
    return _redis(url, SimpleNamespace(config=SimpleNamespace(online_store=SimpleNamespace(**online_store))))  # type: ignore[arg-type]  # all that is asked of a store


def test_the_kind_of_redis_is_that_of_the_online_store() -> None:
    from redis.asyncio import Redis
    from redis.asyncio.cluster import RedisCluster

    assert isinstance(made("redis://h:1/0", redis_type=RedisType.redis, sentinel_master="m"), RedisStream)
    assert isinstance(made("a:1,b:2", redis_type=RedisType.redis_cluster, sentinel_master="m"), RedisCluster)
    sentinel = made("a:1,b:2", redis_type=RedisType.redis_sentinel, sentinel_master="theirs")
    assert isinstance(sentinel, Redis)
    assert sentinel.connection_pool.service_name == "theirs"
    assert sentinel.connection_pool.connection_kwargs["socket_timeout"] == REDIS_SECONDS


@pytest.mark.parametrize(("url", "seconds"), [("redis://h:1/0", REDIS_SECONDS), ("redis://h:1/0?socket_timeout=7", 7)])
def test_a_server_gives_up_soon_unless_the_address_says_otherwise(url: str, seconds: float) -> None:
    assert made(url, redis_type=RedisType.redis).address.timeout == seconds
