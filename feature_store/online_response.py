"""Feast's OnlineResponse from the cells of a read plan, and entity rows out of what Feast's callers pass."""

from __future__ import annotations

import struct
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

from feast.online_response import TIMESTAMP_POSTFIX, OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import RepeatedValue, Value
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp

from feature_store.errors import UsageError
from feature_store.read_plan import ReadPlan
from feature_store.redis_layout import datetime_of, decode_value, encode_timestamp
from feature_store.view_plan import Cell, Feature, ViewRow, python_value

_EMPTY = Value()
unpack_double = struct.Struct("<d").unpack_from
_STATUS: dict[str, Any] = {name: FieldStatus.Value(name) for name in FieldStatus.keys()}  # noqa: SIM118  # an enum


def entities_of(
    plan: ReadPlan, entity_rows: Sequence[Mapping[str, Any]] | Mapping[str, Any]
) -> tuple[dict[str, list[Any]], list[dict[str, object]]]:
    """(join key -> values, the same as rows) of Feast's two shapes of entity rows.

    As in Feast, a column that is no join key is left out of a read that has no use for it. UsageError for a missing join
    key and for columns of different lengths.
    """
    if type(entity_rows) is list and len(plan.join_keys) == 1:  # the common case
        (only,) = plan.join_keys
        try:
            values = [_python(row[only]) for row in entity_rows]
        except KeyError:
            pass  # said below
        else:
            return {only: values}, [{only: value} for value in values]
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


class CellResponse(OnlineResponse):
    """Feast's OnlineResponse over cells: `to_dict` decodes them itself, the protobuf message is made when asked for.

    Join keys come first, as given, then the features in the order asked for. Building the message for a reader who wants
    a dictionary or a frame costs more than the whole read.
    """

    def __init__(
        self, plan: ReadPlan, columns: Mapping[str, list[Any]], rows: list[list[ViewRow]], with_versions: bool
    ) -> None:
        # Feast's own __init__ takes the finished message.
        self._plan = plan
        self._columns = columns
        self._rows = rows
        self._with_versions = with_versions

    def _shown(self) -> list[tuple[str, list[Any]]]:
        """The join keys; as in Feast, inputs of on-demand views that came with the request are not given back."""
        return [(name, values) for name, values in self._columns.items() if name in self._plan.key_types]

    @cached_property
    def _feature_types(self) -> dict[str, Any]:  # type: ignore[override]  # Feast's is an attribute
        return {f.result: f.hint for v in self._plan.view_plans for f in v.features if f.hint is not None}

    @cached_property
    def proto(self) -> GetOnlineFeaturesResponse:  # type: ignore[override]  # Feast's is an attribute
        """The message that stock Feast returns."""
        response = GetOnlineFeaturesResponse()
        types = self._plan.key_types
        for name, values in self._shown():
            response.metadata.feature_names.val.append(name)
            response.results.append(
                GetOnlineFeaturesResponse.FeatureVector(
                    values=python_values_to_proto_values(values, ValueType[types[name]]),
                    statuses=[FieldStatus.PRESENT] * len(values),
                    event_timestamps=[Timestamp()] * len(values),
                )
            )
        fill(response, self._plan, self._rows, self._with_versions)
        return response

    def to_dict(self, include_event_timestamps: bool = False) -> dict[str, Any]:
        """Name -> values, one per entity row; with `{name}__ts` -> whole seconds since 1970, if asked for."""
        types = self._plan.key_types
        out: dict[str, Any] = {}
        for name, given in self._shown():
            out[name] = _keys(given, types[name])
            if include_event_timestamps:
                out[name + TIMESTAMP_POSTFIX] = [0] * len(given)
        for v, view in enumerate(self._plan.view_plans):
            answers = [row[v] for row in self._rows]
            seconds = [(a.event_ns or 0) // 1_000_000_000 for a in answers] if include_event_timestamps else []
            columns = zip(*[a.cells for a in answers]) if answers else [() for _ in view.features]
            for feature, cells in zip(view.features, columns):
                out[feature.result] = _python_column(feature, cells)
                if include_event_timestamps:
                    out[feature.result + TIMESTAMP_POSTFIX] = list(seconds)
        return out


def _keys(values: list[Any], key_type: str) -> list[Any]:
    """Join keys as they come back out of Feast's message."""
    wanted: type = {"STRING": str, "INT32": int, "INT64": int}.get(key_type, type(None))
    if all(type(v) is wanted for v in values):
        return list(values)
    protos = python_values_to_proto_values(values, ValueType[key_type])
    return [feast_value_type_to_python_type(v) for v in protos]


def _python_column(feature: Feature, cells: Sequence[Cell]) -> list[Any]:
    if feature.hint is not None:
        return [python_value(feature, cell)[1] for cell in cells]
    return [
        unpack_double(v, 1)[0]
        if type(v) is bytes and v[0] == 0x29 and len(v) == 9
        else decode_value(v)
        if type(v) is bytes
        else v
        for _, v in cells
    ]


def fill(response: GetOnlineFeaturesResponse, plan: ReadPlan, rows: list[list[ViewRow]], with_versions: bool) -> None:
    """Appends one vector per feature: values, statuses, event timestamps."""
    for v, view in enumerate(plan.view_plans):
        if with_versions and view.view not in [m.name for m in response.metadata.feature_view_metadata]:
            response.metadata.feature_view_metadata.add(name=view.view, version=view.version)
        answers = [row[v] for row in rows]
        times = [Timestamp.FromString(encode_timestamp(a.event_ns or 0)) for a in answers]
        for f, feature in enumerate(view.features):
            response.metadata.feature_names.val.append(feature.result)
            response.results.append(vector(feature, [a.cells[f] for a in answers], times))


def vector(
    feature: Feature, cells: Sequence[Cell], times: Sequence[Timestamp] = ()
) -> GetOnlineFeaturesResponse.FeatureVector:
    """One feature over all rows, as Feast's message holds it."""
    protos = [_proto(feature, cell) for cell in cells]
    return GetOnlineFeaturesResponse.FeatureVector(
        values=[value for _, value in protos],
        statuses=[_STATUS[status] for status, _ in protos],
        event_timestamps=times,
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
