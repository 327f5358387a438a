"""MLflow's schema in its database: migrated once, ahead of the first run, because MLflow takes about nine seconds for it.

`python -m predictflow.local.mlflow_database` migrates the database that MLFLOW_TRACKING_URI names: `up` starts it in the
background as `mlflow-migrate`, and `wait_for_mlflow` waits for it before the first use of MLflow.
"""

from __future__ import annotations

import hashlib
import os
import sys
from importlib.metadata import version
from pathlib import Path

from feature_store.errors import UnavailableError
from predictflow.local import postgres, state
from predictflow.local.processes import Recorded, find
from predictflow.local.program import Program, log_tail, wait_until

NAME = "mlflow-migrate"
TIMEOUT_SECONDS = 180.0


def prepare_mlflow(url: str) -> None:
    """Create or migrate MLflow's tables in an existing Postgres database. Safe to run twice; not at the same time.

    A migration that was killed half-way is taken up where its last transaction ended.
    """
    import logging

    from mlflow.store.db import utils

    logging.getLogger("alembic").setLevel(logging.WARNING)  # one line per migration otherwise
    engine = utils.create_sqlalchemy_engine_with_retry(url)
    try:
        if utils._is_empty_database(engine):
            utils._initialize_tables(engine)
        else:
            utils._upgrade_db(engine)
    finally:
        engine.dispose()


def is_prepared(home: Path, url: str) -> bool:
    """Whether this version of MLflow has migrated that database already; asks without importing MLflow."""
    marker = _marker(home)
    return marker.exists() and marker.read_text() == _fingerprint(url) and _has_schema(url)


def start_migration(launcher: Recorded, url: str) -> None:
    """Start the migration as a recorded process and return at once; nothing when it is done or running already."""
    home = launcher.home
    if is_prepared(home, url) or find(NAME, home) is not None:
        return
    argv = [sys.executable, "-m", "predictflow.local.mlflow_database", str(_marker(home))]
    launcher.start(Program(NAME, argv, _log(home), env={"MLFLOW_TRACKING_URI": url}))


def wait_for_mlflow(home: Path, url: str) -> None:
    """Return once MLflow's schema is in place; `UnavailableError` with the end of its log when the migration failed.

    Returns at once when MLflow's store is not ours to migrate (MLFLOW_TRACKING_URI was set, or docker compose runs it).
    """
    last = state.load(home)
    if last is not None and last.where["mlflow"] != "private":
        return
    if not wait_until(lambda: find(NAME, home) is None, TIMEOUT_SECONDS):
        raise UnavailableError(
            f"MLflow's schema was not ready within {TIMEOUT_SECONDS:.0f} s; the end of {_log(home)}:{log_tail(_log(home))}"
        )
    if not is_prepared(home, url):
        raise UnavailableError(
            f"MLflow's schema was not migrated; the end of {_log(home)}:{log_tail(_log(home))}",
            next_step="predictflow up",
        )


def _has_schema(url: str) -> bool:
    connection = postgres.connect(url)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT to_regclass('alembic_version') IS NOT NULL")
            return bool(cursor.fetchone()[0])
    finally:
        connection.close()


def _fingerprint(url: str) -> str:
    return f"{version('mlflow')} {hashlib.sha256(url.rpartition('@')[2].encode()).hexdigest()}"


def _marker(home: Path) -> Path:
    return home / "services" / "mlflow-schema"


def _log(home: Path) -> Path:
    return home / "logs" / f"{NAME}.log"


if __name__ == "__main__":
    target = os.environ["MLFLOW_TRACKING_URI"]
    prepare_mlflow(target)
    Path(sys.argv[1]).write_text(_fingerprint(target))
