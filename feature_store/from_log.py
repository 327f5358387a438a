"""Online state from the event log alone: after Redis lost it, whether in part or whole.

The log and history hold every event that was counted, so the states as of the newest of them are those that were lost; the
consumer group goes on where the log ends.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING

from feature_store.bootstrap import Bootstrapped, StreamPlace, bootstrap
from feature_store.clock import ClockMode, from_micros
from feature_store.errors import NotFoundError
from feature_store.event_log import log_files
from feature_store.stream_topic import views_of_topic
from feature_store.stream_view import log_directory
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureStore


def rebuild_from_log(
    store: FeatureStore,
    offline_path: str,
    *,
    clock: ClockMode,
    stream: StreamPlace,
    now: datetime,
    topic: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Bootstrapped]:
    """Writes every state of a topic's windowed views as of the newest row of history and log, and sets the group's start.

    `now`: the machine's clock, which the wall clock's states are as of. Under `replay` the clock is moved to the newest row.
    Safe to repeat. NotFoundError: no windowed view of the topic. Others: see `bootstrap`.
    """
    name, views = views_of_topic(store, topic)
    windowed = [v for v in views if definition_of(v) is not None]
    if not windowed:
        raise NotFoundError("no windowed feature view reads this topic: there is no log to rebuild from", value=name)
    newest = max(newest_visible_us(log_files(log_directory(offline_path, v).parent)) for v in windowed)
    known_by = from_micros(newest)
    if clock == "wall":
        known_by = max(known_by, now)
    return bootstrap(
        store, offline_path, known_by, clock=clock, stream=stream, views=[v.name for v in windowed], advance=advance
    )


def newest_visible_us(files: list[str]) -> int:
    """The greatest `_visible_at` of log files, microseconds; 0 without any row."""
    import duckdb

    if not files:
        return 0
    with duckdb.connect() as con:
        found = con.execute(
            "SELECT max(epoch_us(_visible_at)) FROM read_parquet($files, union_by_name => true)", {"files": files}
        ).fetchall()
    return int(found[0][0] or 0)
