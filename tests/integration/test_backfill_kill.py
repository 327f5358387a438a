"""kill -9 at random points of a backfill: what it leaves, resumed, equals an undisturbed run byte for byte.

A handful of kills by default; PREDICTFLOW_BACKFILL_KILLS=50 for the whole proof (`make prove-backfill`).
"""

from __future__ import annotations

import contextlib
import hashlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import backfill_child
import psycopg2
import pytest

KILLS = int(os.environ.get("PREDICTFLOW_BACKFILL_KILLS", "6"))
SEED = int(os.environ.get("PREDICTFLOW_BACKFILL_SEED", "1"))
ROWS = 60_000


def start(context: Any, raw: Path, offline: Path, url: str) -> tuple[Any, Any]:
    """A child that has begun its backfill, and the end of its pipe."""
    ours, theirs = context.Pipe()
    child = context.Process(target=backfill_child.run, args=(str(raw), str(offline), url, theirs))
    child.start()
    theirs.close()
    assert ours.recv() == "started"
    return child, ours


def ended(pipe: Any) -> int:
    """Waits for a child's end; how many chunks it found done."""
    while not isinstance(message := pipe.recv(), int):
        pass
    return message


def kill_at(child: Any, pipe: Any, chunk: int, seconds: float) -> None:
    """kill -9, so many seconds after the child has done so many chunks; nothing where it has ended by then."""
    with contextlib.suppress(EOFError, ProcessLookupError):
        for _ in range(chunk):
            if isinstance(pipe.recv(), int):
                break
        time.sleep(seconds)
        os.kill(child.pid, signal.SIGKILL)
    child.join()


def contents(directory: Path) -> dict[str, str]:
    """Digest of every file, hidden ones too; lock files hold nothing and stand beside the tables."""
    return {
        str(p.relative_to(directory)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(directory.rglob("*"))
        if p.is_file() and ".locks" not in p.parts
    }


def query(url: str, sql: str) -> list[tuple[Any, ...]]:
    connection = psycopg2.connect(url.replace("+psycopg2", ""))
    try:
        with connection, connection.cursor() as cursor:
            cursor.execute(sql)
            return cursor.fetchall() if cursor.description else []
    finally:
        connection.close()


DONE = """SELECT run_id, chunk_number, started_at, finished_at, sha256 FROM predictflow.backfill_chunks
          WHERE status = 'done' ORDER BY 1, 2"""


@pytest.mark.timeout(60 + 30 * KILLS)
def test_a_killed_backfill_goes_on_and_ends_as_an_undisturbed_one(
    tmp_path: Path, postgres_url: str, capsys: pytest.CaptureFixture[str]
) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backfill_child"])
    raw, offline = tmp_path / "raw", tmp_path / "offline"
    backfill_child.write_raw(raw, ROWS)
    for _ in range(2):  # the second time the imports are there: it tells how long the work takes
        shutil.rmtree(offline, ignore_errors=True)
        child, pipe = start(context, raw, offline, postgres_url)
        began = time.monotonic()
        assert ended(pipe) == 0
        duration = time.monotonic() - began
        child.join()
        undisturbed = contents(offline)
    chunks = len(query(postgres_url, DONE))
    assert chunks == 2 * backfill_child.MONTHS
    assert len(undisturbed) == chunks + 1  # and the layout of the row view

    rng = random.Random(SEED)
    progress = []
    for kill in range(KILLS):
        shutil.rmtree(offline)
        query(postgres_url, "DELETE FROM predictflow.backfill_runs")
        for _ in range(rng.choice([1, 1, 2])):  # a resumed run may be killed as well
            child, pipe = start(context, raw, offline, postgres_url)
            # Anywhere before the first chunk, or anywhere within about two chunks after one.
            chunk = rng.choice([0, *rng.sample(range(chunks), 4)])
            kill_at(child, pipe, chunk, rng.random() * duration * (2 / chunks if chunk else 0.5))
            assert child.exitcode in (-signal.SIGKILL, 0)
        before = query(postgres_url, DONE)
        progress.append(len(before))
        child, pipe = start(context, raw, offline, postgres_url)
        skipped = ended(pipe)
        child.join()
        assert child.exitcode == 0
        assert contents(offline) == undisturbed, f"kill {kill} after {len(before)} chunks"
        after = query(postgres_url, DONE)
        assert len(after) == chunks
        assert set(map(str, before)) <= set(map(str, after)), "a chunk that was done was computed again"
        assert skipped == len(before)
    with capsys.disabled():
        sys.stdout.write(f"\n{KILLS} kills, seed {SEED}; chunks done of {chunks} when killed: {sorted(progress)}\n")
    if KILLS >= 20:
        assert any(0 < n < chunks for n in progress), "no kill hit the middle: the proof would prove nothing"


def test_two_runs_at_once_end_as_one(tmp_path: Path, postgres_url: str) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["backfill_child"])
    raw = tmp_path / "raw"
    backfill_child.write_raw(raw, 20_000)
    alone, _pipe = start(context, raw, tmp_path / "alone", postgres_url)
    alone.join()
    both = [start(context, raw, tmp_path / "both", postgres_url) for _ in range(2)]
    for child, _ in both:
        child.join()
    assert [alone.exitcode, *(child.exitcode for child, _ in both)] == [0, 0, 0]
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")


@pytest.fixture(autouse=True)
def _module_path(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fork server is another interpreter: it finds the child module by PYTHONPATH."""
    here = str(Path(__file__).parent)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, [here, os.environ.get("PYTHONPATH")])))
