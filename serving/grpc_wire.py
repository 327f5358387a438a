"""Feast's GetOnlineFeaturesResponse, written as bytes: stored `Value` protos go into it as they stand, never parsed.

`encode` takes cells; `wire_plan.py` goes from Redis' replies by whole columns. What does not change from request to request (names, versions) is encoded once per plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from feature_store.redis_layout import encode_timestamp
from feature_store.view_plan import python_value

if TYPE_CHECKING:
    from feature_store.read_plan import ReadPlan
    from feature_store.view_plan import Cell, Feature
    from serving.online_types import CellRead

STATUS = {"INVALID": 0, "PRESENT": 1, "NULL_VALUE": 2, "NOT_FOUND": 3, "OUTSIDE_MAX_AGE": 4}
"""FieldStatus by name; `tests/unit/test_grpc_wire.py` holds it against Feast's enum."""
_PRESENT = STATUS["PRESENT"]
_NULL_VALUE = STATUS["NULL_VALUE"]
_NO_VALUE = b"\x0a\x00"
NO_TIME = b"\x1a\x00"
"""A row without an event time."""
_NULL_TAG = 0x98  # first byte of a Value that holds null_val (field 19)


def varint(number: int) -> bytes:
    """Base-128, least significant group first, of a number >= 0."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


VALUE_HEADS = [b"\x0a" + varint(n) for n in range(1024)]
"""Tag and length of one Value in a FeatureVector, by its length."""


class Heads:
    """The constant beginning of every answer to a plan: its metadata. Forgets a plan when nobody holds it."""

    def __init__(self) -> None:
        self._heads: WeakKeyDictionary[ReadPlan, dict[tuple[tuple[str, ...], bool], bytes]] = WeakKeyDictionary()

    def of(self, plan: ReadPlan, entities: tuple[str, ...], with_versions: bool) -> bytes:
        """Field `metadata` of the response: the names of the entity columns, then of the features in their order."""
        known = self._heads.setdefault(plan, {})
        head = known.get((entities, with_versions))
        if head is None:
            if len(known) > 64:  # orders of the join keys that clients chose
                known.clear()
            head = known[entities, with_versions] = _head(plan, entities, with_versions)
        return head


def _head(plan: ReadPlan, entities: tuple[str, ...], with_versions: bool) -> bytes:
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse

    response = GetOnlineFeaturesResponse()
    response.metadata.feature_names.val.extend([*entities, *plan.feature_names])
    if with_versions:
        for name, version in {v.view: v.version for v in plan.view_plans}.items():
            response.metadata.feature_view_metadata.add(name=name, version=version)
    return response.SerializeToString()


def encode(read: CellRead, heads: Heads, entities: Mapping[str, Any], with_versions: bool) -> bytes:
    """The response: join keys as the request gave them (`RepeatedValue` by name), then one vector per feature.

    What else `entities` holds, inputs of on-demand views, is left out, as in Feast's own answers.
    """
    plan = read.plan.reader.plan
    entities = {name: values for name, values in entities.items() if name in plan.key_types}
    out = [heads.of(plan, tuple(entities), with_versions)]
    request_vectors(out, entities, len(read.rows))
    for v, view in enumerate(plan.view_plans):
        answers = [row[v] for row in read.rows]
        times = b"".join([NO_TIME if a.event_ns is None else time_field(a.event_ns) for a in answers])
        view_vectors(out, view.features, list(zip(*[a.cells for a in answers])), times)
    return b"".join(out)


def request_vectors(out: list[bytes], entities: Mapping[str, Any], n: int) -> None:
    """One vector of `n` rows per entity column."""
    # FeatureVector.values and RepeatedValue.val have the same field number, so the request's own bytes are the answer's.
    rest = b"\x12" + varint(n) + bytes([_PRESENT]) * n + NO_TIME * n
    for values in entities.values():
        vector(out, values.SerializeToString(), rest)


def view_vectors(out: list[bytes], features: Sequence[Feature], columns: Sequence[Sequence[Cell]], times: bytes) -> int:
    """One vector per feature and its cells; how many of them are null."""
    nulls = 0
    for feature, cells in zip(features, columns):
        values, statuses = _values(feature, cells)
        vector(out, values, b"\x12" + varint(len(statuses)) + bytes(statuses) + times)
        nulls += statuses.count(_NULL_VALUE)
    return nulls


def vector(out: list[bytes], values: bytes, rest: bytes) -> None:
    """One FeatureVector of `results`: its field `values`, then its statuses and times."""
    out.append(b"\x12" + varint(len(values) + len(rest)))
    out.append(values)
    out.append(rest)


def time_field(event_ns: int) -> bytes:
    """One time of a FeatureVector's `event_timestamps`."""
    data = encode_timestamp(event_ns)
    return b"\x1a" + bytes([len(data)]) + data


def _values(feature: Feature, cells: Sequence[Cell]) -> tuple[bytes, bytearray]:
    """Field `values`, and the statuses."""
    values = []
    statuses = bytearray()
    for status, value in cells:
        if value is None:
            values.append(_NO_VALUE)
            statuses.append(STATUS[status])
            continue
        if isinstance(value, int):
            value = b"\x20" + varint(value & 0xFFFFFFFFFFFFFFFF)
        elif _may_be_null(value) and python_value(feature, (status, value))[1] is None:
            values.append(_NO_VALUE)
            statuses.append(_NULL_VALUE)
            continue
        length = len(value)
        values.append(VALUE_HEADS[length] if length < len(VALUE_HEADS) else b"\x0a" + varint(length))
        values.append(value)
        statuses.append(STATUS[status])
    return b"".join(values), statuses


def _may_be_null(value: bytes) -> bool:
    """Whether `python_value` must look: a scalar with something in it is no null."""
    first = value[0] if value else _NULL_TAG
    return first not in NEVER_NULL


NEVER_NULL = frozenset({0x0A, 0x12, 0x18, 0x20, 0x29, 0x35, 0x38})
"""First bytes of Values that hold bytes, string, int32, int64, double, float, bool."""
