"""Sets the demo's stage: servers up, definitions applied, pipeline run, online store filled, server and consumer started."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError, NotFoundError, UnavailableError
from feature_store.masking import masked
from feature_store.rewound import mark_rewound
from predictflow.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore

    from predictflow.local.state import Services

Say = Callable[[str], None]
TOPIC = "customer-events"
MODEL = "churn-predictor"
API_PORT = 9094
SERVER_SECONDS = 120.0
"""A slow disk reads Feast and MLflow for the first time here."""
GRPC_PORT = 50051
ACCOUNT_TTL = timedelta(days=30)


def read_data_file(settings: Settings, workspace: Path, params: dict[str, Any], say: Say) -> None:
    """The pipeline's first stage alone: a file that cannot be used is an error while the previous demo still stands."""
    from training.pipeline import prepare_workspace, run_pipeline

    prepare_workspace(workspace, params, settings.repo)
    ran = run_pipeline(workspace, dict(os.environ), stage="data")
    rows = read_json(workspace / "work" / "raw" / "summary.json")["rows"]
    say(f"{rows['events']:,} events, {rows['rejected']:,} lines rejected{'' if ran else ' (up to date)'}")


def start_services(settings: Settings, workspace: Path, say: Say) -> Services:
    """Servers up, and this process's environment set to them and to the workspace; `<home>/env` names the old one still.

    Safe to run twice. UnavailableError when a server does not start or answer; the previous demo then runs on.
    """
    from predictflow.local import services

    offline = workspace / "work" / "offline"
    offline.mkdir(parents=True, exist_ok=True)
    own = ("PREDICTFLOW_OFFLINE", "PREDICTFLOW_CLOCK")
    up = services.up(settings.home, {k: v for k, v in os.environ.items() if k not in own}, say)
    # The replay clock makes data of any year fresh, and the figures the same next year.
    started = replace(up, offline_path=str(offline), clock="replay")
    os.environ.update(started.environ())
    os.environ["PREDICTFLOW_REPO"] = str(settings.repo)
    os.environ["PREDICTFLOW_HOME"] = str(settings.home)
    say(f"Postgres {masked(started.postgres_url)}, Redis {masked(started.redis_url)}")
    say(f"Kafka {started.kafka_bootstrap_servers} ({started.kafka_mode})")
    return started


def stop_previous(settings: Settings) -> None:
    """End the server and the consumer of the previous demo: they hold its settings. Safe to run twice."""
    from predictflow.local import processes

    for name in ("serve", "sync"):
        processes.stop(name, settings.home)


def save_environment(settings: Settings, services: Services) -> None:
    """`<home>/env` names this demo's offline store from now on, which the online store was just filled from."""
    from predictflow.local import processes, state

    with processes.locked(settings.home):
        state.save(settings.home, services)


def apply_definitions(settings: Settings, say: Say) -> FeatureStore:
    """What `feast apply` does, in this process: importing Feast takes longer than applying."""
    from feast.repo_operations import apply_total_with_repo_instance, cli_check_repo, parse_repo

    from predictflow.wiring import feast_store

    config_file = settings.repo / "feature_store.yaml"
    if not config_file.is_file():
        raise NotFoundError(
            "no feature_store.yaml in this directory", value=str(settings.repo), next_step="cd to the checkout"
        )
    cli_check_repo(settings.repo, config_file)
    store = feast_store(settings)
    with contextlib.chdir(settings.repo), _quiet():
        # `feast apply` itself looks for definitions below .venv too, for seconds, to find these same files.
        definitions = parse_repo(settings.repo / "features")
        apply_total_with_repo_instance(store, store.project, store.registry, definitions, skip_source_validation=False)
    store.refresh_registry()
    for view in sorted(store.list_feature_views(), key=lambda v: v.name):
        say(f"feature view {view.name}: {', '.join(f.name for f in view.features)}")
    return store


