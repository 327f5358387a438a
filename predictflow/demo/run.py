"""The demo's steps in order: services, definitions, pipeline, online state, live stream, proof, report."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from feature_store.errors import NotFoundError, UsageError
from feature_store.masking import masked
from feature_store.topic import client_config, end_offsets, ensure_topic
from predictflow.demo import stage
from predictflow.demo.live import VIEW, Applied, EventProducer, Findings, Rest, live_events, run_live
from predictflow.demo.proof import recompute
from predictflow.demo.report import write_report
from predictflow.settings import Settings
from predictflow.wiring import feature_registry

if TYPE_CHECKING:
    from feast import FeatureStore

Say = Callable[[str], None]


@dataclass(frozen=True)
class Options:
    """What `predictflow demo` was asked for."""

    path: Path | None
    customers: int
    days: int
    seed: int
    events: int


class Steps:
    """Prints each step as it begins and ends, and keeps how long it took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._began = time.perf_counter()

    @contextmanager
    def __call__(self, name: str, title: str) -> Iterator[Say]:
        """Run one step; yields what prints a line below its title."""
        click.secho(f"==> {title}", bold=True)
        start = time.perf_counter()
        yield lambda line: click.echo(f"    {line}")
        self.seconds[name] = round(time.perf_counter() - start, 2)
        click.echo(f"    done in {self.seconds[name]:.1f} s")

    @property
    def total(self) -> float:
        return round(time.perf_counter() - self._began, 2)


def run(settings: Settings, options: Options) -> dict[str, Any]:
    """Run everything; returns the summary that summary.json holds. Raises PredictFlowError with one clear line."""
    dataset, params = _dataset(options)  # wrong input is an error before anything starts
    steps = Steps()
    workspace = settings.home / dataset
    # Whatever can be wrong with a user's file shows here, before anything of the previous demo is touched.
    if options.path is not None:
        with steps("read", f"Read {options.path.name}") as say:
            stage.read_data_file(settings, workspace, params, say)
    with steps("services", "Local services: Postgres, Redis, Kafka") as say:
        services = stage.start_services(settings, workspace, say)
    settings = Settings.from_environ()  # now with the URLs of what runs
    with steps("apply", "feast apply: entities, feature views, the feature service churn_v1") as say:
        store = stage.apply_definitions(settings, say)
    with steps("pipeline", f"dvc repro in {_shown(workspace)}: data, backfill, training set, training") as say:
        stage.stop_previous(settings)
        metrics = stage.run_training_pipeline(settings, workspace, params, say)
        for line in _auc_lines(metrics["auc"]):
            say(line)
    raw = stage.read_json(workspace / "work" / "raw" / "summary.json")
    cut = datetime.fromisoformat(raw["cut"])
    with steps("online", "Fill the online store up to the cut; start the REST server and the sync consumer") as say:
        stage.fill_online_store(settings, store, cut, say)
        stage.save_environment(settings, services)
        url = stage.start_server_and_sync(settings, say)
    with steps("live", f"{options.events:,} live events through Kafka, features and predictions read over REST") as say:
        found = _live(settings, workspace, cut, url, options.events, say)
    with steps("proof", "Recompute what was served, from the event log and Parquet") as say:
        proof = recompute(settings, store, found)
        say(
            f"{proof.checked:,} served values checked, {proof.different} differ, {proof.stale} stale, "
            f"{proof.not_checked} not checked; {len(found.sent):,} events sent, {proof.lost_events} lost"
        )
        say(f"{proof.dead_lettered} of {found.poison} malformed messages in the dead-letter topic")
    summary = {
        "dataset": raw["dataset"],
        "rows": raw["rows"],
        "rejected_by_reason": raw["rejected_by_reason"],
        "auc": metrics["auc"],
        "consistency": {
            "checked": proof.checked,
            "different": proof.different,
            "stale": proof.stale,
            "reads_ahead": found.reads_ahead,
            "lost_events": proof.lost_events,
            "dead_lettered": proof.dead_lettered,
        },
        "freshness_ms": _percentiles(found.freshness_ms),
        "online_ms": _percentiles(found.online_ms),
        "predict_ms": _percentiles(found.predict_ms),
        "model": {"name": stage.MODEL, "version": metrics["model_version"], "data_version": metrics["data_version"]},
        "seconds": {"total": steps.total, **steps.seconds},
        "kafka": {"mode": services.kafka_mode},
        "rest_url": url,
    }
    addresses = _addresses(settings, url)
    detail = {
        "story": found.story,
        "windows": windows_of(store),
        "freshness_ms": found.freshness_ms,
        "online_ms": found.online_ms,
        "lineage": _lineage(settings, str(metrics["model_version"])),
        "addresses": addresses,
    }
    page = write_report(settings.home / "report", summary, detail)
    _print_end(summary, addresses, page)
    failure = proof.failure(found.poison)
    if failure:
        raise failure
    return summary


