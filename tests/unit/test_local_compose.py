"""`up --docker` asks compose for ports and password, starts the servers, and leaves the same settings as private ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from feature_store.errors import NotFoundError, UnavailableError
from predictflow.local import compose, mlflow_database, state

CONFIG = {
    "services": {
        "postgres": {
            "environment": {"POSTGRES_USER": "predictflow", "POSTGRES_DB": "predictflow", "POSTGRES_PASSWORD": "a/b"},
            "ports": [{"host_ip": "127.0.0.1", "published": "15432", "target": 5432}],
        },
        "redis": {"ports": [{"host_ip": "127.0.0.1", "published": "16379", "target": 6379}]},
        "kafka": {"ports": [{"host_ip": "127.0.0.1", "published": "19092", "target": 9092}]},
        "mlflow": {"ports": [{"host_ip": "127.0.0.1", "published": "15000", "target": 5000}]},
    }
}


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory with a compose file, and a client on PATH that notes its calls and answers `config` as compose does."""
    (tmp_path / "docker-compose.yml").write_text("services: {}\n")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    put_docker(tmp_path, f'[ "$2" != config ] || cat {tmp_path}/config.json')
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path


def put_docker(directory: Path, body: str) -> None:
    (directory / "bin").mkdir(exist_ok=True)
    docker = directory / "bin" / "docker"
    docker.write_text(f'#!/bin/sh\necho "$@" >> {directory}/calls\n{body}\n')
    docker.chmod(0o755)


def calls(project: Path) -> list[str]:
    lines = (project / "calls").read_text().splitlines()
    return [line for line in lines if line != "compose version"]


def test_up_writes_the_settings_of_the_containers_and_down_stops_them(project: Path) -> None:
    home = project / "home"
    services = compose.up(home, project, {}, lambda _: None)
    assert services.environ() == {
        "POSTGRES_URL": "postgresql+psycopg2://predictflow:a%2Fb@127.0.0.1:15432/predictflow",
        "REDIS_URL": "redis://127.0.0.1:16379/0",
        "KAFKA_BOOTSTRAP_SERVERS": "127.0.0.1:19092",
        "MLFLOW_TRACKING_URI": "http://127.0.0.1:15000",
        "PREDICTFLOW_OFFLINE": str(home / "offline"),
        "PREDICTFLOW_CLOCK": "wall",
    }
    assert state.load(home) == services
    assert calls(project)[1:] == ["compose up --detach --wait postgres redis kafka mlflow"]
    mlflow_database.wait_for_mlflow(home, services.mlflow_tracking_uri)  # its container migrates: nothing to wait for
    assert compose.down(home, project)
    assert calls(project)[-1] == "compose down"


def test_down_leaves_docker_alone_when_it_was_not_used(project: Path) -> None:
    assert not compose.down(project / "home", project)
    assert not (project / "calls").exists()


def test_what_compose_refuses_is_one_line_and_leaves_no_settings(project: Path) -> None:
    put_docker(project, '[ "$2" = version ] || { echo "required variable POSTGRES_PASSWORD is missing" >&2; exit 1; }')
    with pytest.raises(
        UnavailableError, match=r"config failed: required variable POSTGRES_PASSWORD is missing"
    ) as caught:
        compose.up(project / "home", project, {}, lambda _: None)
    assert "\n" not in caught.value.message
    assert not state.env_file(project / "home").exists()


def test_what_is_missing_is_named(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    put_docker(project, "exit 1")
    with pytest.raises(UnavailableError, match="no compose plugin"):
        compose.up(project / "home", project, {}, lambda _: None)
    (project / "docker-compose.yml").unlink()
    with pytest.raises(NotFoundError, match=r"no docker-compose.yml here"):
        compose.up(project / "home", project, {}, lambda _: None)
    monkeypatch.setenv("PATH", str(project))
    with pytest.raises(UnavailableError, match="no docker on PATH"):
        compose.up(project / "home", project, {}, lambda _: None)