def run_training_pipeline(settings: Settings, workspace: Path, params: dict[str, Any], say: Say) -> dict[str, Any]:
    """`dvc repro` in the data set's workspace; returns metrics.json. Stages whose inputs did not change are not repeated."""
    from predictflow.local.mlflow_database import wait_for_mlflow
    from training.pipeline import prepare_workspace, run_pipeline
    from training.promote import restore
    from training.tracking import Tracker

    # Events that an earlier demo streamed are not part of this one's history; what it served is not checked any more.
    streamed = Path(settings.need("offline_path")) / "customer_events" / "stream"
    if streamed.exists():
        mark_rewound(streamed.parent, datetime.now(UTC))
        shutil.rmtree(streamed)
    wait_for_mlflow(settings.home, settings.need("mlflow_tracking_uri"))
    prepare_workspace(workspace, params, settings.repo)
    environ = dict(os.environ)
    stages = run_pipeline(workspace, environ)
    metrics = read_json(workspace / "work" / "model" / "metrics.json")
    with _quiet():  # MLflow's own warnings about SQLAlchemy
        present = restore(Tracker(settings.need("mlflow_tracking_uri"), settings.home / "mlartifacts"), metrics)
    if not present:
        # The registry was emptied since (another Postgres, say): the files alone are not the model.
        say("the model registry lacks this model: training again")
        stages += run_pipeline(workspace, environ, force=True, stage="train")
        metrics = read_json(workspace / "work" / "model" / "metrics.json")
    say(f"stages run: {', '.join(stages) or 'none, all up to date'}")
    return metrics


def fill_online_store(settings: Settings, store: FeatureStore, cut: datetime, say: Say) -> None:
    """Start the story at the cut: what an earlier demo streamed is forgotten, history's state comes. Sync must be stopped."""
    from feature_store.bootstrap import StreamPlace, bootstrap

    place = StreamPlace(settings.need("kafka_bootstrap_servers"), group_of(settings))
    offline = settings.need("offline_path")
    # From the topic's end: this run sends again what an earlier demo sent.
    begun = bootstrap(
        store,
        offline,
        cut,
        clock="replay",
        stream=place,
        rewind=True,
        start="end",
        wall_clock=lambda: datetime.now(UTC),
    )
    for done in begun:
        say(f"{done.view}: state of {done.entities:,} customers from {done.events:,} events known by {cut:%Y-%m-%d}")
    with _quiet():
        # Rows of an earlier demo may be newer than this one's, and the newest would win.
        online: Any = store._get_provider().online_store
        online.delete_table(store.config, store.get_feature_view("churn_features"))
        store.materialize(cut - ACCOUNT_TTL, cut + timedelta(microseconds=1), feature_views=["churn_features"])
    say("churn_features: latest account statements materialised")


def start_server_and_sync(settings: Settings, say: Say) -> str:
    """Both at once, since each spends seconds importing Feast; returns the server's URL."""
    with ThreadPoolExecutor(2) as pool:
        sync, server = pool.submit(start_sync, settings), pool.submit(start_server, settings)
        sync.result()
        url = server.result()
    say(f"REST server ready at {url}, consumer group {group_of(settings)} started")
    return url


def start_server(settings: Settings) -> str:
    """The REST server as a process that outlives us; returns its URL once it answers. It becomes ready with the model."""
    from predictflow.local import processes
    from predictflow.local.ports import is_free

    port = API_PORT if is_free(API_PORT) else _any_free_port()
    try:
        return _start_server_on(port, settings)
    except UnavailableError:
        if is_free(port) or processes.find("serve", settings.home) is not None:  # it is ours that is slow
            raise
        return _start_server_on(_any_free_port(), settings)  # another checkout's demo took it just now


def _start_server_on(port: int, settings: Settings) -> str:
    from predictflow.local import processes
    from predictflow.local.ports import HOST, is_free

    grpc = GRPC_PORT if is_free(GRPC_PORT) else 0  # the demo needs none
    argv = [sys.executable, "-m", "predictflow.cli", "serve", "--port", str(port), "--grpc-port", str(grpc)]
    url = f"http://{HOST}:{port}"
    processes.start("serve", argv, {}, settings.home, ready=lambda: _answers(f"{url}/readyz"), timeout=SERVER_SECONDS)
    return url


def group_of(settings: Settings) -> str:
    """The consumer group of the demo's project."""
    from feature_store.topic import default_group
    from predictflow.project import project_name

    return default_group(project_name(settings.repo))


def start_sync(settings: Settings) -> None:
    """The consumer as a process that outlives us."""
    from predictflow.local import processes

    argv = [sys.executable, "-m", "predictflow.cli", "sync", "--group", group_of(settings)]
    processes.start("sync", argv, {}, settings.home)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file that an earlier step wrote."""
    try:
        content: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as e:
        raise DataError(f"cannot read {path}", value=str(e), next_step="predictflow demo") from e
    return content


def _any_free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1) as answer:
            return bool(answer.status == 200)
    except OSError:
        return False  # not yet: the caller asks again, and looks whether the process is alive


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Feast and MLflow print tables, bars and warnings of their own; the demo's output is one story."""
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        yield
