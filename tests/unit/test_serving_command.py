"""`predictflow serve` before it serves: addresses and settings."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from feature_store.errors import UsageError
from predictflow.cli_serve import listen, serve
from predictflow.settings import VARIABLES
from serving.access import add_key

COMPLETE = {
    "POSTGRES_URL": "postgresql+psycopg2://u@127.0.0.1:1/x",
    "REDIS_URL": "redis://127.0.0.1:1/0",
    "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:1",
    "MLFLOW_TRACKING_URI": "sqlite://",
    "PREDICTFLOW_OFFLINE": "/nowhere",
}


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in (*VARIABLES, "PREDICTFLOW_ALLOW_REMOTE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.7", "example.org"])
def test_it_does_not_listen_beyond_this_machine_unless_told(host: str) -> None:
    result = CliRunner().invoke(serve, ["--host", host], env=COMPLETE)
    assert result.exit_code == 2
    assert host in result.output
    assert "--allow-remote" in result.output


@pytest.mark.parametrize("extra", [{"args": ["--allow-remote"]}, {"env": {"PREDICTFLOW_ALLOW_REMOTE": "1"}}])
def test_it_may_be_told(extra: dict) -> None:
    # With the address accepted, the first thing missed is a setting.
    result = CliRunner().invoke(serve, ["--host", "0.0.0.0", *extra.get("args", [])], env=extra.get("env", {}))
    assert "POSTGRES_URL is not set" in result.output


@pytest.mark.parametrize(
    ("missing", "switch"), [("KAFKA_BOOTSTRAP_SERVERS", "--no-served-log"), ("MLFLOW_TRACKING_URI", "--no-model")]
)
def test_a_setting_is_needed_only_for_what_is_switched_on(missing: str, switch: str) -> None:
    env = {k: v for k, v in COMPLETE.items() if k != missing}
    without = CliRunner().invoke(serve, ["--port", "0"], env=env)
    assert (without.exit_code, f"{missing} is not set" in without.output) == (2, True)
    with_switch = CliRunner().invoke(serve, ["--port", "0", switch], env={**env, "POSTGRES_URL": ""})
    assert "POSTGRES_URL is not set" in with_switch.output


def test_a_busy_port_is_one_clear_error() -> None:
    with listen("127.0.0.1", 0) as first:
        first.listen()
        port = first.getsockname()[1]
        result = CliRunner().invoke(serve, ["--port", str(port), "--grpc-port", "0"], env=COMPLETE)
    assert result.exit_code == 1
    assert f"cannot listen on 127.0.0.1:{port} (Address already in use)" in result.output
    assert not isinstance(result.exception, UsageError)


def test_keys_open_the_door_to_the_network(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    add_key(keys, "ci", ["read"])
    env = {"PREDICTFLOW_API_KEYS_FILE": str(keys)}
    assert "POSTGRES_URL is not set" in CliRunner().invoke(serve, ["--host", "0.0.0.0"], env=env).output
    missing = CliRunner().invoke(serve, ["--host", "0.0.0.0", "--api-keys", str(tmp_path / "none")], env=COMPLETE)
    assert missing.exit_code == 2
    assert "serve-key new" in missing.output


@pytest.mark.parametrize(
    ("args", "says"),
    [
        (["--tls-cert", "cert.pem"], "--tls-key"),
        (["--tls-cert", "nowhere.pem", "--tls-key", "nowhere.pem"], "nowhere.pem"),
        (["--tls-cert", __file__, "--tls-key", __file__], "PEM"),
    ],
)
def test_a_certificate_that_cannot_be_used_is_told_at_once(args: list[str], says: str) -> None:
    result = CliRunner().invoke(serve, ["--port", "0", *args], env=COMPLETE)
    assert result.exit_code == 2
    assert says in result.output
