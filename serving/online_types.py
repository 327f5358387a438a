"""What passes between the servers and `OnlineService`: limits, entity rows, reads that are not decoded yet."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feature_store.errors import UsageError
from serving.errors import TooManyError

if TYPE_CHECKING:
    from feature_store.view_plan import ViewRow
    from serving.plans import ServicePlan

Done = Callable[[bytes | None, Exception | None], None]
"""Called once, with the body of the answer or with the error."""


Begun = Callable[[Callable[[], bool]], None]
"""Called when a request begins to wait for a model, with what drops it while it waits; see `model_runs.Cancel`."""


@dataclass(frozen=True)
class Limits:
    """What one request may ask for."""

    rows: int = 1000
    features: int = 500
    body_bytes: int = 4 * 1024 * 1024


@dataclass(frozen=True)
class CellRead:
    """What was read, undecoded: per entity row one `ViewRow` per view of `plan.reader.plan.view_plans`, at `t_us`."""

    plan: ServicePlan
    entities: list[dict[str, object]]
    t_us: int
    rows: list[list[ViewRow]]


@dataclass(frozen=True)
class StoredRead:
    """What Redis replied, to be read at `t_us`; see `ReadPlan.at`. `started`: `time.perf_counter()` when it was asked for,
    by `route`."""

    started: float
    route: str
    plan: ServicePlan
    entities: list[dict[str, object]]
    t_us: int
    replies: list[Sequence[bytes | None]]


def entity_rows(entities: Mapping[str, Sequence[object]], max_rows: int) -> list[dict[str, object]]:
    """Columns of join keys as rows; UsageError when their lengths differ or there are none, TooManyError over the limit."""
    lengths = {key: len(values) for key, values in entities.items()}
    n = max(lengths.values(), default=0)
    if len(set(lengths.values())) != 1 or n == 0:
        raise UsageError(
            "entities must hold at least one value, and equally many per join key",
            value=lengths,
            next_step='send {"entities": {"<join key>": ["<value>", ...]}}',
        )
    if n > max_rows:
        raise TooManyError("rows", n, max_rows)
    return [dict(zip(entities, values)) for values in zip(*entities.values())]
