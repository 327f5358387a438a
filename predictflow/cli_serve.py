"""`predictflow serve`: listens, and runs the REST server in one process or several until SIGTERM or Ctrl-C."""

from __future__ import annotations

import functools
import ipaddress
import os
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from feature_store.errors import PredictFlowError, UsageError
from predictflow.serve_wiring import ServeOptions, build_app
from predictflow.settings import Settings
from serving.access import read_keys

if TYPE_CHECKING:
    from starlette.types import ASGIApp

DEFAULT_PORT = 9094
DEFAULT_MODEL = "churn-predictor"
DRAIN_SECONDS = 15
"""How long requests may take to end after SIGTERM."""
STARTUP_FAILURE = 3
"""The exit code by which a worker tells uvicorn's supervisor that restarting it is no use."""


@click.command()
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=DEFAULT_PORT, show_default=True, type=click.IntRange(0, 65535), help="0: any free one.")
@click.option(
    "--workers", default=1, show_default=True, type=click.IntRange(1, 64), help="Processes that share the port."
)
@click.option(
    "--model", "models", multiple=True, default=(DEFAULT_MODEL,), show_default=True, help="Ready once loaded."
)
@click.option("--no-model", is_flag=True, help="Be ready without a model (features only).")
@click.option(
    "--grpc-port", default=50051, show_default=True, type=click.IntRange(0, 65535), help="gRPC port; 0: no gRPC."
)
@click.option("--no-served-log", is_flag=True, help="Do not log what is served to Kafka.")
@click.option(
    "--log-sample",
    default=1.0,
    show_default=True,
    type=click.FloatRange(0, 1),
    help="Part of the entities whose reads are logged, always the same ones.",
)
@click.option("--max-rows", default=1000, show_default=True, type=click.IntRange(1), help="Entities per request.")
@click.option(
    "--max-concurrent",
    default=256,
    show_default=True,
    type=click.IntRange(1),
    help="Requests at a time and worker; more are answered 503.",
)
@click.option(
    "--timeout",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="Seconds a request may take; then 504.",
)
@click.option(
    "--job-rows",
    default=10_000,
    show_default=True,
    type=click.IntRange(1),
    help="A historical request with more rows becomes a job.",
)
@click.option("--feast-port", type=click.IntRange(0, 65535), help="Listen here too: stock Feast clients expect 6566.")
@click.option(
    "--api-keys",
    type=click.Path(path_type=Path),
    envvar="PREDICTFLOW_API_KEYS_FILE",
    help="Ask for a key of this file (`predictflow serve-key new`).",
)
@click.option("--tls-cert", type=click.Path(path_type=Path), help="Serve HTTPS with this certificate chain (PEM).")
@click.option("--tls-key", type=click.Path(path_type=Path), help="Its private key (PEM).")
@click.option(
    "--allow-remote",
    is_flag=True,
    envvar="PREDICTFLOW_ALLOW_REMOTE",
    help="Listen on more than the loopback interface without API keys: put it behind something that has.",
)
def serve(
    host: str,
    port: int,
    workers: int,
    grpc_port: int,
    models: tuple[str, ...],
    no_model: bool,
    no_served_log: bool,
    log_sample: float,
    max_rows: int,
    max_concurrent: int,
    timeout: float,
    job_rows: int,
    feast_port: int | None,
    api_keys: Path | None,
    tls_cert: Path | None,
    tls_key: Path | None,
    allow_remote: bool,
) -> None:
    """Serve features and predictions over REST, and features over gRPC."""
    from predictflow.serve_grpc import reserve

    settings = Settings.from_environ()
    _check_host(host, allow_remote, api_keys)
    _check_tls(tls_cert, tls_key)
    for name in ("postgres_url", "redis_url", "offline_path"):
        settings.need(name)
    if not no_served_log:
        settings.need("kafka_bootstrap_servers")
    if not no_model:
        settings.need("mlflow_tracking_uri")
    if api_keys is not None:
        read_keys(api_keys)  # a server that nobody could call must not start
    options = ServeOptions(
        served_log=not no_served_log,
        log_sample=log_sample,
        models=() if no_model else models,
        max_rows=max_rows,
        workers=workers,
        max_concurrent=max_concurrent,
        seconds=timeout,
        job_rows=job_rows,
        api_keys=api_keys,
        tls_cert=tls_cert,
        tls_key=tls_key,
        grpc=(host, grpc_port) if grpc_port else None,
    )
    with ExitStack() as opened, reserve(options.grpc):
        listeners = [opened.enter_context(listen(host, p)) for p in (port, feast_port) if p is not None]
        scheme = "https" if tls_cert else "http"
        shown = f"[{host}]" if ":" in host else host
        first, *others = [f"{scheme}://{shown}:{listener.getsockname()[1]}" for listener in listeners]
        click.echo(f"PredictFlow serves on {first} (documents: {first}/docs)", err=True)
        for address in others:
            click.echo(f"Feast clients: online_store: {{type: remote, path: {address}}}", err=True)
        if options.grpc is not None:
            click.echo(f"gRPC on {shown}:{grpc_port}", err=True)
        if workers == 1:
            _run_one(settings, options, listeners)
        else:
            _run_workers(settings, options, listeners)


