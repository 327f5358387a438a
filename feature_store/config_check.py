"""Unset `${VARIABLE}`s and an unusable registry URL in feature_store.yaml: one clear line, no driver's traceback later.

Feast expands `${X}` with `os.path.expandvars`, which leaves an unset variable as it stands. Our store configs call
`require_expanded` in a `mode="before"` validator; Feast builds both store configs while it loads the file, before the
registry connects, so this is the one place from which every section can be checked in time.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from types import FrameType

from feature_store.errors import UsageError

DEFAULTS: Mapping[str, str] = {"PREDICTFLOW_CLOCK": "wall"}
"""Variables that may stay unset in feature_store.yaml, and what they then mean."""

URL_FORM = "postgresql+psycopg2://user:password@host:5432/database"

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

    UsageError when all are set, but the registry's URL is none that SQLAlchemy can use.

    Inside Feast's loading of a file the other sections are checked too, the registry first: its URL would otherwise
    fail in SQLAlchemy. Variables of DEFAULTS may be unset.
    """
    loading = _loading_config()
    unset = list(_unset({**loading, section: values}, ""))
    if not unset:
        registry = loading.get("registry")
        if isinstance(registry, Mapping) and registry.get("registry_type") == "sql":
            require_database_url(str(registry.get("path", "")))
        return
    names = list(dict.fromkeys(name for name, _ in unset))
    places = list(dict.fromkeys(place for _, place in unset))
    raise UnsetVariableError(
        f"{', '.join(names)} {'is' if len(names) == 1 else 'are'} not set (feature_store.yaml, {', '.join(places)})",
        next_step='run `predictflow up`, then `eval "$(predictflow env)"`',
    )


def require_database_url(url: str) -> None:
    """Raise UsageError unless SQLAlchemy can make an engine of the SQL registry's `url`. No part of a password is shown."""
    from sqlalchemy.engine import make_url
    from sqlalchemy.exc import SQLAlchemyError

    if url.startswith("postgresql://"):
        url = url.replace("postgresql://", "postgresql+psycopg://", 1)  # what Feast makes of it
    try:
        parsed = make_url(url)
        parsed.get_dialect().import_dbapi()
    except (SQLAlchemyError, ValueError, ImportError):
        scheme = re.match(r"[\w+.-]+(?=://)", url)
        if scheme and scheme[0] == "postgresql+psycopg":
            what = "POSTGRES_URL asks for a driver that is not installed"
        else:
            what = "POSTGRES_URL is no database URL"
        raise UsageError(
            f"{what} (feature_store.yaml, registry.path)",
            value=f"{scheme[0]}://..." if scheme else "text without a scheme",
            next_step=f'write it as {URL_FORM}, or run `predictflow up`, then `eval "$(predictflow env)"`',
        ) from None
    if "@" in (parsed.host or ""):
        # The driver would name the end of the password as an unknown host.
        raise UsageError("POSTGRES_URL has an @ in its user or password", next_step="write it as %40")


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
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if frame.f_code is code:
            data: Mapping[str, object] = frame.f_locals["data"]
            # The registry first: it is what every command needs.
            return {k: data[k] for k in ("registry", "offline_store", "online_store") if k in data}
        frame = frame.f_back
    return {}
