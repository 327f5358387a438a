"""Bodies of the hot routes: read when they are exactly as documented; anything else is the application's to judge."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from serving.plans import Asked

_ONLINE = frozenset(("feature_service", "features", "entities", "at", "full_feature_names"))
_PREDICT = frozenset(("entities", "at"))
_INT64 = 2**63

Rows = list[dict[str, Any]]


def online_body(body: bytes, max_rows: int) -> tuple[Rows, Asked, bool] | None:
    """(entity rows, feature service or references, full names) of an OnlineRequest without `at`; else None."""
    request = _object(body, _ONLINE)
    if request is None:
        return None
    service, references = request.get("feature_service"), request.get("features")
    full_names = request.get("full_feature_names", False)
    asked: Asked
    if type(service) is str and references is None:
        asked = service
    elif service is None and type(references) is list and all(type(r) is str for r in references):
        asked = tuple(references)
    else:
        return None
    rows = _rows(request.get("entities"), max_rows) if type(full_names) is bool else None
    return None if rows is None else (rows, asked, full_names)


def predict_body(body: bytes, max_rows: int) -> Rows | None:
    """The entity rows of a PredictRequest without `at`; else None."""
    request = _object(body, _PREDICT)
    return None if request is None else _rows(request.get("entities"), max_rows)


def _object(body: bytes, fields: frozenset[str]) -> dict[str, Any] | None:
    try:
        request = orjson.loads(body)
    except orjson.JSONDecodeError:
        return None
    if type(request) is not dict or not request.keys() <= fields or request.get("at") is not None:
        return None
    return request


def _rows(entities: Any, max_rows: int) -> Rows | None:
    if type(entities) is not dict or not entities:
        return None
    n = -1
    for values in entities.values():
        if type(values) is not list or not values or len(values) > max_rows or n not in (-1, len(values)):
            return None
        n = len(values)
        for value in values:
            if type(value) is str or value is None or type(value) is bool:
                continue
            if type(value) is not int or not -_INT64 <= value < _INT64:
                return None
    if len(entities) == 1:
        ((key, values),) = entities.items()
        return [{key: v} for v in values]
    return [dict(zip(entities, row)) for row in zip(*entities.values())]
