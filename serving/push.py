"""Writes feature rows that a client sends: to the online store, the offline store, or both, as Feast's push means it.

The newest (event_timestamp, created) stays, whatever the order of requests; `created` is the server's clock where the
client gives none. Blocking: run it in a thread. Safe to repeat.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from feature_store.clock import MAX_SKEW
from feature_store.errors import NotFoundError, UsageError
from feature_store.windows.definition import definition_of
from serving.columns import JSON_TEXT, rows_of, times, typed
from serving.errors import TooManyError

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureStore, FeatureView

To = Literal["online", "offline", "online_and_offline"]
Columns = Mapping[str, Sequence[object]]
EVENT, CREATED = "event_timestamp", "created"
"""Names of the two times in a request; the names that the view's source gives them are taken too."""


class WindowedViewError(UsageError):
    """A push to a view whose values are computed from its stream."""

    code = "windowed_view"


class AheadOfClockError(UsageError):
    """A row dated further ahead of the clock than `max_skew`."""

    code = "ahead_of_clock"


@dataclass(frozen=True)
class Pushed:
    """What was written: rows of the request, and the views they went to."""

    rows: int
    feature_views: list[str]


class Pusher:
    """`now` tells the time of the clock setting (UTC); it may ask Redis, and raise UnavailableError."""

    def __init__(self, store: FeatureStore, now: Callable[[], datetime], max_rows: int = 10_000) -> None:
        self._store = store
        self._now = now
        self._max_rows = max_rows

    def push(self, feature_view: str | None, push_source: str | None, columns: Columns, to: To) -> Pushed:
        """Writes `columns` (join keys, features, `event_timestamp`, `created`?) to one view, or to all of a push source.

        UsageError for wrong columns, values and windowed views, NotFoundError for an unknown name, TooManyError over the
        limit; then nothing is written. UnavailableError when a store does not answer: repeat the request.
        """
        if (feature_view is None) == (push_source is None):
            raise UsageError("give either feature_view or push_source")
        views = self._of_source(push_source) if push_source is not None else [self._view(str(feature_view))]
        for view in views:
            _require_row_view(view)
        rows = rows_of(columns)
        if rows > self._max_rows:
            raise TooManyError("rows", rows, self._max_rows)
        known = {name for view in views for name in _names(view)}
        for name in columns:
            if name not in known:
                raise UsageError("no such column", value=name, valid=known)
        now = self._now()
        tables = [(view, table_of(view, columns, now)) for view in views]
        # History first: what is served must be found by training, not the other way round.
        if to != "online":
            for view, table in tables:
                self._offline_write(view, table)
        if to != "offline":
            prepared = [(view, feast_rows(view, table)) for view, table in tables]
            for view, data in prepared:
                self._online_write(view, data)
        return Pushed(rows, [view.name for view in views])

    def _online_write(self, view: FeatureView, data: list[Any]) -> None:
        provider = self._store._get_provider()
        provider.online_write_batch(self._store.config, view, data, None)

    def _offline_write(self, view: FeatureView, table: pa.Table) -> None:
        source = view.batch_source
        if source is None:
            raise UsageError("feature view has no batch source to write to", value=view.name)
        back = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
        back |= {EVENT: source.timestamp_field, CREATED: source.created_timestamp_column}
        if not source.created_timestamp_column:
            table = table.drop_columns([CREATED])
        table = table.rename_columns([back.get(name, name) for name in table.column_names])
        provider: Any = self._store._get_provider()
        provider.offline_write_batch(self._store.config, view, table, None)

    def _view(self, name: str) -> FeatureView:
        from feast.errors import FeatureViewNotFoundException

        # A view that was applied a moment ago is not in the cache yet: an unknown name is worth a look at the registry.
        for cached in (True, False):
            try:
                return self._store.registry.get_any_feature_view(name, self._store.project, allow_cache=cached)  # type: ignore[return-value]  # other kinds are refused
            except FeatureViewNotFoundException:
                continue
        valid = [v.name for v in self._store.list_all_feature_views(allow_cache=True)]
        raise NotFoundError("unknown feature view", value=name, valid=valid, next_step="feast apply")

    def _of_source(self, name: str) -> list[FeatureView]:
        from feast.data_source import PushSource

        valid: set[str] = set()
        for cached in (True, False):
            by_source: dict[str, list[FeatureView]] = {}
            for view in [
                *self._store.list_feature_views(allow_cache=cached),
                *self._store.list_stream_feature_views(allow_cache=cached),
            ]:
                if isinstance(view.stream_source, PushSource):
                    by_source.setdefault(view.stream_source.name, []).append(view)
            if name in by_source:
                return sorted(by_source[name], key=lambda v: v.name)
            valid |= set(by_source)
        raise NotFoundError("unknown push source", value=name, valid=valid, next_step="feast apply")


def table_of(view: FeatureView, columns: Columns, now: datetime) -> pa.Table:
    """The view's part of a request: join keys and features in their declared types, `event_timestamp` and `created`."""
    import pyarrow as pa

    names = _names(view)
    given = {names[name]: values for name, values in columns.items() if name in names}
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


def _names(view: FeatureView) -> dict[str, str]:
    """The column names that a request for this view may have, each with the name we give it."""
    source = view.batch_source
    names = {field.name: field.name for field in [*_keys(view), *view.features]}
    names |= {EVENT: EVENT, CREATED: CREATED}
    if source is not None:
        names |= {
            t: ours for t, ours in ((source.timestamp_field, EVENT), (source.created_timestamp_column, CREATED)) if t
        }
    return names


def _require_row_view(view: Any) -> None:
    from feast import FeatureView

    if not isinstance(view, FeatureView):
        raise UsageError("rows cannot be pushed to a view of this kind", value=f"{view.name} ({type(view).__name__})")
    if definition_of(view) is not None:
        raise WindowedViewError(
            "the values of a windowed view come from its stream",
            value=view.name,
            next_step=f"send the events to the topic {definition_of(view).topic}",  # type: ignore[union-attr]  # checked above
        )
