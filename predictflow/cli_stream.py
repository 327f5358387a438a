"""Commands of the stream: `sync` and `windows`."""

from __future__ import annotations

import os
import signal
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

import click

from feature_store.errors import UsageError
from predictflow.cli_window_values import values
from predictflow.times import parse_time

if TYPE_CHECKING:
    from feature_store.bootstrap_plan import BootstrapPlan
    from feature_store.sync import SyncOptions
    from predictflow.settings import Settings


@click.command()
@click.option("--group", default=None, help="Consumer group; default: predictflow-sync-PROJECT.")
@click.option("--topic", default=None, help="Event topic; default: the only one that feeds the registry's views.")
@click.option(
    "--max-batch", type=click.IntRange(min=1), default=100_000, show_default=True, help="Messages at once, under load."
)
@click.option(
    "--commit-delay",
    type=click.FloatRange(min=0),
    default=0.0,
    show_default=True,
    help="Seconds by which committed offsets stay behind: what a failing-over Redis lost is read again.",
)
@click.option("--from-log", is_flag=True, help="First rebuild the online state from history and event log.")
@click.option("--metrics-port", type=click.IntRange(1, 65535), default=None, help="Serve Prometheus metrics here.")
@click.option(
    "--metrics-host",
    default="127.0.0.1",
    show_default=True,
    help="Address of the metrics; 0.0.0.0: all of the machine.",
)
def sync(
    group: str | None,
    topic: str | None,
    max_batch: int,
    commit_delay: float,
    from_log: bool,
    metrics_port: int | None,
    metrics_host: str,
) -> None:
    """Keep the features that a topic feeds current from Kafka, until SIGTERM or Ctrl-C."""
    from feature_store.stream_metrics import StreamMetrics
    from feature_store.sync import Sync, SyncOptions
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store, feature_registry

    settings = Settings.from_environ(os.environ)
    options = SyncOptions(
        bootstrap_servers=settings.need("kafka_bootstrap_servers"),
        offline_path=settings.need("offline_path"),
        clock=settings.clock,
        group=group,
        topic=topic,
        max_batch=max_batch,
        commit_delay=commit_delay,
        schema_registry=settings.schema_registry_url,
    )
    metrics = StreamMetrics()
    if metrics_port is not None:
        try:
            metrics.serve(metrics_port, metrics_host)
        except OSError as e:
            raise UsageError(
                f"metrics address cannot be used ({e.strerror})", value=f"{metrics_host}:{metrics_port}"
            ) from e
    store = feast_store(settings)
    if from_log:
        _rebuild(store, options)
    consumer = Sync(store, options, registry=feature_registry(settings), metrics=metrics)
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: consumer.stop())
    consumer.run()


def _rebuild(store: Any, options: SyncOptions) -> None:
    from feature_store.from_log import rebuild_topic_from_log
    from predictflow.progress import progress

    with progress("rebuild", unit="entities") as advance:
        done = rebuild_topic_from_log(
            store, options.offline_path, clock=options.clock, topic=options.topic, advance=advance
        )
    for b in done:
        known = "" if b.known_by is None else f" known by {b.known_by.isoformat()}"
        newer = f"; {b.fenced:,} were newer and stay" if b.fenced else ""
        click.echo(f"{b.view}: {b.entities:,} entities rebuilt from {b.events:,} events{known}{newer}")


@click.group()
def windows() -> None:
    """Windowed features: their online state and their definitions."""


windows.add_command(values)


