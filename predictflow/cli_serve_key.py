"""`predictflow serve-key`: makes, lists and drops the API keys that `predictflow serve` asks for."""

from __future__ import annotations

from pathlib import Path

import click

from serving.access import SCOPES, add_key, drop_key, read_keys

FILE = click.option(
    "--file",
    "path",
    required=True,
    type=click.Path(path_type=Path, dir_okay=False),
    envvar="PREDICTFLOW_API_KEYS_FILE",
    show_envvar=True,
    help="Where digests of keys are kept.",
)


@click.group("serve-key")
def serve_key() -> None:
    """API keys of the REST server."""


@serve_key.command()
@click.argument("name")
@click.option(
    "--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="May be given several times."
)
@FILE
def new(name: str, scopes: tuple[str, ...], path: Path) -> None:
    """Make a key for NAME and print it: the only time it is shown, since the file keeps its SHA-256 digest."""
    click.echo(add_key(path, name, scopes))
    click.echo(f"{path} now knows {name}; send the key as `Authorization: Bearer <key>`", err=True)


@serve_key.command("list")
@FILE
def list_keys(path: Path) -> None:
    """Print the names and scopes of the keys."""
    for key in read_keys(path):
        click.echo(f"{key.name}\t{','.join(s for s in SCOPES if s in key.scopes)}")


@serve_key.command()
@click.argument("name")
@FILE
def drop(name: str, path: Path) -> None:
    """Revoke the key of NAME; running servers refuse it within seconds."""
    drop_key(path, name)
    click.echo(f"{name} is revoked", err=True)


COMMANDS: list[click.Command] = [serve_key]
