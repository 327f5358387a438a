"""What one feature view contributes to a retrieval: Feast's projection, key map and field mapping, resolved once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError, DefinitionError
from feature_store.windows.definition import WindowedView, definition_of
from feature_store.without_functions import requested_on_demand

if TYPE_CHECKING:
    from feast import FeatureView
    from feast.infra.registry.base_registry import BaseRegistry


@dataclass(frozen=True)
class Key:
    """A join key: the column of the source, and the column of the entity rows that it meets."""

    source: str
    entity: str


@dataclass(frozen=True)
class Feature:
    """A feature: the column of the source, its declared Feast type, and the column of the result."""

    name: str
    source: str
    dtype: Any
    output: str


@dataclass(frozen=True)
class ViewRequest:
    """One view of a retrieval. `ttl` None: no limit. `definition` is set for a windowed view."""

    view: str
    place: str
    keys: tuple[Key, ...]
    features: tuple[Feature, ...]
    timestamp: str
    created: str | None
    ttl: timedelta | None
    definition: WindowedView | None

    @property
    def label(self) -> str:
        return f"feature view {self.view}"

    @property
    def next_step(self) -> str:
        return f"predictflow backfill {self.view}"


def view_requests(
    config: Any,
    feature_views: Sequence[FeatureView],
    feature_refs: Sequence[str],
    registry: BaseRegistry,
    project: str,
    full_feature_names: bool,
    entity_columns: Sequence[str],
) -> list[ViewRequest]:
    """The requests of a retrieval, in the order of the references.

    A feature whose name an entity column already has comes back as `view__feature`: the caller's columns stay.
    """
    from feast.utils import _get_requested_feature_views_to_features_dict

    on_demand = requested_on_demand(feature_refs, project, registry)
    grouped, _ = _get_requested_feature_views_to_features_dict(list(feature_refs), list(feature_views), on_demand)
    requests = [
        _request(config, view, list(dict.fromkeys(names)), full_feature_names, set(entity_columns))
        for view, names in grouped.items()
    ]
    outputs = [f.output for r in requests for f in r.features]
    for name in outputs:
        if outputs.count(name) > 1 or name in entity_columns:
            raise DefinitionError(
                "two columns of the result have one name", value=name, next_step="pass full_feature_names=True"
            )
    return requests


def _request(
    config: Any, view: FeatureView, names: Sequence[str], full_feature_names: bool, taken: set[str]
) -> ViewRequest:
    from feast.feature_view import DUMMY_ENTITY_ID

    from feature_store.point_in_time.source import file_path, resolve

    source = view.batch_source
    if source is None:
        raise DataError("feature view has no batch source", value=view.name)
    to_source = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
    prefix = view.projection.name_alias or view.name
    declared = {f.name: f.dtype for f in [*view.features, *view.entity_columns]}

    def output(name: str) -> str:
        return f"{prefix}__{name}" if full_feature_names or name in taken else name

    return ViewRequest(
        view=view.name,
        place=resolve(config, file_path(source)),
        keys=tuple(
            Key(to_source.get(e.name, e.name), view.projection.join_key_map.get(e.name, e.name))
            for e in view.entity_columns
            if e.name != DUMMY_ENTITY_ID
        ),
        features=tuple(Feature(n, to_source.get(n, n), declared[n], output(n)) for n in names),
        timestamp=to_source.get(source.timestamp_field, source.timestamp_field),
        created=to_source.get(source.created_timestamp_column, source.created_timestamp_column) or None,
        ttl=view.ttl or None,
        definition=definition_of(view),
    )
