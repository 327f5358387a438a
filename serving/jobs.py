"""Jobs: reads too large for one request, run in the background, their results on disk until they are fetched or too old.

One directory per job, seen by all workers of a server: `state.json`, `result.parquet`, and `lock`, which the worker that
runs it holds, so that a job whose worker died is told from one that runs. The directories are their owner's only: results
are whoever's data. Blocking: call it from threads.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import re
import shutil
import threading
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from feature_store.durable import locked, write_whole, writing
from feature_store.errors import NotFoundError, PredictFlowError

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

JobStatus = Literal["queued", "running", "done", "failed"]
_ID = re.compile(r"[0-9a-f]{32}")
_STATE, _LOCK, _CANCELLED, _RESULT = "state.json", "lock", "cancelled", "result.parquet"


class TooManyJobsError(PredictFlowError):
    """The server runs or keeps as many jobs as it may: HTTP 429."""

    code = "too_many_jobs"


class NoResultError(PredictFlowError):
    """A job that is not done, or failed: HTTP 409."""

    code = "no_result"


@dataclass(frozen=True)
class JobLimits:
    """`running` and `queued` per worker; `kept` (in all) and `age` bound what lies on disk."""

    running: int = 1
    queued: int = 8
    kept: int = 100
    age: timedelta = timedelta(hours=24)


@dataclass(frozen=True)
class Job:
    """The state of a job. Times are ISO 8601, UTC; `owner`: the API key that started it; `error`: code and message."""

    id: str
    status: JobStatus
    rows_done: int
    rows_total: int
    created_at: str
    finished_at: str | None = None
    error: dict[str, str] | None = None
    owner: str | None = None


class Stopped(Exception):
    """The job was cancelled, or its server stops."""


class Jobs:
    """The jobs below one directory. `now` is the wall clock (UTC). Thread-safe; several processes may share `home`."""

    def __init__(self, home: Path, now: Callable[[], datetime], limits: JobLimits | None = None) -> None:
        self._home = Path(home)
        self._now = now
        self._limits = limits or JobLimits()
        self._pool = ThreadPoolExecutor(self._limits.running, thread_name_prefix="job")
        self._mine = 0
        self._futures: dict[str, Future[None]] = {}
        self._mutex = threading.Lock()
        self._stopping = threading.Event()

    def submit(self, rows_total: int, tables: Callable[[], Iterator[pa.Table]], owner: str | None) -> Job:
        """Starts a job that writes `tables()`, one after the other, or queues it. TooManyJobsError when there is no room."""
        with self._mutex:
            if self._mine >= self._limits.running + self._limits.queued:
                raise TooManyJobsError(
                    f"{self._mine} jobs run or wait here, the limit", next_step="try again after Retry-After"
                )
            self._mine += 1
        held = ExitStack()
        held.callback(self._one_less)
        try:
            self.sweep(room_for=1)
            job = Job(uuid.uuid4().hex, "queued", 0, rows_total, self._now().isoformat(), owner=owner)
            place = self._home / job.id
            with writing(place):
                self._home.mkdir(mode=0o700, parents=True, exist_ok=True)
                place.mkdir(mode=0o700)
            held.enter_context(locked(place / _LOCK, seconds=0))
            self._write(job)
            future = self._futures[job.id] = self._pool.submit(self._run, job, tables)
        except BaseException:
            held.close()
            raise
        future.add_done_callback(lambda _: self._let_go(job.id, held))
        return job

    def get(self, job_id: str, owner: str | None, any_owner: bool) -> Job:
        """NotFoundError for an unknown, cancelled or forgotten job, and for another owner's unless `any_owner`."""
        job = self._read(job_id)
        if job is None or not (any_owner or job.owner == owner):
            raise NotFoundError("no such job", value=job_id, next_step="POST /api/v1/features/historical starts one")
        if job.status in ("queued", "running") and self._is_free(job_id):
            job = self._read(job_id) or job  # it may have ended while we looked
            if job.status in ("queued", "running"):
                job = self._end(job, "failed", {"code": "stopped", "message": "its server process has stopped"})
        return job

    def result(self, job_id: str, owner: str | None, any_owner: bool) -> Path:
        """The Parquet file of a job that is done; NoResultError before, and for one that failed."""
        job = self.get(job_id, owner, any_owner)
        if job.status != "done":
            said = "" if job.error is None else f": {job.error['message']}"
            raise NoResultError(f"the job is {job.status}{said}", value=job_id, next_step=f"GET /api/v1/jobs/{job_id}")
        return self._home / job_id / _RESULT

    def cancel(self, job_id: str, owner: str | None, any_owner: bool) -> None:
        """Stops a job and forgets it with its result; NotFoundError as `get`."""
        self.get(job_id, owner, any_owner)
        self._forget(job_id)

    def forget_all(self) -> int:
        """Cancels and forgets every job with its result, whoever's it is; how many there were. Safe to repeat."""
        with writing(self._home):
            known = self._known()
            for name in known:
                self._forget(name)
        return len(known)

    def count(self) -> int:
        """How many jobs there are, whatever their status."""
        with writing(self._home):
            return len(self._known())

    def sweep(self, room_for: int = 0) -> None:
        """Forgets what is too old, and of what has ended the oldest, until no more than `kept` remain. Safe to repeat."""
        ended: list[Job] = []
        count = 0
        oldest = self._now() - self._limits.age
        for place in self._home.iterdir() if self._home.is_dir() else ():
            job = self._read(place.name)
            if job is None:
                if _ID.fullmatch(place.name) and self._is_free(place.name) and self._is_old(place, oldest):
                    shutil.rmtree(
                        place, ignore_errors=True
                    )  # of a process killed before it wrote the state, or after a cancel
                continue
            count += 1
            if job.status in ("queued", "running") and not self._is_free(job.id):
                continue
            ended.append(job)
        ended.sort(key=lambda j: j.finished_at or j.created_at)
        while ended and (datetime.fromisoformat(ended[0].created_at) < oldest or count + room_for > self._limits.kept):
            self._forget(ended.pop(0).id)
            count -= 1
        if room_for and count + room_for > self._limits.kept:
            raise TooManyJobsError(f"{count} jobs run or wait, the limit", next_step="try again after Retry-After")

    def close(self) -> None:
        """Ends running jobs after the slice at hand; they are then `failed`."""
        self._stopping.set()
        self._pool.shutdown(wait=True, cancel_futures=True)

    # --- running ------------------------------------------------------------------------------------------------------

    def _run(self, job: Job, tables: Callable[[], Iterator[pa.Table]]) -> None:
        job = replace(job, status="running")
        try:
            self._write(job)
            job = self._write_result(job, tables)
            self._end(job, "done", None)
        except Stopped:
            if self._stopping.is_set():
                self._end(job, "failed", {"code": "stopped", "message": "the server was stopped"})
        except PredictFlowError as e:
            log.warning("job failed: %s", e.what, extra={"job": job.id}, exc_info=e)
            self._end(job, "failed", {"code": e.code, "message": e.format_message()})
        except Exception:  # whatever it is must be told to who waits for the job, and to the log
            log.exception("job failed", extra={"job": job.id})
            self._end(job, "failed", {"code": "internal", "message": f"unexpected error; the log has it: {job.id}"})

    def _let_go(self, job_id: str, held: ExitStack) -> None:
        held.close()
        self._futures.pop(job_id, None)
        # After the lock: whoever cancels from now on finds it free and clears up himself.
        if (self._home / job_id / _CANCELLED).exists():
            shutil.rmtree(self._home / job_id, ignore_errors=True)

    def _write_result(self, job: Job, tables: Callable[[], Iterator[pa.Table]]) -> Job:
        import pyarrow.parquet as pq

        place = self._home / job.id
        temporary = place / f".{_RESULT}"
        writer = None
        try:
            self._check(place)
            for table in tables():
                self._check(place)
                if writer is None:
                    writer = pq.ParquetWriter(temporary, table.schema)
                writer.write_table(table.cast(writer.schema))
                job = replace(job, rows_done=job.rows_done + table.num_rows)
                self._write(job)
        finally:
            if writer is not None:
                writer.close()
        temporary.replace(place / _RESULT)
        return job

    def _check(self, place: Path) -> None:
        if self._stopping.is_set() or (place / _CANCELLED).exists():
            raise Stopped

    # --- state on disk ------------------------------------------------------------------------------------------------

    def _read(self, job_id: str) -> Job | None:
        """None for what is no job here; an id that is none never becomes a path."""
        if not _ID.fullmatch(job_id) or (self._home / job_id / _CANCELLED).exists():
            return None
        try:
            return Job(**json.loads((self._home / job_id / _STATE).read_text()))
        except FileNotFoundError:
            return None

    def _known(self) -> list[str]:
        places = list(self._home.iterdir()) if self._home.is_dir() else []
        return [place.name for place in places if self._read(place.name) is not None]

    def _write(self, job: Job) -> None:
        write_whole(self._home / job.id / _STATE, json.dumps(asdict(job)).encode())

    def _end(self, job: Job, status: JobStatus, error: dict[str, str] | None) -> Job:
        job = replace(job, status=status, error=error, finished_at=self._now().isoformat())
        self._write(job)
        return job

    def _forget(self, job_id: str) -> None:
        place = self._home / job_id
        try:
            (place / _CANCELLED).touch()
        except FileNotFoundError:  # another worker was faster
            return
        future = self._futures.get(job_id)
        if future is not None and future.cancel():  # it had not begun: its place is free at once
            return
        if self._is_free(job_id):  # else the worker that runs it clears up
            shutil.rmtree(place, ignore_errors=True)

    def _is_free(self, job_id: str) -> bool:
        """Whether no worker runs the job. Makes nothing: its worker may be removing the directory this moment."""
        try:
            with open(self._home / job_id / _LOCK) as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True
        except FileNotFoundError:
            return True
        except BlockingIOError:
            return False

    @staticmethod
    def _is_old(place: Path, oldest: datetime) -> bool:
        try:
            return os.stat(place).st_mtime < oldest.timestamp() or (place / _CANCELLED).exists()
        except FileNotFoundError:
            return False

    def _one_less(self) -> None:
        with self._mutex:
            self._mine -= 1
