"""Requests made from the OpenAPI document, good and bad: no 5xx and no answer that the document does not know.

Seeded and short in the suite; `make fuzz-rest` runs longer, with new seeds (PREDICTFLOW_FUZZ_EXAMPLES per route).
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import hypothesis
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from serving_platform import MODEL, NOW, SERVICE, Platform, serving, wait_until

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


@pytest.fixture(scope="module")
def api(platform: Platform, model: object) -> Iterator[Any]:
    """The schema of a server with a model, rows offline, and a row limit low enough for jobs."""
    with serving(platform.settings, job_rows=1) as address:
        wait_until(lambda: requests.get(f"{address}/readyz", timeout=5).ok)
        body = {"feature_view": "churn_features", "columns": ROW, "to": "online_and_offline"}
        requests.post(f"{address}/api/v1/features/push", json=body, timeout=30).raise_for_status()
        yield schemathesis.openapi.from_url(f"{address}/openapi.json")


schema = schemathesis.pytest.from_fixture("api")


@schema.parametrize()
@hypothesis.settings(
    max_examples=EXAMPLES,
    derandomize="PREDICTFLOW_FUZZ_EXAMPLES" not in os.environ,
    deadline=None,
    database=None,
    suppress_health_check=list(HealthCheck),
)
@hypothesis.given(data=hypothesis.strategies.data())
def test_every_answer_is_documented_and_none_is_a_failure(case: Any, data: Any) -> None:
    """Names and rows that exist are put in at times: random ones would never get past the first check."""
    body = case.body
    if isinstance(body, dict) and data.draw(hypothesis.strategies.booleans(), "known names"):
        for field, name in NAMES.items():
            if field in body:
                body[field] = name
        for field in ("columns", "df"):
            if field in body:
                body[field] = {**ROW, **(body[field] if isinstance(body[field], dict) else {})}
        if "entities" in body:
            body["entities"] = {"customer_id": ROW["customer_id"]}
            if "historical" in case.path:
                body["entities"]["event_timestamp"] = ROW["event_timestamp"]
    if "model" in (case.path_parameters or {}) and data.draw(hypothesis.strategies.booleans(), "known model"):
        case.path_parameters["model"] = MODEL
    case.call_and_validate(checks=CHECKS, timeout=60)
