"""Trains the churn model twice, on point-in-time features and on leaky ones, measures both, and registers the first."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError
from training.data_version import data_version
from training.dataset import LEAKY, POINT_IN_TIME, TrainingSet
from training.evaluate import Scores, evaluate, need_both_classes
from training.model import TrainParams, is_categorical, make_model, to_frame
from training.raw import LABEL, RawSummary
from training.splits import split_rows
from training.tracking import FINGERPRINT, Tracker

if TYPE_CHECKING:
    import numpy as np
    import pandas as pd
    from sklearn.pipeline import Pipeline

    from feature_store.registry import FeatureRegistry

RUN_NAMES = {POINT_IN_TIME: "point-in-time", LEAKY: "leaky"}
METRICS_FILE = "metrics.json"


def train(
    training_dir: Path,
    raw_dir: Path,
    out_dir: Path,
    *,
    tracker: Tracker,
    registry: FeatureRegistry,
    params: TrainParams,
    at: datetime,
    tags: Mapping[str, str],
    dvc_lock: Path | None = None,
) -> dict[str, Any]:
    """Train, evaluate, track, register as champion, record lineage; returns what `<out>/metrics.json` holds.

    Reads `<training>/point_in_time.parquet`, `<training>/leaky.parquet` and `<raw>/summary.json`. `at` is the time of
    the lineage edges; `tags` go to the runs. Safe to run again: the same data and parameters give the same figures,
    and a model that is registered already becomes champion again instead of a new version.
    """
    summary = RawSummary.read(raw_dir)
    sets = {variant: TrainingSet.load(Path(training_dir) / f"{variant}.parquet") for variant in (POINT_IN_TIME, LEAKY)}
    features = _same_features(sets)
    table = sets[POINT_IN_TIME].table
    split = split_rows(table, summary.train_until, summary.future_from, params.held_out)
    frames = {variant: to_frame(s.table, features) for variant, s in sets.items()}
    categorical = [f for f in features if is_categorical(table, f)]
    numeric = [f for f in features if f not in categorical]

    churned = table[LABEL].to_numpy()
    need_both_classes(churned[split.train], "train")
    models = {v: _fit(frames[v][split.train], churned[split.train], numeric, categorical, params) for v in sets}
    scores = evaluate(models, frames, table, split)

    service = sets[POINT_IN_TIME].feature_service
    version_tags = {
        "feature_service": service,
        "data_version": data_version(Path(training_dir)),
        "raw_data_version": data_version(Path(raw_dir)),
        "dataset": summary.dataset,
    }
    fingerprint = _fingerprint(models[POINT_IN_TIME], frames[POINT_IN_TIME], sets[POINT_IN_TIME].name, params)
    run_ids = {}
    for variant in (LEAKY, POINT_IN_TIME):
        run_tags = {**tags, **version_tags, "training_set": sets[variant].name, "features": variant}
        run_params = {**params.as_dict(), **{f"rows_{k}": v for k, v in split.rows().items()}}
        with tracker.run(RUN_NAMES[variant], run_params, run_tags) as run_id:
            run_ids[RUN_NAMES[variant]] = run_id
            tracker.log_metrics(run_id, _metrics_of(variant, scores))
            if dvc_lock is not None and dvc_lock.is_file():
                tracker.client.log_artifact(run_id, str(dvc_lock))
            if variant == POINT_IN_TIME:
                version = tracker.find_version(fingerprint) or tracker.register(
                    run_id, models[variant], numeric, features, {**version_tags, FINGERPRINT: fingerprint}
                )
                tracker.client.set_tag(run_id, "model_version", version)

    edge = (("training_set", sets[POINT_IN_TIME].name), ("model_version", f"{tracker.model}/{version}"))
    registry.record_lineage([edge], at=at, run_id=run_ids[RUN_NAMES[POINT_IN_TIME]])
    tracker.set_champion(version)
    metrics = {
        "auc": asdict(scores),
        "rows": split.rows(),
        "model": tracker.model,
        "model_version": version,
        "fingerprint": fingerprint,
        "feature_service": service,
        "training_set": sets[POINT_IN_TIME].name,
        "run_ids": run_ids,
        "data_version": version_tags["data_version"],
    }
    _write_json(Path(out_dir) / METRICS_FILE, metrics)
    return metrics


def _fit(
    frame: pd.DataFrame, churned: np.ndarray, numeric: list[str], categorical: list[str], params: TrainParams
) -> Pipeline:
    """One thread: this much data needs no more, and sums then come out the same on machines of any size."""
    from threadpoolctl import threadpool_limits

    with threadpool_limits(limits=1):
        return make_model(numeric, categorical, params).fit(frame, churned)


def _same_features(sets: Mapping[str, TrainingSet]) -> list[str]:
    """The features of both sets; DataError when the sets were built from different labels or services."""
    first, second = sets.values()
    labels = [n for n in first.table.column_names if n not in first.features]
    if first.features != second.features or not first.table.select(labels).equals(second.table.select(labels)):
        raise DataError("the two training sets differ in labels or features", next_step="predictflow dataset --help")
    return list(first.features)


def _metrics_of(variant: str, scores: Scores) -> dict[str, float | None]:
    own = {n: v for n, v in asdict(scores).items() if n.startswith("pit_" if variant == POINT_IN_TIME else "leaky_")}
    return {**own, "best_possible": scores.best_possible}


def _fingerprint(model: Pipeline, frame: pd.DataFrame, training_set: str, params: TrainParams) -> str:
    """Equal for models that predict the same from the same training set; 6 decimals, as the last bits depend on the CPU."""
    predictions = model.predict_proba(frame)[:, 1].round(6)
    digest = hashlib.sha256(json.dumps([training_set, params.as_dict(), list(frame.columns)]).encode())
    digest.update(predictions.tobytes())
    return digest.hexdigest()[:16]


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_text(json.dumps(content, indent=2) + "\n")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
