"""An unset variable of feature_store.yaml is one clear line, whichever section it stands in."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from feast.repo_config import RepoConfig

from feature_store.config_check import UnsetVariableError, require_expanded, with_defaults
from feature_store.errors import UsageError


def config(**changes: str) -> RepoConfig:
    values: dict[str, Any] = {
        "postgres": "postgresql+psycopg2://u@h/d",
        "redis": "redis://h:1/0",
        "clock": "replay",
        "offline": "/x",
        **changes,
    }
    return RepoConfig(
        project="p",
        provider="local",
        registry={"registry_type": "sql", "path": values["postgres"]},
        online_store={
            "type": "feature_store.online_store.PredictFlowOnlineStore",
            "connection_string": values["redis"],
            "clock": values["clock"],
        },
        offline_store={"type": "feature_store.offline_store.PredictFlowOfflineStore", "path": values["offline"]},
        entity_key_serialization_version=3,
    )


def test_a_value_that_still_holds_a_variable_is_refused() -> None:
    with pytest.raises(UsageError) as e:
        require_expanded({"connection_string": "${REDIS_URL}", "clock": "wall"}, "online_store")
    assert e.value.message.startswith(
        "REDIS_URL is not set (feature_store.yaml, online_store.connection_string); next: "
    )
    assert 'eval "$(predictflow env)"' in e.value.message
    require_expanded({"connection_string": "redis://h:1/0", "limit": 3, "nothing": None}, "online_store")


def test_variables_inside_a_longer_or_nested_value_are_found() -> None:
    with pytest.raises(UnsetVariableError, match=r"A, B are not set \(feature_store.yaml, s.x, s.deep.y\)"):
        require_expanded({"x": "s3://${A}/${B}", "deep": {"y": "${A}"}}, "s")


def test_the_clock_may_stay_unset() -> None:
    values = {"clock": "${PREDICTFLOW_CLOCK}", "n": 1}
    require_expanded(values, "online_store")
    assert with_defaults(values) == {"clock": "wall", "n": 1}
    assert config(clock="${PREDICTFLOW_CLOCK}").online_store.clock == "wall"


@pytest.mark.parametrize(
    ("change", "place"),
    [
        ({"postgres": "${POSTGRES_URL}"}, "POSTGRES_URL is not set (feature_store.yaml, registry.path)"),
        ({"redis": "${REDIS_URL}"}, "REDIS_URL is not set (feature_store.yaml, online_store.connection_string)"),
        (
            {"offline": "${PREDICTFLOW_OFFLINE}"},
            "PREDICTFLOW_OFFLINE is not set (feature_store.yaml, offline_store.path)",
        ),
    ],
)
def test_every_section_is_checked_while_feast_loads_the_file(change: dict[str, str], place: str) -> None:
    with pytest.raises(UnsetVariableError) as e:
        config(**change)
    assert e.value.message.startswith(place)
    assert e.value.exit_code == 2


def test_all_unset_variables_are_named_at_once() -> None:
    with pytest.raises(UnsetVariableError, match="POSTGRES_URL, PREDICTFLOW_OFFLINE, REDIS_URL are not set"):
        config(postgres="${POSTGRES_URL}", redis="${REDIS_URL}", offline="${PREDICTFLOW_OFFLINE}")


@pytest.mark.parametrize(
    ("url", "said"),
    [
        (
            "nonsense-hunter2",
            "POSTGRES_URL is no database URL (feature_store.yaml, registry.path): 'text without a scheme'",
        ),
        ("me:hunter2@host/d", "'text without a scheme'"),
        ("http://me:hunter2@host/d", "'http://...'"),
        ("postgres://me:hunter2@host/d", "'postgres://...'"),
        ("postgresql+psycopg2://me:hunter2@host:port/d", "POSTGRES_URL is no database URL"),
        (
            "postgresql+psycopg2://me:x@hunter2@host/d",
            "POSTGRES_URL has an @ in its user or password; next: write it as %40",
        ),
    ],
)
def test_a_registry_url_that_no_driver_takes_is_one_line_without_the_password(url: str, said: str) -> None:
    with pytest.raises(UsageError) as e:
        config(postgres=url)
    assert said in e.value.message
    assert "hunter2" not in e.value.message
    assert "next: " in e.value.message


@pytest.mark.skipif(importlib.util.find_spec("psycopg") is not None, reason="psycopg 3 is installed")
def test_the_driver_that_feast_makes_of_a_bare_postgresql_url_is_named_when_it_is_missing() -> None:
    with pytest.raises(UsageError, match=r"driver that is not installed.*postgresql\+psycopg2://user"):
        config(postgres="postgresql://me@host/d")


def test_other_databases_that_sqlalchemy_knows_stay_possible() -> None:
    assert config(postgres="sqlite:////tmp/registry.db").registry.path == "sqlite:////tmp/registry.db"