def _dataset(options: Options) -> tuple[str, dict[str, Any]]:
    """The data set's name and the pipeline's parameters."""
    from predictflow.sources.base import InputCheck, SourceOptions
    from predictflow.sources.online_retail import OnlineRetail
    from predictflow.sources.registry import choose

    given: dict[str, Any] = {"customers": options.customers, "days": options.days, "seed": options.seed}
    if options.path is not None:
        if not options.path.exists():
            raise NotFoundError("no such data file", value=str(options.path))
        if not options.path.is_file():
            raise UsageError(
                "--data is not a file", value=str(options.path), next_step=f"--data {options.path}/FILE.csv"
            )
        if not OnlineRetail.accepts(options.path):
            raise UsageError(
                "--data takes a .csv or .csv.gz of UCI Online Retail",
                value=str(options.path),
                next_step="other data: docs/how-to/add-a-data-source.md",
            )
        given = {"path": options.path.absolute()}
    adapter = choose(None, options.path)(SourceOptions(**given))
    if isinstance(adapter, InputCheck):
        adapter.check_input()  # what the last demo left running is stopped next
    params = {name: str(value) if isinstance(value, Path) else value for name, value in given.items()}
    return adapter.name, {"data": {"source": adapter.name, **params}}


def _live(settings: Settings, workspace: Path, cut: datetime, url: str, limit: int, say: Say) -> Findings:
    kafka = settings.need("kafka_bootstrap_servers")
    config = client_config(kafka)
    letters = f"{stage.TOPIC}-dlq"
    ensure_topic(config, letters)
    before = sum(end_offsets(config, letters).values())
    rest = Rest(url, f"demo-{uuid.uuid4().hex[:8]}")
    applied = Applied(kafka, stage.TOPIC, stage.group_of(settings))
    try:
        events = live_events(workspace / "work" / "raw", cut, limit)
        found = run_live(rest, EventProducer(kafka, stage.TOPIC), applied, events)
    finally:
        applied.close()
    found.dead_lettered = sum(end_offsets(config, letters).values()) - before
    fresh, online, predict = (_percentiles(x) for x in (found.freshness_ms, found.online_ms, found.predict_ms))
    say(f"event to readable: p50 {fresh['p50']} ms, p99 {fresh['p99']} ms over {len(found.freshness_ms)} events")
    say(
        f"feature read: p50 {online['p50']} ms, p99 {online['p99']} ms; prediction: p50 {predict['p50']} ms, p99 {predict['p99']} ms"
    )
    for line in _story_lines(found):
        say(line)
    return found


def _percentiles(samples: Sequence[float]) -> dict[str, float]:
    ordered = sorted(samples)

    def at(share: float) -> float:
        return round(ordered[min(int(share * len(ordered)), len(ordered) - 1)], 2)

    return {"p50": at(0.50), "p99": at(0.99)}


