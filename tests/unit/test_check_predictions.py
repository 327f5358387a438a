"""Predictions of the served log recomputed: equal to what serving's own code gave, and every planted fault is seen."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pytest

from feature_store.consistency import Consistency
from feature_store.errors import DataError
from predictflow.predictions import check_predictions, no_predictions
from serving.models import Model
from serving.plans import Column
from training.model import TrainParams, make_model

COLUMNS = [
    Column("charges", "account", "charges", True),
    Column("plan", "account", "plan", False),
    Column("count_7d", "behaviour", "count_7d", True),
]
VALUES = [
    {"charges": 0.1 + 0.2, "plan": "basic", "count_7d": 3},
    {"charges": None, "plan": None, "count_7d": None},
    {"charges": 71.05, "plan": "never seen", "count_7d": 0},
]


@pytest.fixture(scope="module")
def views() -> list[Any]:
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int64, String

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)

    def view(name: str, **fields: Any) -> FeatureView:
        source = FileSource(name=f"{name}_s", path=name, timestamp_field="event_timestamp")
        schema = [Field(name=n, dtype=t) for n, t in fields.items()]
        return FeatureView(name=name, entities=[customer], ttl=timedelta(0), schema=schema, source=source)

    return [view("account", charges=Float64, plan=String), view("behaviour", count_7d=Int64)]


@pytest.fixture(scope="module")
def pipeline() -> Any:
    rng = np.random.default_rng(1)
    n = 400
    frame = pd.DataFrame(
        {
            "charges": np.where(rng.random(n) < 0.1, np.nan, rng.normal(50, 20, n)),
            "plan": np.where(rng.random(n) < 0.1, None, rng.choice(["basic", "gold"], n)),
            "count_7d": rng.integers(0, 9, n).astype(float),
        }
    )
    churned = (rng.random(n) < 1 / (1 + np.exp(frame["count_7d"] - 4))).astype(int)
    return make_model(["charges", "count_7d"], ["plan"], TrainParams()).fit(frame, churned)


@pytest.fixture(scope="module")
def records(pipeline: Any) -> list[dict[str, Any]]:
    """As the server logs them: three predictions of one request, and a feature read."""
    names = tuple(str(n) for n in pipeline.feature_names_in_)
    probabilities = Model("churn", "3", "service", pipeline, 1, names).predict(COLUMNS, VALUES)
    out = []
    for values, probability in [*zip(VALUES, probabilities, strict=True), (VALUES[0], None)]:
        features = {
            c.name: {"view": c.view, "feature": c.feature, "value": values[c.name], "status": "PRESENT"}
            for c in COLUMNS
        }
        model = {"model": None, "version": None} if probability is None else {"model": "churn", "version": "3"}
        record = {"entity": {"customer_id": "C1"}, "t": datetime(2024, 3, 1, tzinfo=UTC).isoformat()}
        out.append({**record, "features": features, **model, "probability": probability})
    return json.loads(json.dumps(out))  # type: ignore[no-any-return]  # json has no types


def audit(records: list[dict[str, Any]], views: list[Any], pipeline: Any) -> Consistency:
    result = Consistency()
    check_predictions(records, views, _loader(pipeline), result)
    return result


def _loader(pipeline: Any) -> Any:
    return lambda model, version: pipeline if (model, version) == ("churn", "3") else None


def test_what_the_server_predicted_is_found_equal(records: Any, views: Any, pipeline: Any) -> None:
    result = audit(records, views, pipeline)
    assert (result.checked, result.different, result.not_checked) == (3, 0, 0), result.examples
    assert audit(records[1:2], views, pipeline).different == 0  # also alone, and with nothing but missing values


@pytest.mark.parametrize("fault", ["probability", "value", "missing value", "version of another model", "text"])
def test_an_altered_prediction_or_input_is_different(records: Any, views: Any, pipeline: Any, fault: str) -> None:
    altered = copy.deepcopy(records)
    if fault == "probability":
        altered[0]["probability"] += 1e-9
    elif fault == "value":
        altered[0]["features"]["count_7d"]["value"] = 8
    elif fault == "missing value":
        altered[0]["features"]["plan"]["value"] = None
    elif fault == "text":
        altered[0]["probability"] = str(altered[0]["probability"])
    else:
        pipeline = copy.deepcopy(pipeline)
        pipeline[-1].intercept_ += 0.001
    result = audit(altered, views, pipeline)
    assert result.different == (3 if fault == "version of another model" else 1)
    assert result.examples[0].feature == "probability of churn version 3"


def test_a_version_that_is_gone_is_counted_and_named(records: Any, views: Any, pipeline: Any) -> None:
    gone = [{**records[0], "version": "2"}, records[1]]
    result = audit(gone, views, pipeline)
    assert (result.checked, result.not_checked) == (1, 1)
    assert result.why_not == {"no churn version 2 in MLflow": 1}
    left = Consistency()
    no_predictions(records, left, "asked not to")
    assert left.why_not == {"asked not to": 3}


def test_a_record_without_a_feature_of_the_model_is_an_error_that_names_the_version(
    records: Any, views: Any, pipeline: Any
) -> None:
    lacking = copy.deepcopy(records[:1])
    del lacking[0]["features"]["plan"]
    with pytest.raises(DataError, match=r"churn version 3 cannot predict from the logged values .*plan"):
        audit(lacking, views, pipeline)
