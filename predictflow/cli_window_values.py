"""`predictflow windows values`: past values of a windowed view."""

from __future__ import annotations

import json
import os
import re
from datetime import timedelta
from pathlib import Path

import click

from feature_store.errors import UsageError
from predictflow.times import parse_time

_UNITS = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


@click.command()
@click.argument("view")
@click.option("--start", required=True, help="First step, ISO 8601, inclusive.")
@click.option("--end", required=True, help="Where it stops, ISO 8601, exclusive.")
@click.option("--every", required=True, metavar="LENGTH", help="Between two steps, such as 15m, 1h or 1d.")
@click.option("--out", type=click.Path(path_type=Path, file_okay=False), required=True, help="Directory of the files.")
@click.option("--offline", default=None, help="Offline store directory; default: PREDICTFLOW_OFFLINE.")
@click.option("--memory", default=None, metavar="SIZE", help="What the engine may take before it spills, such as 2GB.")
@click.option("--dry-run", is_flag=True, help="Count entities, steps and files; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def values(
    view: str,
    start: str,
    end: str,
    every: str,
    out: Path,
    offline: str | None,
    memory: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Write a windowed view's past values at regular times to Parquet, as they were known then.

    Safe to run twice: after an interruption the same command goes on where it was.
    """
    from feature_store.point_in_time.engine import EngineSettings
    from feature_store.window_backfill import past_values
    from feature_store.window_store import windowed_views
    from predictflow.progress import progress
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store

    settings = Settings.from_environ(os.environ)
    ((found, _),) = windowed_views(feast_store(settings), [view])
    with progress(f"values of {view}", unit="steps") as advance:
        done = past_values(
            found,
            offline or settings.need("offline_path"),
            out,
            parse_time("--start", start),
            parse_time("--end", end),
            parse_length("--every", every),
            dry_run=dry_run,
            engine=EngineSettings(memory_limit=memory),
            progress=advance,
        )
    if as_json:
        click.echo(json.dumps(vars(done)))
    elif dry_run:
        click.echo(
            f"{view}: would write at most {done.rows:,} rows ({done.entities:,} entities at {done.steps:,} times) "
            f"in {done.files} files to {done.path}"
        )
    else:
        before = f"; {done.skipped} of {done.files} files were done before" if done.skipped else ""
        click.echo(f"{view}: wrote {done.rows:,} rows, {done.files - done.skipped} files to {done.path}{before}")


def parse_length(option: str, text: str) -> timedelta:
    """A length such as 30s, 15m, 1h, 1d or 1w; UsageError names the option."""
    found = re.fullmatch(r"([1-9][0-9]{0,8})([smhdw])", text.strip())
    if not found:
        raise UsageError(f"{option} is no length of time", value=text, valid=["30s", "15m", "1h", "1d", "1w"])
    return timedelta(**{_UNITS[found[2]]: int(found[1])})
