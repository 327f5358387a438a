"""Commands of the online store: `online sweep` and `online orphans`."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from datetime import UTC, datetime

import click

from feature_store.errors import DataError


@click.group()
def online() -> None:
    """The online store: what leaves it in the end."""


@online.command()
@click.option("--view", "views", multiple=True, metavar="VIEW", help="Only this feature view; may be repeated.")
@click.option("--dry-run", is_flag=True, help="Count what is expired, remove nothing.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per view.")
def sweep(views: tuple[str, ...], dry_run: bool, as_json: bool) -> None:
    """Remove rows older than their view's ttl from Redis; ttl 0 keeps them for ever. Safe beside readers and writers.

    Reads never return such rows; the sweep gives back their memory. Run it from a scheduler, every day or hour.
    """
    from feature_store import online_sweep
    from predictflow.progress import progress
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store

    store = feast_store(Settings.from_environ(os.environ))
    at = online_sweep.clock_of(store, datetime.now(UTC))
    if at is None:
        raise DataError(
            "the replay clock is not set, so nothing can be expired",
            next_step="`predictflow windows bootstrap --known-by TIME`",
        )
    with progress("sweep", unit="keys") as advance:
        done = online_sweep.sweep(store, at, views=views, dry_run=dry_run, advance=advance)
    for view in done:
        if as_json:
            click.echo(json.dumps(asdict(view)))
        else:
            gone = "would go" if dry_run else f"{view.removed:,} removed"
            click.echo(f"{view.view}: {view.looked_at:,} rows, {view.expired:,} expired at {at.isoformat()}, {gone}")


@online.command()
@click.option("--delete", is_flag=True, help="Remove them; otherwise they are only listed.")
@click.option("--json", "as_json", is_flag=True, help="One JSON object per view.")
def orphans(delete: bool, as_json: bool) -> None:
    """List rows in Redis of feature views that the registry does not know; remove them with --delete."""
    from feature_store import online_sweep
    from predictflow.progress import progress
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store

    store = feast_store(Settings.from_environ(os.environ))
    with progress("orphans", unit="keys") as advance:
        found = online_sweep.orphans(store, delete=delete, advance=advance)
    for view in found:
        if as_json:
            click.echo(json.dumps(asdict(view)))
        else:
            click.echo(f"{view.view}: {view.rows:,} rows" + (f", {view.removed:,} removed" if delete else ""))
    if not as_json and not found:
        click.echo("no orphans: every view in Redis is in the registry")
    elif not as_json and not delete:
        click.echo("to remove them: predictflow online orphans --delete")


COMMANDS = [online]
