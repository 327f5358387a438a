"""docs/reference/rest.md names every route, metric and error code of the server."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

from fastapi.routing import APIRoute
from prometheus_client import CollectorRegistry

from feature_store.errors import PredictFlowError
from serving import errors
from serving.app import Dependencies, create_app
from serving.metrics import Metrics

PAGE = (Path(__file__).parents[2] / "docs/reference/rest.md").read_text()


def test_every_route_is_documented() -> None:
    nothing = cast(Any, None)
    app = create_app(Dependencies(*[nothing] * 9, Metrics(), nothing, nothing))
    routes = [f"`{m} {path}`" for path, methods in app.openapi()["paths"].items() for m in map(str.upper, methods)]
    assert len(routes) == 16
    assert [r for r in routes if r not in PAGE] == []
    assert all(
        isinstance(r, APIRoute) or r.path in ("/openapi.json", "/docs", "/docs/oauth2-redirect") for r in app.routes
    )  # type: ignore[attr-defined]


def test_the_openapi_document_tells_headers_and_what_every_route_can_answer() -> None:
    nothing = cast(Any, None)
    document = create_app(Dependencies(*[nothing] * 9, Metrics(), nothing, nothing)).openapi()
    assert {h["required"] for h in document["components"]["headers"].values()} == {True}
    for path, operations in document["paths"].items():
        for operation in operations.values():
            answers = operation["responses"]
            assert {"405", "408", "431", "500", "504"} <= answers.keys(), path
            for status, answer in answers.items():
                probe = path in ("/readyz", "/health")  # what they say is their answer, and not to be sent again
                more = {"202": "Location", "401": "WWW-Authenticate", "429": "Retry-After", "503": "Retry-After"}
                names = {"X-Request-Id", *([] if probe or status not in more else [more[status]])}
                assert answer["headers"] == {n: {"$ref": f"#/components/headers/{n}"} for n in names}, (path, status)


def test_every_metric_is_documented_and_no_other() -> None:
    metrics = Metrics(CollectorRegistry())
    exposed = {f.name + ("_total" if f.type == "counter" else "") for f in metrics.registry.collect()}
    assert exposed == set(re.findall(r"^\| `(predictflow_\w+)` \|", PAGE, re.M))


def test_every_error_code_of_the_server_is_documented() -> None:
    def kinds(base: type[PredictFlowError]) -> set[type[PredictFlowError]]:
        return {base}.union(*(kinds(kind) for kind in base.__subclasses__()))

    own = {kind.code for kind in kinds(PredictFlowError) if kind.__module__.startswith("serving.")}
    assert {"column", "windowed_view", "overloaded", "no_result"} <= own
    codes = {
        *own,
        *errors.STATUS_OF_CODE,
        *errors.HTTP_CODES.values(),
        "usage",
        "invalid_body",
        "internal",
        "unavailable",
    }
    assert [c for c in codes if f"`{c}`" not in PAGE] == []
