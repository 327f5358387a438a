"""A worker whose supervisor was killed ends by itself: nobody else would stop it."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

SUPERVISOR = """
import multiprocessing, sys, time
from test_serving_workers import worker

if __name__ == "__main__":
    child = multiprocessing.get_context("spawn").Process(target=worker, args=(sys.argv[1],))
    child.start()
    time.sleep(300)
"""


def worker(directory: str) -> None:
    """As a server's worker: told to end, it drains, and says so."""
    from predictflow.cli_serve import _end_with_parent

    def drain(*_: object) -> None:
        (Path(directory) / "drained").touch()
        sys.exit(0)

    signal.signal(signal.SIGTERM, drain)
    _end_with_parent()
    (Path(directory) / ".pid").write_text(str(os.getpid()))
    (Path(directory) / ".pid").rename(Path(directory) / "pid")
    time.sleep(300)


def gone(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z"


def test_a_worker_drains_when_its_supervisor_was_killed(tmp_path: Path) -> None:
    script = tmp_path / "supervisor.py"
    script.write_text(SUPERVISOR)
    path = os.pathsep.join([str(Path(__file__).parent), str(Path(__file__).parents[2])])
    supervisor = subprocess.Popen(
        [sys.executable, str(script), str(tmp_path)], env={**os.environ, "PYTHONPATH": path}, start_new_session=True
    )
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "pid").exists():
            assert time.monotonic() < deadline
            assert supervisor.poll() is None
            time.sleep(0.05)
        pid = int((tmp_path / "pid").read_text())
        supervisor.kill()
        supervisor.wait(30)
        deadline = time.monotonic() + 60
        while not gone(pid):
            assert time.monotonic() < deadline, "the worker outlives its supervisor"
            time.sleep(0.05)
        assert (tmp_path / "drained").exists()
    finally:
        supervisor.kill()
        if (tmp_path / "pid").exists() and not gone(int((tmp_path / "pid").read_text())):
            os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


def test_a_process_without_a_supervisor_is_left_alone() -> None:
    from predictflow.cli_serve import _end_with_parent

    if multiprocessing.parent_process() is not None:
        pytest.skip("this test process is a worker itself")
    _end_with_parent()
