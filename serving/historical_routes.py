"""The routes of historical features and of the jobs that large requests become."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from pydantic import ValidationError

from feature_store.errors import NotFoundError, UsageError
from serving import schemas
from serving.arrow_input import MEDIA_TYPE as ARROW
from serving.arrow_input import read_stream
from serving.encoding import JSONBytes, dumps, plain
from serving.errors import BodyTooLargeError
from serving.historical import SLICE_ROWS, Historical, Wanted
from serving.jobs import Job, Jobs
from serving.limits import HISTORICAL_PATH, RequestLimits, in_thread
from serving.openapi import faults, returns

if TYPE_CHECKING:
    from serving.metrics import Metrics

PARQUET = "application/vnd.apache.parquet"
BODIES = 8
"""Requests whose bodies, or the rows in them, are held at a time; the others are not read yet."""
_BATCH_ROWS = 16_384
_CHUNK_BYTES = 256 * 1024
_BINARY = {"schema": {"type": "string", "format": "binary"}}


def add_routes(
    app: FastAPI,
    historical: Historical,
    jobs: Jobs,
    threads: ThreadPoolExecutor,
    limits: RequestLimits,
    metrics: Metrics,
) -> None:
    """`threads` is where requests are answered: so many at a time, the others wait. A read that goes on after its request
    was given up keeps the request's slot."""

    held = asyncio.Semaphore(BODIES)

    async def run(request: Request, call: Any, *args: Any) -> Any:
        return await in_thread(request.state.slots, threads, call, *args)

    def owner_of(request: Request) -> tuple[str | None, bool]:
        """Whose jobs a request may see: its key's; all of them with the scope admin and where no keys are asked for."""
        caller = request.state.caller
        return (None, True) if caller is None else (caller.name, caller.may("admin"))

    @app.post(
        HISTORICAL_PATH,
        response_model=schemas.HistoricalResponse,
        responses={
            200: {
                "content": {ARROW: _BINARY},
                "description": "The rows with their features; Arrow if `Accept` says so",
            },
            202: {
                "model": schemas.JobInfo,
                "description": "Many rows: a job was started, see `Location`",
                "headers": returns("Location"),
            },
            **faults(400, 404, 413, 422, 429),
        },
        openapi_extra={
            "requestBody": {
                "required": True,
                "content": {
                    "application/json": {"schema": schemas.HistoricalRequest.model_json_schema()},
                    ARROW: {"schema": {"type": "string", "format": "binary", "description": "Entity rows"}},
                },
            }
        },
        tags=["features"],
        summary="Feature values of entities, each at its own time",
    )
    async def features_historical(
        request: Request,
        feature_service: Annotated[str | None, Query(description="With an Arrow body; else a field of it.")] = None,
        features: Annotated[list[str] | None, Query(description="With an Arrow body; else a field of it.")] = None,
        as_known: Annotated[bool, Query(description="With an Arrow body; else a field of it.")] = True,
        full_feature_names: Annotated[bool, Query(description="With an Arrow body; else a field of it.")] = False,
    ) -> Response:
        """Every row comes back once, in order, with the values that were known at its `event_timestamp`."""
        async with held:
            return await answer(request, feature_service, features, as_known, full_feature_names)

    async def answer(
        request: Request,
        feature_service: str | None,
        features: list[str] | None,
        as_known: bool,
        full_feature_names: bool,
    ) -> Response:
        body = await request.body()
        started = time.perf_counter()
        if _media_type(request) == ARROW:

            def wanted() -> Wanted:
                table = read_stream(body, historical.limits.rows)
                return historical.wanted(_asked(feature_service, features), table, as_known, full_feature_names)

        else:
            if request.query_params:
                raise UsageError("with a JSON body the options are fields of it", value=str(request.query_params)[:80])
            if len(body) > limits.body_bytes:
                raise BodyTooLargeError(limits.body_bytes)

            def wanted() -> Wanted:
                asked = _parsed(body)
                return historical.wanted(
                    _asked(asked.feature_service, asked.features),
                    asked.entities,
                    asked.as_known,
                    asked.full_feature_names,
                )

        request_wanted: Wanted = await run(request, wanted)
        if request_wanted.rows > historical.limits.inline_rows:
            owner, _ = owner_of(request)
            tables = partial(historical.tables, request_wanted, SLICE_ROWS)
            job = await run(request, jobs.submit, request_wanted.rows, tables, owner)
            return JSONBytes(_job(job), status_code=202, headers={"Location": f"/api/v1/jobs/{job.id}"})
        arrow = ARROW in request.headers.get("accept", "")
        content = await run(request, _arrow_answer if arrow else _json_answer, historical, request_wanted)
        metrics.observe_service(HISTORICAL_PATH, request_wanted.feature_service or "", time.perf_counter() - started)
        return Response(content, media_type=ARROW if arrow else "application/json")

    @app.get(
        "/api/v1/jobs/{job}",
        response_model=schemas.JobInfo,
        responses=faults(404, 422),
        tags=["jobs"],
        summary="Status and progress of a job",
    )
    async def job_status(job: str, request: Request) -> Response:
        return JSONBytes(_job(await asyncio.to_thread(jobs.get, job, *owner_of(request))))

    @app.get(
        "/api/v1/jobs/{job}/result",
        response_class=Response,
        responses={
            200: {"content": {ARROW: _BINARY, PARQUET: _BINARY}, "description": "The rows with their features"},
            **faults(404, 409, 422),
        },
        tags=["jobs"],
        summary="Result of a job: an Arrow stream, or Parquet if `Accept` says so",
    )
    async def job_result(job: str, request: Request) -> Response:
        path = await asyncio.to_thread(jobs.result, job, *owner_of(request))
        file = await asyncio.to_thread(_opened, path, job)
        if PARQUET in request.headers.get("accept", ""):
            return StreamingResponse(_chunks(file), media_type=PARQUET)
        return StreamingResponse(_arrow_chunks(file), media_type=ARROW)

    @app.delete(
        "/api/v1/jobs/{job}",
        status_code=204,
        response_class=Response,
        responses=faults(404, 422),
        tags=["jobs"],
        summary="Cancel a job, or remove its result",
    )
    async def job_cancel(job: str, request: Request) -> Response:
        await asyncio.to_thread(jobs.cancel, job, *owner_of(request))
        return Response(status_code=204)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


