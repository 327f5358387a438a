"""Writes feature rows that a client sends: to the online store, the offline store, or both, as Feast's push means it.

The newest (event_timestamp, created) stays, whatever the order of requests; `created` is the server's clock where the
client gives none. Rows of an entity on the erasure list are left out. Safe to repeat.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

from feature_store import without_functions
from feature_store.erased_entities import ErasedEntities
from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.windows.definition import definition_of
from serving.columns import rows_of
from serving.errors import TooManyError
from serving.limits import Gate, in_thread
from serving.push_columns import CREATED, EVENT, Columns, column_names, feast_rows, is_columnar, keys_of, table_of

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureStore, FeatureView

To = Literal["online", "offline", "online_and_offline"]
PUSH_THREADS = 4
"""Writes at a time, of threads of their own: stores that are slow must not hold up what else needs a thread."""


class WindowedViewError(UsageError):
    """A push to a view whose values are computed from its stream."""

    code = "windowed_view"


@dataclass(frozen=True)
class Pushed:
    """What was written: rows of the request (without those of erased entities), and the views they went to."""

    rows: int
    feature_views: list[str]


class Pusher:
    """`now` tells the time of the clock setting (UTC); it may ask Redis, and raise UnavailableError. `gate`: whose slots
    the threads of `apush` hold."""

    def __init__(
        self, store: FeatureStore, now: Callable[[], datetime], max_rows: int = 10_000, gate: Gate | None = None
    ) -> None:
        self._store = store
        self._now = now
        self._max_rows = max_rows
        self._gate = gate
        self._erased = ErasedEntities(store.config)
        self._threads = ThreadPoolExecutor(PUSH_THREADS, thread_name_prefix="push")

    async def apush(self, feature_view: str | None, push_source: str | None, columns: Columns, to: To) -> Pushed:
        """As `push`, in a thread of its own few; a push that is cancelled while it waits for one writes nothing."""
        return await in_thread(self._gate, self._threads, self.push, feature_view, push_source, columns, to)

    def push(self, feature_view: str | None, push_source: str | None, columns: Columns, to: To) -> Pushed:
        """Writes `columns` (join keys, features, `event_timestamp`, `created`?) to one view, or to all of a push source.

        UsageError for wrong columns, values and windowed views, NotFoundError for an unknown name, TooManyError over the
        limit; then nothing is written. UnavailableError when a store does not answer: repeat the request. Blocking.
        """
        if (feature_view is None) == (push_source is None):
            raise UsageError("give either feature_view or push_source")
        if push_source is not None:
            views = views_of_source(self._store, push_source)
        else:
            views = [view_named(self._store, str(feature_view))]
        for view in views:
            require_row_view(view)
        rows = rows_of(columns)
        if rows > self._max_rows:
            raise TooManyError("rows", rows, self._max_rows)
        known = {name for view in views for name in column_names(view)}
        for name in columns:
            if name not in known:
                raise UsageError("no such column", value=name, valid=known)
        now = self._now()
        tables = [
            (view, self._erased.without([c.name for c in keys_of(view)], table_of(view, columns, now)))
            for view in views
        ]
        kept = max(table.num_rows for _, table in tables)
        tables = [(view, table) for view, table in tables if table.num_rows]
        # What a row cannot be made of must be refused before anything is written.
        prepared = [self._prepared(view, table) for view, table in tables] if to != "offline" else []
        # History first: what is served must be found by training, not the other way round.
        if to != "online":
            for view, table in tables:
                self._offline_write(view, table)
        for write in prepared:
            write()
        return Pushed(kept, [view.name for view in views])

    def _prepared(self, view: FeatureView, table: pa.Table) -> Callable[[], object]:
        """The online write of the rows, checked and encoded. UsageError for a value that cannot be stored."""
        import pyarrow as pa

        from feature_store.online_store import PredictFlowOnlineStore

        provider: Any = self._store._get_provider()
        online = provider.online_store
        if not isinstance(online, PredictFlowOnlineStore) or not is_columnar(view):
            return partial(provider.online_write_batch, self._store.config, view, feast_rows(view, table), None)
        writer = online.writer(self._store.config, view)
        columns = {name: table.column(name) for name in table.column_names if name not in (EVENT, CREATED)}
        columns[writer.event_column] = table.column(EVENT)
        columns[writer.created_column] = table.column(CREATED)
        try:
            return writer.prepared(pa.table(columns), wall=None)  # `table_of` has looked at the clock
        except DataError as e:
            raise UsageError(e.what, value=e.value, next_step=e.next_step) from e

    def _offline_write(self, view: FeatureView, table: pa.Table) -> None:
        source = view.batch_source
        if source is None:
            raise UsageError("feature view has no batch source to write to", value=view.name)
        back = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
        times = ((EVENT, source.timestamp_field), (CREATED, source.created_timestamp_column))
        back |= {ours: back.get(name, name) for ours, name in times if name}
        if not source.created_timestamp_column:
            table = table.drop_columns([CREATED])
        table = table.rename_columns([back.get(name, name) for name in table.column_names])
        provider: Any = self._store._get_provider()
        provider.offline_write_batch(self._store.config, view, table, None)


def view_named(store: FeatureStore, name: str) -> FeatureView:
    """The view of this name, of whatever kind, without its function; NotFoundError where there is none."""
    # A view that was applied a moment ago is not in the cache yet: an unknown name is worth a look at the registry.
    for fresh in (False, True):
        view = without_functions.view_named(store.registry, store.project, name, fresh=fresh)
        if view is not None:
            found: FeatureView = view  # or of another kind, which `require_row_view` refuses
            return found
    valid = without_functions.view_names(store.registry, store.project)
    raise NotFoundError("unknown feature view", value=name, valid=valid, next_step="feast apply")


def views_of_source(store: FeatureStore, name: str) -> list[FeatureView]:
    """The views of a push source, by name, without their functions; NotFoundError where there is none."""
    for fresh in (False, True):
        views = without_functions.pushed_views(store.registry, store.project, name, fresh=fresh)
        if views:
            return views
    valid = without_functions.push_sources(store.registry, store.project)
    raise NotFoundError("unknown push source", value=name, valid=valid, next_step="feast apply")


def require_row_view(view: Any) -> None:
    """UsageError for a view that rows cannot be pushed to: an on-demand, a label or a windowed one."""
    from feast import FeatureView

    if not isinstance(view, FeatureView):
        raise UsageError("rows cannot be pushed to a view of this kind", value=f"{view.name} ({type(view).__name__})")
    definition = definition_of(view)
    if definition is not None:
        raise WindowedViewError(
            "the values of a windowed view come from its stream",
            value=view.name,
            next_step=f"send the events to the topic {definition.topic}",
        )
