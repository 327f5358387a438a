"""Commands of the offline store: `backfill`, `compact`, `erase`.

Exit codes, for a scheduler: 0 done, 1 failed (the data, the disk), 2 wrong usage, 75 try again (a server is away, or
another process works on the same files), 130 interrupted.
"""

from __future__ import annotations

import functools
import json
import os
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from feature_store.errors import DataError, NotFoundError, UnavailableError, UsageError

if TYPE_CHECKING:
    from feast import FeatureView

    from feature_store.backfill import BackfillResult
    from feature_store.backfill_state import PostgresState
    from predictflow.settings import Settings


class Bounds(NamedTuple):
    """The range of a backfill; None: no bound."""

    start: datetime | None = None
    end: datetime | None = None
    known_by: datetime | None = None
    known_after: datetime | None = None


class TryAgain(click.ClickException):
    """An error that passes by itself; the exit code is EX_TEMPFAIL of sysexits.h."""

    exit_code = 75


def retryable(run: Callable[..., None]) -> Callable[..., None]:
    """Turns errors that pass by themselves into TryAgain."""

    @functools.wraps(run)
    def wrapped(*args: Any, **kwargs: Any) -> None:
        from feature_store.durable import BusyError

        try:
            run(*args, **kwargs)
        except (UnavailableError, BusyError) as e:
            raise TryAgain(e.message) from e

    return wrapped


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
@click.option("--known-after", default=None, help="Only rows with a newer `created`: what arrived late; default: all.")
@click.option(
    "--workers", type=click.IntRange(min=1), default=None, help="Months written at once; default: cores, <= 4."
)
@click.option("--memory", default=None, metavar="SIZE", help="What the engine may take before it spills, such as 2GB.")
@click.option("--dry-run", is_flag=True, help="Count rows and estimate bytes; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line and view.")
@retryable
def backfill(
    views: tuple[str, ...],
    all_views: bool,
    raw: Path,
    offline: str | None,
    start: str | None,
    end: str | None,
    known_by: str | None,
    known_after: str | None,
    workers: int | None,
    memory: str | None,
    dry_run: bool,
    as_json: bool,
) -> None:
    """Compute the history of views from raw tables into the offline store.

    Safe to run twice and at once. After an interruption the same command goes on where it was.
    Exit codes: 0 done, 1 failed, 2 wrong usage, 75 try again.
    """
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
        known_after=_time("--known-after", known_after),
    )
    target = offline or settings.need("offline_path")
    chosen = _chosen(settings, views)
    with ExitStack() as stack:
        state = None if dry_run else stack.enter_context(_state(settings))
        for view in chosen:
            result = _run(view, raw, target, bounds, dry_run, workers, memory, state)
            if not dry_run:
                _record(settings, result)
            click.echo(json.dumps(result.to_json()) if as_json else _line(result))


def _line(r: BackfillResult) -> str:
    if r.dry_run:
        return f"{r.view}: would write about {r.rows:,} rows, {r.files} files, {r.bytes:,} bytes to {r.path}"
    found = f"; {r.skipped} of {r.chunks} chunks were done before" if r.skipped else ""
    return f"{r.view}: wrote {r.rows:,} rows, {r.files} files, {r.bytes:,} bytes to {r.path}{found}"


def _state(settings: Settings) -> PostgresState:
    from feature_store.backfill_state import PostgresState

    return PostgresState(settings.need("postgres_url"), clock=lambda: datetime.now(UTC))


def _run(
    view: FeatureView,
    raw: Path,
    target: str,
    bounds: Bounds,
    dry_run: bool,
    workers: int | None,
    memory: str | None,
    state: PostgresState | None,
) -> BackfillResult:
    from feature_store.backfill import backfill as run
    from feature_store.point_in_time.engine import EngineSettings
    from predictflow.progress import Advance, no_progress, progress

    with ExitStack() as stack:
        shown: list[Advance] = [no_progress]

        def planned(rows: int) -> None:
            shown[0] = stack.enter_context(progress(f"backfill {view.name}", total=rows))

        return run(
            view,
            raw_dir=raw,
            offline_path=target,
            start=bounds.start,
            end=bounds.end,
            known_by=bounds.known_by,
            known_after=bounds.known_after,
            dry_run=dry_run,
            workers=workers,
            progress=lambda rows: shown[0](rows),
            planned=planned,
            state=state,
            engine=EngineSettings(memory_limit=memory),
        )


def _chosen(settings: Settings, names: tuple[str, ...]) -> list[FeatureView]:
    """The named views of the Feast registry, or every view whose source has a SELECT when none is named."""
    from feature_store.windows.definition import SQL_TAG

    known = _views(settings)
    if names:
        return _named(known, names)
    chosen = [v for v in known.values() if v.batch_source and SQL_TAG in (v.batch_source.tags or {})]
    if not chosen:
        raise NotFoundError(f"no view whose source has a tag {SQL_TAG}", valid=known, next_step="feast apply")
    return sorted(chosen, key=lambda v: v.name)


