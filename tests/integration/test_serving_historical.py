"""Push and historical features over HTTP, at once and as jobs, on a real registry, Redis and Parquet."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import requests
from serving_platform import NOW, Platform, serving, wait_until

from serving.access import add_key

FEATURES = ["churn_features:monthly_charges", "churn_features:payment_method"]
ARROW = "application/vnd.apache.arrow.stream"


def columns(ids: list[str], times: list[datetime], charges: list[float | None], **more: Any) -> dict[str, Any]:
    n = len(ids)
    return {
        "customer_id": ids,
        "event_timestamp": [t.isoformat() for t in times],
        "tenure_months": [1.0] * n,
        "monthly_charges": charges,
        "contract_months": [1] * n,
        "payment_method": ["card"] * n,
        **more,
    }


@pytest.fixture(scope="module")
def url(platform: Platform) -> Iterator[str]:
    with serving(platform.settings, models=(), job_rows=3) as address:
        old, new = NOW - timedelta(days=9), NOW - timedelta(days=2)
        body = {
            "feature_view": "churn_features",
            "columns": columns(
                ["H1", "H1", "H2"], [old, new, old], [1.0, 2.0, None], created=[old.isoformat(), NOW.isoformat(), None]
            ),
            "to": "online_and_offline",
        }
        answer = requests.post(f"{address}/api/v1/features/push", json=body, timeout=30)
        assert answer.json() == {"rows": 3, "feature_views": ["churn_features"], "to": "online_and_offline"}
        yield address


def historical(url: str, entities: dict[str, Any], **more: Any) -> requests.Response:
    body = {"features": FEATURES, "entities": entities, **more}
    return requests.post(f"{url}/api/v1/features/historical", json=body, timeout=60)


def test_pushed_rows_are_served_newest_first_and_with_the_servers_created(url: str) -> None:
    body = {"features": FEATURES, "entities": {"customer_id": ["H1", "H2"]}}
    rows = requests.post(f"{url}/api/v1/features/online", json=body, timeout=10).json()["rows"]
    assert [r["values"]["monthly_charges"] for r in rows] == [2.0, None]
    assert [r["statuses"]["monthly_charges"] for r in rows] == ["PRESENT", "NULL_VALUE"]
    assert rows[0]["event_timestamps"]["monthly_charges"] == (NOW - timedelta(days=2)).isoformat().replace(
        "+00:00", "Z"
    )


def test_each_row_gets_what_was_known_at_its_own_time(url: str) -> None:
    times = [(NOW - timedelta(days=d)).isoformat() for d in (1, 1, 20)]
    entities = {"customer_id": ["H1", "nobody", "H1"], "event_timestamp": times, "label": [1, 0, None]}

    known = historical(url, entities).json()
    hindsight = historical(url, entities, as_known=False, full_feature_names=True).json()

    assert known["rows"] == 3
    assert known["feature_names"] == ["monthly_charges", "payment_method"]
    assert known["columns"]["label"] == [1, 0, None]
    assert known["columns"]["monthly_charges"] == [1.0, None, None]  # the newer row was created only at NOW
    assert hindsight["columns"]["churn_features__monthly_charges"] == [2.0, None, None]


def test_latency_is_told_by_route_and_service(url: str) -> None:
    def told() -> float:
        line = 'predictflow_service_seconds_count{route="/api/v1/features/historical",service=""} '
        text = requests.get(f"{url}/metrics", timeout=10).text
        return sum(float(m.removeprefix(line)) for m in text.splitlines() if m.startswith(line))

    before = told()
    assert historical(url, {"customer_id": ["H1"], "event_timestamp": [NOW.isoformat()]}).ok
    assert told() == before + 1


def stream(table: pa.Table) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue().to_pybytes()


def arrow_rows(n: int) -> pa.Table:
    times = pa.array([NOW - timedelta(days=1)] * n, pa.timestamp("us", "UTC"))
    return pa.table({"customer_id": ["H1", "H2"] * (n // 2), "event_timestamp": times, "row": list(range(n))})


def test_arrow_goes_in_and_comes_out(url: str) -> None:
    answer = requests.post(
        f"{url}/api/v1/features/historical",
        params={"features": FEATURES, "as_known": "false"},
        data=stream(arrow_rows(2)),
        headers={"Content-Type": ARROW, "Accept": ARROW},
        timeout=60,
    )
    assert answer.headers["Content-Type"] == ARROW
    table = pa.ipc.open_stream(answer.content).read_all()
    assert table.select(["customer_id", "event_timestamp", "row"]).equals(arrow_rows(2))
    assert table["monthly_charges"].to_pylist() == [2.0, None]


def test_many_rows_become_a_job_whose_result_is_fetched_and_removed(url: str, platform: Platform) -> None:
    sent = arrow_rows(120_000)
    answer = requests.post(
        f"{url}/api/v1/features/historical",
        params={"features": FEATURES},
        data=stream(sent),
        headers={"Content-Type": ARROW},
        timeout=60,
    )
    assert answer.status_code == 202
    job = url + answer.headers["Location"]
    assert requests.get(job, timeout=10).json()["rows_total"] == 120_000
    wait_until(lambda: requests.get(job, timeout=10).json()["status"] == "done", 100)

    assert requests.get(job, timeout=10).json()["rows_done"] == 120_000
    table = pa.ipc.open_stream(requests.get(f"{job}/result", timeout=60).content).read_all()
    assert table["row"].to_pylist() == sent["row"].to_pylist()
    assert set(table["monthly_charges"].to_pylist()) == {1.0, None}
    parquet = requests.get(f"{job}/result", headers={"Accept": "application/vnd.apache.parquet"}, timeout=60)
    assert pq.read_table(pa.py_buffer(parquet.content)).equals(table)
    assert requests.delete(job, timeout=10).status_code == 204
    assert requests.get(job, timeout=10).status_code == 404
    wait_until(lambda: list((platform.settings.home / "serving" / "jobs").iterdir()) == [])


@pytest.mark.parametrize(
    ("entities", "status", "says"),
    [
        ({"customer_id": ["H1"]}, 400, "event_timestamp"),
        ({"customer_id": ["H1"], "event_timestamp": ["soon"]}, 400, "soon"),
        ({"customer_id": [7], "event_timestamp": ["2026-01-01T00:00:00Z"]}, 400, "STRING"),
        ({"customer_id": ["H1"], "event_timestamp": [None]}, 400, "event_timestamp"),
        ({"customer_id": ["H1"], "event_timestamp": ["0001-01-01T00:00:00Z"]}, 400, "1677"),
        ({"customer_id": ["H1"], "event_timestamp": ["2026-01-01T00:00:00Z"], "monthly_charges": [1]}, 400, "monthly"),
        ({"customer_id": ["H1"], "event_timestamp": ["2026-01-01T00:00:00Z"], "x": [[1]]}, 400, "nested"),
        ("SELECT 1", 422, "entities"),
        ("/etc/passwd.parquet", 422, "entities"),
    ],
)
def test_rows_that_cannot_be_joined_are_the_requests_fault(url: str, entities: Any, status: int, says: str) -> None:
    answer = historical(url, entities)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    ("view", "change", "status", "code"),
    [
        ("customer_behavior", {}, 400, "windowed_view"),
        ("nope", {}, 404, "not_found"),
        ("churn_features", {"event_timestamp": [(NOW + timedelta(seconds=6)).isoformat()]}, 400, "ahead_of_clock"),
        ("churn_features", {"customer_id": [None]}, 400, "usage"),
        ("churn_features", {"tenure_months": ["1"]}, 400, "column"),
        ("churn_features", {"tenure": [1]}, 400, "usage"),
        ("churn_features", {"tenure_months": None}, 400, "usage"),
        ("churn_features", {"tenure_months": [1.0] * 2}, 400, "usage"),
    ],
)
def test_a_push_that_is_refused_writes_nothing(
    url: str, view: str, change: dict[str, Any], status: int, code: str
) -> None:
    sent = {k: v for k, v in {**columns(["N1"], [NOW], [9.0]), **change}.items() if v is not None}
    answer = requests.post(f"{url}/api/v1/features/push", json={"feature_view": view, "columns": sent}, timeout=10)
    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    body = {"features": FEATURES, "entities": {"customer_id": ["N1"]}}
    rows = requests.post(f"{url}/api/v1/features/online", json=body, timeout=10).json()["rows"]
    assert rows[0]["statuses"]["monthly_charges"] == "NOT_FOUND"


def test_a_job_is_seen_by_the_key_that_started_it(platform: Platform, url: str, tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    ann, bob, admin = (
        add_key(keys, name, [scope]) for name, scope in (("ann", "read"), ("bob", "read"), ("root", "admin"))
    )
    entities = {"customer_id": ["H1"] * 4, "event_timestamp": [NOW.isoformat()] * 4}
    with serving(platform.settings, models=(), job_rows=3, api_keys=keys) as address:

        def call(method: str, path: str, key: str, **kwargs: Any) -> requests.Response:
            return requests.request(method, address + path, headers={"X-Api-Key": key}, timeout=30, **kwargs)

        body = {"features": FEATURES, "entities": entities}
        job = call("POST", "/api/v1/features/historical", ann, json=body).headers["Location"]
        assert [call("GET", job, key).status_code for key in (ann, bob, admin)] == [200, 404, 200]
        assert [call("DELETE", job, key).status_code for key in (bob, ann)] == [404, 204]
