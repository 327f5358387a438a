"""Where a consumer's metrics are served, and what they say between batches."""

from __future__ import annotations

import urllib.error
import urllib.request

import pytest

from feature_store.logged import NEVER
from feature_store.stream_metrics import StreamMetrics
from predictflow.local.ports import free_port


def test_metrics_are_served_to_this_machine_unless_asked_otherwise() -> None:
    alone, for_all = free_port(), free_port()
    StreamMetrics().serve(alone)
    StreamMetrics().serve(for_all, "0.0.0.0")
    for address, port in (("127.0.0.1", alone), ("127.0.0.1", for_all), ("127.0.0.2", for_all)):
        with urllib.request.urlopen(f"http://{address}:{port}/metrics", timeout=10) as answer:
            assert b"predictflow_sync_retries_total" in answer.read()
    with pytest.raises(urllib.error.URLError):
        urllib.request.urlopen(f"http://127.0.0.2:{alone}/metrics", timeout=10)


def test_what_is_not_known_stays_as_it_was() -> None:
    metrics = StreamMetrics()
    metrics.stands(3, 5, {"v": 1_000_000, "w": NEVER}, 4_000_000)
    metrics.stands(3, None, {}, 0)
    sample = metrics.registry.get_sample_value
    assert sample("predictflow_sync_lag", {"partition": "3"}) == 5
    assert sample("predictflow_sync_watermark_delay_seconds", {"view": "v", "partition": "3"}) == 3
    assert sample("predictflow_sync_watermark_delay_seconds", {"view": "w", "partition": "3"}) is None
