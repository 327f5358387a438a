"""What a model sees of served rows, and which models may not be served."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
import pytest

from feature_store.errors import DataError
from serving.models import Model
from serving.plans import Column

COLUMNS = (
    Column("charges", "account", "charges", True),
    Column("method", "account", "method", False),
    Column("events", "behaviour", "events", True),
)


class Recorder:
    """A pipeline that keeps the frame it was given."""

    frame: pd.DataFrame

    def predict_proba(self, frame: pd.DataFrame) -> Any:
        self.frame = frame
        return np.column_stack([np.arange(len(frame)), 1 - np.arange(len(frame))]).astype(np.float32)


def test_the_model_gets_its_own_columns_in_its_own_order_and_missing_values_as_nan() -> None:
    pipeline = Recorder()
    model = Model("m", "1", "s", pipeline, 0, ("events", "method"))

    probabilities = model.predict(
        COLUMNS, [{"charges": 1.0, "method": None, "events": 3}, {"charges": 2.0, "method": "card", "events": None}]
    )

    assert list(pipeline.frame.columns) == ["events", "method"]
    assert pipeline.frame["events"].dtype == np.float64
    assert pipeline.frame["method"].dtype == object
    assert pipeline.frame["events"].isna().tolist() == [False, True]
    assert pipeline.frame["method"].isna().tolist() == [True, False]
    assert probabilities == [0.0, 1.0]
    assert {type(p) for p in probabilities} == {float}


def test_a_column_of_nothing_but_missing_values_keeps_its_type() -> None:
    pipeline = Recorder()
    Model("m", "1", "s", pipeline, 1, None).predict(COLUMNS, [{"charges": None, "method": None, "events": None}])

    assert [str(t) for t in pipeline.frame.dtypes] == ["float64", "object", "float64"]


def test_a_model_that_needs_more_than_its_service_gives_is_refused() -> None:
    model = Model("m", "4", "s", Recorder(), 1, ("charges", "tenure"))
    with pytest.raises(DataError, match=r"version 4 needs a feature that service s lacks: 'tenure'"):
        model.check(COLUMNS)
