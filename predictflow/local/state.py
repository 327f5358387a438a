"""What `up` leaves behind for other commands: `<home>/env` for shells, `<home>/services/state.json` for ourselves."""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Literal

from predictflow.local.kafka import KafkaMode

Where = Literal["private", "external", "docker"]
SERVERS = ("postgres", "redis", "kafka")
VARIABLE = {
    "postgres": "POSTGRES_URL",
    "redis": "REDIS_URL",
    "kafka": "KAFKA_BOOTSTRAP_SERVERS",
    "mlflow": "MLFLOW_TRACKING_URI",
}


@dataclass(frozen=True)
class Services:
    """Where everything is. `where` says for each key of `VARIABLE` who runs it; URLs may hold a user's password."""

    postgres_url: str
    redis_url: str
    kafka_bootstrap_servers: str
    mlflow_tracking_uri: str
    offline_path: str
    clock: str
    kafka_mode: KafkaMode
    where: dict[str, Where]

    def environ(self) -> dict[str, str]:
        """The settings for other processes (and for `eval "$(predictflow env)"`)."""
        return {
            "POSTGRES_URL": self.postgres_url,
            "REDIS_URL": self.redis_url,
            "KAFKA_BOOTSTRAP_SERVERS": self.kafka_bootstrap_servers,
            "MLFLOW_TRACKING_URI": self.mlflow_tracking_uri,
            "PREDICTFLOW_OFFLINE": self.offline_path,
            "PREDICTFLOW_CLOCK": self.clock,
        }

    def url(self, name: str) -> str:
        """The address of a key of `VARIABLE`."""
        return self.environ()[VARIABLE[name]]


def env_file(home: Path) -> Path:
    return home / "env"


def env_lines(environ: Mapping[str, str]) -> str:
    return "".join(f"export {key}={shlex.quote(value)}\n" for key, value in environ.items())


def save(home: Path, services: Services) -> None:
    """Write both files, each in one step and readable by their owner alone (a user's URL may hold a password)."""
    _write(home / "services" / "state.json", json.dumps(asdict(services), indent=1))
    _write(env_file(home), env_lines(services.environ()))


def load(home: Path) -> Services | None:
    """What the last `up` left, whether it still runs or not; None before the first."""
    path = home / "services" / "state.json"
    if not path.exists():
        return None
    facts = json.loads(path.read_text())
    return Services(**{field.name: facts[field.name] for field in fields(Services)})


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.new")
    with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
        file.write(text)
    temporary.replace(path)
