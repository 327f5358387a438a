"""The Feast face of the offline store: Parquet below one path, read by DuckDB. The work is done in `point_in_time/`.

Feast finds `PredictFlowOfflineStore` and `PredictFlowOfflineStoreConfig` here by the dotted path in feature_store.yaml.
Against Feast's own stores: every entity row comes back exactly once and in order, ties go to the newest `created`,
times are compared without rounding, and writes append a file instead of rewriting the table.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
from feast.infra.offline_stores.offline_store import OfflineStore, RetrievalJob, RetrievalMetadata
from feast.repo_config import FeastConfigBaseModel, RepoConfig
from pydantic import model_validator

from feature_store.config_check import require_expanded
from feature_store.errors import DataError, UsageError
from feature_store.point_in_time import entities as entity_input
from feature_store.point_in_time.append import append_rows
from feature_store.point_in_time.engine import EngineSettings, connect
from feature_store.point_in_time.job import BACKFILL, PredictFlowRetrievalJob, pull_job, pull_of
from feature_store.point_in_time.latest import Pull, pull_all, pull_latest
from feature_store.point_in_time.request import view_requests
from feature_store.point_in_time.retrieval import known_keys, retrieve_slices
from feature_store.point_in_time.source import file_path, open_source, resolve
from feature_store.windows.definition import definition_of
from feature_store.without_functions import requested_on_demand

if TYPE_CHECKING:
    from feast import FeatureView
    from feast.data_source import DataSource
    from feast.feature_logging import LoggingConfig, LoggingSource
    from feast.infra.registry.base_registry import BaseRegistry


class PredictFlowOfflineStoreConfig(FeastConfigBaseModel):
    """`offline_store:` of feature_store.yaml."""

    type: Literal["feature_store.offline_store.PredictFlowOfflineStore"] = (
        "feature_store.offline_store.PredictFlowOfflineStore"
    )
    path: str = ""
    """Directory below which relative source paths lie; itself relative to feature_store.yaml. Empty: its directory."""
    memory_limit: str | None = None
    """What a query may hold in memory before it spills to disk, for example `4GB`; default: 40% of the machine."""
    threads: int | None = None
    """Threads per query; default: all cores."""
    temp_directory: str | None = None
    """Where a query spills; default: the system's temporary directory."""

    @model_validator(mode="before")
    @classmethod
    def _expanded(cls, values: Any) -> Any:
        if isinstance(values, Mapping):
            require_expanded(values, "offline_store")
        return values

    @property
    def engine(self) -> EngineSettings:
        return EngineSettings(self.memory_limit, self.threads, self.temp_directory)


