"""A micro-batch on its way through a view: its good events, what becomes of them, and the write that is under way."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from feature_store.batch_result import BatchResult
from feature_store.event_decode import RawBatch
from feature_store.event_numbers import Numbers
from feature_store.held_states import Key
from feature_store.logged import Bools, Ints
from feature_store.window_store import Writing
from feature_store.windows.state import States


@dataclass(frozen=True)
class GoodEvents:
    """Good events of a batch, by column."""

    rows: pa.Table
    place: Ints
    partition: Ints
    offset: Ints
    time: Ints
    numbers: Numbers

    def __len__(self) -> int:
        return len(self.place)

    def where(self, keep: Bools) -> GoodEvents:
        if keep.all():
            return self
        numbers = {name: column[keep] for name, column in self.numbers.items()}
        rows = self.rows.filter(pa.array(keep))
        return GoodEvents(rows, self.place[keep], self.partition[keep], self.offset[keep], self.time[keep], numbers)


@dataclass(frozen=True)
class Placed:
    """Events of a batch with what becomes of them: `logged`: in the log before; `before`: the watermark before each,
    `after`: of each partition after the batch; `moved`: entities with events in one more partition than their state held."""

    events: GoodEvents
    keys: list[Key]
    states: States
    visible: Ints
    logged: Bools
    before: Ints
    after: dict[int, int]
    outcome: np.ndarray[Any, Any]
    moved: np.ndarray[Any, Any]


@dataclass(frozen=True)
class Prepared:
    """A batch of which nothing is written. `placed` None: the states must be loaded first."""

    batch: RawBatch
    now_us: int
    wall_us: int
    result: BatchResult
    events: GoodEvents | None = None
    placed: Placed | None = None


@dataclass(frozen=True)
class Begun:
    """A batch that is in the log, and on its way into the online store. `writing` None: it is there."""

    result: BatchResult
    writing: Writing | None = None

    def finish(self) -> BatchResult:
        """What became of it, once it is written. Errors as `StreamView.begin`; once."""
        if self.writing is not None:
            written = self.writing.finish()
            self.result.without_value, self.result.fenced = written.without_values, written.fenced
        return self.result

    def drop(self) -> None:
        """Waits for nothing: it must be applied again. Safe to call after `finish`."""
        if self.writing is not None:
            self.writing.drop()
