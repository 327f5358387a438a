"""Writes what the demo found: `summary.json` for machines, `index.html` for people (one file, no network needed)."""

from __future__ import annotations

import html
import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from predictflow.demo import plots

STYLE = """
:root { color-scheme: light; --ink:#1c2330; --soft:#5b6577; --line:#e3e7ee; --good:#1f7a5c; --bad:#b3402e; --paper:#fff }
* { box-sizing: border-box } body { font: 16px/1.55 system-ui, sans-serif; color: var(--ink); background:#f5f7fa; margin: 0 }
main { max-width: 1020px; margin: 0 auto; padding: 40px 20px 80px }
h1 { font-size: 30px; margin: 0 0 6px } h2 { font-size: 20px; margin: 44px 0 8px } p { margin: 6px 0 14px; max-width: 74ch }
.soft { color: var(--soft) } .cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(170px, 1fr)); gap: 14px; margin: 26px 0 }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; padding: 16px 18px }
.card b { display: block; font-size: 27px; line-height: 1.2 } .card.good b { color: var(--good) } .card.bad b { color: var(--bad) }
figure { background: var(--paper); border: 1px solid var(--line); border-radius: 10px; margin: 12px 0; padding: 12px 16px }
figure svg { width: 100%; height: auto } figcaption { color: var(--soft); font-size: 14px }
table { border-collapse: collapse; background: var(--paper); width: 100%; font-size: 14.5px; font-variant-numeric: tabular-nums }
th, td { text-align: left; padding: 7px 10px; border: 1px solid var(--line) } td.n { text-align: right }
code { background: #eef1f6; padding: 1px 5px; border-radius: 4px; font-size: 14px } ol.path { padding-left: 20px; margin: 6px 0 }
"""


def write_report(folder: Path, summary: Mapping[str, Any], detail: Mapping[str, Any]) -> Path:
    """Write both files atomically into `folder`; returns the path of index.html.

    `summary` is written as it is; `detail` adds what only the page shows: `story` (one customer's reads, in order),
    `windows` (of the windowed view, as `run.windows_of` tells them),
    `freshness_ms` and `online_ms` (all samples), `lineage` (lines of text), `addresses` (name -> address).
    """
    folder.mkdir(parents=True, exist_ok=True)
    _publish(folder / "summary.json", json.dumps(summary, indent=2, sort_keys=False) + "\n")
    page = folder / "index.html"
    _publish(page, render(summary, detail))
    return page


