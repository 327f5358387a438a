"""Rows that arrive over gRPC, one per request: values by their declared type, then written through the Feast store."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from feature_store.errors import DataError, NotFoundError, UsageError
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

MODES = ("online", "offline", "online_and_offline")
_BOOLS = {"true": True, "1": True, "false": False, "0": False}


class RowWriter(Protocol):
    """Writes one row; blocking. `values`: column -> text (to be read as the declared type) or Python value."""

    def push(self, source: str, values: Mapping[str, object], to: str) -> None: ...

    def write(self, view: str, values: Mapping[str, object]) -> None: ...


class Push(Protocol):
    """Writes columns to one view or to all views of a push source: what REST pushes go through."""

    def __call__(
        self, feature_view: str | None, push_source: str | None, columns: Mapping[str, Sequence[object]], to: Any
    ) -> object: ...


class StoreWriter:
    """Through `push`, or else `FeatureStore.push` and `.write_to_online_store`. One row at a time, from any thread. Safe
    to repeat: the newest (event_timestamp, created) wins."""

    def __init__(self, store: FeatureStore, wall: Callable[[], datetime], push: Push | None = None) -> None:
        self._store = store
        self._wall = wall
        self._push = push
        self._lock = threading.Lock()  # Feast's registry cache is refreshed by whoever asks

    def push(self, source: str, values: Mapping[str, object], to: str) -> None:
        """NotFoundError for an unknown push source, UsageError for `to`, DataError for values that do not fit."""
        from feast.data_source import PushMode
        from feast.errors import PushSourceNotFoundException

        if to not in MODES:
            raise UsageError("not a place to push to", value=to, valid=MODES)
        with self._lock:
            try:
                views = list(self._store._fvs_for_push_source_or_raise(source, True))
            except PushSourceNotFoundException as e:
                raise NotFoundError(
                    "unknown push source", value=source, valid=self._push_sources(), next_step="feast apply"
                ) from e
            row = self._row(views, values)
            if self._push is not None:
                self._push(None, source, {name: [value] for name, value in row.items()}, to)
            else:
                self._store.push(source, _frame(row), allow_registry_cache=True, to=PushMode[to.upper()])

    def write(self, view: str, values: Mapping[str, object]) -> None:
        """NotFoundError for an unknown view, DataError for values that do not fit."""
        from feast.errors import FeatureViewNotFoundException

        with self._lock:
            try:
                found = self._store.registry.get_any_feature_view(view, self._store.project, allow_cache=True)
            except FeatureViewNotFoundException as e:
                every = self._store.registry.list_all_feature_views(self._store.project, allow_cache=True)
                raise NotFoundError(
                    "unknown feature view", value=view, valid=[v.name for v in every], next_step="feast apply"
                ) from e
            row = self._row([found], values)
            if self._push is not None:
                self._push(view, None, {name: [value] for name, value in row.items()}, "online")
            else:
                self._store.write_to_online_store(view, _frame(row))

    def _push_sources(self) -> list[str]:
        views = self._store.registry.list_all_feature_views(self._store.project, allow_cache=True)
        sources = [getattr(v, "stream_source", None) for v in views]
        return sorted({s.name for s in sources if s is not None})

    def _row(self, views: list[Any], values: Mapping[str, object]) -> dict[str, object]:
        row: dict[str, object] = {}
        for view in views:
            row |= self._typed(view, values)
        return row

    def _typed(self, view: FeatureView, values: Mapping[str, object]) -> dict[str, object]:
        """The row as the view declares it, by the column names of its source; `created` filled in when it is absent."""
        source = getattr(view, "batch_source", None)
        if source is None:
            raise UsageError("rows cannot be written to an on-demand view without a source", value=view.name)
        if definition_of(view) is not None:
            raise UsageError(
                "a windowed view is not pushed to: it follows its events",
                value=view.name,
                next_step="send the events to its topic; `predictflow sync` applies them",
            )
        mapping = source.field_mapping or {}
        types = {f.name: f.dtype.to_value_type().name for f in [*view.entity_columns, *view.features]}
        times = {source.timestamp_field, source.created_timestamp_column} - {"", None}
        row = {}
        for name, value in values.items():
            kind = "UNIX_TIMESTAMP" if name in times else types.get(mapping.get(name, name))
            row[name] = _read(name, kind, value) if isinstance(value, str) else value
        if source.created_timestamp_column and row.get(source.created_timestamp_column) is None:
            row[source.created_timestamp_column] = self._wall()
        given = {mapping.get(name, name) for name in row}
        missing = [name for name in [*types, source.timestamp_field] if name not in given]
        if missing:
            raise DataError(
                f"the row lacks columns of {view.name}", value=missing, valid=[*types, source.timestamp_field]
            )
        return row


def _frame(row: Mapping[str, object]) -> Any:
    import pandas as pd

    return pd.DataFrame({name: [value] for name, value in row.items()})


def _read(name: str, kind: str | None, text: str) -> object:
    """A text as a value of the declared type (a ValueType's name; None: an undeclared column, left as it is)."""
    try:
        match kind:
            case None | "STRING" | "UUID" | "TIME_UUID":
                return text
            case "INT32" | "INT64":
                return int(text)
            case "FLOAT" | "DOUBLE":
                return float(text)
            case "BOOL":
                return _BOOLS[text.lower()]
            case "UNIX_TIMESTAMP":
                return _time(text)
    except (ValueError, KeyError, OverflowError) as e:
        raise DataError(f"column {name}: not a {kind}", value=text, next_step="or send it in typed_features") from e
    raise DataError(
        f"column {name}: a {kind} cannot be sent as text", value=text, next_step="send it in typed_features"
    )


def _time(text: str) -> datetime:
    """ISO 8601 (naive: UTC), or seconds since the epoch."""
    try:
        return datetime.fromtimestamp(float(text), tz=UTC)
    except ValueError:
        time = datetime.fromisoformat(text)
        return time if time.tzinfo else time.replace(tzinfo=UTC)
