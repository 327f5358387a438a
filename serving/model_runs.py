"""Runs models in threads: the requests that wait for one model go through it together, in one call.

A scikit-learn pipeline takes nearly as long for one row as for a hundred, and holds the interpreter while it runs. So at
most one call per model is under way; what arrives meanwhile shares the next one, unless whoever asked has given up. A
row's prediction does not depend on the rows beside it, but for the last bit of a floating-point sum.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, Future
from functools import partial
from typing import TYPE_CHECKING, Any

from feature_store.errors import UnavailableError
from serving.limits import OverloadedError

if TYPE_CHECKING:
    import pandas as pd

    from serving.limits import Gate
    from serving.models import Model
    from serving.plans import Column

log = logging.getLogger(__name__)

Rows = Sequence[Sequence[Any]]
"""Values in the order of a plan's columns."""
Done = Callable[[list[float] | None, Exception | None], None]
"""Called once, on the event loop, with a probability per row or with the error."""
TOGETHER = 256
"""Rows in one call of several requests; a request of as many goes alone, and holds no other up."""
QUEUED = 1024
"""Requests that wait for one model; more are refused. The gate's slots are fewer by default."""
Cancel = Callable[[], bool]
"""Drops a request that waits: True, and `done` is never called. False for one that runs, or has ended."""


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


class _Request:
    """One request's rows; compared by identity."""

    __slots__ = ("done", "rows")

    def __init__(self, rows: Rows, done: Done) -> None:
        self.rows = rows
        self.done = done


class _Waiting:
    """A model that is running, and the requests for its next call."""

    def __init__(self, model: Model, given: ModelInput) -> None:
        self.model = model
        self.given = given
        self.requests: deque[_Request] = deque()

    def take(self) -> list[_Request]:
        taken: list[_Request] = []
        rows = 0
        while self.requests and (not taken or rows + len(self.requests[0].rows) <= TOGETHER):
            taken.append(self.requests.popleft())
            rows += len(taken[-1].rows)
        return taken

    def drop(self, request: _Request) -> bool:
        try:
            self.requests.remove(request)
        except ValueError:  # it runs, or has ended
            return False
        return True


class ModelRuns:
    """Of one event loop; `threads` are where models run."""

    def __init__(self, threads: Executor) -> None:
        self._threads = threads
        self._running: dict[int, _Waiting] = {}
        self._inputs: dict[str, tuple[Model, Sequence[Column], ModelInput]] = {}

    def start(self, model: Model, columns: Sequence[Column], rows: Rows, done: Done) -> Cancel:
        """Lets `model` predict for rows of these columns. DataError when they do not feed it, OverloadedError when too many
        requests wait for it; then `done` is not called."""
        given = self._input(model, columns)
        request = _Request(rows, done)
        if len(rows) >= TOGETHER:
            alone = [request]
            work = self._run(_Waiting(model, given), alone, None)
            return work.cancel  # where no thread has begun it
        waiting = self._running.get(id(given))
        if waiting is not None:
            if len(waiting.requests) >= QUEUED:
                raise OverloadedError(
                    f"{QUEUED} requests wait for model {model.name}, the limit", next_step="try again after Retry-After"
                )
            waiting.requests.append(request)
            return partial(waiting.drop, request)
        waiting = _Waiting(model, given)  # holds `given`, so its id is nobody else's while it is a key
        self._running[id(given)] = waiting
        try:
            self._run(waiting, [request], id(given))
        except BaseException:
            del self._running[id(given)]
            raise
        return partial(waiting.drop, request)

    async def run(self, model: Model, columns: Sequence[Column], rows: Rows, gate: Gate | None = None) -> list[float]:
        """As `start`, awaited; whatever the model raises is raised. When the caller gives up, a request that waits is
        dropped; one that runs keeps a slot of `gate` until it ends."""
        future: asyncio.Future[list[float]] = asyncio.get_running_loop().create_future()
        ended: Future[None] = Future()

        def done(probabilities: list[float] | None, error: Exception | None) -> None:
            ended.set_result(None)
            if future.done():  # the caller no longer waits
                return
            if probabilities is None:
                future.set_exception(error or RuntimeError("a model gave neither a prediction nor an error"))
            else:
                future.set_result(probabilities)

        cancel = self.start(model, columns, rows, done)
        try:
            return await future
        except asyncio.CancelledError:
            if not cancel() and gate is not None:
                gate.hold_until(ended)
            raise

    def _input(self, model: Model, columns: Sequence[Column]) -> ModelInput:
        known = self._inputs.get(model.name)
        if known is not None and known[0] is model and known[1] is columns:
            return known[2]
        given = model.input(columns)
        self._inputs[model.name] = (model, columns, given)
        return given

    def _run(self, waiting: _Waiting, batch: list[_Request], key: int | None) -> Future[Any]:
        work = self._threads.submit(predict_each, waiting.model, waiting.given, [r.rows for r in batch])
        asyncio.wrap_future(work).add_done_callback(lambda f: self._finished(waiting, batch, key, f))
        return work

    def _finished(
        self,
        waiting: _Waiting,
        batch: list[_Request],
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
        for request, answer in zip(batch, answers):
            if isinstance(answer, Exception):
                request.done(None, answer)
            else:
                request.done(answer, None)


def predict_each(model: Model, given: ModelInput, requests: Sequence[Rows]) -> list[list[float] | Exception]:
    """What the model says to each request, or raises. Blocking.

    One request's rows must not fail the others: what failed together is tried again in halves, so that one bad request
    among n costs about 2 log2(n) calls more.
    """
    try:
        found = model.run(given.frame([row for rows in requests for row in rows]))
    except Exception as e:  # noqa: BLE001 - told, and logged, by whoever asked
        if len(requests) == 1:
            return [e]
        found = None
    out: list[list[float] | Exception] = []
    if found is not None and (len(requests) == 1 or len(found) == sum(map(len, requests))):
        at = 0
        for rows in requests:
            out.append(found[at : at + len(rows)] if len(requests) > 1 else found)
            at += len(rows)
        return out
    half = len(requests) // 2
    return predict_each(model, given, requests[:half]) + predict_each(model, given, requests[half:])
