"""Feast's GetOnlineFeaturesResponse, written as bytes: stored `Value` protos go into it as they stand, never parsed.

What does not change from request to request (names, versions) is encoded once per plan.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from feature_store.redis_layout import encode_timestamp
from feature_store.view_plan import python_value

if TYPE_CHECKING:
    from feature_store.read_plan import ReadPlan
    from feature_store.view_plan import Cell, Feature, ViewRow
    from serving.online import CellRead

STATUS = {"INVALID": 0, "PRESENT": 1, "NULL_VALUE": 2, "NOT_FOUND": 3, "OUTSIDE_MAX_AGE": 4}
"""FieldStatus by name; `tests/unit/test_grpc_wire.py` holds it against Feast's enum."""
_PRESENT = STATUS["PRESENT"]
_NO_VALUE = b"\x0a\x00"
_NO_TIME = b"\x1a\x00"
_NULL_TAG = 0x98  # first byte of a Value that holds null_val (field 19)


def varint(number: int) -> bytes:
    """Base-128, least significant group first, of a number >= 0."""
    out = bytearray()
    while number > 0x7F:
        out.append(number & 0x7F | 0x80)
        number >>= 7
    out.append(number)
    return bytes(out)


_VALUE = [b"\x0a" + varint(n) for n in range(1024)]
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
    n = len(read.rows)
    out = [heads.of(plan, tuple(entities), with_versions)]
    # FeatureVector.values and RepeatedValue.val have the same field number, so the request's own bytes are the answer's.
    rest = b"\x12" + varint(n) + bytes([_PRESENT]) * n + _NO_TIME * n
    for values in entities.values():
        _vector(out, values.SerializeToString(), rest)
    for v, view in enumerate(plan.view_plans):
        answers = [row[v] for row in read.rows]
        times = b"".join([_time(a) for a in answers])
        # What nearly every feature of a row view gives: all rows present.
        present = b"\x12" + varint(n) + bytes([_PRESENT]) * n + times
        for feature, cells in zip(view.features, zip(*[a.cells for a in answers])):
            statuses, stored = zip(*cells)
            values = _plain(stored) if statuses.count("PRESENT") == n else None
            if values is not None:
                _vector(out, values, present)
            else:
                _vector(out, *_values(feature, cells, times))
    return b"".join(out)


def _plain(stored: Sequence[object]) -> bytes | None:
    """Field `values` of stored scalars that are no null and not large, else None."""
    try:
        if not {v[0] for v in stored} <= _NEVER_NULL:  # type: ignore[index]  # a TypeError tells what is no bytes
            return None
        return b"".join([_VALUE[len(v)] + v for v in stored])  # type: ignore[arg-type,operator]  # as above
    except (TypeError, IndexError):
        return None


def _vector(out: list[bytes], values: bytes, rest: bytes) -> None:
    out.append(b"\x12" + varint(len(values) + len(rest)))
    out.append(values)
    out.append(rest)


def _time(answer: ViewRow) -> bytes:
    if answer.event_ns is None:
        return _NO_TIME
    data = encode_timestamp(answer.event_ns)
    return b"\x1a" + bytes([len(data)]) + data


def _values(feature: Feature, cells: Sequence[Cell], times: bytes) -> tuple[bytes, bytes]:
    """Field `values`, and what follows it: `statuses` and `event_timestamps`."""
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
            statuses.append(STATUS["NULL_VALUE"])
            continue
        length = len(value)
        values.append(_VALUE[length] if length < 1024 else b"\x0a" + varint(length))
        values.append(value)
        statuses.append(STATUS[status])
    return b"".join(values), b"\x12" + varint(len(statuses)) + bytes(statuses) + times


def _may_be_null(value: bytes) -> bool:
    """Whether `python_value` must look: a scalar with something in it is no null."""
    first = value[0] if value else _NULL_TAG
    return first not in _NEVER_NULL


_NEVER_NULL = frozenset({0x0A, 0x12, 0x18, 0x20, 0x29, 0x35, 0x38})
"""First bytes of Values that hold bytes, string, int32, int64, double, float, bool."""
