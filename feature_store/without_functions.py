"""Feature views as the registry holds them, without their functions.

Feast's own look-ups restore a view's function from the pickle or the text beside it, and restoring runs whatever was put
there. What only needs names, types and sources reads the registry's message through here instead. Blocking; needs the
registry when its cache is too old.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from feature_store.errors import NotFoundError, UsageError

Kind = Literal["feature", "stream", "on_demand", "label"]


def message(registry: Any, project: str, *, fresh: bool = False) -> Any:
    """The registry's cached message, read anew when `fresh`: its Python objects would come with their functions."""
    if fresh:
        registry.refresh(project)
    if hasattr(registry, "_get_registry_proto"):  # Feast's file registry
        return registry._get_registry_proto(project=project, allow_cache=True)
    if hasattr(registry, "_refresh_cached_registry_if_necessary"):  # its SQL and other caching registries
        registry._refresh_cached_registry_if_necessary()
        return registry.cached_registry_proto
    return registry.proto()


def view_named(registry: Any, project: str, name: str, *, fresh: bool = False) -> Any:
    """The view of any kind with this name, None where there is none."""
    for kind, view in _views(message(registry, project, fresh=fresh), project):
        if view.spec.name == name:
            return _made(kind, view)
    return None


def view_version(registry: Any, project: str, name: str, number: int) -> Any:
    """This version of a view. NotFoundError where there is none; UsageError for a registry whose versions only Feast can
    read: it would restore their functions. Asks the registry."""
    if hasattr(registry, "_get_version_snapshot"):  # Feast's SQL registry
        found = registry._get_version_snapshot(name, project, number)
    elif hasattr(registry, "_get_version_record"):  # its file registry
        record = registry._get_version_record(name, project, number)
        found = None if record is None else (record.feature_view_type, record.feature_view_proto)
    else:
        raise UsageError(
            "versions cannot be read from this registry without restoring the functions that it holds",
            value=type(registry).__name__,
            next_step="leave the version out, or use a SQL registry",
        )
    if found is None:
        raise NotFoundError(
            "no such version of a feature view",
            value=f"{name}@v{number}",
            next_step="leave the version out for the current one",
        )
    kind, stored = found
    view = _made(f"{kind}s", registry._proto_class_for_type(kind)[0].FromString(stored))
    view.current_version_number = number
    return view


def all_views(registry: Any, project: str) -> list[tuple[Kind, Any]]:
    """The project's views of every kind, each with its kind."""
    return [(_KINDS[kind], _made(kind, view)) for kind, view in _views(message(registry, project), project)]


def view_names(registry: Any, project: str) -> list[str]:
    """The names of the project's views of every kind."""
    return sorted({view.spec.name for _, view in _views(message(registry, project), project)})


def stored_views(registry: Any, project: str) -> list[Any]:
    """The project's views of every kind that have rows in the online store, as the registry holds them now."""
    found = _views(message(registry, project, fresh=True), project)
    return [_made(kind, view) for kind, view in found if kind != _ON_DEMAND or view.spec.write_to_online_store]


def push_sources(registry: Any, project: str) -> list[str]:
    """The names of the push sources that views have."""
    return sorted({view.spec.stream_source.name for _, view in _pushed(message(registry, project), project)})


def pushed_views(registry: Any, project: str, source: str, *, fresh: bool = False) -> list[Any]:
    """The views that have the push source of this name, by their names."""
    found = _pushed(message(registry, project, fresh=fresh), project)
    views = [_made(kind, view) for kind, view in found if view.spec.stream_source.name == source]
    return sorted(views, key=lambda view: str(view.name))


def requested_on_demand(feature_refs: Sequence[str], project: str, registry: Any) -> list[Any]:
    """Feast's list of the on-demand views that `view:feature` references name, with their functions.

    Feast restores the functions of all of the project's on-demand views to find that out; here none is where none was named.
    """
    from feast.on_demand_feature_view import OnDemandFeatureView

    named = {view.spec.name for kind, view in _views(message(registry, project), project) if kind == _ON_DEMAND}
    asked = {ref.partition(":")[0].partition("@")[0] for ref in feature_refs}
    if not asked & named:
        return []
    found: list[Any] = OnDemandFeatureView.get_requested_odfvs(list(feature_refs), project, registry)
    return found


_ON_DEMAND = "on_demand_feature_views"
_KINDS: dict[str, Kind] = {
    "feature_views": "feature",
    "stream_feature_views": "stream",
    _ON_DEMAND: "on_demand",
    "label_views": "label",
}


def _views(stored: Any, project: str) -> list[tuple[str, Any]]:
    return [(kind, view) for kind in _KINDS for view in getattr(stored, kind) if view.spec.project == project]


def _pushed(stored: Any, project: str) -> list[tuple[str, Any]]:
    from feast.protos.feast.core.DataSource_pb2 import DataSource

    return [
        (kind, view)
        for kind, view in _views(stored, project)
        if kind in ("feature_views", "stream_feature_views")
        and view.spec.HasField("stream_source")
        and view.spec.stream_source.type == DataSource.PUSH_SOURCE
    ]


def _made(kind: str, view: Any) -> Any:
    from feast import FeatureView, OnDemandFeatureView, StreamFeatureView
    from feast.labeling.label_view import LabelView

    if kind == "label_views":  # has no function
        return LabelView.from_proto(view)
    classes: dict[str, Any] = {
        "feature_views": FeatureView,
        "stream_feature_views": StreamFeatureView,
        _ON_DEMAND: OnDemandFeatureView,
    }
    return classes[kind].from_proto(view, skip_udf=True)
