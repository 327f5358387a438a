"""The churn model: an additive logistic regression in a stock scikit-learn pipeline, deterministic and quick to serve.

On both data sets it ranks held-out customers as well as boosted trees did, or better, and needs no OpenMP threads, which
make single-row latency depend on what else the machine does (docs/how-to/train.md has the figures).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from feature_store.errors import DataError
from training.splits import HELD_OUT

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa
    from sklearn.pipeline import Pipeline


@dataclass(frozen=True)
class TrainParams:
    """Parameters of a training run; `params.yaml` holds the same names and defaults under `train`."""

    held_out: float = HELD_OUT
    knots: int = 3
    regularisation: float = 100.0
    seed: int = 7

    def as_dict(self) -> dict[str, float | int]:
        return asdict(self)


def is_categorical(table: pa.Table, feature: str) -> bool:
    """Whether a feature is text or boolean rather than a number; DataError for a type that no tree can split on."""
    import pyarrow as pa

    kind = table.schema.field(feature).type
    if pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_boolean(kind):
        return True
    if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind):
        return False
    raise DataError(f"feature {feature} has a type that the model cannot use", value=str(kind))


def to_frame(table: pa.Table, features: Sequence[str]) -> pd.DataFrame:
    """The model's input: one column per feature in the given order, numbers as float64 (null: NaN), text as str or None."""
    import pandas as pd

    columns: dict[str, object] = {}
    for name in features:
        if is_categorical(table, name):
            columns[name] = pd.Series([None if v is None else str(v) for v in table[name].to_pylist()], dtype=object)
        else:
            columns[name] = table[name].cast("float64").to_pandas()
    return pd.DataFrame(columns, columns=list(features))


def make_model(numeric: Sequence[str], categorical: Sequence[str], params: TrainParams) -> Pipeline:
    """An unfitted pipeline from a frame with these columns to P(churn) = `predict_proba(frame)[:, 1]`.

    A number becomes its rank among the training values and a piecewise linear curve over it, a missing one its own
    indicator; a category becomes one column per value, and none for a value that training never saw. Only stock
    classes: whoever loads the model needs scikit-learn and nothing of ours.
    """
    from sklearn.compose import ColumnTransformer
    from sklearn.impute import SimpleImputer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import Pipeline
    from sklearn.preprocessing import OneHotEncoder, QuantileTransformer, SplineTransformer

    curve = Pipeline(
        [
            ("missing", SimpleImputer(strategy="median", add_indicator=True, keep_empty_features=True)),
            ("rank", QuantileTransformer(n_quantiles=100, random_state=params.seed)),
            ("bend", SplineTransformer(n_knots=params.knots, degree=1, extrapolation="constant")),
        ]
    )
    columns = ColumnTransformer(
        [("numeric", curve, list(numeric)), ("categorical", OneHotEncoder(handle_unknown="ignore"), list(categorical))]
    )
    regression = LogisticRegression(C=1 / params.regularisation, max_iter=1000, random_state=params.seed)
    return Pipeline([("columns", columns), ("regression", regression)])
