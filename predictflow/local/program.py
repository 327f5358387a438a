"""What to run and how to tell that it is ready: the vocabulary of the two ways of starting a child."""

from __future__ import annotations

import hashlib
import json
import signal
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from feature_store.errors import UnavailableError

START_TIMEOUT_SECONDS = 60.0


@dataclass(frozen=True)
class Program:
    """What to run and how to tell that it is ready.

    `env` is added to the caller's environment. `ready` is asked again and again until it is true; it must answer within
    a second or so and raise only for what waiting cannot mend. `user` is an account to run as (only possible as root).
    """

    name: str
    argv: Sequence[str]
    log: Path
    env: Mapping[str, str] = field(default_factory=dict)
    ready: Callable[[], bool] = lambda: True
    user: str | None = None
    stop_signal: signal.Signals = signal.SIGTERM
    timeout: float = START_TIMEOUT_SECONDS

    @property
    def fingerprint(self) -> str:
        """Changes with the arguments and the added environment (hashed: it may hold a password)."""
        text = json.dumps([list(self.argv), sorted(self.env.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Launcher(Protocol):
    """Either way of starting a server (`start` returns once it is ready), and of running a helper to its end (`run`)."""

    def start(self, program: Program) -> int: ...

    def run(self, program: Program) -> None: ...


def wait_until(condition: Callable[[], bool], timeout: float) -> bool:
    """Ask `condition` with growing pauses (10 to 200 ms) until it is true; False after `timeout` seconds."""
    deadline = time.monotonic() + timeout
    pause = 0.01
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(pause)
        pause = min(pause * 1.5, 0.2)
    return True


def await_ready(program: Program, alive: Callable[[], bool]) -> None:
    # Liveness first: something else that listens on the port must not pass for a child that died of just that.
    if not wait_until(lambda: not alive() or program.ready(), program.timeout):
        raise UnavailableError(
            f"{program.name} was not ready within {program.timeout:.0f} s; the end of {program.log}:{log_tail(program.log)}"
        )
    if not alive():
        raise UnavailableError(f"{program.name} ended while starting; the end of {program.log}:{log_tail(program.log)}")


def log_tail(log: Path, lines: int = 12) -> str:
    """The last lines of a log, indented, for an error message."""
    text = log.read_text(errors="replace") if log.exists() else ""
    shown = [line for line in text.splitlines() if line.strip()][-lines:]
    return "".join(f"\n  {line}" for line in shown) or "\n  (nothing was written)"
