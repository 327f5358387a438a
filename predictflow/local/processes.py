"""Children that outlive us (`predictflow up`, `sync`, `serve`): start, record, find, list, stop.

Each is known by a record in `<home>/services/run/NAME.json`, which the child writes itself before it becomes its program,
so that a command killed half-way leaves nothing unknown. A pid is signalled only while its start time is the recorded one.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

from feature_store.errors import PredictFlowError, UnavailableError, UsageError
from predictflow.local import child
from predictflow.local.child import identity_of
from predictflow.local.program import START_TIMEOUT_SECONDS, Program, await_ready, log_tail, wait_until
from predictflow.local.watched import Watched

STOP_TIMEOUT_SECONDS = 20.0
STOP_ORDER = ("serve", "sync", "mlflow-migrate", "kafka", "redis", "postgres")
"""Readers before what they read from; a name that is not listed stops first."""


@dataclass(frozen=True)
class Record:
    """A recorded child: `identity` tells it from a later process with the same pid."""

    name: str
    pid: int
    identity: str
    argv: list[str]
    log: Path
    fingerprint: str
    stop_signal: int

    @property
    def alive(self) -> bool:
        _reap(self.pid)
        return identity_of(self.pid) == self.identity


_own: dict[int, subprocess.Popen[bytes]] = {}
"""Children of this process, kept so that they can be reaped: a zombie would look like a stopped server for ever."""


def _reap(pid: int) -> None:
    if pid in _own and _own[pid].poll() is not None:
        del _own[pid]


def run_directory(home: Path) -> Path:
    return home / "services" / "run"


@contextmanager
def locked(home: Path) -> Iterator[int]:
    """Hold `<home>/services/lock`: one `up`, `down` or start at a time. Yields the descriptor, for children to hold too."""
    (home / "services").mkdir(parents=True, exist_ok=True)
    with open(home / "services" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield lock.fileno()


def find(name: str, home: Path) -> Record | None:
    """The record of a child that is alive; None otherwise (the record of a dead one is removed)."""
    path = run_directory(home) / f"{name}.json"
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    record = Record(
        name=name,
        pid=int(facts["pid"]),
        identity=facts["identity"],
        argv=facts["argv"],
        log=Path(facts["log"]),
        fingerprint=facts["fingerprint"],
        stop_signal=int(facts["stop_signal"]),
    )
    if record.alive:
        return record
    path.unlink(missing_ok=True)
    return None


def running(home: Path) -> list[Record]:
    """Every recorded child that is alive, in the order in which `down` stops them."""
    names = [path.stem for path in run_directory(home).glob("*.json")]
    order = {name: i for i, name in enumerate(STOP_ORDER)}
    found = [find(name, home) for name in sorted(names, key=lambda n: (order.get(n, -1), n))]
    return [record for record in found if record is not None]


def start(
    name: str,
    argv: Sequence[str],
    env: Mapping[str, str],
    home: Path,
    *,
    ready: Callable[[], bool] = lambda: True,
    timeout: float = START_TIMEOUT_SECONDS,
) -> Record:
    """Start a child that outlives us (`sync`, `serve`), wait until it is ready; log in `<home>/logs/NAME.log`.

    `env` is added to our environment. Safe to run twice: a child that runs already with the same arguments and `env` is
    kept. Raises `UsageError` when it runs with others, `UnavailableError` (with the end of its log) when it ends or is
    not ready in time.
    """
    log = home / "logs" / f"{name}.log"
    Recorded(home).start(Program(name, list(argv), log, env=env, ready=ready, timeout=timeout))
    record = find(name, home)
    if record is None:
        raise UnavailableError(f"{name} ended right after it was ready; the end of {log}:{log_tail(log)}")
    return record


def stop(name: str, home: Path, timeout: float = STOP_TIMEOUT_SECONDS) -> bool:
    """Stop a recorded child: its stop signal, then SIGKILL after `timeout` seconds. False when it was not running."""
    record = find(name, home)
    if record is None:
        return False
    _signal(record, record.stop_signal)
    if not wait_until(lambda: not record.alive, timeout):
        _signal(record, signal.SIGKILL)
        if not wait_until(lambda: not record.alive, 10.0):
            raise PredictFlowError(f"{name} does not end", value=record.pid, next_step=f"look at {record.log}")
    (run_directory(home) / f"{name}.json").unlink(missing_ok=True)
    return True


def _signal(record: Record, sig: int) -> None:
    if record.alive:
        try:
            os.kill(record.pid, sig)
        except ProcessLookupError:
            pass  # it ended between the two calls, which is what we want
        except PermissionError as error:
            raise PredictFlowError(
                f"{record.name} belongs to another user", value=record.pid, next_step="run the command as that user"
            ) from error


def _inherited(environ: Mapping[str, str]) -> dict[str, str]:
    """What a child that outlives us takes over: not the directory that Feast makes at import and removes when we end."""
    feasts_own = ("PROMETHEUS_MULTIPROC_DIR", "PROMETHEUS_MULTIPROCESS_DIR")
    return {k: v for k, v in environ.items() if k not in feasts_own or "feast_metrics_" not in v}


class Recorded:
    """Starts children that outlive us and are known by their records below `home`. Usable from several threads."""

    def __init__(self, home: Path, lock: int | None = None) -> None:
        self.home = home
        self.lock = lock
        """Descriptor of the home's lock when the caller holds it. A child shares it until it has become its program, so
        that a `down` cannot come between the start of a child and its record."""
        self._started: list[str] = []
        self._helpers = Watched()
        self._cancelled = False
        self._mutex = threading.Lock()

    def start(self, program: Program) -> int:
        record = find(program.name, self.home)
        if record is not None and record.fingerprint != program.fingerprint:
            raise UsageError(
                f"{program.name} runs already with other arguments or settings (pid {record.pid})",
                next_step="predictflow down, then again",
            )
        if record is not None:
            await_ready(program, lambda: record.alive)
            return record.pid
        with self._mutex:
            self._refuse_when_cancelled(program)
            self._started.append(program.name)
            with nullcontext(self.lock) if self.lock is not None else locked(self.home) as lock:
                process = self._launch(program, lock)
        await_ready(program, lambda: process.poll() is None)
        return process.pid

    def run(self, program: Program) -> None:
        """Run a helper to its end, as `Watched.run`."""
        self._refuse_when_cancelled(program)
        self._helpers.run(program)

    def cancel(self) -> None:
        """Stop what was started here and start nothing more; threads that wait for it get an error. Safe to run twice."""
        with self._mutex:
            self._cancelled = True
        self._helpers.close()
        for name in self._started:
            stop(name, self.home)

    def _refuse_when_cancelled(self, program: Program) -> None:
        if self._cancelled:
            raise UnavailableError(f"{program.name} was not started: the start was interrupted")

    def _launch(self, program: Program, lock: int) -> subprocess.Popen[bytes]:
        path = run_directory(self.home) / f"{program.name}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        program.log.parent.mkdir(parents=True, exist_ok=True)
        facts = {
            "log": str(program.log),
            "fingerprint": program.fingerprint,
            "stop_signal": int(program.stop_signal),
            "user": program.user,
            "lock": lock,
        }
        wrapper = [sys.executable, "-I", child.__file__, "record", str(path), json.dumps(facts), "--", *program.argv]
        with open(program.log, "wb") as log:
            process = subprocess.Popen(
                wrapper,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                env={**_inherited(os.environ), **program.env},
                pass_fds=[lock],
            )
        _own[process.pid] = process
        # Wait for the record, so that from here on `find` and `stop` know the child.
        if not wait_until(lambda: path.exists() or process.poll() is not None, program.timeout):
            process.kill()
        return process