@windows.command()
@click.argument("views", nargs=-1, metavar="[VIEW ...]")
@click.option("--known-by", default=None, help="ISO 8601; default: now under the wall clock, required under replay.")
@click.option("--group", default=None, help="Consumer group whose start is set; default: predictflow-sync-PROJECT.")
@click.option("--rewind", is_flag=True, help="Forget what the stream logged later, and the views' online rows.")
@click.option(
    "--dry-run", is_flag=True, help="Show what would be forgotten and where sync would start; change nothing."
)
@click.option("--yes", is_flag=True, help="With --rewind: do it. Without this, or --dry-run, nothing is forgotten.")
def bootstrap(
    views: tuple[str, ...], known_by: str | None, group: str | None, rewind: bool, dry_run: bool, yes: bool
) -> None:
    """Write the online state of windowed views from their history. Stop sync first; safe to run twice."""
    from feature_store.bootstrap import bootstrap as run
    from feature_store.bootstrap_plan import StreamPlace, plan_bootstrap
    from feature_store.topic import default_group
    from predictflow.progress import progress
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store

    if rewind and dry_run == yes:
        raise UsageError(
            "forgetting cannot be undone: pass --dry-run to see what --rewind would forget, or --yes to do it"
        )
    settings = Settings.from_environ(os.environ)
    at = None if known_by is None else parse_time("--known-by", known_by)
    store, offline = feast_store(settings), settings.need("offline_path")
    if at is None and settings.clock == "replay":
        raise UsageError(
            f"under the replay clock, say until when history is known; {_replay_clock(settings, store.project)}",
            next_step="pass --known-by TIME",
        )
    at = at or datetime.now(UTC)
    group = group or default_group(store.project)
    place = StreamPlace(settings.need("kafka_bootstrap_servers"), group, settings.schema_registry_url)
    if rewind or dry_run:
        plans = plan_bootstrap(store, offline, at, clock=settings.clock, stream=place, views=views, rewind=rewind)
        for plan in plans:
            click.echo(_described(plan, group, rewind))
    if dry_run:
        return
    with progress("bootstrap", unit="entities") as advance:
        done = run(
            store,
            offline,
            at,
            clock=settings.clock,
            stream=place,
            views=views,
            rewind=rewind,
            wall_clock=lambda: datetime.now(UTC),
            advance=advance,
        )
    for b in done:
        forgotten = f", {b.forgotten:,} later events forgotten" if b.forgotten else ""
        click.echo(
            f"{b.view}: {b.entities:,} entities, {b.events:,} events known by {b.known_by.isoformat()}{forgotten}; "
            f"group {group} starts at offsets {_offsets(b.starts)}"
        )


def _replay_clock(settings: Settings, project: str) -> str:
    from feature_store.clock import from_micros, replay_clock_key
    from feature_store.redis_connection import answering, connect

    redis: Any = connect(settings.need("redis_url"))
    with answering(redis):
        at = redis.get(replay_clock_key(project))
    return "it is not set yet" if at is None else f"it stands at {from_micros(int(at)).isoformat()}"


def _described(plan: BootstrapPlan, group: str, rewind: bool) -> str:
    parts = [f"{plan.view}: known by {plan.known_by.isoformat()}"]
    if rewind:
        ranges = ", ".join(f"partition {p}: {a} to {b}" for p, (a, b) in plan.offsets.items())
        parts.append(
            f"forgets all online rows and {plan.forgotten:,} log rows in {plan.files:,} files"
            + (f" (offsets of {ranges})" if ranges else "")
        )
    if plan.gone:
        parts.append(f"{plan.gone:,} of them are no longer in the topic: only a backfill brings them back")
    return "; ".join([*parts, f"group {group} would start at offsets {_offsets(plan.starts)}"])


def _offsets(starts: Mapping[int, int]) -> str:
    return "{" + ", ".join(f"{p}: {o}" for p, o in sorted(starts.items())) + "}"


@windows.command()
@click.argument("view")
@click.option(
    "--events-per-day",
    type=click.FloatRange(min=0),
    default=10.0,
    show_default=True,
    help="Of one entity, for the size of its state.",
)
def explain(view: str, events_per_day: float) -> None:
    """Show a windowed view's plan, the state it keeps, and the DuckDB, Flink and Spark SQL it compiles to."""
    from feature_store.window_store import windowed_views
    from feature_store.windows.explain import explain as explained
    from predictflow.settings import Settings
    from predictflow.wiring import feast_store

    ((_, definition),) = windowed_views(feast_store(Settings.from_environ(os.environ)), [view])
    click.echo(explained(definition, events_per_day=events_per_day))


COMMANDS = [sync, windows]