def _record(settings: Settings, result: BackfillResult) -> None:
    """Records which raw columns the table was made of; the same backfill run again records the same run."""
    from predictflow.wiring import feature_registry

    with feature_registry(settings) as registry:
        registry.record_lineage(result.edges, at=datetime.now(UTC), run_id=result.run_id)


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


@click.command()
@click.argument("views", nargs=-1, metavar="[VIEW ...]")
@click.option("--all", "all_views", is_flag=True, help="Every view with rows of its own (not the windowed ones).")
@click.option("--offline", default=None, help="Offline store directory; default: PREDICTFLOW_OFFLINE.")
@click.option("--at-least", type=click.IntRange(min=1), default=2, show_default=True, help="Fewer small files stay.")
@click.option("--dry-run", is_flag=True, help="Count files and rows; write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object per line and view.")
@retryable
def compact(
    views: tuple[str, ...], all_views: bool, offline: str | None, at_least: int, dry_run: bool, as_json: bool
) -> None:
    """Merge the small files that appends leave into one sorted file per month; values stay the same.

    Safe to run twice, at once, and beside readers and writers. Exit codes as `predictflow backfill`.
    """
    from feature_store.compaction import compact as run
    from feature_store.windows.definition import definition_of
    from predictflow.progress import no_progress, progress
    from predictflow.settings import Settings

    settings = Settings.from_environ(os.environ)
    if bool(views) == all_views:
        raise UsageError("name the views to compact, or pass --all", next_step="predictflow compact --all")
    target = offline or settings.need("offline_path")
    known = _views(settings)
    chosen = _named(known, views) or [v for _, v in sorted(known.items()) if definition_of(v) is None]
    for view in chosen:
        with ExitStack() as stack:
            advance = no_progress if dry_run else stack.enter_context(progress(f"compact {view.name}"))
            r = run(view, offline_path=target, at_least=at_least, dry_run=dry_run, progress=advance)
        if as_json:
            click.echo(json.dumps(r.to_json()))
            continue
        verb = "would merge" if dry_run else "merged"
        click.echo(f"{r.view}: {verb} {r.absorbed} files into {r.written}, {r.rows:,} rows; {r.shadowed} shadowed")
        for name in r.skipped:
            click.echo(f"{r.view}: left {name} alone: its column types differ", err=True)


@click.command()
@click.argument("entity")
@click.argument("value")
@click.option("--offline", default=None, help="Offline store directory; default: PREDICTFLOW_OFFLINE.")
@click.option("--online", is_flag=True, help="Erase it from the online store too.")
@click.option("--dry-run", is_flag=True, help="Show which files hold it; write nothing.")
@click.option("--yes", is_flag=True, help="Do it: without this, or --dry-run, nothing happens.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@retryable
def erase(entity: str, value: str, offline: str | None, online: bool, dry_run: bool, yes: bool, as_json: bool) -> None:
    """Erase ENTITY with key VALUE from every file of the offline store, and keep it out of every later backfill.

    For instance `predictflow erase customer C000123 --dry-run`. It cannot be undone. Safe to run twice. The server's jobs
    and their results, which may hold the entity, are dropped.
    Exit codes as `predictflow backfill`.
    """
    from feast import FeatureView

    from feature_store.erasure import erase as run
    from feature_store.erasure_online import erase_online
    from feature_store.without_functions import stored_views
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store
    from serving.jobs import Jobs

    if dry_run == yes:
        raise UsageError("erasing cannot be undone: pass --dry-run to see what it would do, or --yes to do it")
    settings = Settings.from_environ(os.environ)
    target = offline or settings.need("offline_path")
    store = feast_store(settings)
    entities = {e.name: e for e in store.list_entities()}
    if entity not in entities:
        raise NotFoundError("no such entity", value=entity, valid=entities, next_step="feast apply")
    views = [v for v in stored_views(store.registry, store.project) if isinstance(v, FeatureView)]
    result = run(
        entities[entity].join_key, value, offline_path=target, views=views, at=datetime.now(UTC), dry_run=dry_run
    )
    keys = erase_online(store, entities[entity], value, dry_run) if online else None
    jobs = Jobs(settings.home / "serving" / "jobs", lambda: datetime.now(UTC))
    dropped = jobs.count() if dry_run else jobs.forget_all()
    if as_json:
        click.echo(json.dumps({**result.to_json(), "online_keys": keys, "jobs": dropped}))
        return
    verb = "would rewrite" if dry_run else "rewrote"
    for file in result.files:
        click.echo(f"{verb} {file.path}: {file.rows:,} of {file.of:,} rows")
    click.echo(
        f"{len(result.files)} files, {result.rows:,} rows"
        + (f", {keys} online keys" if online else "")
        + (f", {dropped} jobs of the server" if dropped else "")
    )


def _views(settings: Settings) -> dict[str, FeatureView]:
    from predictflow.wiring import feast_store

    return {v.name: v for v in feast_store(settings).list_feature_views()}


def _named(known: dict[str, FeatureView], names: tuple[str, ...]) -> list[FeatureView]:
    for name in names:
        if name not in known:
            raise NotFoundError("no such feature view", value=name, valid=known, next_step="feast apply")
    return [known[n] for n in dict.fromkeys(names)]


COMMANDS = [backfill, compact, erase]
