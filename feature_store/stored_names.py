"""Under which names the versions of a view have rows in Redis: `view`, and `view_v1`, `view_v2`, ... of versioned views."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from feast import FeatureStore, RepoConfig


def stored_name(config: RepoConfig, view: Any) -> str:
    """The name under which a view at hand is written and read."""
    from feast.infra.online_stores.helpers import compute_versioned_name

    return str(compute_versioned_name(view, versioned(config)))


def stored_names(config: RepoConfig, view: Any) -> list[str]:
    """The names of every version up to the one at hand."""
    newest = (getattr(view, "current_version_number", 0) or 0) if versioned(config) else 0
    return list(
        dict.fromkeys([view.name, *(_of_version(view, n) for n in range(newest + 1)), stored_name(config, view)])
    )


def names_after_apply(store: FeatureStore, view: Any, held: Any) -> list[str]:
    """The names that a view may have once it is applied: those of the version in force and of a new one, or of the pinned
    one. `held`: the view as the registry has it, None where it does not."""
    from feast.version_utils import parse_version

    if not versioned(store.config):
        return [view.name]
    latest, pinned = parse_version(getattr(view, "version", ""))
    current = getattr(held, "current_version_number", 0) or 0
    if not latest:
        return [_of_version(view, pinned)]
    # After a return to an older version the next number is not the one after it.
    known = [int(v["version_number"]) for v in store.registry.list_feature_view_versions(view.name, store.project)]
    return [_of_version(view, n) for n in (current, max([current, *known]) + 1)]


def versioned(config: RepoConfig) -> bool:
    """Whether each version of a view has rows of its own."""
    return bool(config.registry.enable_online_feature_view_versioning)


def _of_version(view: Any, number: int) -> str:
    return f"{view.name}_v{number}" if number else str(view.name)
