"""The numbers that a definition's aggregates need of a batch of events; events that have none, with the reason.

By DuckDB, or by Arrow where the definition is plain enough (see `plain_numbers.py`).

An expression that overflows, or gives NaN or an infinity, is the event's fault and no other's: it is found by halving the
batch, and the others stay. Public: `EventNumbers`.
"""

from __future__ import annotations

from typing import Any

import duckdb
import numpy as np
import pyarrow as pa

from feature_store.plain_numbers import most_events, plain_numbers
from feature_store.windows.definition import WindowedView
from feature_store.windows.plan import plan_of

Numbers = dict[str, np.ndarray[Any, Any]]
"""`_mask`, `_id`, `_v0`, ...: int64, or float64 where the plan says so."""


class EventNumbers:
    """One definition's projection in a private DuckDB connection. DefinitionError: SQL that is not supported."""

    def __init__(self, definition: WindowedView) -> None:
        self._plan = plan = plan_of(definition)
        self._most = most_events(plan)
        self._sql = f"SELECT {plan.numbers_sql()}, {plan.event_id_sql()} FROM batch"
        self.values = [f"_v{i}" for i in range(len(plan.values))]
        self._types: dict[str, Any] = {"_mask": np.int64, "_id": np.int64} | {
            name: np.float64 if v.is_float else np.int64 for name, v in zip(self.values, plan.values, strict=True)
        }
        # One thread: a batch is small, and each core has a consumer of its own.
        self._db = duckdb.connect(config={"threads": 1, "python_enable_replacements": "false"})
        self._db.execute("SET TimeZone = 'UTC'")

    def of(self, events: pa.Table) -> tuple[Numbers, list[tuple[int, str]]]:
        """The numbers of each event (0 where refused), and place and reason of the refused. Pure."""
        parts: list[Numbers] = []
        refused: list[tuple[int, str]] = []
        if 0 < events.num_rows <= self._most:
            parts.append(plain_numbers(self._plan, events))
        else:
            self._run(events, 0, parts, refused)
        numbers: Numbers = {}
        for name, kind in self._types.items():
            columns = [p[name] for p in parts] or [np.empty(0, kind)]
            numbers[name] = (columns[0] if len(columns) == 1 else np.concatenate(columns)).astype(kind, copy=False)
        for name, kind in self._types.items():
            if kind is np.float64:
                finite = np.isfinite(numbers[name])
                if not finite.all():
                    refused += [
                        (int(i), "a value the features are made of is not finite") for i in np.flatnonzero(~finite)
                    ]
        return numbers, sorted(dict(refused).items())

    def close(self) -> None:
        """Ends the connection."""
        self._db.close()

    def _run(self, events: pa.Table, first: int, parts: list[Numbers], refused: list[tuple[int, str]]) -> None:
        n = events.num_rows
        if not n:
            return
        self._db.register("batch", events)
        try:
            found: Any = self._db.execute(self._sql).fetchnumpy()
            parts.append(found)
            return
        except (duckdb.DataError, duckdb.InvalidInputException) as e:
            if n == 1:
                line = str(e).splitlines()[0]
                refused.append((first, f"a value the features are made of cannot be computed ({line})"))
                parts.append({name: np.zeros(1, kind) for name, kind in self._types.items()})
                return
        finally:
            self._db.unregister("batch")
        half = n // 2
        self._run(events.slice(0, half), first, parts, refused)
        self._run(events.slice(half), first + half, parts, refused)
