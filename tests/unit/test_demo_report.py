"""The demo's page names each kind of window of the project's own definition, with the values that were read."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from predictflow.demo.report import render
from predictflow.demo.run import windows_of

ROOT = Path(__file__).parents[2]


def _project() -> Any:
    """What the demo has of the registry, straight from features/."""
    from feast.repo_operations import parse_repo

    views = {v.name: v for v in parse_repo(ROOT / "features").feature_views}
    return SimpleNamespace(get_feature_view=views.__getitem__)


def test_every_kind_of_window_stands_on_the_page_with_what_was_read(monkeypatch: Any) -> None:
    monkeypatch.chdir(ROOT)
    windows = windows_of(_project())
    features = [f for w in windows for f in w["features"]]

    def read(day: int, live: bool) -> dict[str, Any]:
        values = {f: 10_000 + 100 * i + day for i, f in enumerate(features)} | {"spell_spend_cents": None}
        t = f"2024-{1 + day // 28:02}-{1 + day % 28:02}T00:00:00Z"
        return {"customer": "C1", "t": t, "values": values, "probability": 0.5, "live": live}

    story = [read(0, True), read(1, True), *(read(1 + n, False) for n in range(1, 46))]
    auc = dict.fromkeys(("pit_heldout", "leaky_heldout", "pit_future", "leaky_future", "best_possible"), 0.7)
    summary = {
        "dataset": "telco", "rows": {"customers": 1, "events": 2, "rejected": 0}, "auc": auc, "kafka": {"mode": "real"},
        "consistency": {"checked": 1, "different": 0}, "seconds": {"total": 1.0},
        "freshness_ms": {"p50": 1.0, "p99": 2.0}, "online_ms": {"p50": 1.0, "p99": 2.0},
    }  # fmt: skip
    detail = {
        "story": story, "windows": windows, "freshness_ms": [1.0, 2.0], "online_ms": [1.0, 2.0], "lineage": [], "addresses": {},
    }  # fmt: skip
    page = render(summary, detail)
    shown = set(re.findall(r"<td rowspan=\"\d+\"><code>(OVER|TUMBLE|HOP|SESSION) ?\(", page))
    assert shown == {"OVER", "TUMBLE", "HOP", "SESSION"}
    for i, feature in enumerate(features):
        values = (
            ["null"] * 5 if feature == "spell_spend_cents" else [f"{10_000 + 100 * i + d:,}" for d in (0, 1, 9, 32, 46)]
        )
        cells = "".join(f'<td class="n">{v}</td>' for v in values)
        assert f"<td><code>{feature}</code></td>{cells}" in page
