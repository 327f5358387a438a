"""How good a model is, by AUC: on customers it never saw, and on the future."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from feature_store.errors import DataError
from training.dataset import LEAKY, POINT_IN_TIME
from training.raw import BEST, LABEL
from training.splits import Split

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    import pyarrow as pa
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class Scores:
    """Areas under the ROC curve.

    `*_heldout`: held-out customers at t <= train_until, each model on features built its own way: what its developer
    would believe. `*_future`: all customers at t >= future_from, both models on point-in-time features, which are what
    production serves: what the developer would get. `best_possible`: the true probabilities on the rows of
    `*_heldout`, where the source knows them.
    """

    pit_heldout: float
    leaky_heldout: float
    pit_future: float
    leaky_future: float
    best_possible: float | None


def evaluate(
    models: Mapping[str, Pipeline], frames: Mapping[str, pd.DataFrame], labels: pa.Table, split: Split
) -> Scores:
    """Score the models named POINT_IN_TIME and LEAKY; `frames` of the same names hold one row per row of `labels`."""
    churned = labels[LABEL].to_numpy()
    best = labels[BEST].to_numpy().astype(float)[split.held_out]

    def score(model: str, frame: str, rows: np.ndarray, part: str) -> float:
        return auc(churned[rows], models[model].predict_proba(frames[frame][rows])[:, 1], part)

    known = not (best != best).any()  # NaN: the source does not know
    return Scores(
        pit_heldout=score(POINT_IN_TIME, POINT_IN_TIME, split.held_out, "held_out"),
        leaky_heldout=score(LEAKY, LEAKY, split.held_out, "held_out"),
        pit_future=score(POINT_IN_TIME, POINT_IN_TIME, split.future, "future"),
        leaky_future=score(LEAKY, POINT_IN_TIME, split.future, "future"),
        best_possible=auc(churned[split.held_out], best, "held_out") if known else None,
    )


def auc(churned: np.ndarray, probability: np.ndarray, part: str) -> float:
    """Area under the ROC curve, to 6 decimals; DataError when the part has only churners or only others."""
    from sklearn.metrics import roc_auc_score

    need_both_classes(churned, part)
    return round(float(roc_auc_score(churned, probability)), 6)


def need_both_classes(churned: np.ndarray, part: str) -> None:
    """DataError unless churners and others are both among the rows of `part`."""
    if churned.min() == churned.max():
        raise DataError(
            f"all {len(churned)} rows of the part {part!r} have the same label",
            value=int(churned[0]),
            next_step="use more customers or days: predictflow data --help",
        )
