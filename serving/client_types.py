"""What the Python client returns: plain dataclasses, validated when they are read from an answer. Times are UTC."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from serving.schemas import Status

if TYPE_CHECKING:
    import pandas as pd


@dataclass(slots=True)
class FeatureRow:
    """Values of one entity, None unless the status is PRESENT; `offsets`: windowed view -> partition -> last offset."""

    entity: dict[str, Any]
    values: dict[str, Any]
    statuses: dict[str, Status]
    event_timestamps: dict[str, datetime | None]
    offsets: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(slots=True)
class OnlineFeatures:
    """Feature values, one row per entity in the order asked for; `t` is the time as of which they hold (gRPC: None)."""

    t: datetime | None
    feature_service: str | None
    feature_names: list[str]
    rows: list[FeatureRow]

    def to_df(self) -> pd.DataFrame:
        """One row per entity: join keys, then features (missing: None). Statuses are in `rows`."""
        import pandas as pd

        return pd.DataFrame([{**row.entity, **row.values} for row in self.rows], dtype=object).infer_objects()


@dataclass(slots=True)
class Prediction:
    """A probability, and the features that it was made from."""

    entity: dict[str, Any]
    values: dict[str, Any]
    statuses: dict[str, Status]
    probability: float
    offsets: dict[str, dict[str, int]] = field(default_factory=dict)
    event_timestamps: dict[str, datetime | None] = field(default_factory=dict)


@dataclass(slots=True)
class Predictions:
    """Predictions, one per entity in the order asked for."""

    model: str
    version: str
    feature_service: str
    t: datetime
    predictions: list[Prediction]

    def to_df(self) -> pd.DataFrame:
        """One row per entity: join keys, features (missing: None), `probability`."""
        import pandas as pd

        rows = [{**p.entity, **p.values, "probability": p.probability} for p in self.predictions]
        return pd.DataFrame(rows, dtype=object).infer_objects()


@dataclass(slots=True)
class Pushed:
    """What a push wrote: rows, the views they went to (gRPC: empty), and which stores."""

    rows: int
    feature_views: list[str]
    to: str


@dataclass(slots=True)
class HistoricalJob:
    """A historical request that the server answers in the background."""

    id: str
    status: str
    rows_done: int
    rows_total: int
    error: dict[str, Any] | None = None
