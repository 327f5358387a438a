"""Real Postgres, Redis and Kafka for the tests: private to this pytest process, on free ports, gone when it is gone.

Every test gets a database, a Redis db number and a topic prefix of its own. Nothing starts before a test asks for it.
"""

from __future__ import annotations

import itertools
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import prometheus_client  # noqa: F401 - before Feast, whose import would make all counters of a process shared files
import pytest
from hypothesis import HealthCheck, settings

if TYPE_CHECKING:
    from predictflow.local.watched import Watched

# No absolute times: a pause of the machine, or Hypothesis' first look at Unicode, is no fault of what is tested.
settings.register_profile("project", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("project")

REDIS_DATABASES = 512
_redis_databases = itertools.cycle(range(REDIS_DATABASES))


@pytest.fixture(scope="session")
def _servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Watched, Path]]:
    """What starts the servers, and the directory for their state."""
    from predictflow.local.watched import Watched

    with Watched() as watched:
        yield watched, tmp_path_factory.mktemp("servers")


@pytest.fixture(scope="session")
def postgres_server(_servers: tuple[Watched, Path]) -> str:
    """URL of the session's Postgres (its own database `postgres`); use `postgres_url` in tests."""
    from predictflow.local import postgres
    from predictflow.local.ports import free_port

    watched, home = _servers
    port = free_port()
    postgres.start(watched, home / "postgres", port, home / "postgres.log", settings=postgres.FOR_TESTS)
    return postgres.url(port, "postgres")


@pytest.fixture
def postgres_url(postgres_server: str) -> Iterator[str]:
    """SQLAlchemy URL of an empty database of this test's own."""
    yield from _database(postgres_server, None)


@pytest.fixture(scope="session")
def _mlflow_template(postgres_server: str) -> str:
    """A database that holds MLflow's schema: migrating takes seconds, so it happens once per session."""
    from predictflow.local import mlflow_database, postgres

    postgres.create_database(postgres_server, "mlflow_template")
    mlflow_database.prepare_mlflow(postgres_server.rpartition("/")[0] + "/mlflow_template")
    return "mlflow_template"


@pytest.fixture
def mlflow_url(postgres_server: str, _mlflow_template: str) -> Iterator[str]:
    """SQLAlchemy URL of a database of this test's own with MLflow's schema and no runs."""
    yield from _database(postgres_server, _mlflow_template)


def _database(server: str, template: str | None) -> Iterator[str]:
    from predictflow.local import postgres

    name = f"test_{uuid.uuid4().hex[:12]}"
    postgres.create_database(server, name, template=template)
    yield f"{server.rpartition('/')[0]}/{name}"
    postgres.drop_database(server, name)


@pytest.fixture(scope="session")
def redis_server(_servers: tuple[Watched, Path]) -> str:
    """`127.0.0.1:port` of the session's Redis; use `redis_url` in tests."""
    from predictflow.local import redis
    from predictflow.local.ports import HOST, free_port

    watched, home = _servers
    port = free_port()
    redis.start(watched, home / "redis", port, home / "redis.log", durable=False, databases=REDIS_DATABASES)
    return f"{HOST}:{port}"


@pytest.fixture
def redis_url(redis_server: str) -> str:
    """`redis://127.0.0.1:port/N` of an empty db of this test's own."""
    import redis

    url = f"redis://{redis_server}/{next(_redis_databases)}"
    with redis.Redis.from_url(url) as client:
        client.flushdb()
    return url


@pytest.fixture(scope="session")
def kafka_bootstrap(_servers: tuple[Watched, Path]) -> str:
    """Bootstrap servers of the session's real broker. Where none can run, a skip with the reason; with
    PREDICTFLOW_REQUIRE_REAL_KAFKA=1 a failure."""
    from predictflow.local import kafka
    from predictflow.local.ports import HOST, free_port

    watched, home = _servers
    try:
        broker = kafka.installation(watched, say=print)
    except kafka.NoRealKafka as error:
        if os.environ.get("PREDICTFLOW_REQUIRE_REAL_KAFKA") == "1":
            pytest.fail(f"PREDICTFLOW_REQUIRE_REAL_KAFKA=1, but {error.message}", pytrace=False)
        pytest.skip(error.message)
    port = free_port()
    kafka.start_real(watched, broker, home / "kafka", port, free_port(), home / "kafka.log")
    return f"{HOST}:{port}"


@pytest.fixture
def topic_prefix() -> str:
    """Unique per test; end it with your topic's name: `f"{topic_prefix}customer-events"`."""
    return f"t{uuid.uuid4().hex[:10]}-"
