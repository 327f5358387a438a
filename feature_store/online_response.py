"""Feast's OnlineResponse from the cells of a read plan, and entity rows out of what Feast's callers pass."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from feast.type_map import python_values_to_proto_values
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp

from feature_store.errors import UsageError
from feature_store.read_plan import ReadPlan
from feature_store.redis_layout import datetime_of, encode_timestamp
from feature_store.view_plan import Cell, Feature, ViewRow, python_value

_EMPTY = Value()
_STATUS: dict[str, Any] = {name: FieldStatus.Value(name) for name in FieldStatus.keys()}  # noqa: SIM118  # an enum


def entities_of(
    plan: ReadPlan, entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]
) -> tuple[dict[str, list[Any]], list[dict[str, object]]]:
    """(join key -> values, the same as rows) of Feast's two shapes of entity rows.

    As in Feast, a column that is no join key is left out of a read that has no use for it. UsageError for a missing join
    key and for columns of different lengths.
    """
    if isinstance(entity_rows, Mapping):
        given = {k: list(v.val) if isinstance(v, RepeatedValue) else list(v) for k, v in entity_rows.items()}
        count = len(next(iter(given.values()), []))
    else:
        count = len(entity_rows)
        names = dict.fromkeys(k for row in entity_rows for k in row)
        given = {k: [row[k] for row in entity_rows if k in row] for k in names}
    columns = {k: [_python(v) for v in values] for k, values in given.items() if k in plan.join_keys}
    for name in plan.join_keys:
        if name not in columns:
            raise UsageError(f"join key {name} is missing in the entity rows", value=list(given), valid=plan.join_keys)
        if len(columns[name]) != count:
            raise UsageError(f"join key {name} is not in every entity row", value=len(columns[name]), valid=[count])
    rows: list[dict[str, object]] = [{} for _ in range(count)]
    for name, values in columns.items():
        for row, value in zip(rows, values):
            row[name] = value
    return columns, rows


def of_rows(
    plan: ReadPlan, columns: Mapping[str, list[Any]], rows: list[list[ViewRow]], with_versions: bool
) -> OnlineResponse:
    """The response: join keys as given, then the features in the order asked for."""
    response = GetOnlineFeaturesResponse()
    types = {p.requested: p.type for v in plan.view_plans for p in v.key_parts}
    for name, values in columns.items():
        response.metadata.feature_names.val.append(name)
        response.results.append(
            GetOnlineFeaturesResponse.FeatureVector(
                values=python_values_to_proto_values(values, ValueType[types[name]]),
                statuses=[FieldStatus.PRESENT] * len(values),
                event_timestamps=[Timestamp()] * len(values),
            )
        )
    fill(response, plan, rows, with_versions)
    hints = {f.result: f.hint for v in plan.view_plans for f in v.features if f.hint is not None}
    return OnlineResponse(response, feature_types=hints)


def fill(response: GetOnlineFeaturesResponse, plan: ReadPlan, rows: list[list[ViewRow]], with_versions: bool) -> None:
    """Appends one vector per feature: values, statuses, event timestamps."""
    for v, view in enumerate(plan.view_plans):
        if with_versions and view.view not in [m.name for m in response.metadata.feature_view_metadata]:
            response.metadata.feature_view_metadata.add(name=view.view, version=view.version)
        answers = [row[v] for row in rows]
        times = [Timestamp.FromString(encode_timestamp(a.event_ns or 0)) for a in answers]
        for f, feature in enumerate(view.features):
            cells = [_proto(feature, a.cells[f]) for a in answers]
            response.metadata.feature_names.val.append(feature.result)
            response.results.append(
                GetOnlineFeaturesResponse.FeatureVector(
                    values=[value for _, value in cells],
                    statuses=[_STATUS[status] for status, _ in cells],
                    event_timestamps=times,
                )
            )


def read_rows(plan: ReadPlan, rows: list[list[ViewRow]]) -> list[Any]:
    """Feast's `online_read` shape of a plan of one view."""
    (view,) = plan.view_plans
    out: list[Any] = []
    for (answer,) in rows:
        if all(status == "NOT_FOUND" for status, _ in answer.cells):
            out.append((None, None))
            continue
        values = {f.name: _proto(f, cell)[1] for f, cell in zip(view.features, answer.cells)}
        out.append((None if answer.event_ns is None else datetime_of(answer.event_ns), values))
    return out


def _proto(feature: Feature, cell: Cell) -> tuple[str, Value]:
    status, value = cell
    if value is None:
        return status, _EMPTY
    if isinstance(value, int):
        return status, Value(int64_val=value)
    status, decoded = python_value(feature, cell)
    return (status, _EMPTY) if decoded is None else (status, Value.FromString(value))


def _python(value: Any) -> Any:
    """The scalar of a Value proto; other values as they are."""
    if not isinstance(value, Value):
        return value
    kind = value.WhichOneof("val")
    return None if kind is None else getattr(value, kind)
