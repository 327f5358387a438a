"""What `feast apply` adds to the catalogue: every feature, and lineage from raw column to feature service.

The online store's `update()` calls `record_apply_of_store` during each apply, because Feast offers no other hook. A SQL
registry is written before that, so what must be refused is refused by `guard_apply`, which goes before Feast's own apply.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

from feature_store import without_functions
from feature_store.errors import DefinitionError
from feature_store.feature import Feature
from feature_store.lineage import Edge, Node
from feature_store.postgres import is_postgres
from feature_store.source_columns import SourceColumn, columns_of
from feature_store.stored_names import names_after_apply, stored_name
from feature_store.windows.definition import SQL_TAG, STATE_FIELD, WindowedView, definition_of
from feature_store.windows.in_words import output_columns, output_text
from feature_store.windows.ir import Output, Statement

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView, RepoConfig

Origin = tuple[list[Node], dict[str, object]]
"""What a feature is made from, and its definition as JSON-able data with `kind` and `expression`."""


@dataclass
class Applied:
    """What one apply says: its features, its edges, and the feature names that each view holds."""

    features: list[Feature] = field(default_factory=list)
    edges: list[Edge] = field(default_factory=list)
    views: dict[str, list[str]] = field(default_factory=dict)
    services: list[str] = field(default_factory=list)


def record_apply(
    config: RepoConfig,
    views: Sequence[FeatureView],
    services: Sequence[FeatureService],
    at: datetime,
    *,
    deleted_views: Sequence[FeatureView] = (),
    services_complete: bool = False,
) -> None:
    """Register every feature of `views` and record column → feature → feature view → feature service, all or nothing.

    Features and edges that the definitions no longer have are retired at `at`, and all of `deleted_views`; those of other
    services too when `services_complete` says that `services` are all there are. Does nothing
    when the registry of `config` is not on Postgres. Safe to run twice and at once. DefinitionError for colliding
    fields and for SQL that cannot be read, before anything is written.
    """
    check_field_collisions(views, lambda view: [stored_name(config, view)])
    url = _registry_url(config)
    if url is None:
        return
    applied = describe(views, services)
    from feature_store.registry import FeatureRegistry

    with FeatureRegistry(url, project=config.project) as registry, registry.transaction():
        registry.register_features(applied.features, at)
        registry.record_lineage(applied.edges, at=at, run_id=f"apply-{at:%Y%m%dT%H%M%S%f}")
        gone = [Node("feature_view", v.name) for v in deleted_views]
        gone += registry.nodes("feature_service") if services_complete else []
        for view, names in {**applied.views, **{v.name: [] for v in deleted_views}}.items():
            gone += [Node("feature", f) for f in registry.retire_features(view, names, at)]
        made = [Node("feature", f.full_name) for f in applied.features]
        made += [Node("feature_view", v) for v in applied.views]
        made += [Node("feature_service", s) for s in applied.services]
        registry.retire_lineage([*made, *gone], ("column", "feature", "feature_view", "table"), at)


def record_apply_of_store(
    config: RepoConfig,
    views: Sequence[FeatureView],
    at: datetime,
    *,
    deleted_views: Sequence[FeatureView] = (),
) -> None:
    """`record_apply` with the feature services that stand in Feast's registry: `update()` is not given them.

    Feast's SQL registry is written before `update()` runs, so they are those of this apply.
    """
    services: Sequence[FeatureService] = ()
    if _registry_url(config) is not None:
        from feast.infra.registry.sql import SqlRegistry

        # Not the store's own: that one would start a thread to refresh its cache.
        registry = SqlRegistry(config.registry.model_copy(update={"cache_mode": "sync"}), config.project, None)
        services = registry.list_feature_services(config.project, allow_cache=False)
        registry.write_engine.dispose()
        registry.read_engine.dispose()
    record_apply(config, views, services, at, deleted_views=deleted_views, services_complete=True)


def guard_apply() -> None:
    """From now on `FeatureStore.apply` refuses colliding fields before it writes anything. Safe to repeat.

    Feast calls nothing of ours between reading the definitions and writing them into a SQL registry, so its `apply` is
    wrapped: called when the settings of our online store are loaded, and without effect on any other store.
    tests/integration/test_online_admin.py fails when a Feast upgrade breaks it.
    """
    from feast import FeatureStore

    original = FeatureStore.apply
    if getattr(original, "checks_field_collisions", False):
        return

    @functools.wraps(original)
    def apply(self: FeatureStore, objects: Any, objects_to_delete: Any = None, *args: Any, **kwargs: Any) -> Any:
        from feature_store.online_store import PredictFlowOnlineStoreConfig

        if isinstance(self.config.online_store, PredictFlowOnlineStoreConfig):
            _check_collisions_after(self, objects, objects_to_delete or ())
        return original(self, objects, objects_to_delete, *args, **kwargs)

    apply.checks_field_collisions = True  # type: ignore[attr-defined]  # a mark on the wrapper
    FeatureStore.apply = apply  # type: ignore[method-assign]  # see above: there is no other place


def _check_collisions_after(store: FeatureStore, objects: Any, deleted: Sequence[Any]) -> None:
    """`check_field_collisions` of the views with a place in Redis as an apply leaves them: those given, and the registry's
    others."""
    from feast import FeatureView, OnDemandFeatureView
    from feast.labeling.label_view import LabelView

    given = objects if isinstance(objects, Sequence) else [objects]
    views = [
        o
        for o in given
        if isinstance(o, (FeatureView, LabelView)) or (isinstance(o, OnDemandFeatureView) and o.write_to_online_store)
    ]
    if not views:
        return
    held = {v.name: v for v in without_functions.stored_views(store.registry, store.project)}
    names = {v.name: names_after_apply(store, v, held.get(v.name)) for v in views}
    gone = {v.name for v in [*views, *deleted] if hasattr(v, "name")}
    others = [v for v in held.values() if v.name not in gone]
    names |= {v.name: [stored_name(store.config, v)] for v in others}
    check_field_collisions([*views, *others], lambda view: names[view.name])


def check_field_collisions(
    views: Sequence[Any], stored_as: Callable[[Any], Sequence[str]] = lambda view: [view.name]
) -> None:
    """DefinitionError when two fields, of one view or several, would share a field of an entity's Redis hash.

    Feast names it by mmh3_32 of `view:feature` (4 bytes), so the odds are about n²/2³³ for n fields. `stored_as`: the names
    that versions of a view have there. Pure.
    """
    import mmh3

    taken: dict[int, str] = {}
    for view in views:
        for name in [f"{stored}:{f.name}" for stored in stored_as(view) for f in view.features]:
            other = taken.setdefault(mmh3.hash(name, signed=False), name)
            if other != name:
                raise DefinitionError(
                    f"features {other} and {name} have the same Redis field (mmh3 of view:feature)",
                    next_step="rename one of them",
                )


def describe(views: Sequence[Any], services: Sequence[FeatureService]) -> Applied:
    """Features and edges of feature views (windowed, row, on demand) and services. Pure; DefinitionError for bad SQL."""
    applied = Applied()
    for view in views:
        fields = [f for f in view.features if f.name != STATE_FIELD or definition_of(view) is None]
        applied.views[view.name] = [f.name for f in fields]
        of_view = Node("feature_view", view.name)
        table = _table(view)
        if table is not None:
            applied.edges.append(Edge(table, of_view, "batch_source", str(view.batch_source.name)))
        origin = _origin(view)
        for f in fields:
            columns, definition = origin(f.name)
            feature = Feature(
                group=view.name,
                name=f.name,
                dtype=str(f.dtype),
                definition={"entities": sorted(getattr(view, "entities", None) or []), **definition},
                owner=view.owner,
                description=f.description,
                unit=f.tags.get("unit", ""),
                tags={**view.tags, **f.tags},
            )
            applied.features.append(_without_machine_tags(feature))
            node = Node("feature", feature.full_name)
            how = (str(definition["kind"]), str(definition.get("expression", "")))
            applied.edges += [Edge(column, node, *how) for column in columns]
            applied.edges.append(Edge(node, of_view, "feast"))
    for service in services:
        applied.services.append(service.name)
        of_service = Node("feature_service", service.name)
        for p in service.feature_view_projections:
            names = [f.name for f in p.features if f.name != STATE_FIELD]
            # The view carries the walk (topics and tables end there), the features say which of its fields are read.
            applied.edges.append(Edge(Node("feature_view", p.name), of_service, "projection", ", ".join(names)))
            applied.edges += [Edge(Node("feature", f"{p.name}:{n}"), of_service, "projection", n) for n in names]
    return applied


def _origin(view: Any) -> Callable[[str], Origin]:
    """A function from a feature's name to its origin."""
    if not hasattr(view, "batch_source"):
        inputs, text = list(_on_demand_inputs(view)), _on_demand_text(view)
        return lambda _: (inputs, {"kind": "on_demand", "expression": text})
    source = view.batch_source
    table = source.name if source is not None else view.name
    sql = (source.tags or {}).get(SQL_TAG) if source is not None else None
    written = {n.lower(): c for n, c in columns_of(sql, f"source {table}").items()} if sql else {}
    stored_as = {feature: column for column, feature in (source.field_mapping or {}).items()} if source else {}

    def column(name: str) -> SourceColumn:
        stored = stored_as.get(name, name)
        return written.get(stored.lower()) or SourceColumn((f"{table}.{stored}",), stored, table)

    windowed = definition_of(view)
    if windowed is not None:
        outputs = {o.name: (s, o) for s in windowed.statements for o in s.outputs}
        return lambda name: _windowed_origin(windowed, *outputs[name], column)

    def row(name: str) -> Origin:
        c = column(name)
        definition = {"kind": "sql" if sql else "source", "expression": c.expression, "source": c.statement}
        return [Node("column", n) for n in c.columns], {**definition, "ttl_s": _ttl(view)}

    return row