COMMANDS: list[click.Command] = [serve]


def _check_host(host: str, allow_remote: bool, api_keys: Path | None) -> None:
    if allow_remote or api_keys is not None or host == "localhost":
        return
    try:
        loopback = ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not loopback:
        raise UsageError(
            "refusing to listen beyond this machine: the server asks no one for a key",
            value=host,
            next_step="use --host 127.0.0.1, --api-keys FILE, or --allow-remote (PREDICTFLOW_ALLOW_REMOTE=1)",
        )


def _check_tls(cert: Path | None, key: Path | None) -> None:
    if cert is None and key is None:
        return
    if cert is None or key is None:
        raise UsageError("TLS needs a certificate and its key", next_step="give --tls-cert and --tls-key")
    import ssl

    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(cert, key)
    except OSError as e:  # ssl.SSLError is one
        raise UsageError(
            "the certificate and its key cannot be used",
            value=f"{cert}, {key}",
            next_step=f"give a PEM chain and its PEM key ({e.strerror or e})",
        ) from e


def listen(host: str, port: int) -> socket.socket:
    """The listening socket, before anything slow is imported: a busy port is told at once."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listener = socket.socket(family, kind, protocol)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
        # Now, not when the application is ready: two servers may both bind a port on which nobody listens yet.
        listener.listen(2048)
    except OSError as e:
        raise PredictFlowError(
            f"cannot listen on {host}:{port} ({os.strerror(e.errno) if e.errno and e.errno > 0 else e})",
            next_step="stop what listens there, or choose another --port",
        ) from e
    listener.set_inheritable(True)
    return listener


def _config(app: Callable[[], ASGIApp], options: ServeOptions) -> Any:
    import uvicorn

    from serving.hot_protocol import HotProtocol

    return uvicorn.Config(
        app,  # a factory
        factory=True,
        loop="uvloop",
        http=HotProtocol,
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=DRAIN_SECONDS,
        timeout_worker_healthcheck=60,  # a worker that is still importing must not be taken for a hung one
        workers=options.workers,
        ssl_certfile=options.tls_cert,
        ssl_keyfile=options.tls_key,
    )


def _run_one(settings: Settings, options: ServeOptions, listeners: list[socket.socket]) -> None:
    import uvicorn

    # uvicorn drains on SIGTERM and then raises the signal again; a drained server has ended well.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    server = uvicorn.Server(_config(functools.partial(build_app, settings, options), options))
    server.run(sockets=listeners)
    if not server.started:
        raise PredictFlowError("the server did not start", next_step="see the log above")


def _run_workers(settings: Settings, options: ServeOptions, listeners: list[socket.socket]) -> None:
    from uvicorn.supervisors import Multiprocess

    with tempfile.TemporaryDirectory(prefix="predictflow-metrics-") as metrics:
        os.environ["PROMETHEUS_MULTIPROC_DIR"] = metrics  # read by prometheus_client when a worker imports it
        Multiprocess(_config(functools.partial(_worker_app, settings, options), options), listeners).run()


def _worker_app(settings: Settings, options: ServeOptions) -> ASGIApp:
    _end_with_parent()
    try:
        return build_app(settings, options)
    except PredictFlowError as e:
        e.show()
        sys.exit(STARTUP_FAILURE)


def _end_with_parent() -> None:
    """Makes this worker drain and end when its supervisor is gone, however that died: nobody else would stop it.

    Not by PR_SET_PDEATHSIG, which is Linux only and bound to the thread that started the worker.
    """
    from multiprocessing import connection, parent_process

    parent = parent_process()
    if parent is None:
        return
    sentinel = parent.sentinel  # a pipe that the kernel closes with the parent

    def watch() -> None:
        connection.wait([sentinel])
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(2 * DRAIN_SECONDS)  # the drain has its time, and as much again, before this worker ends itself
        os._exit(1)

    threading.Thread(target=watch, name="parent-watch", daemon=True).start()
