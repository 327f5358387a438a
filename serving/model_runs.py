"""Runs models in threads: the requests that wait for one model go through it together, in one call.

A scikit-learn pipeline takes nearly as long for one row as for a hundred, and holds the interpreter while it runs. So at
most one call per model is under way; what arrives meanwhile shares the next one. A row's prediction does not depend on
the rows beside it, but for the last bit of a floating-point sum.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from typing import TYPE_CHECKING, Any

from feature_store.errors import UnavailableError

if TYPE_CHECKING:
    import pandas as pd

    from serving.models import Model
    from serving.plans import Column

log = logging.getLogger(__name__)

Rows = Sequence[Sequence[Any]]
"""Values in the order of a plan's columns."""
Done = Callable[[list[float] | None, Exception | None], None]
"""Called once, on the event loop, with a probability per row or with the error."""
TOGETHER = 256
"""Rows in one call of several requests; a request of as many goes alone, and holds no other up."""


class ModelInput:
    """Frames for a model out of one plan's rows: which of the columns, in which order, of which kind; found out once."""

    def __init__(self, wanted: Sequence[str], columns: Sequence[Column]) -> None:
        """`wanted`: names among the `columns`, in the model's order."""
        places = {c.name: i for i, c in enumerate(columns)}
        self._names = list(wanted)
        self._places = [places[name] for name in wanted]
        self._numeric = [columns[i].numeric for i in self._places]
        self._header: Any = None

    def frame(self, rows: Rows) -> pd.DataFrame:
        """None is missing: NaN for a number (float64), and None for text (object), as in training."""
        import numpy as np
        import pandas as pd

        if self._header is None:
            self._header = pd.Index(self._names)
        if all(self._numeric) and self._names:  # one block: making a frame of columns costs more than reading them
            numbers = [[np.nan if (v := row[i]) is None else v for i in self._places] for row in rows]
            block = np.array(numbers, dtype=np.float64).reshape(len(rows), len(self._names))
            return pd.DataFrame(block, columns=self._header, copy=False)
        data: dict[str, Any] = {}
        for name, i, numeric in zip(self._names, self._places, self._numeric):
            values = [row[i] for row in rows]
            if numeric:
                data[name] = np.array([np.nan if v is None else v for v in values], dtype=np.float64)
            else:
                data[name] = np.array(values, dtype=object)
        return pd.DataFrame(data, columns=self._header, copy=False)


class _Waiting:
    """A model that is running, and the requests for its next call."""

    def __init__(self, model: Model, given: ModelInput) -> None:
        self.model = model
        self.given = given
        self.requests: deque[tuple[Rows, Done]] = deque()

    def take(self) -> list[tuple[Rows, Done]]:
        taken: list[tuple[Rows, Done]] = []
        rows = 0
        while self.requests and (not taken or rows + len(self.requests[0][0]) <= TOGETHER):
            taken.append(self.requests.popleft())
            rows += len(taken[-1][0])
        return taken


class ModelRuns:
    """Of one event loop; `threads` are where models run."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._running: dict[int, _Waiting] = {}
        self._inputs: dict[str, tuple[Model, Sequence[Column], ModelInput]] = {}

    def start(self, model: Model, columns: Sequence[Column], rows: Rows, done: Done) -> None:
        """Lets `model` predict for rows of these columns. DataError, and `done` is not called, when they do not feed it."""
        given = self._input(model, columns)
        if len(rows) >= TOGETHER:
            self._run(_Waiting(model, given), [(rows, done)], None)
            return
        waiting = self._running.get(id(given))
        if waiting is not None:
            waiting.requests.append((rows, done))
            return
        waiting = _Waiting(model, given)  # holds `given`, so its id is nobody else's while it is a key
        self._running[id(given)] = waiting
        try:
            self._run(waiting, [(rows, done)], id(given))
        except BaseException:
            del self._running[id(given)]
            raise

    async def run(self, model: Model, columns: Sequence[Column], rows: Rows) -> list[float]:
        """As `start`, awaited; whatever the model raises is raised."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()

        def done(probabilities: list[float] | None, error: Exception | None) -> None:
            if future.done():  # the caller no longer waits
                return
            if probabilities is None:
                future.set_exception(error or RuntimeError("a model gave neither a prediction nor an error"))
            else:
                future.set_result(probabilities)

        self.start(model, columns, rows, done)
        return await future

    def _input(self, model: Model, columns: Sequence[Column]) -> ModelInput:
        known = self._inputs.get(model.name)
        if known is not None and known[0] is model and known[1] is columns:
            return known[2]
        given = model.input(columns)
        self._inputs[model.name] = (model, columns, given)
        return given

    def _run(self, waiting: _Waiting, batch: list[tuple[Rows, Done]], key: int | None) -> None:
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(
            self._threads, predict_each, waiting.model, waiting.given, [rows for rows, _ in batch]
        )
        future.add_done_callback(lambda f: self._finished(waiting, batch, key, f))

    def _finished(
        self,
        waiting: _Waiting,
        batch: list[tuple[Rows, Done]],
        key: int | None,
        future: asyncio.Future[list[list[float] | Exception]],
    ) -> None:
        answers: Sequence[list[float] | Exception]
        try:
            answers = future.result()
        except (Exception, asyncio.CancelledError) as e:
            log.debug("a model's thread did not run", exc_info=e)
            answers = [UnavailableError("the server is stopping", next_step="ask another one")] * len(batch)
        if key is not None:
            following = waiting.take()
            if following:
                try:
                    self._run(waiting, following, key)
                except RuntimeError as e:  # no threads any more: the server is stopping
                    batch, answers = [*batch, *following, *waiting.requests], [*answers]
                    answers += [e] * (len(batch) - len(answers))
                    following = []
            if not following:
                del self._running[key]
        for (_, done), answer in zip(batch, answers):
            if isinstance(answer, Exception):
                done(None, answer)
            else:
                done(answer, None)


def predict_each(model: Model, given: ModelInput, requests: Sequence[Rows]) -> list[list[float] | Exception]:
    """What the model says to each request, or raises. Blocking."""
    if len(requests) > 1:
        try:
            found = model.run(given.frame([row for rows in requests for row in rows]))
        except Exception:  # noqa: BLE001 - one request's rows must not fail the others: each is tried alone, and told its own fault
            found = []
        if len(found) == sum(map(len, requests)):
            out: list[list[float] | Exception] = []
            at = 0
            for rows in requests:
                out.append(found[at : at + len(rows)])
                at += len(rows)
            return out
    answers: list[list[float] | Exception] = []
    for rows in requests:
        try:
            answers.append(model.run(given.frame(rows)))
        except Exception as e:  # noqa: BLE001 - told, and logged, by whoever asked
            answers.append(e)
    return answers
