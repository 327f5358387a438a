"""The catalogue as REST shows it: views, features and services of Feast's registry. Reads the registry's cache."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from feature_store.errors import NotFoundError
from feature_store.windows.definition import STATE_FIELD, definition_of
from feature_store.without_functions import Kind, all_views, view_named
from serving import schemas

if TYPE_CHECKING:
    from feast import FeatureStore


class FeatureCatalogue:
    """What can be asked for, and what it means."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def all(self) -> schemas.Catalogue:
        """Every view, of any kind, and every feature service of the project, by name."""
        views = self._views()
        services = self._store.registry.list_feature_services(self._store.project, allow_cache=True)
        return schemas.Catalogue(
            project=self._store.project,
            views=[self._view(kind, v) for kind, v in sorted(views, key=lambda pair: pair[1].name)],
            feature_services=[_service(s) for s in sorted(services, key=lambda s: s.name)],
        )

    def view(self, name: str) -> schemas.ViewInfo:
        """One view of any kind; NotFoundError names the others."""
        views = {v.name: (kind, v) for kind, v in self._views()}
        if name not in views:
            raise NotFoundError("unknown feature view", value=name, valid=views, next_step="GET /api/v1/features")
        return self._view(*views[name])

    def _views(self) -> list[tuple[Kind, Any]]:
        # Nothing here needs a view's function, which Feast would restore from the registry's pickles.
        return all_views(self._store.registry, self._store.project)

    def _view(self, kind: Kind, view: Any) -> schemas.ViewInfo:
        window = None if kind == "on_demand" else definition_of(view)
        ttl = getattr(view, "ttl", None)
        hidden = {STATE_FIELD} if window else set()
        return schemas.ViewInfo(
            name=view.name,
            description=view.description or "",
            owner=view.owner or "",
            ttl_seconds=(ttl.total_seconds() if ttl else 0) or None,
            kind=kind,
            join_keys=self._keys_read(view) if kind == "on_demand" else list(_keys(view)),
            request=_inputs(view) if kind == "on_demand" else [],
            windowed=window is not None,
            topic=window.topic if window else None,
            features=[
                schemas.FeatureInfo(
                    name=f.name,
                    type=str(f.dtype),
                    description=f.description or "",
                    unit=(f.tags or {}).get("unit"),
                )
                for f in view.features
                if f.name not in hidden
            ],
        )

    def _keys_read(self, view: Any) -> list[str]:
        keys: dict[str, None] = {}
        for projection in view.source_feature_view_projections.values():
            source = view_named(self._store.registry, self._store.project, projection.name)
            if source is not None:
                keys |= dict.fromkeys(projection.join_key_map.get(key, key) for key in _keys(source))
        return list(keys)


def _keys(view: Any) -> Iterator[str]:
    from feast.feature_view import DUMMY_ENTITY_ID

    return (c.name for c in view.entity_columns if c.name != DUMMY_ENTITY_ID)


def _inputs(view: Any) -> list[schemas.RequestInput]:
    sources = view.source_request_sources.values()
    return [schemas.RequestInput(name=f.name, type=str(f.dtype)) for source in sources for f in source.schema]


def _service(service: Any) -> schemas.ServiceInfo:
    return schemas.ServiceInfo(
        name=service.name,
        description=service.description or "",
        owner=service.owner or "",
        features=[f"{p.name_to_use()}:{f.name}" for p in service.feature_view_projections for f in p.features],
    )
