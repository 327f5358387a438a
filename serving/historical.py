"""Point-in-time features for entity rows that a client sends: at once, or as a job when there are many.

The rows are data, never SQL text or a path. On-demand features are computed as at online reads, by the functions of the
checkout. Blocking: run it in threads of their own.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError, NotFoundError, UsageError
from serving.columns import rows_of, times, typed
from serving.errors import TooManyError
from serving.plans import Asked

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import FeatureService, FeatureStore, FeatureView

    from feature_store.on_demand_history import OnDemandHistory

TIME = "event_timestamp"
SLICE_ROWS = 50_000
"""Rows between two reports of a job's progress, and between two looks at whether it was cancelled."""


@dataclass(frozen=True)
class HistoricalLimits:
    """`inline_rows`: what is answered at once, more becomes a job; `rows`: what is refused above it."""

    inline_rows: int = 10_000
    rows: int = 1_000_000
    features: int = 500


@dataclass(frozen=True)
class Wanted:
    """A checked request: features by name, and entity rows with their join keys in the declared types."""

    features: FeatureService | list[str]
    views: list[tuple[FeatureView, list[str]]]
    feature_service: str | None
    feature_names: list[str]
    entities: pa.Table
    as_known: bool
    full_names: bool
    on_demand: OnDemandHistory | None = None

    @property
    def rows(self) -> int:
        return int(self.entities.num_rows)


class Historical:
    """Point-in-time retrieval from the project's offline store."""

    def __init__(self, store: FeatureStore, limits: HistoricalLimits | None = None) -> None:
        self._store = store
        self.limits = limits or HistoricalLimits()

    def wanted(
        self,
        asked: Asked,
        entities: pa.Table | Mapping[str, Sequence[object]],
        as_known: bool,
        full_names: bool,
    ) -> Wanted:
        """Checks names, columns and types. UsageError, NotFoundError or TooManyError, OnDemandViewError for an on-demand
        view whose function may not run here; nothing is read but the registry and, for such a view, the checkout.
        """
        from feast import OnDemandFeatureView

        from feature_store.on_demand_history import OnDemandHistory
        from feature_store.view_plan import OnDemandViewError, resolve

        if not isinstance(asked, str) and len(asked) > self.limits.features:
            raise TooManyError("features", len(asked), self.limits.features)
        rows = rows_of(entities) if isinstance(entities, Mapping) else entities.num_rows
        if rows > self.limits.rows:
            raise TooManyError("rows", rows, self.limits.rows)
        features = self._service(asked) if isinstance(asked, str) else list(asked)
        views = resolve(self._store.registry, self._store.project, features, full_names)
        computed = [view.name for view, _ in views if isinstance(view, OnDemandFeatureView)]
        on_demand = None
        if computed and not self._ours:
            raise OnDemandViewError(
                "on-demand features of historical rows are computed over PredictFlow's offline store only",
                value=computed[0],
                next_step="ask for the features it reads, or use get_historical_features of the SDK in the checkout",
            )
        if computed:
            store = self._store
            on_demand = OnDemandHistory(store.config, store.registry, store.project, views, full_names)
            names, read = on_demand.feature_names, on_demand.read_names
            keys = on_demand.request | on_demand.join_keys
        else:
            names, read, keys = _names_of(views, full_names), [], {}
            for view, _ in views:
                for column in view.entity_columns:
                    name = view.projection.join_key_map.get(column.name, column.name)
                    keys[name] = column.dtype.to_value_type().name
        table = _of_columns(entities, keys) if isinstance(entities, Mapping) else _of_table(entities, keys)
        for name in [*names, *read]:
            if name in table.column_names:
                raise UsageError(
                    "an entity column has the name of a feature", value=name, next_step="rename the column"
                )
        service = asked if isinstance(asked, str) else None
        return Wanted(features, views, service, names, table, as_known, full_names, on_demand)

    @property
    def _ours(self) -> bool:
        return bool(self._store.config.offline_store.type.endswith("PredictFlowOfflineStore"))

    def tables(self, wanted: Wanted, slice_rows: int | None) -> Iterator[pa.Table]:
        """The entity rows, in order, with their features, in tables of `slice_rows` (None: one table)."""
        from feature_store.point_in_time.job import ALL_ROWS, PredictFlowRetrievalJob

        store = self._store
        if wanted.on_demand is not None and not wanted.on_demand.reads:  # computed from the request alone
            for start in range(0, wanted.rows, slice_rows or ALL_ROWS):
                yield wanted.on_demand.answer(wanted.entities.slice(start, slice_rows or ALL_ROWS))
            return
        job: Any
        if self._ours:
            plan = wanted.on_demand
            views = wanted.views if plan is None else plan.reads
            # Not by way of the store: it looks the views up again, with their functions.
            job = store._get_provider().get_historical_features(
                config=store.config,
                feature_views=[view for view, _ in views],
                feature_refs=[f"{view.projection.name_to_use()}:{n}" for view, names in views for n in names],
                entity_df=wanted.entities,  # ours takes Arrow
                registry=store.registry,
                project=store.project,
                full_feature_names=wanted.full_names or plan is not None,
                filter_by_created_timestamp=wanted.as_known,
            )
        else:
            job = store.get_historical_features(
                # Other stores know pandas only, which has no exact integers beside nulls.
                entity_df=wanted.entities.to_pandas(),
                features=wanted.features,
                full_feature_names=wanted.full_names,
                filter_by_created_timestamp=wanted.as_known,
            )
        if isinstance(job, PredictFlowRetrievalJob):
            for table in job.tables(slice_rows or ALL_ROWS):
                yield table if wanted.on_demand is None else wanted.on_demand.answer(table)
        else:
            yield job.to_arrow()

    def table(self, wanted: Wanted) -> pa.Table:
        """All rows at once."""
        import pyarrow as pa

        return pa.concat_tables(list(self.tables(wanted, None))).combine_chunks()

    def _service(self, name: str) -> FeatureService:
        from feast.errors import FeatureServiceNotFoundException

        try:
            return self._store.get_feature_service(name, allow_cache=True)
        except FeatureServiceNotFoundException as e:
            valid = [s.name for s in self._store.registry.list_feature_services(self._store.project, allow_cache=True)]
            raise NotFoundError("unknown feature service", value=name, valid=valid, next_step="feast apply") from e