def _asked(feature_service: str | None, features: list[str] | None) -> str | tuple[str, ...]:
    if (feature_service is None) == (not features):
        raise UsageError("give either feature_service or features", next_step='{"feature_service": "churn_v1", ...}')
    return feature_service if feature_service is not None else tuple(features or ())


def _parsed(body: bytes) -> schemas.HistoricalRequest:
    try:
        return schemas.HistoricalRequest.model_validate_json(body)
    except ValidationError as e:
        raise RequestValidationError(e.errors(include_url=False, include_context=False)) from e


def _json_answer(historical: Historical, wanted: Wanted) -> bytes:
    table = historical.table(wanted)
    head = dumps(
        {"feature_service": wanted.feature_service, "feature_names": wanted.feature_names, "rows": table.num_rows}
    )
    # A column at a time: encoding holds the interpreter, and other requests want it too.
    columns = [
        dumps(name) + b":" + dumps([plain(v) for v in table.column(i).to_pylist(maps_as_pydicts="lossy")])
        for i, name in enumerate(table.column_names)
    ]
    return head[:-1] + b',"columns":{' + b",".join(columns) + b"}}"


def _arrow_answer(historical: Historical, wanted: Wanted) -> bytes:
    import pyarrow as pa

    table = historical.table(wanted)
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def _opened(path: Path, job: str) -> BinaryIO:
    try:
        return path.open("rb")
    except FileNotFoundError as e:  # swept or cancelled meanwhile
        raise NotFoundError("no such job", value=job) from e


def _chunks(file: BinaryIO) -> Iterator[bytes]:
    with file:
        while chunk := file.read(_CHUNK_BYTES):
            yield chunk


def _arrow_chunks(file: BinaryIO) -> Iterator[bytes]:
    """A Parquet file as an Arrow stream, a batch at a time."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    with file, pq.ParquetFile(file) as parquet:
        sink = _Sink()
        with pa.ipc.new_stream(pa.PythonFile(sink, mode="w"), parquet.schema_arrow) as writer:
            for batch in parquet.iter_batches(_BATCH_ROWS):
                writer.write_batch(batch)
                yield sink.take()
        yield sink.take()


class _Sink:
    """A file to write to, from which what was written is taken."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self.closed = False

    def write(self, data: Any) -> int:
        self._parts.append(bytes(data))
        return len(self._parts[-1])

    def flush(self) -> None:
        """Nothing is held back."""

    def close(self) -> None:
        self.closed = True

    def take(self) -> bytes:
        parts, self._parts = self._parts, []
        return b"".join(parts)


def _job(job: Job) -> dict[str, Any]:
    return {
        "id": job.id,
        "status": job.status,
        "rows_done": job.rows_done,
        "rows_total": job.rows_total,
        "created_at": job.created_at,
        "finished_at": job.finished_at,
        "error": job.error,
    }