def _auc_lines(auc: dict[str, float | None]) -> list[str]:
    best = auc["best_possible"]
    return [
        f"held-out customers: AUC {auc['pit_heldout']:.3f} point-in-time, {auc['leaky_heldout']:.3f} leaky"
        + (f", {best:.3f} best possible" if best is not None else ""),
        f"the future:         AUC {auc['pit_future']:.3f} point-in-time, {auc['leaky_future']:.3f} leaky",
    ]


def _story_lines(found: Findings) -> list[str]:
    live = [s for s in found.story if s["live"]]
    shown = [("before the stream", live[0]), ("after the stream", live[-1]), ("45 days later", found.story[-1])]
    lines = [f"customer {live[0]['customer']}:"]
    for label, s in shown:
        v = s["values"]
        lines.append(
            f"  {label:<18} events_7d {_n(v['events_7d']):>5}  events_30d {_n(v['events_30d']):>5}  churn probability {s['probability']:.3f}"
        )
    return lines


def windows_of(store: FeatureStore) -> list[dict[str, Any]]:
    """Each window of the demo's windowed view: `window` (as in its SQL), `reading` (what it holds at t), `features`."""
    from feature_store.windows.definition import definition_of
    from feature_store.windows.explain import reading_text
    from feature_store.windows.in_words import window_text

    definition = definition_of(store.get_feature_view(VIEW))
    if definition is None:
        raise NotFoundError("the demo's view has no windows", value=VIEW, next_step="predictflow demo")
    return [
        {"window": window_text(s.window), "reading": reading_text(s), "features": [o.name for o in s.outputs]}
        for s in definition.statements
    ]


def _n(value: object) -> str:
    return "-" if value is None else f"{value:,}"


def _lineage(settings: Settings, version: str) -> list[str]:
    """One path from a raw column to the endpoint that serves it, as lines."""
    with feature_registry(settings) as registry:
        endpoint = f"endpoint:POST /api/v1/predict/{stage.MODEL}"
        model = f"model_version:{stage.MODEL}/{version}"
        edges = [*registry.path("column:events.quantity", model), *registry.path(model, endpoint)]
    return [str(edges[0].source), *(f"{e.target}" for e in edges)]


def _addresses(settings: Settings, url: str) -> dict[str, str]:
    return {
        "REST": f"{url}/docs",
        "metrics": f"{url}/metrics",
        "Postgres": masked(settings.need("postgres_url")),
        "Redis": masked(settings.need("redis_url")),
        "Kafka": settings.need("kafka_bootstrap_servers"),
        "MLflow UI": ".venv/bin/mlflow ui --backend-store-uri $MLFLOW_TRACKING_URI  (after eval of `predictflow env`)",
    }


def _print_end(summary: dict[str, Any], addresses: dict[str, str], page: Path) -> None:
    auc, check, rows = summary["auc"], summary["consistency"], summary["rows"]
    table = [
        (
            "data",
            f"{summary['dataset']}: {rows['customers']:,} customers, {rows['events']:,} events, {rows['rejected']:,} rejected",
        ),
        ("AUC held-out", f"{auc['pit_heldout']:.3f} point-in-time, {auc['leaky_heldout']:.3f} leaky"),
        ("AUC future", f"{auc['pit_future']:.3f} point-in-time, {auc['leaky_future']:.3f} leaky"),
        ("served values", f"{check['checked']:,} checked, {check['different']} differ"),
        ("freshness", f"p50 {summary['freshness_ms']['p50']} ms, p99 {summary['freshness_ms']['p99']} ms"),
        ("feature read", f"p50 {summary['online_ms']['p50']} ms, p99 {summary['online_ms']['p99']} ms"),
        ("Kafka", summary["kafka"]["mode"]),
        ("seconds", f"{summary['seconds']['total']:.1f}"),
    ]
    click.echo()
    for name, value in [*table, *addresses.items(), ("report", _shown(page))]:
        click.echo(f"  {name:<14} {value}")
    click.echo("\nEverything keeps running: `make down` stops it, another `make demo` starts the story again.")


def _shown(path: Path) -> str:
    try:
        return str(path.relative_to(Path.cwd()))
    except ValueError:
        return str(path)