def _windowed_origin(
    view: WindowedView, statement: Statement, output: Output, column: Callable[[str], SourceColumn]
) -> Origin:
    columns = {name: column(name) for name in sorted({view.source.timestamp, *output_columns(statement, output)})}
    definition: dict[str, object] = {
        "kind": "window",
        "expression": output_text(statement, output),
        "columns": {name: [c.expression, c.statement] for name, c in columns.items()},
        "topic": view.topic,
        "event_id": view.source.event_id,
        "retention_s": view.source.retention_us / 1e6,
        "allowed_lateness_s": view.source.allowed_lateness_us / 1e6,
        "ttl_s": view.ttl.total_seconds(),
    }
    return [Node("column", n) for c in columns.values() for n in c.columns], definition


def _on_demand_inputs(view: Any) -> Iterator[Node]:
    for p in view.source_feature_view_projections.values():
        yield from (Node("feature", f"{p.name}:{f.name}") for f in p.features)
    for name, request in view.source_request_sources.items():
        yield from (Node("column", f"{name}.{f.name}") for f in request.schema)


def _on_demand_text(view: Any) -> str:
    return str(getattr(view.feature_transformation, "udf_string", ""))


def _table(view: Any) -> Node | None:
    """The offline table of a view: its path below the offline store, or its source's name where that is elsewhere."""
    source = getattr(view, "batch_source", None)
    if source is None:
        return None
    path = str(getattr(source, "path", "") or "")
    here = path and "://" not in path and not PurePath(path).is_absolute()
    return Node("table", path.rstrip("/") if here else source.name)


def _ttl(view: Any) -> float:
    ttl = getattr(view, "ttl", None)
    return ttl.total_seconds() if ttl else 0.0


def _without_machine_tags(feature: Feature) -> Feature:
    """Tags a person wrote: not the unit (a column of its own), nor the JSON and SQL that travel in tags."""
    kept: Mapping[str, str] = {
        k: v for k, v in feature.tags.items() if k != "unit" and not k.startswith("predictflow.")
    }
    return Feature(**{**feature.__dict__, "tags": kept})


def _registry_url(config: RepoConfig) -> str | None:
    """The URL of Feast's registry when it is on Postgres."""
    path = str(getattr(config.registry, "path", "") or "")
    return path if is_postgres(path) else None
