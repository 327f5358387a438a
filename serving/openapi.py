"""What the OpenAPI document says of every route alike: answers that are errors, headers, and API keys."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI

from serving import schemas
from serving.access import scope_of

DESCRIPTION = """Online and historical features, pushes and predictions. Errors of every route have one shape; the routes
of Feast's own server answer errors as Feast does. Where the server runs with API keys, a key needs the route's scope."""

_FAULTS = {
    400: "The request asks for something that cannot be answered",
    401: "No API key, or an unknown one",
    403: "The API key lacks the scope of this route",
    404: "Unknown feature service, feature, view, source, model or job",
    405: "The route has other methods",
    408: "Request line and headers did not come in time",
    409: "The job has no result yet, or none any more",
    413: "Over a limit: rows, features or bytes",
    422: "The request does not have the documented shape",
    429: "Too many jobs; try again after Retry-After seconds",
    431: "Request line and headers are too large",
    500: "Unexpected error, or an on-demand view's function failed; the log has it under the request id",
    503: "A server behind this one does not answer, or this one is full; try again after Retry-After seconds",
    504: "No answer within the server's time budget",
}
ALWAYS = (405, 408, 431, 500, 504)
"""What every route can answer."""
COMMON = (401, 403, *ALWAYS, 503)
"""What every route that asks for a key can answer."""
_BEFORE_ROUTES = (408, 431)
"""Answered before the path is looked at: of one shape, on Feast's routes too."""
_HEADERS: dict[str, tuple[str, dict[str, Any]]] = {
    "X-Request-Id": ("The request's own, if it sent a well-formed one, else a new one", {"type": "string"}),
    "Retry-After": ("Seconds after which to try again", {"type": "integer", "minimum": 0}),
    "Location": ("Path of the job", {"type": "string"}),
    "WWW-Authenticate": ("How to send a key", {"type": "string"}),
}
_OF_FAULTS = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}
_FEAST_ERROR = {"application/json": {"schema": {"type": "string", "description": "Feast's error: a JSON text"}}}


def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these statuses and the common ones."""
    return _faults({*statuses, *COMMON}, feast=False)


def feast_faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """As `faults`, for a route of Feast's own server."""
    return _faults({*statuses, *COMMON}, feast=True)


def probe_faults(feast: bool = False) -> dict[int | str, dict[str, Any]]:
    """As `faults`, for a route that asks for no key and is answered however busy the server is."""
    return _faults({*ALWAYS}, feast)


def returns(*names: str) -> dict[str, Any]:
    """`headers` of an answer, each always there."""
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _faults(statuses: set[int], feast: bool) -> dict[int | str, dict[str, Any]]:
    out: dict[int | str, dict[str, Any]] = {}
    for status in sorted(statuses):
        in_feasts_shape = feast and status not in _BEFORE_ROUTES
        shape = {"content": _FEAST_ERROR} if in_feasts_shape else {"model": schemas.ErrorResponse}
        headers = {"headers": returns(_OF_FAULTS[status])} if status in _OF_FAULTS else {}
        out[status] = {"description": _FAULTS[status], **shape, **headers}
    return out


def complete(app: FastAPI) -> None:
    """Adds to the app's OpenAPI document the headers that every answer has, the two ways to send an API key, and each
    route's scope."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            components = document.setdefault("components", {})
            components["headers"] = {
                name: {"description": says, "required": True, "schema": schema}
                for name, (says, schema) in _HEADERS.items()
            }
            components["securitySchemes"] = {
                "bearer": {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "`predictflow serve-key new` makes a key",
                },
                "header": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
            }
            for path, operations in document["paths"].items():
                scope = scope_of(path)
                for operation in operations.values():
                    # `{}`: a server without keys asks for none
                    operation["security"] = [{"bearer": []}, {"header": []}, {}] if scope else []
                    if scope:
                        operation["x-scope"] = scope
                    for answer in operation["responses"].values():
                        answer["headers"] = {**returns("X-Request-Id"), **answer.get("headers", {})}
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
