"""Rows that arrive over gRPC, one per request: values by their declared type, then pushed as REST pushes are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Protocol

from feature_store.errors import DataError, UsageError
from serving.push import require_row_view, view_named, views_of_source
from serving.push_columns import column_names, column_types

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
    """Through `push`, which REST pushes go through too. One row at a time, from any thread. Safe to repeat: the newest
    (event_timestamp, created) wins."""

    def __init__(self, store: FeatureStore, push: Push) -> None:
        self._store = store
        self._push = push

    def push(self, source: str, values: Mapping[str, object], to: str) -> None:
        """NotFoundError for an unknown push source, UsageError for `to` and columns, DataError for a text that does not fit."""
        if to not in MODES:
            raise UsageError("not a place to push to", value=to, valid=MODES)
        self._push(None, source, _columns(views_of_source(self._store, source), values), to)

    def write(self, view: str, values: Mapping[str, object]) -> None:
        """NotFoundError for an unknown view, UsageError for columns, DataError for a text that does not fit."""
        self._push(view, None, _columns([view_named(self._store, view)], values), "online")


def _columns(views: Sequence[FeatureView], values: Mapping[str, object]) -> dict[str, list[object]]:
    """The row as columns of one value, by our names, texts read as declared. What is missing `push` tells."""
    names: dict[str, str] = {}
    types: dict[str, str] = {}
    for view in views:
        require_row_view(view)
        names = column_names(view) | names
        types = column_types(view) | types
    out: dict[str, list[object]] = {}
    for given, value in values.items():
        name = names.get(given, given)
        if name in out:
            raise UsageError("two columns are one and the same", value=given, valid=[name])
        out[name] = [_read(given, types.get(name), value) if isinstance(value, str) else value]
    return out


def _read(name: str, kind: str | None, text: str) -> object:
    """A text as a value of the declared type (a ValueType's name; None: an undeclared column, left as it is)."""
    try:
        match kind:
            case None | "STRING" | "UUID" | "TIME_UUID" | "DECIMAL":
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
