"""Requests made from the OpenAPI document, good and bad: no 5xx and no answer that the document does not know.

Seeded and short in the suite; `make fuzz-rest` runs longer, with new seeds (PREDICTFLOW_FUZZ_EXAMPLES per route).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any, cast

import hypothesis
import pyarrow as pa
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving_platform import MODEL, NOW, SERVICE, Platform, serving, wait_until

from serving.app import Dependencies, create_app
from serving.arrow_input import MEDIA_TYPE as ARROW
from serving.metrics import Metrics

LONG = "PREDICTFLOW_FUZZ_EXAMPLES" in os.environ
EXAMPLES = int(os.environ.get("PREDICTFLOW_FUZZ_EXAMPLES", "12"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
NAMES = {"feature_service": SERVICE, "feature_view": "churn_features", "feature_view_name": "churn_features"}
ROW: dict[str, list[Any]] = {
    "customer_id": ["F1"],
    "event_timestamp": [(NOW - timedelta(days=1)).isoformat()],
    "tenure_months": [1.0],
    "monthly_charges": [2.0],
    "contract_months": [1],
    "payment_method": ["card"],
}


FEATURES = ["churn_features:monthly_charges"]


def _arrow() -> bytes:
    sink = pa.BufferOutputStream()
    times = pa.array([NOW, NOW], pa.timestamp("us", "UTC"))
    with pa.ipc.new_stream(sink, pa.schema([("customer_id", pa.string()), ("event_timestamp", times.type)])) as writer:
        writer.write_table(pa.table({"customer_id": ["F1", "F2"], "event_timestamp": times}))
    return sink.getvalue().to_pybytes()


def _damaged(at: int, byte: int) -> bytes:
    whole = _arrow()
    at %= len(whole)
    return whole[:at] + bytes([byte]) + whole[at + 1 :]


schemathesis.openapi.media_type(
    ARROW, st.one_of(st.just(_arrow()), st.builds(_damaged, st.integers(0, 5000), st.integers(0, 255)), st.binary())
)


@pytest.fixture(scope="module")
def api(platform: Platform, model: object) -> Iterator[Any]:
    """The schema of a server with a model, rows offline, and a row limit low enough for jobs."""
    with serving(platform.settings, job_rows=1) as address:
        wait_until(lambda: requests.get(f"{address}/readyz", timeout=5).ok)
        body = {"feature_view": "churn_features", "columns": ROW, "to": "online_and_offline"}
        requests.post(f"{address}/api/v1/features/push", json=body, timeout=30).raise_for_status()
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


@pytest.fixture(scope="module")
def finished_job(api: Any) -> str:
    """The id of a job whose result can be fetched."""
    address = api.get_base_url().rstrip("/")
    times = [ROW["event_timestamp"][0]] * 2
    entities = {"customer_id": ["F1", "F2"], "event_timestamp": times}
    body = {"features": FEATURES, "entities": entities}
    job = requests.post(f"{address}/api/v1/features/historical", json=body, timeout=30).json()["id"]
    wait_until(lambda: requests.get(f"{address}/api/v1/jobs/{job}", timeout=10).json()["status"] == "done")
    return str(job)


def routes() -> list[tuple[str, str]]:
    """(method, path) of every route, from an application that is never started."""
    nothing = cast(Any, None)
    paths = create_app(Dependencies(*[nothing] * 9, Metrics(), nothing, nothing)).openapi()["paths"]
    return [(method, path) for path, operations in paths.items() for method in operations]


@pytest.mark.parametrize("mode", list(GenerationMode), ids=lambda m: m.name.lower())
@pytest.mark.parametrize(("method", "path"), routes(), ids=lambda text: text)
def test_every_answer_is_documented_and_none_is_a_failure(
    api: Any, finished_job: str, method: str, path: str, mode: GenerationMode
) -> None:
    operation = api[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.body or operation.query):
        pytest.skip("nothing in this request can be wrong")

    @hypothesis.settings(
        max_examples=EXAMPLES,
        derandomize=not LONG,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.generate],
    )
    @hypothesis.given(case=operation.as_strategy(generation_mode=mode), known=st.booleans(), spoil=st.booleans())
    def ask(case: Any, known: bool, spoil: bool) -> None:
        if known:
            _use_what_exists(case, finished_job, spoil)
        case.call_and_validate(checks=CHECKS, timeout=60)

    ask()


def _use_what_exists(case: Any, job: str, spoil: bool) -> None:
    """Names and rows of this project: random ones would never get past the first check. `spoil`: with one column of
    values that were made up.
    """
    for name, value in (("model", MODEL), ("view", "churn_features"), ("job", job)):
        if name in (case.path_parameters or {}) and case.method != "DELETE":
            case.path_parameters[name] = value
    if case.media_type == ARROW:
        case.query = {"features": FEATURES}
    body = case.body
    if not isinstance(body, dict):
        return
    for field, name in NAMES.items():
        if field in body:
            body[field] = name
    for field in ("push_source", "features", "at"):
        if not spoil or "feature_service" in body:
            body.pop(field, None)
    for field in ("columns", "df"):
        if field in body:
            given = body[field] if isinstance(body[field], dict) else {}
            made_up = next((v[:1] for v in given.values() if isinstance(v, list) and v), [None])
            body[field] = {**ROW, "monthly_charges": made_up} if spoil else dict(ROW)
    if "entities" in body:
        body["entities"] = {"customer_id": ROW["customer_id"]}
        if "historical" in case.path:
            body.pop("feature_service", None)
            body["entities"]["event_timestamp"] = ROW["event_timestamp"]
            body["features"] = FEATURES
            case.query = {}
        elif "online" in case.path:
            body["feature_service"] = SERVICE
            body.pop("features", None)
