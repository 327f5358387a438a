"""What a model sees of served rows, and which models may not be served."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest

from feature_store.clock import EPOCH
from feature_store.errors import DataError
from serving.metrics import Metrics
from serving.models import MLflowModels, Model, _empty
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


class Needs:
    """A pipeline that predicts only for rows without this value; `never`: for none."""

    def __init__(self, refuses: Any = None, never: bool = False) -> None:
        self.refuses = refuses
        self.never = never

    def predict_proba(self, frame: pd.DataFrame) -> Any:
        if self.never or (frame["method"].isna().any() and self.refuses == "missing"):
            raise AttributeError("no attribute of the other scikit-learn")
        return np.full((len(frame), 2), 0.5)


class Champions(MLflowModels):
    """The champion is what `serve` says, out of no MLflow."""

    def __init__(self, metrics: Metrics) -> None:
        super().__init__("nowhere:", ("m",), metrics, lambda _: COLUMNS, lambda _: None)

    def serve(self, version: str, pipeline: Needs) -> None:
        self.next = version, pipeline
        self.refresh()

    def _champion(self, name: str) -> Any:
        return SimpleNamespace(version=self.next[0], tags={"feature_service": "s"})

    def _load(self, name: str, version: str, service: str) -> Model:
        return Model(name, version, service, self.next[1], 1, None)

    @property
    def version(self) -> str | None:
        model = self.cached("m")
        return None if model is None else model.version


def failures(metrics: Metrics) -> float:
    return metrics.registry.get_sample_value("predictflow_refresh_failures_total", {"what": "model"}) or 0.0


def test_a_champion_that_cannot_predict_does_not_replace_one_that_can(caplog: pytest.LogCaptureFixture) -> None:
    metrics = Metrics()
    models = Champions(metrics)
    models.serve("1", Needs())
    models.serve("2", Needs(never=True))
    assert models.version == "1"
    assert "version 2 cannot predict (AttributeError: no attribute" in caplog.text
    assert failures(metrics) == 1
    ok, detail = models.check()
    assert ok
    assert "version 1; model m version 2 cannot predict" in detail

    models.serve("3", Needs("missing"))  # entities that have features are worth serving
    assert (models.version, models.check()) == ("3", (True, "m: version 3"))
    assert "cannot predict for an entity without features" in caplog.text


def test_the_first_champion_is_not_ready_when_it_cannot_predict() -> None:
    metrics = Metrics()
    models = Champions(metrics)
    models.serve("1", Needs(never=True))
    models.refresh()
    ok, detail = models.check()
    assert not ok
    assert "version 1; model m version 1 cannot predict (AttributeError" in detail
    assert failures(metrics) == 1
    models.serve("2", Needs(never=True))
    assert (models.version, models.check()[0]) == ("2", False)
    models.serve("3", Needs())
    assert (models.version, models.check()) == ("3", (True, "m: version 3"))


def test_the_second_row_that_a_model_is_tried_with_has_a_value_of_each_type() -> None:
    kinds = ["INT64", "STRING", "BYTES", "UNIX_TIMESTAMP", "STRING_LIST", "MAP"]
    found = [_empty(Column("f", "v", "f", kind == "INT64", kind)) for kind in kinds]
    assert found == [0, "", b"", EPOCH, [], None]
