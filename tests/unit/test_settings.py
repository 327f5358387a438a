"""Settings come from the environment once; what is missing or wrong is named."""

from __future__ import annotations

import click
import pytest

from feature_store.errors import UsageError
from predictflow.settings import NotSetError, Settings


def test_defaults() -> None:
    settings = Settings.from_environ({})
    assert settings.clock == "wall"
    assert settings.home.name == ".predictflow"
    assert settings.redis_url is None


def test_a_missing_setting_is_named_with_the_command_that_sets_it() -> None:
    with pytest.raises(NotSetError, match=r"REDIS_URL is not set.*predictflow up") as e:
        Settings.from_environ({"REDIS_URL": "  "}).need("redis_url")
    assert e.value.exit_code == 2


def test_an_unknown_clock_is_refused_with_the_valid_ones() -> None:
    with pytest.raises(UsageError, match=r"'wal'; valid: replay, wall; did you mean 'wall'"):
        Settings.from_environ({"PREDICTFLOW_CLOCK": "wal"})


def test_given_values_are_kept() -> None:
    settings = Settings.from_environ({"POSTGRES_URL": "postgresql+psycopg2://u@h:1/d", "PREDICTFLOW_CLOCK": "replay"})
    assert settings.need("postgres_url") == "postgresql+psycopg2://u@h:1/d"
    assert settings.clock == "replay"


def test_the_command_leaves_with_the_code_that_a_command_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """`predictflow check` says by its exit code that values differ: through the entry point, not only in-process."""
    from predictflow import cli

    failing = click.Command("failing", callback=lambda: click.get_current_context().exit(1))
    monkeypatch.setattr(cli.cli, "get_command", lambda ctx, name: failing)
    monkeypatch.setattr("sys.argv", ["predictflow", "failing"])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert left.value.code == 1
