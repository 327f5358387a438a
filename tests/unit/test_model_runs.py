"""What waits for a model: who has given up is not run for, and one bad request does not cost a call per request."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from serving import model_runs
from serving.limits import Gate, OverloadedError
from serving.model_runs import ModelRuns, predict_each
from serving.models import Model
from serving.plans import Column

COLUMNS = (Column("a", "v", "a", True),)


class Pipeline:
    """Runs once `go` is set; fails for negative values."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.calls: list[list[float]] = []

    def predict_proba(self, frame: Any) -> Any:
        given = frame["a"].to_numpy()
        self.calls.append(given.tolist())
        assert self.go.wait(60)
        if (given < 0).any():
            raise ValueError("unlucky")
        return np.column_stack([-given, given])


def model_of(pipeline: Pipeline) -> Model:
    return Model("m", "1", "s", pipeline, 1, ("a",))


async def until(what: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not what():
            await asyncio.sleep(0.005)


def test_what_is_given_up_while_it_waits_is_never_run() -> None:
    async def run() -> None:
        pipeline, gate = Pipeline(), Gate(None, 9)
        model = model_of(pipeline)
        with ThreadPoolExecutor(1) as threads:
            runs = ModelRuns(threads)
            first = asyncio.create_task(runs.run(model, COLUMNS, [[1.0]], gate))
            await until(lambda: len(pipeline.calls) == 1)
            asked = [asyncio.create_task(runs.run(model, COLUMNS, [[v]], gate)) for v in (2.0, 3.0)]
            large = asyncio.create_task(runs.run(model, COLUMNS, [[4.0]] * model_runs.TOGETHER, gate))
            await asyncio.sleep(0)
            for task in (first, asked[0], large):
                task.cancel()
            await asyncio.gather(first, asked[0], large, return_exceptions=True)
            assert gate.busy == 1  # of the one that runs
            pipeline.go.set()
            assert await asked[1] == [3.0]
            await until(lambda: gate.busy == 0)
        assert pipeline.calls == [[1.0], [3.0]]

    asyncio.run(run())


def test_only_so_many_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        monkeypatch.setattr(model_runs, "QUEUED", 1)
        pipeline = Pipeline()
        model = model_of(pipeline)
        with ThreadPoolExecutor(1) as threads:
            runs = ModelRuns(threads)
            asked = [asyncio.create_task(runs.run(model, COLUMNS, [[v]])) for v in (1.0, 2.0, 3.0)]
            await asyncio.sleep(0)
            pipeline.go.set()
            found = await asyncio.gather(*asked, return_exceptions=True)
        assert found[:2] == [[1.0], [2.0]]
        assert isinstance(found[2], OverloadedError)

    asyncio.run(run())


def test_one_bad_request_among_many_costs_few_calls_and_fails_alone() -> None:
    pipeline = Pipeline()
    pipeline.go.set()
    model = model_of(pipeline)
    found = predict_each(model, model.input(COLUMNS), [[[float(v)]] for v in range(100)] + [[[-1.0]]])
    assert found[:100] == [[float(v)] for v in range(100)]
    assert isinstance(found[100], ValueError)
    assert len(pipeline.calls) <= 2 * 7 + 1
