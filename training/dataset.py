"""Builds training sets through Feast: the labels' rows with the features that were known at each row's own time.

The leaky set is built too, on purpose: it shows what joining the latest values would have promised.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.errors import DataError, DefinitionError, NotFoundError
from training.raw import TIME

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureStore

POINT_IN_TIME, LEAKY = "point_in_time", "leaky"
METADATA_KEY = b"predictflow.training_set"


@dataclass(frozen=True)
class TrainingSet:
    """A training set and where it came from. `name` ends in a hash of its content; `features` keep the service's order."""

    name: str
    table: pa.Table
    feature_service: str
    features: tuple[str, ...]
    as_known: bool

    def save(self, path: Path) -> None:
        """Write Parquet, atomically; the description travels in the file's schema metadata. Safe to run twice."""
        import pyarrow.parquet as pq

        about = {
            "name": self.name,
            "feature_service": self.feature_service,
            "features": list(self.features),
            "as_known": self.as_known,
            "rows": self.table.num_rows,
        }
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            pq.write_table(self.table.replace_schema_metadata({METADATA_KEY: json.dumps(about)}), temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: Path) -> TrainingSet:
        """Read what `save` wrote; NotFoundError without the file, DataError when it is no training set."""
        import pyarrow as pa
        import pyarrow.parquet as pq

        path = Path(path)
        if not path.is_file():
            raise NotFoundError("no training set", value=str(path), next_step="predictflow dataset --help")
        try:
            table = pq.read_table(path)
            about = json.loads((table.schema.metadata or {})[METADATA_KEY])
        except (pa.ArrowInvalid, OSError, KeyError) as e:
            raise DataError("not a training set", value=str(path), next_step="predictflow dataset --help") from e
        return cls(about["name"], table, about["feature_service"], tuple(about["features"]), about["as_known"])


def feature_names(store: FeatureStore, feature_service: str) -> list[str]:
    """The service's features in its own order; NotFoundError, naming the services there are, for an unknown one."""
    from feast.errors import FeatureServiceNotFoundException

    try:
        service = store.get_feature_service(feature_service)
    except FeatureServiceNotFoundException as e:
        valid = [s.name for s in store.list_feature_services()]
        raise NotFoundError(
            "unknown feature service", value=feature_service, valid=valid, next_step="feast apply"
        ) from e
    return [f.name for projection in service.feature_view_projections for f in projection.features]


def build_training_set(
    store: FeatureStore,
    labels: pa.Table,
    feature_service: str,
    as_known: bool = True,
    keys: Sequence[str] | None = None,
) -> pa.Table:
    """`labels`' columns plus one column per feature of the service: same rows, same order, duplicates kept.

    Each row gets the values at its own event_timestamp (UTC); `as_known` also demands that they were known by then.
    `keys` are the entity columns (default: the join keys of the service's views). No match gives null. Reads only.
    NotFoundError for an unknown service, DataError for missing columns, no rows, or a store that loses rows.
    """

    features = feature_names(store, feature_service)
    keys = list(keys) if keys is not None else join_keys(store, feature_service)
    for name in (*keys, TIME):
        if name not in labels.column_names:
            raise DataError("labels lack a column", value=name, valid=labels.column_names)
    if labels.num_rows == 0:
        raise DataError("labels have no rows")
    if clash := sorted(set(features) & set(labels.column_names)):
        raise DefinitionError("a label column has the name of a feature", value=clash[0], next_step="rename the column")

    entities = labels.select([*keys, TIME])
    job = store.get_historical_features(
        entity_df=entities.to_pandas(),
        features=store.get_feature_service(feature_service),
        filter_by_created_timestamp=as_known,
    )
    joined: pa.Table = job.to_arrow().combine_chunks()
    _check_same_rows(entities, joined)
    for name in features:
        labels = labels.append_column(joined.schema.field(name), joined.column(name))
    return labels


def build_leaky_set(store: FeatureStore, labels: pa.Table, feature_service: str, cut: datetime) -> pa.Table:
    """The classic mistake, kept for comparison: every row gets its customer's values as of `cut`, whatever its time.

    Shape and errors as build_training_set. A customer who churned has been silent for long by then, which tells the
    model the answer in training and nothing in production.
    """
    import pyarrow as pa
    import pyarrow.compute as pc

    keys = join_keys(store, feature_service)
    entities = labels.select(keys).group_by(keys, use_threads=False).aggregate([])
    at_cut = pa.array([cut] * entities.num_rows, labels.schema.field(TIME).type)
    latest = build_training_set(store, entities.append_column(TIME, at_cut), feature_service, keys=keys)
    row_of = {key: i for i, key in enumerate(zip(*(latest[k].to_pylist() for k in keys)))}
    rows = pa.array([row_of[key] for key in zip(*(labels[k].to_pylist() for k in keys))], pa.int64())
    for name in feature_names(store, feature_service):
        labels = labels.append_column(latest.schema.field(name), pc.take(latest[name], rows))
    return labels


def build_both(
    store: FeatureStore, labels: pa.Table, dataset: str, feature_service: str, cut: datetime
) -> dict[str, TrainingSet]:
    """The point-in-time set and the leaky set of one feature service, named by content. Errors: build_training_set."""
    features = tuple(feature_names(store, feature_service))
    tables = {
        POINT_IN_TIME: build_training_set(store, labels, feature_service),
        LEAKY: build_leaky_set(store, labels, feature_service, cut),
    }
    # Named by content, so that a lineage node or a run names exactly these rows and no others.
    return {
        variant: TrainingSet(f"{dataset}/{variant}@{content_hash(table)}", table, feature_service, features, True)
        for variant, table in tables.items()
    }


def lineage_of(sets: Iterable[TrainingSet]) -> list[tuple[tuple[str, str], tuple[str, str]]]:
    """The edges feature service -> training set, for FeatureRegistry.record_lineage."""
    return [(("feature_service", s.feature_service), ("training_set", s.name)) for s in sets]


def content_hash(table: pa.Table) -> str:
    """12 hex digits over column names, types and values, independent of file format, chunks and library versions."""
    import pandas as pd

    digest = hashlib.sha256(str([(f.name, str(f.type)) for f in table.schema]).encode())
    digest.update(pd.util.hash_pandas_object(table.to_pandas(), index=False).to_numpy().tobytes())
    return digest.hexdigest()[:12]


def join_keys(store: FeatureStore, feature_service: str) -> list[str]:
    """The entity columns that the service's views need, each once, in the views' order."""
    keys: dict[str, None] = {}
    for projection in store.get_feature_service(feature_service).feature_view_projections:
        view = store.get_feature_view(projection.name)
        for column in view.entity_columns:
            keys[projection.join_key_map.get(column.name, column.name)] = None
    return list(keys)


def _check_same_rows(entities: pa.Table, joined: pa.Table) -> None:
    """Stock stores drop and reorder rows; a label beside another row's features would be worse than no label."""
    same = joined.num_rows == entities.num_rows and all(
        joined.column(n)
        .cast(entities.schema.field(n).type)
        .combine_chunks()
        .equals(entities.column(n).combine_chunks())
        for n in entities.column_names
    )
    if not same:
        raise DataError(
            f"the offline store returned {joined.num_rows} rows for {entities.num_rows}, or in another order",
            next_step="set offline_store.type of feature_store.yaml to "
            "feature_store.offline_store.PredictFlowOfflineStore",
        )
