"""Jobs: progress, results, cancelling, bounds, and a worker that dies."""

from __future__ import annotations

import multiprocessing
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.errors import DataError, NotFoundError
from serving.jobs import Job, JobLimits, Jobs, NoResultError, TooManyJobsError

T = datetime(2026, 1, 1, tzinfo=UTC)


class Slices:
    """Three tables of two rows; each waits until it is let go."""

    def __init__(self, fail: Exception | None = None) -> None:
        self.go = threading.Semaphore(0)
        self.given = 0
        self.fail = fail

    def __call__(self) -> Iterator[pa.Table]:
        for i in range(3):
            assert self.go.acquire(timeout=20)
            if self.fail is not None and i == 1:
                raise self.fail
            self.given += 1
            yield pa.table({"x": [2 * i, 2 * i + 1]})


class Clock:
    def __init__(self) -> None:
        self.t = T

    def __call__(self) -> datetime:
        return self.t


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def jobs(tmp_path: Path, clock: Clock) -> Iterator[Jobs]:
    made = Jobs(tmp_path, clock, JobLimits(running=1, queued=1, kept=3))
    yield made
    made.close()


def wait_until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def until(jobs: Jobs, job: Job, status: str, rows_done: int | None = None) -> Job:
    deadline = time.monotonic() + 20
    while True:
        now = jobs.get(job.id, None, True)
        if now.status == status and rows_done in (None, now.rows_done):
            return now
        assert time.monotonic() < deadline, now
        time.sleep(0.01)


def done(jobs: Jobs) -> Job:
    slices = Slices()
    slices.go.release(3)
    return until(jobs, jobs.submit(6, slices, None), "done")


def test_a_job_tells_its_progress_and_keeps_its_result(jobs: Jobs, clock: Clock) -> None:
    slices = Slices()
    job = jobs.submit(6, slices, None)
    assert (job.status, job.rows_done, job.rows_total) == ("queued", 0, 6)
    slices.go.release()
    until(jobs, job, "running", 2)
    with pytest.raises(NoResultError, match="running"):
        jobs.result(job.id, None, True)
    clock.t += timedelta(seconds=5)
    slices.go.release(2)

    ended = until(jobs, job, "done", 6)
    assert ended.finished_at == (T + timedelta(seconds=5)).isoformat()
    assert pq.read_table(jobs.result(job.id, None, True))["x"].to_pylist() == [0, 1, 2, 3, 4, 5]


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [(DataError("broken", value="x"), "data", "broken: 'x'"), (RuntimeError("a bug"), "internal", "the log has it")],
)
def test_a_job_that_fails_says_why(jobs: Jobs, error: Exception, code: str, says: str) -> None:
    slices = Slices(error)
    slices.go.release(3)
    job = until(jobs, jobs.submit(6, slices, None), "failed")
    assert job.error is not None
    assert job.error["code"] == code
    assert says in job.error["message"]
    with pytest.raises(NoResultError, match="failed"):
        jobs.result(job.id, None, True)


def test_a_cancelled_job_stops_and_is_forgotten(jobs: Jobs, tmp_path: Path) -> None:
    slices = Slices()
    job = jobs.submit(6, slices, None)
    slices.go.release()
    until(jobs, job, "running", 2)
    jobs.cancel(job.id, None, True)
    with pytest.raises(NotFoundError):
        jobs.get(job.id, None, True)
    slices.go.release(2)
    after = done(jobs)  # the pool is free again
    assert slices.given < 3
    wait_until(lambda: [p.name for p in tmp_path.iterdir()] == [after.id])
    jobs.cancel(after.id, None, True)
    wait_until(lambda: list(tmp_path.iterdir()) == [])


