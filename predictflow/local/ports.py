"""Free ports on 127.0.0.1, remembered so that a server comes back where it was."""

from __future__ import annotations

import json
import random
import socket
import threading
from pathlib import Path

from feature_store.errors import UnavailableError

HOST = "127.0.0.1"
# Below every usual ephemeral range: an outgoing connection can neither take a remembered port while its server is down,
# nor connect to itself while it waits for the server.
LOWEST, HIGHEST = 20_000, 32_000


def is_free(port: int) -> bool:
    """Whether a server could listen on 127.0.0.1:port now."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def answers(port: int, host: str = HOST, timeout: float = 0.5) -> bool:
    """Whether something accepts connections there."""
    try:
        with socket.create_connection((host, port), timeout):
            return True
    except OSError:
        return False


def free_port() -> int:
    """A free port, drawn at random so that two checkouts that start together do not draw the same."""
    draw = random.SystemRandom()
    for _ in range(1000):
        port = draw.randrange(LOWEST, HIGHEST)
        if is_free(port):
            return port
    raise UnavailableError(f"no free port between {LOWEST} and {HIGHEST} on {HOST}")


class Ports:
    """The remembered ports of one home, in `<home>/services/ports.json`. Usable from several threads."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._mutex = threading.Lock()

    def get(self, name: str) -> int | None:
        return self._read().get(name)

    def choose(self, name: str) -> tuple[int, int | None]:
        """The port to use for `name`, and the remembered one when it is busy now (else None). Remembers the choice."""
        with self._mutex:
            remembered = self._read().get(name)
            if remembered is not None and is_free(remembered):
                return remembered, None
            port = free_port()
            self._write({**self._read(), name: port})
            return port, remembered

    def _read(self) -> dict[str, int]:
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def _write(self, ports: dict[str, int]) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        temporary = self.path.with_name(f".{self.path.name}")
        temporary.write_text(json.dumps(ports, indent=1, sort_keys=True))
        temporary.replace(self.path)
