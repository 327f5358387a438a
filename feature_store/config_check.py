"""Unset `${VARIABLE}`s in feature_store.yaml: one clear line at load time instead of a driver's traceback later.

Feast expands `${X}` with `os.path.expandvars`, which leaves an unset variable as it stands. Our store configs call
`require_expanded` in a `mode="before"` validator; Feast builds both store configs while it loads the file, before the
registry connects, so this is the one place from which every section can be checked in time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping

from feature_store.errors import UsageError

DEFAULTS: Mapping[str, str] = {"PREDICTFLOW_CLOCK": "wall"}
"""Variables that may stay unset in feature_store.yaml, and what they then mean."""

_UNSET = re.compile(r"\$\{(\w+)\}")


class UnsetVariableError(UsageError):
    """A `${VARIABLE}` of feature_store.yaml that the environment does not set."""

    code = "not_set"


def with_defaults(values: Mapping[str, object]) -> dict[str, object]:
    """A copy of one section of feature_store.yaml with unset variables of DEFAULTS filled in. Pure."""

    def fill(value: object) -> object:
        if not isinstance(value, str):
            return value
        return _UNSET.sub(lambda m: DEFAULTS.get(m.group(1), m.group(0)), value)

    return {key: fill(value) for key, value in values.items()}


def require_expanded(values: Mapping[str, object], section: str) -> None:
    """Raise UnsetVariableError (a UsageError) when a value of `section` still holds `${NAME}`.

    Inside Feast's loading of a file the other sections are checked too, the registry first: its URL would otherwise
    fail in SQLAlchemy. Variables of DEFAULTS may be unset.
    """
    unset = list(_unset({**_loading_config(), section: values}, ""))
    if not unset:
        return
    names = list(dict.fromkeys(name for name, _ in unset))
    places = list(dict.fromkeys(place for _, place in unset))
    raise UnsetVariableError(
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not set (feature_store.yaml, {', '.join(places)})",
        next_step='run `predictflow up`, then `eval "$(predictflow env)"`',
    )


def _unset(value: object, place: str) -> Iterator[tuple[str, str]]:
    if isinstance(value, str):
        for name in _UNSET.findall(value):
            if name not in DEFAULTS:
                yield name, place
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _unset(inner, f"{place}.{key}" if place else str(key))


def _loading_config() -> Mapping[str, object]:
    """The sections of the RepoConfig under construction in this call stack; empty outside of one.

    Feast hands a store config its own section only, and a registry class of our own is refused, so the caller's frame
    is the only way to the registry's path that works for every way of loading (CLI, `-f`, FeatureStore, a dict).
    tests/integration/test_init_project.py fails when a Feast upgrade breaks it.
    """
    from feast.repo_config import RepoConfig

    code = RepoConfig.__init__.__code__
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            data: Mapping[str, object] = frame.f_locals["data"]
            # The registry first: it is what every command needs.
            return {k: data[k] for k in ("registry", "offline_store", "online_store") if k in data}
        frame = frame.f_back  # type: ignore[assignment]
    return {}