class PredictFlowOfflineStore(OfflineStore):
    """Feast's OfflineStore over Parquet files; see the methods for what differs from Feast's own."""

    supports_filter_by_created_timestamp = True

    @staticmethod
    def get_historical_features(
        config: RepoConfig,
        feature_views: list[FeatureView],
        feature_refs: list[str],
        entity_df: pd.DataFrame | pa.Table | str | None,
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
        filter_by_created_timestamp: bool = False,
        **_ignored: Any,
    ) -> RetrievalJob:
        """Point-in-time features for `entity_df`: DataFrame, Arrow table, Parquet path, or SQL over the data sources.

        Without `entity_df`: one row per key known in [start_date, end_date], at end_date. `filter_by_created_timestamp`
        is as-known mode for row views; windowed views are always as known by t.
        """

        def requests(columns: list[str]) -> Any:
            return view_requests(config, feature_views, feature_refs, registry, project, full_feature_names, columns)

        if entity_df is None:
            if end_date is None:
                raise UsageError("retrieval without entity_df needs end_date")
            with connect(config.offline_store.engine) as con:
                table = known_keys(con, requests([]), start_date, end_date, filter_by_created_timestamp)
        else:
            table = _entity_table(config, entity_df, registry, project)
        rows = entity_input.entity_rows(table)
        wanted = requests(rows.table.column_names)

        def slices(size: int | None) -> Iterator[pa.Table]:
            with connect(config.offline_store.engine) as con:
                yield from retrieve_slices(con, wanted, rows, filter_by_created_timestamp, size)

        times = rows.table.column(rows.timestamp).cast(pa.timestamp("us", "UTC"), safe=False)
        span = pc.min_max(times).as_py()
        return PredictFlowRetrievalJob(
            slices,
            config,
            metadata=RetrievalMetadata(list(feature_refs), rows.keys, span["min"], span["max"]),
            on_demand=requested_on_demand(feature_refs, project, registry),
            full_feature_names=full_feature_names,
        )

    @staticmethod
    def pull_latest_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None,
        start_date: datetime | None,
        end_date: datetime | None,
    ) -> RetrievalJob:
        """The row with the greatest (event_timestamp, created) per key in [start_date, end_date]; none for a windowed
        source, whose online state is bootstrapped."""
        pull = pull_of(
            config,
            data_source,
            join_key_columns,
            feature_name_columns,
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
        )
        return pull_job(config, data_source, pull, join_key_columns, pull_latest)

    @staticmethod
    def pull_all_from_table_or_query(
        config: RepoConfig,
        data_source: DataSource,
        join_key_columns: list[str],
        feature_name_columns: list[str],
        timestamp_field: str,
        created_timestamp_column: str | None = None,
        start_date: datetime | None = None,
        end_date: datetime | None = None,
    ) -> RetrievalJob:
        """Every row in [start_date, end_date]; none for a windowed source, whose online state is bootstrapped."""
        pull = pull_of(
            config,
            data_source,
            join_key_columns,
            feature_name_columns,
            timestamp_field,
            created_timestamp_column,
            start_date,
            end_date,
        )
        return pull_job(config, data_source, pull, join_key_columns, pull_all)

    @staticmethod
    def offline_write_batch(
        config: RepoConfig, feature_view: FeatureView, table: pa.Table, progress: Callable[[int], Any] | None
    ) -> None:
        """Appends `table` as one new file of the view's source; the same table twice makes one file."""
        if definition_of(feature_view) is not None:
            raise UsageError(
                "rows of a windowed view come from its topic", value=feature_view.name, next_step="send events to it"
            )
        source = feature_view.batch_source
        if source is None:
            raise DataError("feature view has no batch source", value=feature_view.name)
        place = resolve(config, file_path(source))
        append_rows(place, table, f"feature view {feature_view.name}", _expected(feature_view))
        if progress:
            progress(table.num_rows)

    @staticmethod
    def write_logged_features(
        config: RepoConfig,
        data: pa.Table | Path,
        source: LoggingSource,
        logging_config: LoggingConfig,
        registry: BaseRegistry,  # noqa: ARG004  # Feast's signature
    ) -> None:
        """Appends logged features, one file per call, to the logging destination's directory."""
        import pyarrow.parquet as pq

        table = pq.read_table(data) if isinstance(data, Path) else data
        place = resolve(config, file_path(logging_config.destination.to_data_source()))
        append_rows(place, table, f"log of {type(source).__name__}", None)

    def validate_data_source(self, config: RepoConfig, data_source: DataSource) -> None:
        """A source needs a path; its files may come later, from backfill."""
        file_path(data_source)

    def get_table_column_names_and_types_from_data_source(
        self, config: RepoConfig, data_source: DataSource
    ) -> Iterable[tuple[str, str]]:
        """Names and Arrow types of the columns the source's files hold."""
        pull = Pull(f"source {data_source.name}", resolve(config, file_path(data_source)), BACKFILL,
                    (), (), data_source.timestamp_field, None, None, None)  # fmt: skip
        with connect(config.offline_store.engine) as con:
            source = open_source(con, pull.label, [pull.place], pull.next_step)
            schema = con.sql(f"SELECT * FROM {source.relation} LIMIT 0").to_arrow_table().schema
        return [(f.name, str(f.type)) for f in schema]


def _entity_table(config: RepoConfig, entity_df: Any, registry: BaseRegistry, project: str) -> pa.Table:
    if isinstance(entity_df, pa.Table):
        return entity_df
    if isinstance(entity_df, pd.DataFrame):
        return entity_input.from_pandas(entity_df)
    if isinstance(entity_df, Path) or (isinstance(entity_df, str) and entity_input.is_path(entity_df)):
        with connect(config.offline_store.engine) as con:
            return entity_input.from_path(con, str(entity_df))
    if isinstance(entity_df, str):
        sources = registry.list_data_sources(project, allow_cache=True)
        places = {s.name: resolve(config, file_path(s)) for s in sources if getattr(s, "path", None)}
        with connect(config.offline_store.engine) as con:
            return entity_input.from_sql(con, entity_df, places)
    raise UsageError(
        "entity_df is of an unknown type",
        value=type(entity_df).__name__,
        valid=["pandas.DataFrame", "pyarrow.Table", "Parquet path", "SQL text"],
    )


def _expected(view: FeatureView) -> dict[str, Any]:
    """Columns that a row of the view's source must have: name to declared Feast type, None for a time."""
    source = view.batch_source
    assert source is not None
    to_source = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
    columns = {to_source.get(f.name, f.name): f.dtype for f in [*view.entity_columns, *view.features]}
    times = [source.timestamp_field, source.created_timestamp_column]
    return {**columns, **{to_source.get(t, t): None for t in times if t}}