def _names_of(views: Sequence[tuple[FeatureView, list[str]]], full_names: bool) -> list[str]:
    return [
        f"{view.projection.name_to_use()}__{name}" if full_names else name for view, names in views for name in names
    ]


def _of_columns(columns: Mapping[str, Sequence[object]], keys: Mapping[str, str]) -> pa.Table:
    """JSON columns: join keys as declared, the time, and other columns as they are."""
    import pyarrow as pa

    _require(columns, keys)
    out: dict[str, pa.Array] = {}
    for name, values in columns.items():
        if name == TIME:
            out[name] = times(name, values)
        elif name in keys:
            out[name] = typed(name, values, keys[name])
        else:
            if any(isinstance(v, list | dict) for v in values):
                raise UsageError("an entity column holds nested values", value=name)
            try:
                out[name] = pa.array(values)
            except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError, UnicodeEncodeError) as e:
                raise UsageError("an entity column holds values of several types, or out of range", value=name) from e
    return _checked(pa.table(out))


def _of_table(table: pa.Table, keys: Mapping[str, str]) -> pa.Table:
    """Arrow columns: join keys cast to their declared types where no value changes, the rest as it is."""
    import pyarrow as pa
    import pyarrow.types as t

    repeated = {n for n in table.column_names if table.column_names.count(n) > 1}
    if repeated:
        raise UsageError("two columns of one name", value=sorted(repeated)[0])
    if not table.num_rows:
        raise UsageError("there are no entity rows")
    _require(table.column_names, keys)
    same = {
        "STRING": (t.is_string, t.is_large_string),
        "BYTES": (t.is_binary, t.is_large_binary),
        "UNIX_TIMESTAMP": (t.is_timestamp,),
    }
    for name, kind in keys.items():
        target = typed(name, [], kind).type
        column = table.column(name)
        checks = same.get(kind, (t.is_integer,) if t.is_integer(target) else ())
        try:
            if not any(check(column.type) for check in checks) and column.type != target:
                raise pa.ArrowInvalid(f"{column.type} is not {target}")
            column = column.cast(target)
        except pa.ArrowException as e:
            raise UsageError(f"column {name} is not of type {kind}", value=str(e)[:200]) from e
        table = table.set_column(table.column_names.index(name), name, column)
    return _checked(table)


def _require(names: Any, keys: Mapping[str, str]) -> None:
    for name in (*keys, TIME):
        if name not in names:
            raise UsageError("a column is missing in the entity rows", value=name, valid=[*keys, TIME])


def _checked(table: pa.Table) -> pa.Table:
    """What the offline store would refuse of the rows is the request's fault."""
    import pyarrow.types as t

    from feature_store.point_in_time.entities import entity_rows

    if not (t.is_timestamp(table.schema.field(TIME).type) or t.is_date(table.schema.field(TIME).type)):
        raise UsageError(f"column {TIME} is not a timestamp", value=str(table.schema.field(TIME).type))
    try:
        entity_rows(table)
    except DataError as e:
        raise UsageError(e.what, value=e.value, next_step=e.next_step) from e
    return table
