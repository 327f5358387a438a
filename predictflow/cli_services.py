"""`predictflow up`, `down`, `status`, `env`: the servers that everything else needs."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from typing import Any

import click

from feature_store.errors import NotFoundError
from predictflow.settings import Settings


@click.command()
@click.option("--docker", is_flag=True, help="Use docker compose instead of private processes.")
def up(docker: bool) -> None:
    """Start private Postgres, Redis and Kafka (what runs already is kept), and write the settings to `.predictflow/env`.

    A server whose variable is set (POSTGRES_URL, REDIS_URL, KAFKA_BOOTSTRAP_SERVERS) is used instead of a private one.
    """
    from predictflow.local import compose, services

    settings = Settings.from_environ()
    if docker:
        compose.up(settings.home, settings.repo, os.environ, click.echo)
    else:
        services.up(settings.home, os.environ, click.echo)
    _show(services.status(settings.home))
    click.echo('next: eval "$(predictflow env)"')


@click.command()
def down() -> None:
    """Stop everything that `up` or `demo` started here; data and ports are kept."""
    from predictflow.local import compose, services

    settings = Settings.from_environ()
    containers = compose.down(settings.home, settings.repo)
    stopped = services.down(settings.home)
    click.echo(f"stopped: {', '.join(stopped + ['docker compose'] * containers) or 'nothing was running'}")


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def status(as_json: bool) -> None:
    """Show what runs, where, and since which log."""
    from predictflow.local import services

    home = Settings.from_environ().home
    lines = services.status(home)
    if as_json:
        click.echo(json.dumps({"home": str(home), "services": [asdict(line) for line in lines]}, indent=1))
    else:
        _show(lines)


@click.command()
def env() -> None:
    """Print the settings as shell lines: `eval "$(predictflow env)"`."""
    from predictflow.local import state

    home = Settings.from_environ().home
    path = state.env_file(home)
    if not path.exists():
        raise NotFoundError("nothing runs for this home", value=str(home), next_step="predictflow up")
    click.echo(path.read_text(), nl=False)


def _show(lines: list[Any]) -> None:
    for line in lines:
        about = ", ".join(text for text in (line.where, line.detail) if text and text != line.where)
        pid = f"pid {line.pid}" if line.pid else ""
        click.echo(f"{line.name:<15} {line.state:<14} {about:<16} {pid:<11} {line.address or line.log or ''}".rstrip())


COMMANDS = [up, down, status, env]
