"""Feast's RetrievalJob over our reads: whole as Arrow or pandas, or streamed to Parquet a slice at a time."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pyarrow as pa
from feast.infra.offline_stores.offline_store import RetrievalJob, RetrievalMetadata
from feast.repo_config import RepoConfig

from feature_store.errors import UsageError
from feature_store.point_in_time.append import write_new
from feature_store.point_in_time.engine import connect
from feature_store.point_in_time.latest import Pull
from feature_store.point_in_time.source import file_path, is_uri, resolve
from feature_store.windows.definition import STATE_FIELD, WindowedView, definition_of

if TYPE_CHECKING:
    from feast.data_source import DataSource
    from feast.on_demand_feature_view import OnDemandFeatureView
    from feast.saved_dataset import SavedDatasetStorage

log = logging.getLogger(__name__)

BACKFILL = "predictflow backfill --all"


class PredictFlowRetrievalJob(RetrievalJob):
    """A retrieval that runs on each call. `slices(n)` gives it in tables of n rows; None: of as many as memory allows."""

    def __init__(
        self,
        slices: Callable[[int | None], Iterator[pa.Table]],
        config: RepoConfig,
        *,
        metadata: RetrievalMetadata | None = None,
        on_demand: list[OnDemandFeatureView] | None = None,
        full_feature_names: bool = False,
    ) -> None:
        super().__init__()
        self._slices = slices
        self._config = config
        self._metadata = metadata
        self._on_demand = on_demand or []
        self._full_feature_names = full_feature_names

    def _to_arrow_internal(self, timeout: int | None = None) -> pa.Table:
        # Feast's conversion to protobuf reads the first batch only: more than one chunk would lose rows.
        return pa.concat_tables(list(self._slices(ALL_ROWS))).combine_chunks()

    def _to_df_internal(self, timeout: int | None = None) -> pd.DataFrame:
        return self._to_arrow_internal(timeout).to_pandas()

    def tables(self, rows: int | None = None) -> Iterator[pa.Table]:
        """The result in tables of `rows` rows, without on-demand features; None: of as many as memory allows."""
        return self._slices(rows)

    @property
    def full_feature_names(self) -> bool:
        return self._full_feature_names

    @property
    def on_demand_feature_views(self) -> list[OnDemandFeatureView]:
        return self._on_demand

    @property
    def metadata(self) -> RetrievalMetadata | None:
        return self._metadata

    def to_parquet(self, path: str | Path, allow_overwrite: bool = False, timeout: int | None = None) -> int:
        """Streams the result to `path`, a `.parquet` file or a directory; returns its rows.

        One slice is held at a time, within the memory limit; with on-demand features, which Feast computes over the whole
        result, all of it. The file appears whole or not at all.
        """
        if is_uri(str(path)):
            raise UsageError("a result is written to a local path", value=str(path))

        def tables() -> Iterable[pa.Table]:
            return [self.to_arrow(timeout=timeout)] if self._on_demand else self._slices(None)

        return write_new(tables, Path(path), allow_overwrite)

    def persist(self, storage: SavedDatasetStorage, allow_overwrite: bool = False, timeout: int | None = None) -> None:
        """As `to_parquet`, to the storage's path; an existing one is an error unless `allow_overwrite`."""
        self.to_parquet(resolve(self._config, file_path(storage.to_data_source())), allow_overwrite, timeout)


ALL_ROWS = 2**62


def pull_of(
    config: RepoConfig,
    source: DataSource,
    keys: list[str],
    features: list[str],
    timestamp: str,
    created: str | None,
    start: datetime | None,
    end: datetime | None,
) -> Pull:
    from feast.feature_view import DUMMY_ENTITY_ID

    return Pull(
        label=f"source {source.name}",
        place=resolve(config, file_path(source)),
        next_step=BACKFILL,
        keys=tuple(k for k in keys if k != DUMMY_ENTITY_ID),
        features=tuple(features),
        timestamp=timestamp,
        created=created or None,
        start=start,
        end=end,
    )


def pull_job(
    config: RepoConfig,
    source: DataSource,
    pull: Pull,
    join_keys: list[str],
    read: Callable[[Any, Pull], pa.Table],
) -> RetrievalJob:
    from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL

    definition = definition_of(source)

    def slices(_size: int | None) -> Iterator[pa.Table]:
        if definition is not None:
            log.warning(  # Feast's command line shows nothing below
                "%s is windowed: nothing to materialise; its online state comes from "
                "`predictflow windows bootstrap %s` and the stream",
                definition.name,
                definition.name,
            )
            yield _no_rows(pull, definition)
            return
        with connect(config.offline_store.engine) as con:
            table = read(con, pull)
        if not join_keys or DUMMY_ENTITY_ID in join_keys:  # no entities: Feast stores such a view under one made-up key
            table = table.append_column(DUMMY_ENTITY_ID, pa.array([DUMMY_ENTITY_VAL] * table.num_rows, pa.string()))
        yield table

    return PredictFlowRetrievalJob(slices, config)


def _no_rows(pull: Pull, definition: WindowedView) -> pa.Table:
    time = pa.timestamp("us", "UTC")
    arrow: dict[str, pa.DataType] = {
        "int64": pa.int64(), "float64": pa.float64(), "string": pa.string(), "bool": pa.bool_(), "timestamp": time,
    }  # fmt: skip
    types = {o.name: arrow[o.type] for o in definition.outputs}
    types |= {key: arrow[kind] for key, kind in zip(definition.entity_key, definition.key_types, strict=True)}
    types[STATE_FIELD] = pa.binary()
    types.update({name: time for name in (pull.timestamp, pull.created) if name})
    return pa.table({c: pa.array([], types.get(c, pa.string())) for c in pull.columns})
