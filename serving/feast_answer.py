"""Feast's JSON of an online read from the cells of a read plan: the document that Feast makes of its message, without the
message but for types that only its converter knows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from feast.feature_server_utils import convert_response_to_dict
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse

from feature_store.online_response import CellResponse, unpack_double, vector
from feature_store.redis_layout import decode_value

if TYPE_CHECKING:
    from feature_store.read_plan import ReadPlan
    from feature_store.view_plan import Cell, Feature, ViewRow

_NATIVE = frozenset(b"\x18\x20\x29\x35\x38\x12")
"""The first byte of `Value`s whose Python value is what Feast's JSON holds: integers, floats, a boolean, a text."""


def feast_answer(
    plan: ReadPlan, columns: Mapping[str, list[Any]], rows: Sequence[list[ViewRow]], with_versions: bool
) -> dict[str, Any]:
    """What Feast's server answers: join keys first, as given, then features, each with its statuses and event times."""
    empty = convert_response_to_dict(CellResponse(plan, columns, [], with_versions).proto)
    keys = len(empty["results"]) - sum(len(view.features) for view in plan.view_plans)
    results = empty["results"][:keys]
    shown: dict[int | None, str] = {}
    for v, view in enumerate(plan.view_plans):
        answers = [row[v] for row in rows]
        times = [shown.get(a.event_ns) or shown.setdefault(a.event_ns, _time(a.event_ns or 0)) for a in answers]
        by_feature = zip(*[a.cells for a in answers], strict=True) if answers else [() for _ in view.features]
        for feature, cells in zip(view.features, by_feature, strict=True):
            values, statuses = _column(feature, cells)
            result = {"values": values, "statuses": statuses}
            results.append({**result, "event_timestamps": times} if times else result)
    return {**empty, "results": results}


def _column(feature: Feature, cells: Sequence[Cell]) -> tuple[list[Any], list[str]]:
    if feature.hint is None and all(type(c) is not bytes or (c[:1] and c[0] in _NATIVE) for _, c in cells):
        values = [
            c if type(c) is not bytes else unpack_double(c, 1)[0] if c[0] == 0x29 and len(c) == 9 else decode_value(c)
            for _, c in cells
        ]
        return values, [status for status, _ in cells]
    (made,) = convert_response_to_dict(GetOnlineFeaturesResponse(results=[vector(feature, cells)]))["results"]
    return made["values"], made["statuses"]


def _time(ns: int) -> str:
    """RFC 3339 with as many digits as it takes, in groups of three: protobuf's JSON of a Timestamp."""
    seconds, nanos = divmod(ns, 1_000_000_000)
    base = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    digits = 0 if not nanos else 3 if nanos % 1_000_000 == 0 else 6 if nanos % 1_000 == 0 else 9
    return f"{base}.{nanos // 10 ** (9 - digits):0{digits}d}Z" if digits else f"{base}Z"
