"""Children outlive a killed `up` only if they are known, and die with a killed test run."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from feature_store.errors import UnavailableError, UsageError
from predictflow.local import processes
from predictflow.local.child import identity_of
from predictflow.local.processes import Recorded
from predictflow.local.program import Program, wait_until
from predictflow.local.watched import Watched

SLEEP = [sys.executable, "-c", "import time; time.sleep(300)"]


def gone(pid: int) -> bool:
    return identity_of(pid) is None


def test_a_started_child_is_recorded_kept_and_stopped(tmp_path: Path) -> None:
    first = processes.start("sync", SLEEP, {}, tmp_path)
    try:
        assert psutil.Process(first.pid).cmdline() == SLEEP
        assert processes.start("sync", SLEEP, {}, tmp_path).pid == first.pid
        assert [r.name for r in processes.running(tmp_path)] == ["sync"]
    finally:
        assert processes.stop("sync", tmp_path)
    assert gone(first.pid)
    assert processes.running(tmp_path) == []
    assert not processes.stop("sync", tmp_path)


def test_a_child_does_not_inherit_the_directory_that_feast_removes_when_we_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PROMETHEUS_MULTIPROC_DIR", "/tmp/feast_metrics_x1")
    monkeypatch.setenv("PROMETHEUS_MULTIPROCESS_DIR", "/srv/metrics")
    record = processes.start("serve", SLEEP, {}, tmp_path)
    try:
        environ = psutil.Process(record.pid).environ()
    finally:
        processes.stop("serve", tmp_path)
    assert "PROMETHEUS_MULTIPROC_DIR" not in environ
    assert environ["PROMETHEUS_MULTIPROCESS_DIR"] == "/srv/metrics"


def test_the_same_name_with_other_arguments_is_refused(tmp_path: Path) -> None:
    processes.start("sync", SLEEP, {"A": "1"}, tmp_path)
    try:
        with pytest.raises(UsageError, match="sync runs already with other arguments"):
            processes.start("sync", SLEEP, {"A": "2"}, tmp_path)
    finally:
        processes.stop("sync", tmp_path)


def test_a_child_that_ends_while_starting_fails_at_once_with_the_end_of_its_log(tmp_path: Path) -> None:
    argv = [sys.executable, "-c", "import sys; sys.exit('port 9094 is taken')"]
    with pytest.raises(
        UnavailableError, match=r"(?s)serve ended while starting; the end of .*serve\.log.*port 9094 is taken"
    ):
        processes.start("serve", argv, {}, tmp_path, ready=lambda: False, timeout=60)
    assert processes.running(tmp_path) == []


def test_a_program_that_does_not_exist_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(UnavailableError, match="cannot run /no/such/program: No such file"):
        processes.start("serve", ["/no/such/program"], {}, tmp_path, ready=lambda: False)
    assert processes.running(tmp_path) == []


def test_a_pid_that_belongs_to_somebody_else_by_now_is_never_signalled(tmp_path: Path) -> None:
    record = processes.start("sync", SLEEP, {}, tmp_path)
    path = processes.run_directory(tmp_path) / "sync.json"
    written = path.read_text()
    try:
        path.write_text(json.dumps({**json.loads(written), "identity": "another-boot:1"}))
        assert not processes.stop("sync", tmp_path)
        assert not gone(record.pid)
    finally:
        path.write_text(written)
        processes.stop("sync", tmp_path)


def test_a_child_that_ignores_its_stop_signal_is_killed(tmp_path: Path) -> None:
    code = (
        "import signal, time, pathlib; signal.signal(15, signal.SIG_IGN); pathlib.Path('{}').touch(); time.sleep(300)"
    )
    deaf = tmp_path / "deaf"
    record = processes.start("x", [sys.executable, "-c", code.format(deaf)], {}, tmp_path, ready=deaf.exists)
    assert processes.stop("x", tmp_path, timeout=0.2)
    assert gone(record.pid)


def test_readers_stop_before_what_they_read_from(tmp_path: Path) -> None:
    for name in ("postgres", "kafka", "serve", "redis", "sync", "something-else"):
        processes.start(name, SLEEP, {}, tmp_path)
    try:
        names = [record.name for record in processes.running(tmp_path)]
        assert names == ["something-else", "serve", "sync", "kafka", "redis", "postgres"]
    finally:
        for record in processes.running(tmp_path):
            processes.stop(record.name, tmp_path)


def test_a_starter_killed_while_it_waits_leaves_a_child_that_is_known_and_can_be_stopped(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from predictflow.local import processes\n"
        f"processes.start('sync', {SLEEP!r}, {{}}, Path({str(tmp_path)!r}), ready=lambda: False, timeout=300)"
    )
    starter = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_until(lambda: processes.find("sync", tmp_path) is not None, 30)
    finally:
        starter.kill()
        starter.wait()
    record = processes.find("sync", tmp_path)
    assert record is not None
    assert not gone(record.pid)
    assert processes.stop("sync", tmp_path)
    assert gone(record.pid)


def test_a_running_child_does_not_hold_the_lock_of_its_home(tmp_path: Path) -> None:
    with processes.locked(tmp_path) as lock:
        Recorded(tmp_path, lock).start(Program("sync", SLEEP, tmp_path / "log"))
    try:
        with open(tmp_path / "services" / "lock", "w") as again:
            # The child lets go when it becomes its program, a moment after it has written its record.
            assert wait_until(lambda: _can_lock(again.fileno()), 30)
    finally:
        processes.stop("sync", tmp_path)


def _can_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def test_cancel_stops_what_was_started_and_refuses_more(tmp_path: Path) -> None:
    launcher = Recorded(tmp_path)
    launcher.start(Program("redis", SLEEP, tmp_path / "redis.log"))
    launcher.cancel()
    assert processes.running(tmp_path) == []
    with pytest.raises(UnavailableError, match="kafka was not started"):
        launcher.start(Program("kafka", SLEEP, tmp_path / "kafka.log"))


@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_watched_children_and_their_children_die_with_a_killed_parent(tmp_path: Path, sig: signal.Signals) -> None:
    pids = tmp_path / "pids"
    server = f"import os, subprocess; p = subprocess.Popen({SLEEP!r}); open({str(pids)!r}, 'w').write(f'{{os.getpid()}} {{p.pid}} '); p.wait()"
    code = (
        "import sys, time; from pathlib import Path; from predictflow.local.program import Program; from predictflow.local.watched import Watched\n"
        f"w = Watched(); w.start(Program('x', [sys.executable, '-c', {server!r}], Path({str(tmp_path / 'log')!r})))\n"
        "time.sleep(300)"
    )
    parent = subprocess.Popen([sys.executable, "-c", code])
    try:
        assert wait_until(lambda: pids.exists() and len(pids.read_text().split()) == 2, 30), (
            tmp_path / "log"
        ).read_text()
    finally:
        parent.send_signal(sig)
        parent.wait()
    for pid in map(int, pids.read_text().split()):
        assert wait_until(lambda pid=pid: gone(pid), 20)


def test_a_watched_helper_that_fails_names_its_log(tmp_path: Path) -> None:
    with Watched() as watched, pytest.raises(UnavailableError, match=r"(?s)initdb failed.*no space left"):
        watched.run(Program("initdb", [sys.executable, "-c", "exit('no space left')"], tmp_path / "log"))


def test_a_watched_helper_does_not_end_the_servers_beside_it(tmp_path: Path) -> None:
    with Watched() as watched:
        pid = watched.start(Program("server", SLEEP, tmp_path / "server.log"))
        watched.run(Program("helper", [sys.executable, "-c", ""], tmp_path / "helper.log"))
        assert not gone(pid)
    assert gone(pid)


def test_the_identity_of_a_process_stays_and_a_zombie_has_none() -> None:
    assert identity_of(os.getpid()) == identity_of(os.getpid()) is not None
    child = subprocess.Popen([sys.executable, "-c", ""])
    deadline = time.monotonic() + 30
    while identity_of(child.pid) is not None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert identity_of(child.pid) is None  # it has ended and nobody has asked for its exit code
    child.wait()
