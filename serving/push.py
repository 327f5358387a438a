"""Writes feature rows that a client sends: to the online store, the offline store, or both, as Feast's push means it.

The newest (event_timestamp, created) stays, whatever the order of requests; `created` is the server's clock where the
client gives none. Rows of an entity on the erasure list are left out. Safe to repeat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from feature_store import without_functions
from feature_store.clock import MAX_SKEW
from feature_store.erasure_list import ErasureList, digest_of
from feature_store.errors import NotFoundError, UsageError
from feature_store.windows.definition import definition_of
from serving.columns import JSON_TEXT, rows_of, times, typed
from serving.errors import TooManyError
from serving.limits import Gate, in_thread

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureStore, FeatureView

To = Literal["online", "offline", "online_and_offline"]
Columns = Mapping[str, Sequence[object]]
EVENT, CREATED = "event_timestamp", "created"
"""Names of the two times in a request; the names that the view's source gives them are taken too."""
PUSH_THREADS = 4
"""Writes at a time, of threads of their own: stores that are slow must not hold up what else needs a thread."""


class WindowedViewError(UsageError):
    """A push to a view whose values are computed from its stream."""

    code = "windowed_view"


class AheadOfClockError(UsageError):
    """A row dated further ahead of the clock than `max_skew`."""

    code = "ahead_of_clock"


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
        self._erased = _Erased(store)
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
        tables = [(view, self._erased.without(view, table_of(view, columns, now))) for view in views]
        kept = max(table.num_rows for _, table in tables)
        tables = [(view, table) for view, table in tables if table.num_rows]
        # What a row cannot be made of must be refused before anything is written.
        prepared = [(view, feast_rows(view, table)) for view, table in tables] if to != "offline" else []
        # History first: what is served must be found by training, not the other way round.
        if to != "online":
            for view, table in tables:
                self._offline_write(view, table)
        for view, data in prepared:
            self._online_write(view, data)
        return Pushed(kept, [view.name for view in views])

    def _online_write(self, view: FeatureView, data: list[Any]) -> None:
        provider = self._store._get_provider()
        provider.online_write_batch(self._store.config, view, data, None)

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


class _Erased:
    """The erasure list of the project's offline store, read again when it changed; nothing where it has no such list."""

    def __init__(self, store: FeatureStore) -> None:
        from feature_store.point_in_time.source import is_uri, resolve

        place = resolve(store.config, "")
        ours = store.config.offline_store.type.endswith("PredictFlowOfflineStore")
        self._list = ErasureList(place) if ours and not is_uri(place) else None
        self._seen: tuple[tuple[int, ...] | None, dict[str, set[str]]] = (None, {})

    def without(self, view: FeatureView, table: pa.Table) -> pa.Table:
        """`table` without the rows of erased entities. DataError for a list that cannot be read."""
        import pyarrow as pa

        digests = self._digests()
        keys = [c.name for c in _keys(view) if c.name in digests]
        if not keys:
            return table
        columns = [(key, digests[key], table.column(key).to_pylist()) for key in keys]
        kept = [
            all(digest_of(key, values[i]) not in listed for key, listed, values in columns)
            for i in range(table.num_rows)
        ]
        return table.filter(pa.array(kept, pa.bool_()))

    def _digests(self) -> dict[str, set[str]]:
        if self._list is None:
            return {}
        changed = self._list.changed()  # before the entries: a list that changes now is read again next time
        seen, digests = self._seen
        if changed != seen:
            digests = {}
            for entry in self._list.entries():
                digests.setdefault(entry.join_key, set()).add(entry.sha256)
            self._seen = (changed, digests)
        return digests


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


