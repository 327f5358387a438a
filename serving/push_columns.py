"""The columns of a push as the rows of a view: their names, their types, and the forms that online stores take."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.clock import MAX_SKEW
from feature_store.errors import UsageError
from serving.columns import JSON_TEXT, times, typed

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureView

Columns = Mapping[str, Sequence[object]]
EVENT, CREATED = "event_timestamp", "created"
"""Names of the two times in a request; the names that the view's source gives them are taken too."""


class AheadOfClockError(UsageError):
    """A row dated further ahead of the clock than `max_skew`."""

    code = "ahead_of_clock"


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
    keys = [c.name for c in keys_of(view)]
    for field in [*keys_of(view), *view.features]:
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


def is_columnar(view: FeatureView) -> bool:
    """Whether `table_of` holds every value as the engine's table writes take it: Arrow has no form of sets, maps and UUIDs."""
    kinds = [f.dtype.to_value_type().name for f in view.features]
    return not any(
        kind.endswith("_SET") or "UUID" in kind or "DECIMAL" in kind or (kind in JSON_TEXT and kind != "JSON")
        for kind in kinds
    )


def feast_rows(view: FeatureView, table: pa.Table) -> list[Any]:
    """The rows of `table_of` as Feast's online stores take them: (entity key, values, event time, created)."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    protos = {
        field.name: _protos(field.name, table.column(field.name).to_pylist(), field.dtype.to_value_type())
        for field in [*keys_of(view), *view.features]
    }
    keys = sorted(c.name for c in keys_of(view))
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


def keys_of(view: FeatureView) -> list[Any]:
    from feast.feature_view import DUMMY_ENTITY_ID

    return [c for c in view.entity_columns if c.name != DUMMY_ENTITY_ID]


def column_types(view: FeatureView) -> dict[str, str]:
    """The names that we give the columns of a view's rows, each with its Feast value type (`INT64`, ...)."""
    types = {f.name: f.dtype.to_value_type().name for f in [*keys_of(view), *view.features]}
    return types | {EVENT: "UNIX_TIMESTAMP", CREATED: "UNIX_TIMESTAMP"}


def column_names(view: FeatureView) -> dict[str, str]:
    """The column names that a request for this view may have, each with the name we give it: those of the view, and
    those that its source has for them."""
    source = view.batch_source
    names = {field.name: field.name for field in [*keys_of(view), *view.features]}
    names |= {EVENT: EVENT, CREATED: CREATED}
    if source is not None:
        names |= {
            t: ours for t, ours in ((source.timestamp_field, EVENT), (source.created_timestamp_column, CREATED)) if t
        }
        for raw, mapped in (source.field_mapping or {}).items():
            if mapped in names:
                names.setdefault(raw, names[mapped])
    return names
