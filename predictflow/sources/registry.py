"""Finds a data source: a built-in one by name or by the file it accepts, a user's own as `package.module:ClassName`."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

from feature_store.errors import NotFoundError, UsageError
from predictflow.sources.base import DataSource
from predictflow.sources.online_retail import OnlineRetail
from predictflow.sources.telco import Telco

SOURCES: dict[str, type[DataSource]] = {source.name: source for source in (Telco, OnlineRetail)}
DEFAULT = Telco.name


def choose(name: str | None, path: Path | None) -> type[DataSource]:
    """The class named, else the first that accepts `path`, else the simulator.

    NotFoundError for an unknown name and a missing file, UsageError when no source accepts the file or a user's class
    is not a data source.
    """
    if path is not None and not path.exists():
        raise NotFoundError("no such file", value=str(path))
    if name is not None:
        return _load(name) if ":" in name else _built_in(name)
    if path is None:
        return SOURCES[DEFAULT]
    for source in SOURCES.values():
        if source.accepts(path):
            return source
    raise UsageError(
        "a directory, not a file" if path.is_dir() else "no built-in source accepts a file of this name",
        value=str(path),
        next_step=f"name it: --source {' | '.join(SOURCES)} | package.module:ClassName",
    )


def _built_in(name: str) -> type[DataSource]:
    if name not in SOURCES:
        raise NotFoundError("no such data source", value=name, valid=[*SOURCES, "package.module:ClassName"])
    return SOURCES[name]


def _load(spec: str) -> type[DataSource]:
    """Imports a user's class; the working directory is on the path, as with `python -m`."""
    module_name, _, class_name = spec.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as e:
        raise NotFoundError(f"the module of --source cannot be imported ({e})", value=spec) from e
    found = getattr(module, class_name, None)
    if found is None:
        classes = [n for n, c in vars(module).items() if isinstance(c, type) and c.__module__ == module.__name__]
        raise NotFoundError(f"module {module_name} has no such class", value=class_name, valid=classes)
    lacking = [m for m in ("name", "accepts", "write") if not hasattr(found, m)]
    if not isinstance(found, type) or lacking:
        raise UsageError(
            f"not a data source: it lacks {', '.join(lacking) or 'being a class'}",
            value=spec,
            next_step="see docs/how-to/add-a-data-source.md",
        )
    return found
