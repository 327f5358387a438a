"""The catalogue as REST shows it: views, features and services of Feast's registry. Reads the registry's cache."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from feature_store.errors import NotFoundError
from feature_store.windows.definition import STATE_FIELD, definition_of
from serving import schemas

if TYPE_CHECKING:
    from feast import FeatureStore


class FeatureCatalogue:
    """What can be asked for, and what it means."""

    def __init__(self, store: FeatureStore) -> None:
        self._store = store

    def all(self) -> schemas.Catalogue:
        """Every feature view and feature service of the project, by name."""
        views = self._views()
        services = self._store.registry.list_feature_services(self._store.project, allow_cache=True)
        return schemas.Catalogue(
            project=self._store.project,
            views=[self._view(v) for v in sorted(views, key=lambda v: v.name)],
            feature_services=[_service(s) for s in sorted(services, key=lambda s: s.name)],
        )

    def view(self, name: str) -> schemas.ViewInfo:
        """One feature view; NotFoundError names the others."""
        views = {v.name: v for v in self._views()}
        if name not in views:
            raise NotFoundError("unknown feature view", value=name, valid=views, next_step="GET /api/v1/features")
        return self._view(views[name])

    def _views(self) -> list[Any]:
        # Nothing here needs a view's function, which Feast would restore from the registry's pickles.
        store = self._store
        return list(store.registry.list_feature_views(store.project, allow_cache=True, skip_udf=True))

    def _view(self, view: Any) -> schemas.ViewInfo:
        from feast.feature_view import DUMMY_ENTITY_ID

        window = definition_of(view)
        ttl = view.ttl.total_seconds() if view.ttl else 0
        hidden = {STATE_FIELD} if window else set()
        return schemas.ViewInfo(
            name=view.name,
            description=view.description or "",
            owner=view.owner or "",
            ttl_seconds=ttl or None,
            join_keys=[c.name for c in view.entity_columns if c.name != DUMMY_ENTITY_ID],
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


def _service(service: Any) -> schemas.ServiceInfo:
    return schemas.ServiceInfo(
        name=service.name,
        description=service.description or "",
        owner=service.owner or "",
        features=[f"{p.name_to_use()}:{f.name}" for p in service.feature_view_projections for f in p.features],
    )
