"""The report's plots, as inline SVG with real text; the same input gives the same bytes."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

GOOD, BAD, SOFT, ACCENT = "#1f7a5c", "#c8553d", "#8a94a6", "#2b5fb3"


def auc_bars(auc: Mapping[str, float | None]) -> str:
    """Bars of the four AUCs, held-out and future, with the best possible as a line where it is known."""
    figure = _figure(8.6, 3.1)
    axis = figure.subplots()
    pairs = [("held-out customers", "pit_heldout", "leaky_heldout"), ("the future", "pit_future", "leaky_future")]
    for i, (_, honest, leaky) in enumerate(pairs):
        for dx, key, colour in ((-0.18, honest, GOOD), (0.18, leaky, BAD)):
            value = float(auc[key] or 0.0)
            axis.bar(i + dx, value, width=0.32, color=colour)
            axis.text(i + dx, value + 0.01, f"{value:.3f}", ha="center", fontsize=10)
    best = auc.get("best_possible")
    if best is not None:
        axis.axhline(best, color=SOFT, linestyle="--", linewidth=1)
        axis.text(1.95, best + 0.008, f"best possible {best:.3f}", ha="right", fontsize=9, color=SOFT)
    axis.set_xticks([0, 1], [p[0] for p in pairs])
    lowest = min(float(auc[k] or 0.0) for pair in pairs for k in pair[1:])
    axis.set_ylim(min(0.45, lowest - 0.05), 1.06)
    axis.axhline(0.5, color=SOFT, linewidth=0.6)
    axis.text(1.95, 0.505, "guessing 0.5", ha="right", fontsize=9, color=SOFT)
    axis.set_xlim(-0.5, 1.95)
    axis.bar(0, 0, color=GOOD, label="point-in-time features")
    axis.bar(0, 0, color=BAD, label="leaky latest values")
    axis.legend(frameon=False, fontsize=9, loc="upper right")
    axis.set_ylabel("AUC")
    return _svg(figure)


def histogram(samples: Sequence[float], label: str) -> str:
    """Histogram of milliseconds with p50 and p99 marked."""
    import numpy as np

    figure = _figure(8.6, 2.4)
    axis = figure.subplots()
    values = np.asarray(samples, dtype=float)
    p50, p99 = np.percentile(values, [50, 99])
    axis.hist(np.minimum(values, p99 * 1.5), bins=40, color=ACCENT)
    for at, name in ((p50, "p50"), (p99, "p99")):
        axis.axvline(at, color=BAD, linewidth=1, linestyle=":")
        axis.text(at, axis.get_ylim()[1] * 0.92, f" {name} {at:.1f}", fontsize=9, color=BAD, backgroundcolor="white")
    axis.set_xlabel(label)
    axis.set_ylabel("reads")
    return _svg(figure)


def story(reads: Sequence[Mapping[str, Any]], windows: Mapping[str, str]) -> str:
    """One customer's counts and churn probability over the times at which they were read; `windows`: feature -> its window."""
    figure = _figure(8.6, 4.8)
    top, bottom = figure.subplots(2, 1, sharex=True)
    if not reads:
        return _svg(figure)
    start = datetime.fromisoformat(reads[0]["t"])
    days = [(datetime.fromisoformat(r["t"]) - start).total_seconds() / 86400 for r in reads]
    for name, colour in (("events_7d", ACCENT), ("events_30d", GOOD), ("events_this_week", BAD)):
        top.step(
            days,
            [r["values"].get(name) or 0 for r in reads],
            where="post",
            marker="o",
            markersize=3,
            color=colour,
            label=f"{name}: {windows[name]}",
        )
    bottom.step(
        days,
        [r["probability"] for r in reads],
        where="post",
        marker="o",
        markersize=3,
        color=BAD,
        label="churn probability",
    )
    live = [d for d, r in zip(days, reads, strict=True) if r["live"]]
    for axis in (top, bottom):
        if live:
            axis.axvline(live[-1], color=SOFT, linestyle=":", linewidth=1)
        axis.legend(frameon=False, fontsize=9, loc="lower left", bbox_to_anchor=(0, 1))  # above: lines are anywhere
    bottom.set_xlabel("days since the first read")
    return _svg(figure)


def _figure(width: float, height: float) -> Figure:
    import matplotlib
    from matplotlib.figure import Figure

    matplotlib.rcParams.update(
        {
            "svg.hashsalt": "predictflow",
            "svg.fonttype": "none",
            "font.family": "sans-serif",
            "axes.spines.top": False,
            "axes.spines.right": False,
        }
    )
    return Figure(figsize=(width, height), layout="constrained")


def _svg(figure: Figure) -> str:
    out = io.StringIO()
    figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]
