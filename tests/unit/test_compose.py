"""docker-compose.yml: pinned images, healthchecks, ordered starts, loopback ports, and no working default secret."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
ONE_SHOT = {"apply"}
each_service = pytest.mark.parametrize("name", sorted(SERVICES))


def variables(text: str) -> dict[str, str]:
    """Every `${NAME...}` in a text with what follows the name (`:-default`, `:?message` or nothing)."""
    return {m[1]: m[2] for m in re.finditer(r"\$\{([A-Z_]+)([^}]*)\}", text)}


def without_comments(path: Path) -> str:
    return "\n".join(line for line in path.read_text().splitlines() if not line.lstrip().startswith("#"))


def test_the_whole_platform_is_there() -> None:
    assert {"postgres", "redis", "kafka", "mlflow", "sync", "api"} <= set(SERVICES)
    assert SERVICES["kafka"]["environment"]["KAFKA_PROCESS_ROLES"] == "broker,controller"  # KRaft
    assert SERVICES["sync"]["command"][:2] == ["predictflow", "sync"]
    assert SERVICES["sync"]["command"][-2:] == ["--metrics-host", "0.0.0.0"]  # scraped from another container
    assert "ports" not in SERVICES["sync"]
    assert SERVICES["api"]["command"] == [
        "predictflow",
        "serve",
        "--host",
        "0.0.0.0",
        "--port",
        "9094",
        "--allow-remote",
    ]


@each_service
def test_images_are_pinned_to_an_exact_version(name: str) -> None:
    assert re.fullmatch(r"[a-z0-9/-]+:\d+\.\d+(\.\d+)?(-[a-z0-9]+)*", SERVICES[name]["image"])


def test_the_app_image_has_the_projects_version_and_is_built_from_the_lock() -> None:
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.M)
    assert version is not None
    assert SERVICES["api"]["image"].endswith(f":{version[1]}")
    dockerfile = without_comments(ROOT / SERVICES["api"]["build"]["dockerfile"])
    assert re.search(r"^FROM python:3\.11\.\d+-slim-[a-z]+$", dockerfile, re.M)
    assert "--require-hashes -r requirements.lock" in dockerfile
    assert "\nUSER predictflow\n" in dockerfile
    ignored = (ROOT / "docker" / "Dockerfile.dockerignore").read_text().splitlines()
    assert {".env", ".git", ".predictflow"} <= set(ignored)


@each_service
def test_every_lasting_service_has_a_healthcheck(name: str) -> None:
    service = SERVICES[name]
    assert ("healthcheck" in service) == (name not in ONE_SHOT)
    if name not in ONE_SHOT:
        check = service["healthcheck"]
        assert check["test"][0] in ("CMD", "CMD-SHELL")
        assert {"interval", "timeout", "retries"} <= set(check)


@each_service
def test_a_service_waits_until_what_it_needs_is_healthy(name: str) -> None:
    for needed, how in SERVICES[name].get("depends_on", {}).items():
        expected = "service_completed_successfully" if needed in ONE_SHOT else "service_healthy"
        assert how["condition"] == expected
    if name in ("sync", "api"):
        assert {"apply", "redis", "kafka"} <= set(SERVICES[name]["depends_on"])


@each_service
def test_ports_are_published_on_loopback_alone(name: str) -> None:
    for port in SERVICES[name].get("ports", []):
        assert re.fullmatch(r"127\.0\.0\.1:\$\{[A-Z]+_PORT:-\d+\}:\d+", port)


def test_the_published_ports_are_the_documented_ones_and_differ() -> None:
    ports = {name: int(s["ports"][0].rpartition(":")[2]) for name, s in SERVICES.items() if "ports" in s}
    assert ports == {"postgres": 5432, "redis": 6379, "kafka": 9092, "mlflow": 5000, "api": 9094}


def test_secrets_are_required_and_have_no_default() -> None:
    found = {
        m[0]
        for m in re.finditer(
            r"\$\{[A-Z_]*(PASSWORD|SECRET|TOKEN|KEY)[^}]*\}", without_comments(ROOT / "docker-compose.yml")
        )
    }
    assert found
    assert all(re.match(r"\$\{[A-Z_]+:\?.+\}", use) for use in found)


def test_the_env_example_names_every_variable_and_sets_no_secret() -> None:
    used = variables(without_comments(ROOT / "docker-compose.yml"))
    example = dict(re.findall(r"^#?([A-Z_]+)=(.*)$", (ROOT / ".env.example").read_text(), re.M))
    assert set(example) == set(used)
    for name, default in used.items():
        assert example[name] == ("" if default.startswith(":?") else default.removeprefix(":-"))


def test_named_volumes_are_declared_and_mounted_files_exist() -> None:
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"]


def compose_config(directory: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """`docker compose config -q` without the caller's settings; skips where there is no client with compose."""
    docker = shutil.which("docker")
    if docker is None or subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        pytest.skip("no docker client with the compose plugin here")
    clean = {k: v for k, v in os.environ.items() if k != "POSTGRES_PASSWORD"}
    command = [
        docker,
        "compose",
        "--project-directory",
        str(directory),
        "-f",
        str(ROOT / "docker-compose.yml"),
        "config",
        "-q",
    ]
    return subprocess.run(command, env={**clean, **env}, capture_output=True, text=True)


def test_docker_compose_accepts_the_file(tmp_path: Path) -> None:
    done = compose_config(tmp_path, POSTGRES_PASSWORD="abc123")
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""


def test_docker_compose_refuses_an_unset_or_empty_password(tmp_path: Path) -> None:
    assert "set POSTGRES_PASSWORD in .env" in compose_config(tmp_path).stderr
    shutil.copy(ROOT / ".env.example", tmp_path / ".env")
    done = compose_config(tmp_path)
    assert done.returncode != 0
    assert "set POSTGRES_PASSWORD in .env" in done.stderr
