"""On-demand features of historical rows over HTTP, at once and as jobs, and what a failing function is answered with."""

from __future__ import annotations

import importlib
import sys
import textwrap
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pyarrow as pa
import pytest
import requests
from serving_platform import NOW, Platform, serving, wait_until

MODULE = "computed_over_http"  # of the served checkout
DEFINITIONS = """
    import pandas as pd
    from feast import Field, RequestSource
    from feast.on_demand_feature_view import on_demand_feature_view
    from feast.types import Float64, Int64

    from features.customer_features import churn_features

    asked = RequestSource(name="asked", schema=[Field(name="factor", dtype=Float64)])

    @on_demand_feature_view(sources=[churn_features, asked], schema=[Field(name="product", dtype=Float64)])
    def by_frame(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"product": inputs["monthly_charges"] * inputs["factor"]})

    @on_demand_feature_view(
        sources=[churn_features], schema=[Field(name="cents", dtype=Int64)], mode="python", singleton=True
    )
    def no_nulls(inputs):
        return {"cents": int(inputs["monthly_charges"] * 100)}

    @on_demand_feature_view(sources=[churn_features], schema=[Field(name="whole", dtype=Int64)], mode="python")
    def of_another_type(inputs):
        return {"whole": ["a word" if charges is None else 1 for charges in inputs["monthly_charges"]]}
"""
OLD, NEW = NOW - timedelta(days=9), NOW - timedelta(days=2)
ARROW = "application/vnd.apache.arrow.stream"
HISTORICAL = "/api/v1/features/historical"
FAULTS = [
    ("no_nulls:cents", "no_nulls failed (TypeError"),
    ("of_another_type:whole", "of_another_type gives values of"),
]


@pytest.fixture(scope="module")
def url(platform: Platform) -> Iterator[str]:
    """A server whose checkout defines the views; D1 has two rows, of which the newer became known at NOW."""
    (platform.settings.repo / f"{MODULE}.py").write_text(textwrap.dedent(DEFINITIONS))
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(platform.settings.repo))
        module = importlib.import_module(MODULE)
        platform.store.apply([module.by_frame, module.no_nulls, module.of_another_type])
        with serving(platform.settings, models=(), job_rows=3) as address:
            columns: dict[str, Any] = {
                "customer_id": ["D1", "D1"],
                "event_timestamp": [OLD.isoformat(), NEW.isoformat()],
                "created": [OLD.isoformat(), NOW.isoformat()],
                "tenure_months": [1.0, 1.0],
                "monthly_charges": [1.5, 2.5],
                "contract_months": [1, 1],
                "payment_method": ["card", "card"],
            }
            body = {"feature_view": "churn_features", "columns": columns, "to": "online_and_offline"}
            requests.post(f"{address}/api/v1/features/push", json=body, timeout=30).raise_for_status()
            yield address
    sys.modules.pop(MODULE, None)


def entities(ids: list[str], **more: Any) -> dict[str, Any]:
    return {"customer_id": ids, "event_timestamp": [NOW.isoformat()] * len(ids), **more}


def historical(url: str, features: list[str], rows: dict[str, Any], **more: Any) -> requests.Response:
    return requests.post(f"{url}{HISTORICAL}", json={"features": features, "entities": rows, **more}, timeout=60)


def ended(url: str, answer: requests.Response) -> dict[str, Any]:
    assert answer.status_code == 202, answer.text
    job = url + answer.headers["Location"]
    wait_until(lambda: requests.get(job, timeout=10).json()["status"] in ("done", "failed"))
    return dict(requests.get(job, timeout=10).json())


def test_each_row_is_computed_of_what_was_known_at_its_time(url: str) -> None:
    before = (NOW - timedelta(seconds=1)).isoformat()
    rows = entities(["D1", "D1", "nobody"], factor=[2.0, 2.0, 2.0])
    rows["event_timestamp"][0] = before

    answer = historical(url, ["by_frame:product", "churn_features:monthly_charges"], rows).json()
    assert answer["feature_names"] == ["product", "monthly_charges"]
    assert answer["columns"]["product"] == [3.0, 5.0, None]
    assert answer["columns"]["monthly_charges"] == [1.5, 2.5, None]
    assert answer["columns"]["factor"] == [2.0, 2.0, 2.0]

    body = {"features": ["by_frame:product"], "entities": {"customer_id": ["D1", "nobody"], "factor": [2.0, 2.0]}}
    online = requests.post(f"{url}/api/v1/features/online", json=body, timeout=10).json()["rows"]
    assert [row["values"]["product"] for row in online] == answer["columns"]["product"][1:]


def test_so_is_each_row_of_a_job(url: str) -> None:
    n = 60_000  # more than a job computes at a time
    table = pa.table(
        {
            "customer_id": ["D1", "nobody"] * (n // 2),
            "event_timestamp": pa.array([NOW] * n, pa.timestamp("us", "UTC")),
            "factor": [float(i) for i in range(n)],
        }
    )
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    answer = requests.post(
        f"{url}{HISTORICAL}",
        params={"features": ["by_frame:product"]},
        data=sink.getvalue().to_pybytes(),
        headers={"Content-Type": ARROW},
        timeout=60,
    )
    job = ended(url, answer)
    assert (job["status"], job["rows_done"]) == ("done", n)
    content = requests.get(f"{url}{answer.headers['Location']}/result", timeout=60).content
    result = pa.ipc.open_stream(content).read_all()
    assert result.column_names == ["customer_id", "event_timestamp", "factor", "product"]
    assert result["product"].to_pylist() == [None if i % 2 else 2.5 * i for i in range(n)]


@pytest.mark.parametrize(("feature", "says"), FAULTS)
def test_a_function_that_fails_is_told_under_its_name_and_logged(
    url: str, feature: str, says: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("ERROR", "serving")
    answer = historical(url, [feature], entities(["D1", "nobody"]))
    error = answer.json()["error"]
    assert (answer.status_code, error["code"]) == (500, "on_demand_function")
    assert says in error["message"]
    (record,) = [r for r in caplog.records if r.name.startswith("serving")]
    assert record.request_id == answer.headers["X-Request-Id"]  # type: ignore[attr-defined]  # an extra of the record
    assert says in (record.exc_text or str(record.exc_info))

    responses = requests.get(f"{url}/openapi.json", timeout=30).json()["paths"][HISTORICAL]["post"]["responses"]
    assert "application/json" in responses["500"]["content"]


@pytest.mark.parametrize(("feature", "says"), FAULTS)
def test_a_job_says_which_function_failed(url: str, feature: str, says: str) -> None:
    answer = historical(url, [feature], entities(["D1", "D1", "D1", "nobody"]))
    job = ended(url, answer)
    assert (job["status"], job["error"]["code"]) == ("failed", "on_demand_function")
    assert says in job["error"]["message"]
    result = requests.get(f"{url}{answer.headers['Location']}/result", timeout=10)
    assert (result.status_code, result.json()["error"]["code"]) == (409, "no_result")
    assert says in result.json()["error"]["message"]


def test_a_missing_input_is_the_requests_fault_before_any_job(url: str) -> None:
    for ids in (["D1"], ["D1"] * 4):
        answer = historical(url, ["by_frame:product"], entities(ids))
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "usage")
        assert "factor" in answer.json()["error"]["message"]
