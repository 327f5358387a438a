"""Answers feature and prediction requests: limits, plan, one read, model, metrics, served log. Knows nothing of HTTP."""

from __future__ import annotations

import asyncio
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any

from feature_store.errors import PredictFlowError, UsageError
from serving.encoding import plain
from serving.errors import TooManyError
from serving.limits import in_thread
from serving.model_runs import ModelRuns
from serving.online_types import Begun, CellRead, Done, Limits, StoredRead, entity_rows
from serving.served_log import Served, ServedLog

if TYPE_CHECKING:
    from feature_store.read_plan import OnlineRow, OnlineRows
    from serving.json_plan import Answered, Windowed
    from serving.limits import Gate
    from serving.metrics import Metrics
    from serving.models import Model, Models
    from serving.plans import Asked, Plans, ServicePlan


FUNCTION_THREADS = 2
"""For the functions of on-demand views: they are the user's, and must not hold the models' threads."""


class OnlineService:
    """Features and predictions for entities. One per process; requests run concurrently on its event loop.

    `route` is what metrics call the way that a request came.
    """

    def __init__(
        self,
        plans: Plans,
        models: Models,
        served_log: ServedLog,
        metrics: Metrics,
        threads: Executor,
        wall: Callable[[], datetime],
        limits: Limits,
        gate: Gate | None = None,
        functions: ThreadPoolExecutor | None = None,
    ) -> None:
        """`threads` run models, `functions` those of on-demand views (None: threads of its own). What still runs when its
        request has been given up keeps a slot of `gate`."""
        self._plans = plans
        self._models = models
        self._log = served_log
        self._metrics = metrics
        self._gate = gate
        self._functions = functions or ThreadPoolExecutor(FUNCTION_THREADS, thread_name_prefix="on-demand")
        self._runs = ModelRuns(threads)
        self._wall = wall
        self._limits = limits

    async def features(
        self,
        entities: Mapping[str, Sequence[object]],
        feature_service: str | None,
        features: Sequence[str] | None,
        at: datetime | None,
        full_names: bool,
        request_id: str,
        route: str,
    ) -> dict[str, Any]:
        """The body of an OnlineResponse. UsageError, NotFoundError or UnavailableError as the reader and plans raise."""
        if (feature_service is None) == (features is None):
            raise UsageError(
                "give either feature_service or features", next_step='{"feature_service": "churn_v1", ...}'
            )
        if features is not None and len(features) > self._limits.features:
            raise TooManyError("features", len(features), self._limits.features)
        started = time.perf_counter()
        rows = entity_rows(entities, self._limits.rows)
        plan = await self._plan(feature_service or tuple(features or ()), full_names)
        read = await self._read(plan, plan.keyed(rows), at)
        self._count(plan, read, started, route)
        self._log.write(Served(request_id, self._wall(), self._plans.project), plan, read)
        return {
            "t": read.t,
            "feature_service": plan.name,
            "feature_names": [c.name for c in plan.columns],
            "feature_types": [c.kind for c in plan.columns],
            "rows": [_row(row) for row in read.rows],
        }

    async def cells(
        self,
        entities: Mapping[str, Sequence[object]],
        asked: Asked,
        at: datetime | None,
        full_names: bool,
        request_id: str,
        route: str,
    ) -> CellRead:
        """As `features`, undecoded, for answers in Feast's own formats: a row view's cells are `Value` proto bytes."""
        started = time.perf_counter()
        plan, rows = await self._asked(entities, asked, full_names)
        compiled = plan.reader.plan
        replies, now_us = await plan.reader.afetch(rows, at)
        if plan.computes:
            t_us, answers = await in_thread(self._gate, self._functions, compiled.at, replies, now_us, rows)
        else:
            t_us, answers = compiled.at(replies, now_us, rows)
        if plan.json is not None:
            self._served(plan, plan.json.of_cells(rows, t_us, answers), request_id, started, route)
        else:
            read = compiled.rows(rows, t_us, answers)
            self._count(plan, read, started, route)
            self._log.write(Served(request_id, self._wall(), self._plans.project), plan, read)
        return CellRead(plan, rows, t_us, answers)

    async def stored(
        self, entities: Mapping[str, Sequence[object]], asked: Asked, full_names: bool, route: str
    ) -> StoredRead | None:
        """As `cells` at the clock, as Redis replied; tell `served` what came of it. None for what must be computed with:
        `cells` does."""
        started = time.perf_counter()
        plan, rows = await self._asked(entities, asked, full_names)
        if plan.json is None:
            return None
        replies, t_us = await plan.reader.afetch(rows)
        return StoredRead(started, route, plan, rows, t_us, replies)

    def served(
        self,
        read: StoredRead,
        counts: Sequence[tuple[str, str, int]],
        request_id: str,
        windowed: Windowed | None = None,
    ) -> None:
        """Counts and logs an answer to `stored`. `counts`: (view, status, number of values); `windowed`: what its windowed
        views said, so that they need not say it again."""
        name = read.plan.name or ""
        self._metrics.add_read(read.route, name, len(read.entities), time.perf_counter() - read.started)
        for count in counts:
            self._metrics.add_status(*count)
        if read.plan.json is not None:
            answered = read.plan.json.later(read.entities, read.replies, read.t_us, windowed)
            if self._metrics.wants_age(name):
                read.plan.json.ages(answered, self._metrics.add_age)
            self._log.write_read(Served(request_id, self._wall(), self._plans.project), answered)

    async def _asked(
        self, entities: Mapping[str, Sequence[object]], asked: Asked, full_names: bool
    ) -> tuple[ServicePlan, list[dict[str, object]]]:
        if not isinstance(asked, str) and len(asked) > self._limits.features:
            raise TooManyError("features", len(asked), self._limits.features)
        rows = entity_rows(entities, self._limits.rows)
        plan = await self._plan(asked, full_names)
        return plan, plan.keyed(rows)

    def begin(
        self,
        rows: Sequence[Mapping[str, object]],
        asked: Asked,
        full_names: bool,
        request_id: str,
        route: str,
        done: Done,
    ) -> bool:
        """As `features` at the clock, without a task, for a request that was checked: `done` gets the body or the error.

        False, and `done` is not called, for what needs the other path: a plan that is not compiled yet or not plain, too
        many features, entities that `features` refuses.
        """
        started = time.perf_counter()
        plan = self._plans.cached(asked, full_names)
        json = None if plan is None else plan.json
        if plan is None or json is None or (not isinstance(asked, str) and len(asked) > self._limits.features):
            return False
        reader: Any = plan.reader

        def replied(replies: list[Any] | None, error: PredictFlowError | None) -> None:
            if replies is None:
                done(None, error)
                return
            try:
                read = json.answered(rows, *reader.replied(replies))
                body = json.body(read)
            except Exception as e:  # noqa: BLE001 - whatever it is, the caller waits for an answer, and logs it
                done(None, e)
                return
            done(body, None)
            self._served(plan, read, request_id, started, route)

        try:
            return bool(reader.start(rows, replied))
        except UsageError:
            return False

    def begin_predict(
        self,
        model_name: str,
        rows: Sequence[Mapping[str, object]],
        request_id: str,
        route: str,
        done: Done,
        begun: Begun,
    ) -> bool:
        """As `predict` at the clock, in the way of `begin`. False also for a model that is not loaded yet."""
        started = time.perf_counter()
        model = self._models.cached(model_name)
        plan = None if model is None else self._plans.cached(model.feature_service, False)
        json = None if plan is None else plan.json
        if model is None or plan is None or json is None:
            return False
        reader: Any = plan.reader

        def replied(replies: list[Any] | None, error: PredictFlowError | None) -> None:
            if replies is None:
                done(None, error)
                return
            try:
                found, t_us = reader.replied(replies)
                read = json.answered(rows, found, t_us)
                values = json.inputs(read)
                if values is None:
                    values = _values(plan, reader.plan.decode(rows, found, t_us))
                begun(self._runs.start(model, plan.columns, values, partial(predicted, read)))
            except Exception as e:  # noqa: BLE001 - as in `begin`
                done(None, e)

        def predicted(read: Answered, probabilities: list[float] | None, error: Exception | None) -> None:
            if probabilities is None:
                done(None, error)
                return
            read.probabilities = probabilities
            try:
                body = json.predictions(read, probabilities, model.name, model.version)
            except Exception as e:  # noqa: BLE001 - as in `begin`
                done(None, e)
                return
            done(body, None)
            self._served(plan, read, request_id, started, route, model)

        try:
            return bool(reader.start(rows, replied))
        except UsageError:
            return False

    def _served(
        self, plan: ServicePlan, read: Answered, request_id: str, started: float, route: str, model: Model | None = None
    ) -> None:
        name = plan.name or ""
        self._metrics.add_read(route, name, len(read), time.perf_counter() - started)
        read.plan.count(read, self._metrics.add_status)
        if self._metrics.wants_age(name):
            read.plan.ages(read, self._metrics.add_age)
        named = (None, None) if model is None else (model.name, model.version)
        self._log.write_read(Served(request_id, self._wall(), self._plans.project, *named), read)

    async def predict(
        self,
        model_name: str,
        entities: Mapping[str, Sequence[object]],
        at: datetime | None,
        request_id: str,
        route: str,
    ) -> dict[str, Any]:
        """The body of a PredictResponse; errors as `features`, and NotFoundError for a model without a champion."""
        started = time.perf_counter()
        rows = entity_rows(entities, self._limits.rows)
        model = self._models.cached(model_name)
        if model is None:
            model = await asyncio.to_thread(self._models.get, model_name)
        plan = await self._plan(model.feature_service, False)
        read = await self._read(plan, plan.keyed(rows), at)
        probabilities = await self._runs.run(model, plan.columns, _values(plan, read), self._gate)
        self._count(plan, read, started, route)
        served = Served(request_id, self._wall(), self._plans.project, model.name, model.version)
        self._log.write(served, plan, read, probabilities)
        return {
            "model": model.name,
            "version": model.version,
            "feature_service": model.feature_service,
            "feature_types": {c.name: c.kind for c in plan.columns},
            "t": read.t,
            "predictions": [{**_row(row), "probability": p} for row, p in zip(read.rows, probabilities)],
        }

    async def _read(self, plan: ServicePlan, rows: list[dict[str, object]], at: datetime | None) -> OnlineRows:
        """As `plan.reader.aread`; the functions of on-demand views run in a thread: the event loop serves others."""
        if not plan.computes:
            return await plan.reader.aread(rows, at)
        replies, now_us = await plan.reader.afetch(rows, at)
        decode = plan.reader.plan.decode
        return await in_thread(self._gate, self._functions, decode, rows, replies, now_us)

    async def _plan(self, asked: Asked, full_names: bool) -> ServicePlan:
        plan = self._plans.cached(asked, full_names)
        return plan if plan is not None else await asyncio.to_thread(self._plans.get, asked, full_names)

    def _count(self, plan: ServicePlan, read: OnlineRows, started: float, route: str) -> None:
        name = plan.name or ""
        self._metrics.add_read(route, name, len(read.rows), time.perf_counter() - started)
        counts = Counter((c.view, row.statuses[c.name]) for row in read.rows for c in plan.columns)
        self._metrics.count_statuses(counts.items())
        if self._metrics.wants_age(name):
            for view, held in [pair for row in read.rows[:1] for pair in row.views.items()]:
                if held.event_timestamp is not None:
                    self._metrics.add_age(view, (read.t - held.event_timestamp).total_seconds())


def _values(plan: ServicePlan, read: OnlineRows) -> list[list[Any]]:
    return [[row.values[c.name] for c in plan.columns] for row in read.rows]


def _row(row: OnlineRow) -> dict[str, Any]:
    return {
        "entity": plain(row.entity),
        "values": {name: plain(value) for name, value in row.values.items()},
        "statuses": row.statuses,
        "offsets": {
            name: {str(p): o for p, o in view.offsets.items()}
            for name, view in row.views.items()
            if view.offsets is not None
        },
        "event_timestamps": row.event_timestamps,
    }