def table_of(view: FeatureView, columns: Columns, now: datetime) -> pa.Table:
    """The view's part of a request: join keys and features in their declared types, `event_timestamp` and `created`."""
    import pyarrow as pa

    names = column_names(view)
    given: dict[str, Sequence[object]] = {}
    for name, values in columns.items():
        if name in names:
            if names[name] in given:
                raise UsageError(f"{view.name}: two columns are one and the same", value=name, valid=[names[name]])
            given[names[name]] = values
    out: dict[str, pa.Array] = {}
    keys = [c.name for c in _keys(view)]
    for field in [*_keys(view), *view.features]:
        if field.name not in given:
            raise UsageError(
                f"{view.name}: a column is missing", value=field.name, next_step="send it, null where it is unknown"
            )
        out[field.name] = typed(field.name, given[field.name], field.dtype.to_value_type().name)
    for key in keys:
        if out[key].null_count:
            raise UsageError(f"{view.name}: a join key is null", value=key)
    if EVENT not in given:
        raise UsageError(f"{view.name}: a column is missing", value=EVENT)
    out[EVENT] = times(EVENT, given[EVENT])
    if out[EVENT].null_count:
        raise UsageError(f"{view.name}: a row has no {EVENT}")
    # The stock client writes a missing `created` as the text of pandas' "not a time".
    known = [None if v == "NaT" else v for v in given.get(CREATED, [None] * len(out[EVENT]))]
    created = times(CREATED, known)
    out[CREATED] = created.fill_null(pa.scalar(now, out[EVENT].type))
    latest = now + MAX_SKEW
    for name in (EVENT, CREATED):
        newest = max(out[name].to_pylist())
        if newest > latest:
            raise AheadOfClockError(
                f"{view.name}: {name} is ahead of the clock by more than {MAX_SKEW.seconds} s",
                value=newest.isoformat(),
                next_step=f"the clock stands at {now.isoformat()}",
            )
    return pa.table(out)


def feast_rows(view: FeatureView, table: pa.Table) -> list[Any]:
    """The rows of `table_of` as Feast's online stores take them: (entity key, values, event time, created)."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    protos = {
        field.name: _protos(field.name, table.column(field.name).to_pylist(), field.dtype.to_value_type())
        for field in [*_keys(view), *view.features]
    }
    keys = sorted(c.name for c in _keys(view))
    features = [f.name for f in view.features]
    events, created = table.column(EVENT).to_pylist(), table.column(CREATED).to_pylist()
    return [
        (
            EntityKey(join_keys=keys, entity_values=[protos[k][i] for k in keys]),
            {name: protos[name][i] for name in features},
            events[i],
            created[i],
        )
        for i in range(table.num_rows)
    ]


def _protos(name: str, values: list[Any], kind: Any) -> list[Any]:
    from decimal import Decimal
    from uuid import UUID

    from feast.type_map import python_values_to_proto_values

    read: Callable[[Any], Any] | None = None
    if kind.name in JSON_TEXT and kind.name != "JSON":
        read = json.loads
    elif "UUID" in kind.name:
        read = UUID
    elif "DECIMAL" in kind.name:
        read = Decimal
    if read is not None:
        listed = kind.name.endswith(("_LIST", "_SET")) and read is not json.loads
        values = [None if v is None else [read(x) for x in v] if listed else read(v) for v in values]
    if kind.name.endswith("_SET") and kind.name != "VALUE_SET":
        values = [None if v is None else set(v) for v in values]
    try:
        return python_values_to_proto_values(values, kind)
    except Exception as e:  # Feast's converters raise what comes for a nested value that has no Feast type
        raise UsageError(f"column {name}: a value that Feast cannot store as {kind.name}", value=str(e)[:200]) from e


def _keys(view: FeatureView) -> list[Any]:
    from feast.feature_view import DUMMY_ENTITY_ID

    return [c for c in view.entity_columns if c.name != DUMMY_ENTITY_ID]


def column_types(view: FeatureView) -> dict[str, str]:
    """The names that we give the columns of a view's rows, each with its Feast value type (`INT64`, ...)."""
    types = {f.name: f.dtype.to_value_type().name for f in [*_keys(view), *view.features]}
    return types | {EVENT: "UNIX_TIMESTAMP", CREATED: "UNIX_TIMESTAMP"}


def column_names(view: FeatureView) -> dict[str, str]:
    """The column names that a request for this view may have, each with the name we give it: those of the view, and
    those that its source has for them."""
    source = view.batch_source
    names = {field.name: field.name for field in [*_keys(view), *view.features]}
    names |= {EVENT: EVENT, CREATED: CREATED}
    if source is not None:
        names |= {
            t: ours for t, ours in ((source.timestamp_field, EVENT), (source.created_timestamp_column, CREATED)) if t
        }
        for raw, mapped in (source.field_mapping or {}).items():
            if mapped in names:
                names.setdefault(raw, names[mapped])
    return names


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
