"""The settings of a process, read from the environment once, at the command line; below it values are passed in."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from feature_store.clock import CLOCK_MODES, ClockMode
from feature_store.errors import UsageError

VARIABLES = {
    "POSTGRES_URL": "Feast's SQL registry and the predictflow schema: postgresql+psycopg2://user@host:port/database",
    "REDIS_URL": "the online store: redis://host:port/db",
    "KAFKA_BOOTSTRAP_SERVERS": "the event stream: host:port[,host:port]",
    "SCHEMA_REGISTRY_URL": "schema registry of Avro topics whose source declares no schema: http://host:port",
    "MLFLOW_TRACKING_URI": "MLflow's tracking store",
    "PREDICTFLOW_OFFLINE": "directory of the offline store; relative source paths are below it",
    "PREDICTFLOW_CLOCK": "wall (default) or replay",
    "PREDICTFLOW_HOME": "state of local services, logs and the report (default .predictflow)",
    "PREDICTFLOW_REPO": "directory of feature_store.yaml (default the working directory)",
    "PREDICTFLOW_SERVED_TOPIC": "Kafka topic of the served log (default predictflow-served)",
    "PREDICTFLOW_API_KEYS_FILE": "digests of the API keys that `predictflow serve` asks for (default: none, loopback only)",
    "PREDICTFLOW_ALLOW_PICKLED_FUNCTIONS": "1: the server may run functions of on-demand views out of the registry",
}
"""Every variable the product reads, with its meaning; docs/reference/settings.md is checked against this table."""


class NotSetError(UsageError):
    """A setting that a command needs and that has no default."""

    code = "not_set"

    def __init__(self, variable: str) -> None:
        super().__init__(
            f"{variable} is not set ({VARIABLES[variable]})",
            next_step='run `predictflow up`, then `eval "$(predictflow env)"`',
        )


@dataclass(frozen=True)
class Settings:
    """What a process may know of its surroundings. A setting without a default is None until it is needed."""

    home: Path
    repo: Path
    clock: ClockMode
    served_topic: str
    postgres_url: str | None = None
    redis_url: str | None = None
    kafka_bootstrap_servers: str | None = None
    schema_registry_url: str | None = None
    mlflow_tracking_uri: str | None = None
    offline_path: str | None = None
    allow_pickled_functions: bool = False

    @classmethod
    def from_environ(cls, environ: Mapping[str, str] | None = None) -> Settings:
        """Settings of `environ` (default: the process's own). An empty variable counts as unset."""
        source = os.environ if environ is None else environ
        env = {k: v for k in VARIABLES if (v := source.get(k, "").strip())}
        clock = env.get("PREDICTFLOW_CLOCK", "wall")
        if clock not in CLOCK_MODES:
            raise UsageError("PREDICTFLOW_CLOCK is not a clock", value=clock, valid=CLOCK_MODES)
        return cls(
            home=Path(env.get("PREDICTFLOW_HOME", ".predictflow")).absolute(),
            repo=Path(env.get("PREDICTFLOW_REPO", ".")).absolute(),
            clock=clock,
            served_topic=env.get("PREDICTFLOW_SERVED_TOPIC", "predictflow-served"),
            postgres_url=env.get("POSTGRES_URL"),
            redis_url=env.get("REDIS_URL"),
            kafka_bootstrap_servers=env.get("KAFKA_BOOTSTRAP_SERVERS"),
            schema_registry_url=env.get("SCHEMA_REGISTRY_URL"),
            mlflow_tracking_uri=env.get("MLFLOW_TRACKING_URI"),
            offline_path=env.get("PREDICTFLOW_OFFLINE"),
            allow_pickled_functions=env.get("PREDICTFLOW_ALLOW_PICKLED_FUNCTIONS") == "1",
        )

    def need(self, name: str) -> str:
        """The value of an optional setting by attribute name; NotSetError names its variable when it is missing."""
        value = getattr(self, name)
        if value is None:
            raise NotSetError(_VARIABLE_OF[name])
        return str(value)


_VARIABLE_OF = {
    "postgres_url": "POSTGRES_URL",
    "redis_url": "REDIS_URL",
    "kafka_bootstrap_servers": "KAFKA_BOOTSTRAP_SERVERS",
    "mlflow_tracking_uri": "MLFLOW_TRACKING_URI",
    "offline_path": "PREDICTFLOW_OFFLINE",
}
