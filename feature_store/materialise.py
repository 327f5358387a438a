"""The batch engine behind `feast materialize`: latest row per key, found in one pass and written online in chunks.

feature_store.yaml: `batch_engine: {type: feature_store.materialise.PredictFlowEngine}`. Against Feast's local engine:
memory is bounded by the keys and two chunks (one is read while the last is written), progress moves per chunk, integers
keep every digit (nothing passes through pandas), and an incremental run also takes rows that became known since the last
one although they happened before it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

import pyarrow as pa
from feast.infra.common.materialization_job import MaterializationJob, MaterializationJobStatus, MaterializationTask
from feast.infra.compute_engines.base import ComputeEngine
from feast.repo_config import FeastConfigBaseModel
from pydantic import PositiveInt

from feature_store.clock import MAX_SKEW, MICROSECOND, WallClock
from feature_store.errors import DataError, PredictFlowError
from feature_store.online_store import PredictFlowOnlineStore
from feature_store.online_write import OnlineWriter
from feature_store.point_in_time.engine import EngineSettings, connect
from feature_store.point_in_time.latest import Pull, latest_chunks
from feature_store.point_in_time.request import Feature
from feature_store.point_in_time.source import file_path, resolve
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureView
    from feast.infra.registry.base_registry import BaseRegistry

log = logging.getLogger(__name__)

BACKFILL = "predictflow backfill --all"


class PredictFlowEngineConfig(FeastConfigBaseModel):
    """`batch_engine:` of feature_store.yaml."""

    type: Literal["feature_store.materialise.PredictFlowEngine"] = "feature_store.materialise.PredictFlowEngine"
    chunk_rows: PositiveInt = 50_000
    """Rows held and written at a time."""


@dataclass
class PredictFlowJob(MaterializationJob):
    """A finished run; an error is kept for Feast to raise."""

    task: MaterializationTask
    failure: BaseException | None = None

    def status(self) -> MaterializationJobStatus:
        return MaterializationJobStatus.ERROR if self.failure else MaterializationJobStatus.SUCCEEDED

    def error(self) -> BaseException | None:
        return self.failure

    def should_be_retried(self) -> bool:
        return False

    def job_id(self) -> str:
        return f"{self.task.feature_view.name}-{self.task.start_time}-{self.task.end_time}"

    def url(self) -> str | None:
        return None


class PredictFlowEngine(ComputeEngine):
    """Feast's ComputeEngine for materialisation; retrieval goes to the offline store directly."""

    def __init__(self, *, type: str = "", chunk_rows: int = 50_000, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.chunk_rows = PredictFlowEngineConfig(chunk_rows=chunk_rows).chunk_rows

    def update(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to prepare."""

    def teardown_infra(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing to remove."""

    def _materialize_one(
        self,
        registry: BaseRegistry,
        task: MaterializationTask,
        **_kwargs: Any,
    ) -> MaterializationJob:
        """Writes the view's latest row per key with event_timestamp in [start, end]. Safe to repeat: the newest row wins.

        A run that starts where the last one ended (`materialize-incremental`) also takes rows with `created` since then.
        After an error the chunks written so far stay, and Feast does not record the range as done.
        """
        from feast import StreamFeatureView

        view = task.feature_view
        if definition_of(view) is not None:
            log.warning(  # Feast's command line shows nothing below
                "%s is windowed: nothing to materialise; its online state comes from `predictflow windows bootstrap %s` and the stream",
                view.name,
                view.name,
            )
            return PredictFlowJob(task)
        if isinstance(view, StreamFeatureView) or getattr(view, "feature_transformation", None) is not None:
            return PredictFlowJob(
                task, DataError("a view with a transformation cannot be materialised", value=view.name)
            )
        try:
            self._write(task)
        except PredictFlowError as e:
            return PredictFlowJob(task, e)
        return PredictFlowJob(task)

    def _write(self, task: MaterializationTask) -> None:
        view = task.feature_view
        settings = getattr(self.repo_config.offline_store, "engine", EngineSettings())
        pull, features = _pull(self.repo_config, task)
        write = self._writer(pull, features, view)
        with connect(settings) as con, ThreadPoolExecutor(1, thread_name_prefix="read-ahead") as reader:
            self._refuse_future(con, pull, view)
            rows, chunks = latest_chunks(con, pull, self.chunk_rows, features)
            bar = task.tqdm_builder(rows) if task.tqdm_builder else None
            try:
                coming = reader.submit(next, chunks, None)
                while (chunk := coming.result()) is not None:
                    coming = reader.submit(next, chunks, None)
                    if chunk.num_rows:
                        write(chunk, bar.update if bar is not None else None)
            finally:
                if bar is not None:
                    bar.close()

    def _writer(
        self, pull: Pull, features: Sequence[Feature], view: FeatureView
    ) -> Callable[[pa.Table, Callable[[int], Any] | None], object]:
        """Writes a chunk: by column into our store, by rows of protos into any other."""
        if not isinstance(self.online_store, PredictFlowOnlineStore):
            return lambda chunk, advance: self.online_store.online_write_batch(
                self.repo_config, view, list(_rows(pull, features, chunk)), advance
            )
        writer = OnlineWriter(self.online_store, self.repo_config, view)

        def write(chunk: pa.Table, advance: Callable[[int], Any] | None) -> None:
            columns = {f.output[2:]: chunk.column(f.output) for f in features}
            columns[writer.event_column] = chunk.column(pull.timestamp)
            if pull.created:
                columns[writer.created_column] = chunk.column(pull.created)
            writer.write(pa.table(columns), wall=None, progress=advance)  # _refuse_future has looked at the clock

        return write

    def _refuse_future(self, con: Any, pull: Pull, view: FeatureView) -> None:
        """DataError where the range holds a row that a direct write would refuse. Leaving it out instead would lose it:
        Feast records the whole range as done."""
        if not isinstance(self.online_store, PredictFlowOnlineStore):
            return
        # Feast passes no time: a materialisation runs when a person or a scheduler starts it.
        limit = OnlineWriter(self.online_store, self.repo_config, view).newest_allowed(WallClock())
        if limit is None or pull.end is None or pull.end <= limit:
            return
        later = replace(pull, start=limit + MICROSECOND, late_since=None)
        keys, chunks = latest_chunks(con, later, 1)
        if keys:
            row = next(iter(chunks)).to_pylist()[0]
            named = ", ".join(f"{k}={row[k]!r}" for k in pull.keys)
            raise DataError(
                f"{view.name}: {keys} keys have rows dated after the clock, the first ({named}) {row[pull.timestamp]}; "
                "nothing was written",
                next_step=f"materialise up to {(limit - MAX_SKEW).isoformat()}, or mend the rows",
            )

    def get_historical_features(self, registry: BaseRegistry, task: Any) -> Any:
        """Point-in-time retrieval, by the offline store."""
        return self.offline_store.get_historical_features(
            config=self.repo_config,
            feature_views=[task.feature_view],
            feature_refs=[f"{task.feature_view.name}:{f.name}" for f in task.feature_view.features],
            entity_df=task.entity_df,
            registry=registry,
            project=task.project,
            full_feature_names=task.full_feature_name,
        )


def late_since(view: FeatureView, start: datetime) -> datetime | None:
    """From when on a run's late rows count: `start`, if it continues where the last run ended; else None.

    Feast passes an incremental run only its range, and that range starts at the end of the last one recorded.
    """
    last = view.most_recent_end_time
    return start if last is not None and last == start else None


def _pull(config: Any, task: MaterializationTask) -> tuple[Pull, list[Feature]]:
    from feast.feature_view import DUMMY_ENTITY_ID

    view = task.feature_view
    source = view.batch_source
    if source is None:
        raise DataError("feature view has no batch source", value=view.name)
    to_source = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
    keys = [e.name for e in view.entity_columns if e.name != DUMMY_ENTITY_ID]
    created = source.created_timestamp_column
    pull = Pull(
        label=f"feature view {view.name}",
        place=resolve(config, file_path(source)),
        next_step=BACKFILL,
        keys=tuple(to_source.get(k, k) for k in keys),
        features=(),
        timestamp=to_source.get(source.timestamp_field, source.timestamp_field),
        created=to_source.get(created, created) or None,
        start=task.start_time,
        end=task.end_time,
        late_since=late_since(view, task.start_time),
    )
    declared = [f for f in view.entity_columns if f.name in keys]
    wanted = [Feature(f.name, to_source.get(f.name, f.name), f.dtype, f"k:{f.name}") for f in declared]
    wanted += [Feature(f.name, to_source.get(f.name, f.name), f.dtype, f"f:{f.name}") for f in view.features]
    return pull, wanted


def _rows(
    pull: Pull, features: Sequence[Feature], chunk: pa.Table
) -> Iterator[tuple[Any, dict[str, Any], datetime, datetime | None]]:
    """The rows as the online store takes them; every value from Arrow straight to its proto, so no digit is lost."""
    from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import python_values_to_proto_values

    protos = {
        f.output: python_values_to_proto_values(chunk.column(f.output).to_pylist(), f.dtype.to_value_type())
        for f in features
    }
    keys = {name[2:]: values for name, values in protos.items() if name.startswith("k:")}
    values = {name[2:]: column for name, column in protos.items() if name.startswith("f:")}
    if not keys:  # a view without entities: Feast stores it under one made-up key
        keys = {DUMMY_ENTITY_ID: [Value(string_val=DUMMY_ENTITY_VAL)] * chunk.num_rows}
    events = chunk.column(pull.timestamp).to_pylist()
    created = chunk.column(pull.created).to_pylist() if pull.created else [None] * chunk.num_rows
    for i in range(chunk.num_rows):
        key = EntityKey(join_keys=list(keys), entity_values=[column[i] for column in keys.values()])
        yield key, {name: column[i] for name, column in values.items()}, _utc(events[i]), _utc(created[i])


def _utc(time: datetime | None) -> Any:
    return time.replace(tzinfo=UTC) if time is not None and time.tzinfo is None else time