def render(summary: Mapping[str, Any], detail: Mapping[str, Any]) -> str:
    """The report as one HTML page, plots inlined as SVG."""
    auc, check, rows = summary["auc"], summary["consistency"], summary["rows"]
    fresh, online = summary["freshness_ms"], summary["online_ms"]
    clean = check["different"] == 0
    cards = [
        _card(
            f"{check['different']:,} of {check['checked']:,}",
            "served values differ from their recomputation",
            good=clean,
        ),
        _card(f"{auc['pit_heldout']:.3f}", "AUC, point-in-time features, held-out customers", good=True),
        _card(f"{auc['leaky_heldout']:.3f}", "AUC a leaky training set would have promised", good=False),
        _card(f"{fresh['p99']:.0f} ms", f"event to readable over REST, p99 (p50 {fresh['p50']:.0f} ms)"),
        _card(f"{online['p99']:.1f} ms", f"feature read over REST, p99 (p50 {online['p50']:.1f} ms)"),
    ]
    best = (
        ""
        if auc["best_possible"] is None
        else (
            f" The simulator knows each customer's true hazard: no model can do better than {auc['best_possible']:.3f} here."
        )
    )
    story: Sequence[Mapping[str, Any]] = detail["story"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>PredictFlow: {_e(summary["dataset"])}</title><style>{STYLE}</style></head><body><main>
<h1>PredictFlow report: {_e(summary["dataset"])}</h1>
<p class="soft">{rows["customers"]:,} customers, {rows["events"]:,} events, {
        rows["rejected"]:,} input lines rejected with a reason.
Postgres, Redis and Kafka ({_e(summary["kafka"]["mode"])}) ran as real servers.</p>
<div class="cards">{"".join(cards)}</div>

<h2>What leakage would have promised</h2>
<p>Both models are the same, trained on the same customers and times. One saw each feature <em>as known at the prediction
time</em>; the other saw the latest values, as a careless join gives them. On held-out customers the leaky one looks
better; on the future, with the features that serving really has, it falls behind.{_e(best)}</p>
<figure>{
        plots.auc_bars(auc)
    }<figcaption>AUC (0.5 is guessing). Future: prediction times after the training period, with the values serving would have had.</figcaption></figure>

<h2>Served, then recomputed</h2>
<p>Every value served during the demo was logged with its time and the stream offsets it included, and recomputed from
the event log and the Parquet rows by SQL that shares no code with the consumer or the server.</p>
{
        _table(
            ["what", "count"],
            [
                ["values checked", f"{check['checked']:,}"],
                ["values that differ", f"{check['different']:,}"],
                ["values with a newer row not yet written (stale)", f"{check.get('stale', 0):,}"],
                ["reads between events, or after events left their window", f"{check.get('reads_ahead', 0):,}"],
            ],
        )
    }

<h2>One customer, as events arrive and leave</h2>
<p>Customer <code>{
        _e(story[0]["customer"]) if story else ""
    }</code>: live events raise the counts; without any new event
the windows empty again as time passes, because values are finalised at the moment of reading.</p>
<figure>{
        plots.story(story, {f: w["window"] for w in detail["windows"] for f in w["features"]})
    }<figcaption>Read over REST at each marked time. Dotted line: the last live event.</figcaption></figure>

<h2>Each kind of window, at moments of our choice</h2>
<p>The same reads of the same customer. Every value is that of the moment it was asked for, between events too: one SQL text
defines it for training, stream and serving.</p>
{_windows(detail["windows"], story)}

<h2>Freshness and latency</h2>
<figure>{plots.histogram(detail["freshness_ms"], "ms from handing an event to Kafka to reading its effect over REST")}
<figcaption>{len(detail["freshness_ms"])} single events, each awaited before the next.</figcaption></figure>
<figure>{plots.histogram(detail["online_ms"], "ms per feature read over REST, one customer, all features of churn_v1")}
<figcaption>{len(detail["online_ms"])} reads, one after another, measured in the client.</figcaption></figure>

<h2>From raw column to served model</h2>
<ol class="path">{"".join(f"<li><code>{_e(line)}</code></li>" for line in detail["lineage"])}</ol>
<p class="soft">Each edge was recorded by the step itself, in the <code>feature_lineage</code> table.</p>

<h2>The run</h2>
{_table(["step", "seconds"], [[k, f"{v:.1f}"] for k, v in summary["seconds"].items()])}
<h2>Running now</h2>
{_table(["what", "address"], [[k, v] for k, v in detail["addresses"].items()])}
<p class="soft">Stop everything with <code>make down</code>; data stays for the next run.</p>
</main></body></html>
"""


def _windows(windows: Sequence[Mapping[str, Any]], story: Sequence[Mapping[str, Any]]) -> str:
    """A row per windowed feature; a column per moment of the story: around the live events, and when they have left."""
    live = [s for s in story if s["live"]]
    later = [s for s in story if not s["live"]]
    moments = [("before the stream", live[:1]), ("after it", live[-1:])]
    moments += [(f"{n} days later", later[n - 1 : n]) for n in (8, 31, 45)]
    shown = [(name, found[0]["values"]) for name, found in moments if found]
    head = "".join(f"<th>{_e(h)}</th>" for h in ["window", "feature", *(name for name, _ in shown)])
    body = ""
    for w in windows:
        title = f"<code>{_e(w['window'])}</code><br><span class='soft'>{_e(w['reading'])}</span>"
        for i, feature in enumerate(w["features"]):
            first = f'<td rowspan="{len(w["features"])}">{title}</td>' if i == 0 else ""
            values = "".join(f'<td class="n">{_e(_number(v.get(feature)))}</td>' for _, v in shown)
            body += f"<tr>{first}<td><code>{_e(feature)}</code></td>{values}</tr>"
    return f"<table><tr>{head}</tr>{body}</table>"


def _number(value: float | None) -> str:
    if value is None:
        return "null"
    return f"{value:,.2f}" if isinstance(value, float) else f"{value:,}"


def _publish(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def _e(value: object) -> str:
    return html.escape(str(value))


def _card(figure: str, caption: str, good: bool | None = None) -> str:
    kind = "" if good is None else " good" if good else " bad"
    return f'<div class="card{kind}"><b>{_e(figure)}</b>{_e(caption)}</div>'


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    body = "".join(
        f"<tr><td>{_e(r[0])}</td>" + "".join(f'<td class="n">{_e(c)}</td>' for c in r[1:]) + "</tr>" for r in rows
    )
    return f"<table><tr>{''.join(f'<th>{_e(h)}</th>' for h in head)}</tr>{body}</table>"
