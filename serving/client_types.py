"""What the Python client returns: plain dataclasses, validated when they are read from an answer. Times are UTC."""

from __future__ import annotations

from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from serving.client_kinds import frame
from serving.schemas import Status

if TYPE_CHECKING:
    import pandas as pd


@dataclass(slots=True)
class FeatureRow:
    """Values of one entity, None unless the status is PRESENT; `offsets`: windowed view -> partition -> last offset.

    `values` are Python's own of the declared types, whichever way they came: a REST answer without types keeps JSON's.
    """

    entity: dict[str, Any]
    values: dict[str, Any]
    statuses: dict[str, Status]
    event_timestamps: dict[str, datetime | None]
    offsets: dict[str, dict[str, int]] = field(default_factory=dict)


@dataclass(slots=True)
class OnlineFeatures:
    """Feature values, one row per entity in the order asked for; `t` is the time as of which they hold (gRPC: None).

    `feature_types`: names of Feast's value types, in the order of `feature_names`; over gRPC those of the values, and empty
    texts where there is none. None at all from a server that does not tell them.
    """

    t: datetime | None
    feature_service: str | None
    feature_names: list[str]
    rows: list[FeatureRow]
    feature_types: list[str] = field(default_factory=list)

    def to_df(self) -> pd.DataFrame:
        """One row per entity: join keys, then features; missing: NaN in floats, NA in integers and booleans, NaT in times,
        else None. Statuses are in `rows`."""
        rows = [{**row.entity, **row.values} for row in self.rows]
        return frame(rows, zip(self.feature_names, self.feature_types))


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
    """Predictions, one per entity in the order asked for; `feature_types`: feature to the name of its Feast value type."""

    model: str
    version: str
    feature_service: str
    t: datetime
    predictions: list[Prediction]
    feature_types: dict[str, str] = field(default_factory=dict)

    def to_df(self) -> pd.DataFrame:
        """One row per entity: join keys, features (missing: as `OnlineFeatures.to_df`), `probability`."""
        rows = [{**p.entity, **p.values, "probability": p.probability} for p in self.predictions]
        return frame(rows, self.feature_types.items())


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
