"""How far a backfill has come: its run, and the chunks whose files are published, in Postgres beside the lineage.

Only a memory of what need not be done again. What is true stands in the files: a chunk counts as done when its record
says so and the published files have the recorded digests, so a lost or stale record costs work, never correctness.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

from feature_store import schema
from feature_store.postgres import Postgres
from feature_store.sql import blocks

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor


@dataclass(frozen=True)
class Run:
    """One backfill; `run_id` is made from all that its result depends on, so a repeated run has the same one."""

    run_id: str
    view: str
    definition_hash: str
    start: datetime | None
    end: datetime | None
    known_by: datetime | None


@dataclass(frozen=True)
class Published:
    """A chunk's result: its rows (of this run, not kept ones) and its files, by name below the table, with digests."""

    rows: int
    files: tuple[str, ...]
    sha256: tuple[str, ...]


@dataclass(frozen=True)
class Progress:
    """How far a run had come: whether it had ended well, and its finished chunks by number."""

    done: bool
    chunks: Mapping[int, Published]


class BackfillState(Protocol):
    """Where runs and chunks are remembered. Every method is safe to repeat and may be called from any thread."""

    def open(self, run: Run) -> Progress:
        """Begins or takes up a run: how far it had come."""

    def finished(self, run: Run, chunk: int) -> Published | None:
        """The record of one chunk, where another process may have made it meanwhile."""

    def start(self, run: Run, chunk: int, start: datetime, end: datetime) -> None:
        """A chunk is being computed; what was recorded of it no longer counts."""

    def finish(self, run: Run, chunk: int, result: Published) -> None:
        """A chunk's files are published."""

    def fail(self, run: Run, chunk: int, error: str) -> None:
        """A chunk could not be computed; one line that says why."""

    def close(self, run: Run, done: bool) -> None:
        """The run has ended."""


class MemoryState:
    """State of one process: within it a repeated run skips what is done. For `backfill()` without Postgres."""

    def __init__(self) -> None:
        self.done: dict[tuple[str, int], Published] = {}
        self.errors: dict[tuple[str, int], str] = {}
        self.ended: set[str] = set()

    def open(self, run: Run) -> Progress:
        chunks = {chunk: result for (run_id, chunk), result in self.done.items() if run_id == run.run_id}
        done = run.run_id in self.ended
        self.ended.discard(run.run_id)
        return Progress(done, chunks)

    def finished(self, run: Run, chunk: int) -> Published | None:
        return self.done.get((run.run_id, chunk))

    def start(self, run: Run, chunk: int, start: datetime, end: datetime) -> None:
        self.done.pop((run.run_id, chunk), None)
        self.errors.pop((run.run_id, chunk), None)

    def finish(self, run: Run, chunk: int, result: Published) -> None:
        self.done[run.run_id, chunk] = result

    def fail(self, run: Run, chunk: int, error: str) -> None:
        self.errors[run.run_id, chunk] = error

    def close(self, run: Run, done: bool) -> None:
        if done:
            self.ended.add(run.run_id)


class PostgresState:
    """State in the schema `predictflow` (tables backfill_runs, backfill_chunks) of one Feast project.

    Connects on first use; threads take turns. Makes the schema in a fresh database. `clock` gives the times that are
    recorded, for people to read: nothing is decided by them. UnavailableError when Postgres does not answer.
    """

    def __init__(self, url: str, clock: Callable[[], datetime], project: str = "predictflow") -> None:
        self.project = project
        self._postgres = Postgres(url)
        self._clock = clock
        self._sql = blocks("backfill.sql")
        self._checked = False

    def __enter__(self) -> PostgresState:
        return self

    def __exit__(self, *_: object) -> None:
        self._postgres.close()

    def open(self, run: Run) -> Progress:
        with self._cursor() as cursor:
            cursor.execute(self._sql["run_status"], {"run_id": run.run_id})
            status = cursor.fetchone()
            cursor.execute(
                self._sql["open_run"],
                {
                    "run_id": run.run_id,
                    "project": self.project,
                    "view": run.view,
                    "definition_hash": run.definition_hash,
                    "start": run.start,
                    "end": run.end,
                    "known_by": run.known_by,
                    "at": self._clock(),
                },
            )
            cursor.execute(self._sql["done_chunks"], {"run_id": run.run_id})
            rows = cursor.fetchall()
        return Progress(
            done=status is not None and status[0] == "done",
            chunks={n: Published(count, tuple(files), tuple(digests)) for n, count, files, digests in rows},
        )

    def finished(self, run: Run, chunk: int) -> Published | None:
        with self._cursor() as cursor:
            cursor.execute(self._sql["done_chunk"], {"run_id": run.run_id, "number": chunk})
            row = cursor.fetchone()
        return Published(row[0], tuple(row[1]), tuple(row[2])) if row else None

    def start(self, run: Run, chunk: int, start: datetime, end: datetime) -> None:
        self._do("start_chunk", run, number=chunk, start=start, end=end)

    def finish(self, run: Run, chunk: int, result: Published) -> None:
        # psycopg2 writes a list as an array, a tuple as a row.
        files, sha256 = list(result.files), list(result.sha256)
        self._do("finish_chunk", run, number=chunk, rows=result.rows, files=files, sha256=sha256)

    def fail(self, run: Run, chunk: int, error: str) -> None:
        self._do("fail_chunk", run, number=chunk, error=error)

    def close(self, run: Run, done: bool) -> None:
        self._do("close_run", run, status="done" if done else "failed")

    def _do(self, statement: str, run: Run, **values: object) -> None:
        with self._cursor() as cursor:
            cursor.execute(self._sql[statement], {"run_id": run.run_id, "at": self._clock(), **values})

    @contextmanager
    def _cursor(self) -> Iterator[Cursor]:
        with self._postgres.transaction() as cursor:
            if not self._checked:
                schema.ensure(cursor)
            yield cursor
        # Only after the commit: a schema made in a transaction that was rolled back is gone again.
        self._checked = True
