"""Commands of the offline store: `backfill`."""

from __future__ import annotations

import json
import os
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import click

from feature_store.errors import DataError, NotFoundError, UsageError

if TYPE_CHECKING:
    from feast import FeatureView

    from feature_store.backfill import BackfillResult
    from predictflow.settings import Settings


class Bounds(NamedTuple):
    """The range of a backfill; None: no bound."""

    start: datetime | None = None
    end: datetime | None = None
    known_by: datetime | None = None


@click.command()
@click.argument("views", nargs=-1, metavar="[VIEW ...]")
@click.option("--all", "all_views", is_flag=True, help="Every view whose source has a SELECT to run.")
@click.option("--raw", type=click.Path(path_type=Path), required=True, help="Directory of the raw tables (*.parquet).")
@click.option("--offline", default=None, help="Offline store directory; default: PREDICTFLOW_OFFLINE.")
@click.option("--start", default=None, help="First event time, ISO 8601, inclusive; default: summary.json, else all.")
@click.option(
    "--end", default=None, help="Event time where it stops, exclusive; default: just after the cut, else all."
)
@click.option("--known-by", default=None, help="Newest `created` let in; default: the cut of summary.json, else all.")
@click.option("--dry-run", is_flag=True, help="Count rows and estimate bytes; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line and view.")
def backfill(
    views: tuple[str, ...],
    all_views: bool,
    raw: Path,
    offline: str | None,
    start: str | None,
    end: str | None,
    known_by: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compute the history of views from raw tables into the offline store. Safe to run twice."""
    from predictflow.settings import Settings

    settings = Settings.from_environ(os.environ)
    if bool(views) == all_views:
        raise UsageError("name the views to backfill, or pass --all", next_step="predictflow backfill --all --raw DIR")
    if not raw.is_dir():
        raise NotFoundError("no directory of raw tables", value=str(raw), next_step="predictflow data")
    defaults = _range_of(raw)
    bounds = Bounds(
        start=_time("--start", start) or defaults.start,
        end=_time("--end", end) or defaults.end,
        known_by=_time("--known-by", known_by) or defaults.known_by,
    )
    target = offline or settings.need("offline_path")
    results = []
    for view in _chosen(settings, views):
        results.append(_run(view, raw, target, bounds, dry_run))
        if as_json:
            click.echo(json.dumps(results[-1].to_json()))
    if not dry_run:
        _record(settings, results)
    if not as_json:
        for r in results:
            verb = "would write about" if dry_run else "wrote"
            click.echo(f"{r.view}: {verb} {r.rows:,} rows, {r.files} files, {r.bytes:,} bytes to {r.path}")


def _run(view: FeatureView, raw: Path, target: str, bounds: Bounds, dry_run: bool) -> BackfillResult:
    from feature_store.backfill import backfill as run
    from predictflow.progress import no_progress, progress

    with nullcontext(no_progress) if dry_run else progress(f"backfill {view.name}") as advance:
        return run(
            view,
            raw_dir=raw,
            offline_path=target,
            start=bounds.start,
            end=bounds.end,
            known_by=bounds.known_by,
            dry_run=dry_run,
            progress=advance,
        )


def _chosen(settings: Settings, names: tuple[str, ...]) -> list[FeatureView]:
    """The named views of the Feast registry, or every view whose source has a SELECT when none is named."""
    from feature_store.windows.definition import SQL_TAG
    from predictflow.wiring import feast_store

    known = {v.name: v for v in feast_store(settings).list_feature_views()}
    for name in names:
        if name not in known:
            raise NotFoundError("no such feature view", value=name, valid=known, next_step="feast apply")
    if names:
        return [known[n] for n in dict.fromkeys(names)]
    chosen = [v for v in known.values() if v.batch_source and SQL_TAG in (v.batch_source.tags or {})]
    if not chosen:
        raise NotFoundError(f"no view whose source has a tag {SQL_TAG}", valid=known, next_step="feast apply")
    return sorted(chosen, key=lambda v: v.name)


def _record(settings: Settings, results: list[BackfillResult]) -> None:
    """Records which raw columns each table was made of; the same backfill run again records the same run."""
    from predictflow.wiring import feature_registry, run_id

    at = datetime.now(UTC)
    with feature_registry(settings) as registry:
        for r in results:
            same = {k: v for k, v in r.to_json().items() if k not in ("seconds", "path")}
            registry.record_lineage(r.edges, at=at, run_id=run_id("backfill", json.dumps(same, sort_keys=True)))


def _range_of(raw: Path) -> Bounds:
    """start, end, known_by of the raw directory's summary.json; the cut itself is inside, so end is just after it."""
    path = raw / "summary.json"
    if not path.is_file():
        return Bounds()
    try:
        summary = json.loads(path.read_text())
        start, cut = (_time(f"{path}: {key}", summary[key]) for key in ("start", "cut"))
    except (ValueError, KeyError, TypeError) as e:
        raise DataError(f"{path} has no usable start and cut", value=str(e), next_step="predictflow data") from e
    return Bounds(start, cut + timedelta(microseconds=1) if cut else None, cut)


def _time(option: str, value: str | None) -> datetime | None:
    """An ISO 8601 time as UTC; naive is UTC."""
    if value is None:
        return None
    try:
        parsed = datetime.fromisoformat(value)
    except ValueError as e:
        raise UsageError(f"{option} is not an ISO 8601 time", value=value, valid=["2024-01-31T00:00:00Z"]) from e
    return parsed.replace(tzinfo=UTC) if parsed.tzinfo is None else parsed.astimezone(UTC)


COMMANDS = [backfill]
