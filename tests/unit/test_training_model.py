"""The model and its scores: deterministic, at ease with missing and unknown values, loadable without our code."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest

from feature_store.errors import DataError
from training.dataset import LEAKY, POINT_IN_TIME
from training.evaluate import auc, evaluate
from training.model import TrainParams, is_categorical, make_model, to_frame
from training.splits import Split

NUMERIC, CATEGORICAL = ["charges", "events", "empty"], ["payment"]
FEATURES = ["charges", "payment", "events", "empty"]


def feature_table(rows: int = 800, seed: int = 1) -> tuple[pa.Table, np.ndarray]:
    rng = np.random.default_rng(seed)
    charges, events = rng.normal(50, 20, rows), rng.poisson(4, rows)
    payment = rng.choice(["card", "check", None], rows)
    churned = rng.random(rows) < 1 / (1 + np.exp(-(charges - 50) / 20 + events - 4))
    table = pa.table(
        {
            "charges": pa.array(np.where(rng.random(rows) < 0.1, np.nan, charges), from_pandas=True),
            "payment": pa.array(payment.tolist(), pa.string()),
            "events": pa.array(events),
            "empty": pa.nulls(rows, pa.int64()),  # a source may know nothing of a feature
        }
    )
    return table, churned.astype(int)


@pytest.fixture(scope="module")
def fitted() -> tuple[Any, pd.DataFrame, np.ndarray]:
    table, churned = feature_table()
    frame = to_frame(table, FEATURES)
    return make_model(NUMERIC, CATEGORICAL, TrainParams()).fit(frame, churned), frame, churned


def test_the_frame_keeps_the_features_order_with_numbers_as_floats_and_text_as_it_is() -> None:
    table, _ = feature_table(20)
    frame = to_frame(table, FEATURES)
    assert list(frame.columns) == FEATURES
    assert [str(t) for t in frame.dtypes] == ["float64", "object", "float64", "float64"]
    assert frame["payment"].tolist() == table["payment"].to_pylist()
    assert [f for f in FEATURES if is_categorical(table, f)] == CATEGORICAL


def test_a_feature_type_without_meaning_for_the_model_is_refused() -> None:
    with pytest.raises(DataError, match="feature tags has a type"):
        is_categorical(pa.table({"tags": [["a"], ["b"]]}), "tags")


def test_the_model_learns_what_is_there(fitted: Any) -> None:
    model, _, _ = fitted
    table, churned = feature_table(seed=2)
    assert auc(churned, model.predict_proba(to_frame(table, FEATURES))[:, 1], "test") > 0.75


@pytest.mark.parametrize(
    "row",
    [
        dict.fromkeys(FEATURES),
        {"charges": None, "payment": "card", "events": 3, "empty": None},
        {"charges": 1e9, "payment": "barter", "events": -5, "empty": 7},
        {"charges": 50.0, "payment": None, "events": 4, "empty": float("nan")},
    ],
)
def test_single_rows_with_missing_unknown_and_extreme_values_get_a_probability(fitted: Any, row: Any) -> None:
    model, _, _ = fitted
    probability = model.predict_proba(pd.DataFrame([row], columns=FEATURES))[0, 1]
    assert 0 < probability < 1


def test_a_served_row_gets_the_probability_of_the_same_row_in_a_batch(fitted: Any) -> None:
    model, frame, _ = fitted
    batch = model.predict_proba(frame)[:, 1]
    for i in (0, 5, 17):
        row = {k: None if v is None or v != v else v for k, v in frame.iloc[i].to_dict().items()}
        single = model.predict_proba(pd.DataFrame([row], columns=FEATURES))[0, 1]
        assert single == pytest.approx(batch[i], abs=1e-12)


def test_training_twice_gives_the_same_model(fitted: Any) -> None:
    model, frame, churned = fitted
    again = make_model(NUMERIC, CATEGORICAL, TrainParams()).fit(frame, churned)
    assert (again.predict_proba(frame) == model.predict_proba(frame)).all()


def test_scores_are_taken_from_the_right_model_features_and_rows(fitted: Any) -> None:
    """Each of the four figures against a direct computation; a mix-up of frame, model or mask changes one of them."""
    from sklearn.metrics import roc_auc_score

    model, _, _ = fitted
    table, churned = feature_table(seed=3)
    frame = to_frame(table, FEATURES)
    leaky_frame = frame.assign(charges=np.where(churned == 1, np.nan, frame["charges"].fillna(50)))
    leaky_model = make_model(NUMERIC, CATEGORICAL, TrainParams()).fit(leaky_frame, churned)
    masks = [np.arange(len(churned)) % 4 == i for i in range(3)]
    split = Split(*masks)
    t = pa.array([datetime(2025, 1, 1, tzinfo=UTC) + timedelta(hours=i) for i in range(len(churned))])
    best = np.random.default_rng(4).random(len(churned))
    labels = pa.table({"event_timestamp": t, "churned": churned, "best_probability": best})
    scores = evaluate(
        {POINT_IN_TIME: model, LEAKY: leaky_model}, {POINT_IN_TIME: frame, LEAKY: leaky_frame}, labels, split
    )

    def direct(m: Any, f: pd.DataFrame, mask: np.ndarray) -> float:
        return float(roc_auc_score(churned[mask], m.predict_proba(f[mask])[:, 1]))

    assert scores.pit_heldout == pytest.approx(direct(model, frame, split.held_out), abs=1e-6)
    assert scores.leaky_heldout == pytest.approx(direct(leaky_model, leaky_frame, split.held_out), abs=1e-6)
    assert scores.pit_future == pytest.approx(direct(model, frame, split.future), abs=1e-6)
    assert scores.leaky_future == pytest.approx(direct(leaky_model, frame, split.future), abs=1e-6)
    held = split.held_out
    assert scores.best_possible == pytest.approx(roc_auc_score(churned[held], best[held]), abs=1e-6)
    unknown = labels.set_column(2, "best_probability", pa.nulls(len(churned), pa.float64()))
    assert (
        evaluate(
            {POINT_IN_TIME: model, LEAKY: model}, {POINT_IN_TIME: frame, LEAKY: frame}, unknown, split
        ).best_possible
        is None
    )


def test_a_part_with_one_label_only_is_refused() -> None:
    with pytest.raises(DataError, match="all 3 rows of the part 'future' have the same label: 0"):
        auc(np.zeros(3), np.array([0.1, 0.2, 0.3]), "future")


def test_a_saved_model_holds_only_classes_of_scikit_learn_numpy_and_scipy(fitted: Any) -> None:
    import skops.io

    model, frame, _ = fitted
    data = skops.io.dumps(model)
    foreign = skops.io.get_untrusted_types(data=data)
    assert {t.partition(".")[0] for t in foreign} <= {"numpy", "scipy"}
    loaded = skops.io.loads(data, trusted=foreign)
    assert (loaded.predict_proba(frame) == model.predict_proba(frame)).all()