def test_a_job_is_its_owners(jobs: Jobs) -> None:
    slices = Slices()
    slices.go.release(3)
    job = jobs.submit(6, slices, "ann")
    assert jobs.get(job.id, "ann", False).owner == "ann"
    for other in ("bob", None):
        with pytest.raises(NotFoundError):
            jobs.get(job.id, other, False)
        with pytest.raises(NotFoundError):
            jobs.cancel(job.id, other, False)


@pytest.mark.parametrize("job_id", ["..", "../x", "0" * 31, "0" * 32, "", "A" * 32, "state.json"])
def test_only_an_id_names_a_job(jobs: Jobs, job_id: str) -> None:
    with pytest.raises(NotFoundError):
        jobs.get(job_id, None, True)


def test_more_jobs_than_may_wait_are_refused(jobs: Jobs) -> None:
    first, second = Slices(), Slices()
    jobs.submit(6, first, None)
    waiting = jobs.submit(6, second, None)
    with pytest.raises(TooManyJobsError):
        jobs.submit(6, Slices(), None)
    first.go.release(3)
    second.go.release(3)
    until(jobs, waiting, "done")
    done(jobs)


def test_a_cancelled_job_that_waited_gives_its_place_back_at_once(jobs: Jobs, tmp_path: Path) -> None:
    slices = Slices()
    running = jobs.submit(6, slices, None)
    waiting = jobs.submit(6, Slices(), None)
    jobs.cancel(waiting.id, None, True)
    assert {p.name for p in tmp_path.iterdir()} == {running.id}
    waiting = jobs.submit(6, Slices(), None)
    assert jobs.forget_all() == 2
    assert {p.name for p in tmp_path.iterdir()} == {running.id}
    slices.go.release(3)
    wait_until(lambda: list(tmp_path.iterdir()) == [])


def test_results_are_their_owners_only(tmp_path: Path, clock: Clock) -> None:
    jobs = Jobs(tmp_path / "home", clock)
    job = done(jobs)
    assert [p.stat().st_mode & 0o077 for p in (tmp_path / "home", tmp_path / "home" / job.id)] == [0, 0]
    jobs.close()


def test_the_oldest_and_the_old_are_forgotten(jobs: Jobs, clock: Clock, tmp_path: Path) -> None:
    made = []
    for _ in range(4):
        clock.t += timedelta(minutes=1)
        made.append(done(jobs))
    wait_until(lambda: {p.name for p in tmp_path.iterdir()} == {j.id for j in made[1:]})
    clock.t += timedelta(hours=24, seconds=-30)
    jobs.sweep()
    wait_until(lambda: {p.name for p in tmp_path.iterdir()} == {made[3].id})


def test_a_stopped_server_leaves_no_job_running(tmp_path: Path, clock: Clock) -> None:
    jobs = Jobs(tmp_path, clock, JobLimits(running=1, queued=1))
    slices = Slices()
    running, waiting = jobs.submit(6, slices, None), jobs.submit(6, Slices(), None)
    slices.go.release()
    until(jobs, running, "running", 2)
    closing = threading.Thread(target=jobs.close)
    closing.start()
    time.sleep(0.1)
    slices.go.release()
    closing.join(20)
    after = Jobs(tmp_path, clock)
    for job in (running, waiting):
        ended = after.get(job.id, None, True)
        assert (ended.status, ended.error and ended.error["code"]) == ("failed", "stopped")


def _start_and_die(home: Path) -> None:
    jobs = Jobs(home, lambda: T)
    slices = Slices()
    job = jobs.submit(6, slices, None)
    slices.go.release()
    until(jobs, job, "running", 2)
    os._exit(9)


def test_a_job_whose_process_died_is_failed_and_not_running_for_ever(tmp_path: Path, jobs: Jobs) -> None:
    child = multiprocessing.get_context("spawn").Process(target=_start_and_die, args=(tmp_path,))
    child.start()
    child.join(60)
    assert child.exitcode == 9
    (place,) = tmp_path.iterdir()
    job = jobs.get(place.name, None, True)
    assert (job.status, job.rows_done) == ("failed", 2)
