"""`predictflow up --docker`: the same servers, and MLflow's, from docker-compose.yml instead of as private processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

from feature_store.errors import NotFoundError, UnavailableError
from predictflow.local import processes, state
from predictflow.local.state import Services

BACKENDS = ("postgres", "redis", "kafka", "mlflow")


def up(
    home: Path, project: Path, environ: Mapping[str, str] | None = None, say: Callable[[str], None] = print
) -> Services:
    """Start `BACKENDS` with compose, wait until they are healthy, write `<home>/env`. Safe to run twice.

    `project` is the directory with docker-compose.yml and `.env`. Raises `NotFoundError` without the former,
    `UnavailableError` when there is no docker compose, it refuses the configuration, or a container does not get healthy.
    """
    given = os.environ if environ is None else environ
    home = home.absolute()
    with processes.locked(home):
        if running := processes.running(home):
            raise UnavailableError(
                f"private servers run here already: {', '.join(record.name for record in running)}",
                next_step="predictflow down, then predictflow up --docker",
            )
        # Asked first: it names an unset password, and it knows the ports and the password that compose will use.
        config = json.loads(_compose(project, "config", "--format", "json"))
        say(f"docker compose: starting {', '.join(BACKENDS)} ...")
        _compose(project, "up", "--detach", "--wait", *BACKENDS, shown=True)  # it may pull images for minutes
        services = _services(config["services"], home, given)
        state.save(home, services)
    return services


def down(home: Path, project: Path) -> bool:
    """Stop the containers when the last `up` of this home used docker; volumes stay. Whether there was something to do."""
    last = state.load(home)
    if last is None or last.where["postgres"] != "docker" or not state.env_file(home).exists():
        return False
    _compose(project, "down")
    return True


def _services(config: Mapping[str, dict[str, Any]], home: Path, environ: Mapping[str, str]) -> Services:
    def address(name: str) -> str:
        port = config[name]["ports"][0]
        return f"{port.get('host_ip', '127.0.0.1')}:{port['published']}"

    postgres = config["postgres"]["environment"]
    user, password = postgres["POSTGRES_USER"], quote(postgres["POSTGRES_PASSWORD"], safe="")
    return Services(
        postgres_url=f"postgresql+psycopg2://{user}:{password}@{address('postgres')}/{postgres['POSTGRES_DB']}",
        redis_url=f"redis://{address('redis')}/0",
        kafka_bootstrap_servers=address("kafka"),
        mlflow_tracking_uri=f"http://{address('mlflow')}",
        offline_path=environ.get("PREDICTFLOW_OFFLINE") or str(home / "offline"),
        clock=environ.get("PREDICTFLOW_CLOCK") or "wall",
        kafka_mode="real",
        where=dict.fromkeys(state.VARIABLE, "docker"),
    )


def _compose(project: Path, *arguments: str, shown: bool = False) -> str:
    """Standard output of `docker compose ARGUMENTS`; with `shown`, its messages go to ours as they come."""
    docker = shutil.which("docker")
    if docker is None:
        raise UnavailableError("there is no docker on PATH", next_step="install Docker, or run without --docker")
    if not (project / "docker-compose.yml").exists():
        raise NotFoundError("no docker-compose.yml here", value=str(project), next_step="cd to the checkout")
    if subprocess.run([docker, "compose", "version"], capture_output=True).returncode:
        raise UnavailableError(
            "this docker has no compose plugin", next_step="install docker compose v2, or run without --docker"
        )
    messages = None if shown else subprocess.PIPE
    done = subprocess.run(
        [docker, "compose", *arguments], cwd=project, stdout=subprocess.PIPE, stderr=messages, text=True
    )
    if done.returncode:
        lines = [line for line in (done.stderr or "see above").splitlines() if line.strip()]
        raise UnavailableError(
            f"docker compose {arguments[0]} failed: {lines[-1] if lines else 'no message'}",
            next_step="passwords and ports are set in .env (copy .env.example); containers speak in docker compose logs",
        )
    return done.stdout
