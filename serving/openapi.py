"""What the OpenAPI document says of every route alike: answers that are errors, and API keys."""

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
    409: "The job has no result yet, or none any more",
    413: "Over a limit: rows, features or bytes",
    422: "The request does not have the documented shape",
    429: "Too many jobs; try again after Retry-After seconds",
    500: "Unexpected error, or an on-demand view's function failed; the log has it under the request id",
    503: "A server behind this one does not answer, or this one is full; try again after Retry-After seconds",
    504: "No answer within the server's time budget",
}
COMMON = (401, 403, 500, 503, 504)
"""What every route that asks for a key can answer."""
_FEAST_ERROR = {"application/json": {"schema": {"type": "string", "description": "Feast's error: a JSON text"}}}


def faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """`responses` of a route: these statuses and the common ones."""
    return {s: {"model": schemas.ErrorResponse, "description": _FAULTS[s]} for s in sorted({*statuses, *COMMON})}


def feast_faults(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """As `faults`, for a route of Feast's own server."""
    return {s: {"description": _FAULTS[s], "content": _FEAST_ERROR} for s in sorted({*statuses, *COMMON})}


def document_keys(app: FastAPI) -> None:
    """Adds the two ways to send an API key, and each route's scope, to the app's OpenAPI document."""
    make = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = make()
            document.setdefault("components", {})["securitySchemes"] = {
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
            app.openapi_schema = document
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]  # FastAPI's documented way to extend the document
