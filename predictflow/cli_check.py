"""The command `check`: recompute what was served."""

from __future__ import annotations

import json
import os
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import click

from feature_store.errors import DataError
from predictflow.times import parse_time

if TYPE_CHECKING:
    from feature_store.consistency import Consistency


@click.command()
@click.option(
    "--served-file", type=click.Path(path_type=Path), default=None, help="Served log as JSONL, not the topic."
)
@click.option(
    "--since",
    default=None,
    metavar="TIME",
    help="Check what was served from then on (ISO 8601, wall clock); default: since the last `windows bootstrap --rewind`.",
)
@click.option("--no-predictions", is_flag=True, help="Leave predicted probabilities unchecked, without MLflow.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object.")
def check(served_file: Path | None, since: str | None, no_predictions: bool, as_json: bool) -> None:
    """Recompute every value served for this project, and every prediction; exit 1 when any differs."""
    from feature_store import consistency
    from predictflow import predictions
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store, model_tracker

    start: datetime | None = None if since is None else parse_time("--since", since)
    settings = Settings.from_environ(os.environ)
    store = feast_store(settings)
    offline = settings.need("offline_path")
    if served_file is not None:
        served = consistency.read_served_file(served_file)
    else:
        served = consistency.read_served(settings.need("kafka_bootstrap_servers"), settings.served_topic)
    # Projects that share a broker share this topic; each checks its own.
    served = (r for r in served if r.get("project", store.project) == store.project)
    views = store.list_feature_views()
    records, older = consistency.served_since(served, views, offline, start)
    result = consistency.check(records, views, offline)
    result.left_out = older
    if no_predictions:
        predictions.no_predictions(records, result, "predictions, by --no-predictions")
    elif any(r.get("probability") is not None for r in records):
        predictions.check_predictions(records, views, predictions.mlflow_models(model_tracker(settings)), result)
    if result.checked == 0:
        raise _nothing_checked(result, str(served_file or settings.served_topic))
    if as_json:
        click.echo(json.dumps(result.as_dict(), default=str))
    else:
        _print(result, since)
    if result.different:
        raise click.exceptions.Exit(1)


def _nothing_checked(result: Consistency, place: str) -> DataError:
    parts = []
    if result.left_out:
        parts.append(f"{result.left_out:,} older records left out")
    parts += [f"{count:,} values with {reason}" for reason, count in result.why_not.items()]
    return DataError(f"nothing was checked: {', '.join(parts) or 'the served log is empty'}", value=place)


def _print(result: Consistency, since: str | None) -> None:
    line = f"checked {result.checked:,}, different {result.different:,}, stale {result.stale:,}"
    if result.not_checked:
        why = ", ".join(f"{reason}: {count:,}" for reason, count in sorted(result.why_not.items()))
        line += f", not checked {result.not_checked:,} ({why})"
    click.echo(line)
    if result.left_out:
        before = f"before {since}" if since else "before the last `windows bootstrap --rewind`"
        click.echo(f"left out {result.left_out:,} records served {before}")
    for d in result.examples:
        entity = ", ".join(f"{k}={v}" for k, v in d.entity.items())
        why = f" ({d.reason})" if d.reason else ""
        click.echo(f"  {entity} {d.feature} at {d.t}: served {d.served}, recomputed {d.recomputed}{why}")


COMMANDS = [check]
