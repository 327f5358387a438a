"""The settings that `up` leaves behind survive a shell, and an existing server that does not answer is one clear line."""

from __future__ import annotations

import stat
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from feature_store.errors import UnavailableError, UsageError
from predictflow.cli import cli
from predictflow.local import external, state
from predictflow.local.state import Services

SERVICES = Services(
    postgres_url="postgresql+psycopg2://me:p'w $x@db:5432/features",
    redis_url="redis://127.0.0.1:1/0",
    kafka_bootstrap_servers="127.0.0.1:2",
    mlflow_tracking_uri="http://mlflow",
    offline_path="/a dir/offline",
    clock="replay",
    kafka_mode="real",
    where={"postgres": "external", "redis": "private", "kafka": "private", "mlflow": "external"},
)


def test_a_shell_reads_back_exactly_what_was_written(tmp_path: Path) -> None:
    state.save(tmp_path, SERVICES)
    names = list(SERVICES.environ())
    script = f'eval "$(cat "$1")"; for n in {" ".join(names)}; do printf "%s\\n" "${{!n}}"; done'
    out = subprocess.run(
        ["bash", "-c", script, "-", str(state.env_file(tmp_path))], capture_output=True, text=True, check=True
    )
    assert out.stdout.splitlines() == list(SERVICES.environ().values())


def test_the_state_is_read_back_and_readable_by_its_owner_alone(tmp_path: Path) -> None:
    assert state.load(tmp_path) is None
    state.save(tmp_path, SERVICES)
    assert state.load(tmp_path) == SERVICES
    for path in (state.env_file(tmp_path), tmp_path / "services" / "state.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_env_before_up_names_the_next_command(tmp_path: Path) -> None:
    result = CliRunner().invoke(cli, ["env"], env={"PREDICTFLOW_HOME": str(tmp_path)})
    assert result.exit_code == 2
    assert "next: predictflow up" in result.output
    assert "export" not in result.output


def test_env_prints_the_settings(tmp_path: Path) -> None:
    state.save(tmp_path, SERVICES)
    result = CliRunner().invoke(cli, ["env"], env={"PREDICTFLOW_HOME": str(tmp_path)})
    assert result.exit_code == 0
    assert result.output == state.env_lines(SERVICES.environ())


@pytest.mark.parametrize(
    ("check", "url", "variable"),
    [
        (external.check_postgres, "postgresql+psycopg2://me:secret@127.0.0.1:1/db", "POSTGRES_URL"),
        (external.check_redis, "redis://:secret@127.0.0.1:1/0", "REDIS_URL"),
        (external.check_redis, "127.0.0.1:1,db=0,password=secret", "REDIS_URL"),
        (external.check_kafka, "127.0.0.1:1", "KAFKA_BOOTSTRAP_SERVERS"),
    ],
)
def test_an_existing_server_that_does_not_answer_is_named_with_its_variable(
    check: Callable[[str], None], url: str, variable: str
) -> None:
    with pytest.raises(UnavailableError) as caught:
        check(url)
    message = caught.value.message
    assert variable in message
    assert "127.0.0.1:1" in message
    assert f"unset {variable}" in message
    assert "secret" not in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("check", "url"),
    [
        (external.check_postgres, "mysql://me:secret@db/x"),
        (external.check_redis, "http://:secret@cache:6379"),
        (external.check_redis, "127.0.0.1:port"),
    ],
)
def test_a_url_of_another_kind_is_a_usage_error(check: Callable[[str], None], url: str) -> None:
    with pytest.raises(UsageError) as caught:
        check(url)
    assert "secret" not in caught.value.message
