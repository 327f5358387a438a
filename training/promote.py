"""Moves the alias `champion` to another version of the model, unless that version is measurably worse."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from feature_store.errors import NotFoundError, PredictFlowError
from training.tracking import Tracker

METRIC = "pit_heldout"


class NotPromotedError(PredictFlowError):
    """The gate: the version's AUC is unknown or below the champion's."""

    code = "not_promoted"


@dataclass(frozen=True)
class Promotion:
    """Who was champion, who is now, and their AUC on held-out customers (None: no champion, or none recorded)."""

    before: str | None
    after: str
    auc_before: float | None
    auc_after: float | None


def promote(tracker: Tracker, version: str, force: bool = False) -> Promotion:
    """Make `version` champion if its pit_heldout AUC is not below the present champion's, or always with `force`.

    NotFoundError for an unknown version, NotPromotedError when the gate stays shut. Safe to run twice.
    """
    versions = {str(v.version): v for v in tracker.client.search_model_versions(f"name = '{tracker.model}'")}
    if version not in versions:
        raise NotFoundError(
            f"no such version of {tracker.model}", value=version, valid=versions, next_step="predictflow train --help"
        )
    champion = tracker.champion()
    before = tracker.champion_version()
    result = Promotion(
        before=before,
        after=version,
        auc_before=None if champion is None else _auc(tracker, champion.run_id),
        auc_after=_auc(tracker, versions[version].run_id),
    )
    if not force and before != version:
        _check(result)
    tracker.set_champion(version)
    return result


def restore(tracker: Tracker, metrics: Mapping[str, Any]) -> bool:
    """Make the model of a training that is not repeated champion again; False when the registry has it no more.

    `metrics` is the metrics.json of that training. Needed where DVC finds everything up to date, and another data set
    or an emptied registry came in between. No gate. Safe to run twice.
    """
    version = tracker.find_version(metrics["fingerprint"])
    if version is None or version != metrics["model_version"]:
        return False
    tracker.set_champion(version)
    return True


def _check(p: Promotion) -> None:
    if p.auc_after is None:
        raise NotPromotedError(
            f"version {p.after} has no metric {METRIC}", next_step=f"predictflow promote {p.after} --force"
        )
    if p.auc_before is not None and p.auc_after < p.auc_before:
        raise NotPromotedError(
            f"version {p.after} is worse than the champion, version {p.before}: "
            f"{METRIC} {p.auc_after:.4f} < {p.auc_before:.4f}",
            next_step=f"predictflow promote {p.after} --force",
        )


def _auc(tracker: Tracker, run_id: str | None) -> float | None:
    return tracker.client.get_run(run_id).data.metrics.get(METRIC) if run_id else None
