"""No form of address shows its password, and every form keeps what tells servers apart."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from feature_store.errors import PredictFlowError
from feature_store.masking import masked
from predictflow.local.external import check_postgres, check_redis
from training.tracking import check_reachable


@pytest.mark.parametrize(
    ("address", "shown"),
    [
        ("postgresql+psycopg2://me:hunter2@db:5432/x", "postgresql+psycopg2://me:***@db:5432/x"),
        ("postgresql+psycopg2://me:hun@ter2@db:5432/x", "postgresql+psycopg2://me:***@db:5432/x"),
        ("postgresql://me:hun/ter2@db/x?sslmode=require", "postgresql://me:***@db/x?sslmode=require"),
        ("postgresql://me:hun?ter2#@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:hun:ter2@db/x", "postgresql://me:***@db/x"),
        ("postgresql://me:hunter%402@[::1]:5432/x", "postgresql://me:***@[::1]:5432/x"),
        ("postgresql://me:a@b@h1:1,h2:2/x", "postgresql://me:***@h1:1,h2:2/x"),
        ("postgresql://db/x?user=me&password=hunter2", "postgresql://db/x?user=me&password=***"),
        ("postgresql://db/x?password=hun,t@er2&sslmode=no", "postgresql://db/x?password=***&sslmode=no"),
        ("postgresql://me@db/x?sslpassword=hunter2", "postgresql://me@db/x?sslpassword=***"),
        ("redis://:hunter2@cache:6379/0", "redis://:***@cache:6379/0"),
        ("rediss://cache:6379/0?PASSWORD=hunter2", "rediss://cache:6379/0?PASSWORD=***"),
        ("https://me:hunter2@mlflow.example/path", "https://me:***@mlflow.example/path"),
        ("me:hun@ter2@db", "me:***@db"),
        ("me:hunter2@db:5432/x", "me:***@db:5432/x"),
        ("cache:6379,db=0,password=hunter2", "cache:6379,db=0,password=***"),
        ("cache:6379,password=hun@ter=2,ssl=true", "cache:6379,password=***,ssl=true"),
        ("cache:6379,username=me,sentinel_password=hunter2", "cache:6379,username=me,sentinel_password=***"),
        ("host=db user=me password='hun ter2'", "host=db user=me password=***"),
    ],
)
def test_the_password_goes_and_the_rest_stays(address: str, shown: str) -> None:
    assert masked(address) == shown


@pytest.mark.parametrize(
    "address",
    [
        "postgresql+psycopg2://predictflow@127.0.0.1:5432/predictflow",
        "redis://127.0.0.1:6379/0",
        "cache:6379,db=0",
        "broker-1:9092,broker-2:9092",
        "sqlite:////tmp/mlflow.db",
        "http://127.0.0.1:5000",
        "",
    ],
)
def test_an_address_without_a_password_is_shown_whole(address: str) -> None:
    assert masked(address) == address


@pytest.mark.parametrize(
    ("check", "url"),
    [
        (check_postgres, "postgresql+psycopg2://me:a@hunter2@127.0.0.1:1/d"),
        (check_postgres, "postgresql+psycopg2://me:hunter2@127.0.0.1:port/d"),
        (check_postgres, "postgresql+psycopg2://me:hunter2@127.0.0.1:1/d"),
        (check_postgres, "me:a@hunter2@127.0.0.1:1/d"),
        (check_redis, "redis://me:a@hunter2@127.0.0.1:1/0"),
        (check_redis, "127.0.0.1:1,password=hunter2"),
        (check_redis, "redis://127.0.0.1:1/0?password=hunter2"),
        (check_reachable, "postgresql+psycopg2://me:a@hunter2@127.0.0.1:1/d"),
        (check_reachable, "postgresql+psycopg2://me:hunter2@127.0.0.1:1/d"),
        (check_reachable, "http://me:hunter2@127.0.0.1:1"),
    ],
)
def test_a_server_that_does_not_answer_is_named_without_its_password(check: Callable[[str], None], url: str) -> None:
    with pytest.raises(PredictFlowError) as e:
        check(url)
    assert "hunter2" not in e.value.message
