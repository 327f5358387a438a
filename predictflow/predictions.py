"""The part of the check that recomputes predictions: the logged model version, loaded anew, on the logged values.

It stands here because the engine knows nothing of models. Nothing of the server is used: the version comes from MLflow by
number, and its input from the record's values alone.
"""

from __future__ import annotations

import math
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from feature_store.consistency import Consistency, Difference
from feature_store.errors import DataError, UnavailableError

if TYPE_CHECKING:
    from feast import FeatureView

    from training.tracking import Tracker

TOLERANCE = 1e-12
"""Largest absolute difference that counts as equal: sums over rows depend, in the last digits, on how many come at once."""
PROBABILITY = "probability"
_NUMERIC = ("INT32", "INT64", "FLOAT", "DOUBLE", "BOOL")
_ROWS = 10_000

Load = Callable[[str, str], Any]
"""(model, version) -> the fitted classifier, None when the registry has no such version."""


def check_predictions(
    records: Iterable[Mapping[str, Any]], views: Iterable[FeatureView], load: Load, result: Consistency
) -> None:
    """Recomputes the probability of every record that has one, and counts it in `result` like any served value.

    `views` say which features are numbers. A version that the registry lacks is counted as not checked, with its name.
    DataError for a record that is not one of the served log, and for a version that cannot predict from what was logged;
    what `load` raises.
    """
    numeric = {(v.name, f.name): f.dtype.to_value_type().name in _NUMERIC for v in views for f in v.features}
    groups: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for r in records:
        if r.get("probability") is not None:
            groups[str(r.get("model")), str(r.get("version"))].append(r)
    for (model, version), served in sorted(groups.items()):
        pipeline = load(model, version)
        if pipeline is None:
            result.skip(f"no {model} version {version} in MLflow", len(served))
            continue
        for i in range(0, len(served), _ROWS):
            part = served[i : i + _ROWS]
            try:
                found = _predict(pipeline, part, numeric)
            except Exception as e:  # whatever a model makes of its input: the version and the reason are named
                raise DataError(
                    f"{model} version {version} cannot predict from the logged values ({type(e).__name__}: {e})",
                    value=part[0].get("request_id"),
                ) from e
            for record, probability in zip(part, found, strict=True):
                _compare(record, probability, result)


def no_predictions(records: Iterable[Mapping[str, Any]], result: Consistency, reason: str) -> None:
    """Counts every prediction as not checked."""
    result.skip(reason, sum(r.get("probability") is not None for r in records))


def mlflow_models(tracker: Tracker) -> Load:
    """Versions of the MLflow registry. UnavailableError when it does not answer, or a version does not load."""

    def load(model: str, version: str) -> Any:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="mlflow")  # its own use of SQLAlchemy, nothing a user can mend
            return _load(tracker, model, version)

    return load


def _load(tracker: Tracker, model: str, version: str) -> Any:
    import mlflow.sklearn
    from mlflow.exceptions import MlflowException

    try:
        found = tracker.client.get_model_version(model, version)
    except MlflowException as e:
        if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
            return None
        raise _unavailable(model, version, e) from e
    try:
        return mlflow.sklearn.load_model(f"models:/{found.name}/{found.version}")
    except Exception as e:  # unpickling and the artifact store raise what they like
        raise _unavailable(model, version, e) from e


def _predict(
    pipeline: Any, records: Sequence[Mapping[str, Any]], numeric: Mapping[tuple[str, str], bool]
) -> list[float]:
    import numpy as np
    import pandas as pd

    names = getattr(pipeline, "feature_names_in_", None)
    wanted = list(records[0]["features"]) if names is None else [str(n) for n in names]
    columns: dict[str, Any] = {}
    for name in wanted:
        features = [r["features"][name] for r in records]
        values = [f["value"] for f in features]
        if numeric.get((features[0]["view"], features[0]["feature"]), all(_is_number(v) for v in values)):
            columns[name] = np.array([math.nan if v is None else float(v) for v in values], dtype=np.float64)
        else:
            columns[name] = np.array(values, dtype=object)
    positive = [int(c) for c in pipeline.classes_].index(1)
    found = pipeline.predict_proba(pd.DataFrame(columns, columns=wanted))[:, positive]
    return [float(p) for p in found]


def _is_number(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _compare(record: Mapping[str, Any], probability: float, result: Consistency) -> None:
    served = record["probability"]
    equal = isinstance(served, (int, float)) and abs(served - probability) <= TOLERANCE
    name = f"{PROBABILITY} of {record['model']} version {record['version']}"
    result.count(Difference(record["entity"], name, str(record["t"]), ("", served), ("", probability)), equal=equal)


def _unavailable(model: str, version: str, error: Exception) -> UnavailableError:
    return UnavailableError(
        f"{model} version {version} cannot be loaded from MLflow ({type(error).__name__})",
        value=(str(error).splitlines() or [""])[0],
        next_step="check MLFLOW_TRACKING_URI and `predictflow status`, or pass --no-predictions",
    )
