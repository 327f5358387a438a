"""The on-demand views that a checkout's modules define (`features/*.py`), and taking up modules that have changed since.

A module is imported once per process, so a long-running server would go on with the functions of its start. When what is
imported is not what was applied, all modules of the checkout are imported anew, if one of their files has changed: all of
them, since one may have taken a helper out of another.
"""

from __future__ import annotations

import importlib
import importlib.util
import linecache
import sys
import threading
from contextlib import suppress
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from feature_store.errors import UsageError
from feature_store.view_plan import OnDemandViewError

if TYPE_CHECKING:
    from feast import OnDemandFeatureView

_lock = threading.Lock()
_stamps: dict[Path, tuple[int, int]] = {}
"""Time and size of each file when it was imported here. Files that somebody else imported are missing: they may be old."""


def definitions(repo: Path | str | None) -> dict[str, OnDemandFeatureView]:
    """The on-demand views that the modules of a Feast repository define, as `feast apply` would find them."""
    with _lock:
        return _found(_modules(repo))


def changed_definitions(repo: Path | str | None) -> dict[str, OnDemandFeatureView]:
    """As `definitions`, of the files as they are now; modules are imported anew only where a file has changed.

    OnDemandViewError when that fails: the modules of before stay, and it is tried again at the next call. What has
    already been made of them is not touched.
    """
    with _lock:
        modules = _modules(repo)
        changed = [path for path in modules.values() if _stamps.get(path) != _stamp(path)]
        return _found(_anew(modules, changed) if changed else modules)


def _modules(repo: Path | str | None) -> dict[str, Path]:
    """The modules of a repository by name; its root is put on the module path."""
    from feast.repo_operations import get_repo_files

    if repo is None or not Path(repo).is_dir():
        return {}
    root = Path(repo).resolve()
    if str(root) not in sys.path:
        sys.path.append(str(root))  # last, as Feast's own command line does
    return {".".join(path.relative_to(root).with_suffix("").parts): path for path in get_repo_files(root)}


def _found(modules: dict[str, Path]) -> dict[str, OnDemandFeatureView]:
    from feast import OnDemandFeatureView

    found = {}
    for name, path in modules.items():
        for value in vars(_imported(name, path)).values():
            if isinstance(value, OnDemandFeatureView):
                found[value.name] = value
    return found


def _imported(name: str, path: Path) -> ModuleType:
    if name not in sys.modules:
        stamp = _stamp(path)  # of before: a file that changes meanwhile is imported again
        module = importlib.import_module(name)
        _stamps[path] = stamp
    module = sys.modules[name]
    if Path(module.__file__ or "").resolve() != path:
        raise UsageError(
            "a module of the feature repository is hidden by another of its name",
            value=name,
            next_step=f"rename {path}, or uninstall {module.__file__}",
        )
    return module


def _anew(modules: dict[str, Path], changed: list[Path]) -> dict[str, Path]:
    """Imports all modules again. They all are those of before when one fails."""
    importlib.invalidate_caches()
    for path in changed:
        with suppress(OSError):  # not ours to remove: then it holds nothing that this process wrote
            # It tells a file's state by the second and the size, too coarse here.
            Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
        linecache.checkcache(str(path))  # where Feast takes a function's text from
    before = {name: sys.modules.pop(name) for name in modules if name in sys.modules}
    stamps = {path: _stamps.pop(path) for path in modules.values() if path in _stamps}
    try:
        for name, path in modules.items():
            stamp = _stamp(path)
            importlib.import_module(name)
            _stamps[path] = stamp
    except Exception as e:  # the modules are the user's: whatever they raise is told
        for name in modules:
            sys.modules.pop(name, None)
        for name, module in before.items():
            sys.modules[name] = module
            package, _, child = name.rpartition(".")
            if package in sys.modules:
                setattr(sys.modules[package], child, module)
        for path in modules.values():
            _stamps.pop(path, None)
        _stamps.update(stamps)
        raise OnDemandViewError(
            f"a changed module of the checkout cannot be imported ({type(e).__name__}: {e})",
            value=name,
            next_step="mend it; if it needs a fresh process, restart the server",
        ) from e
    return modules


def _stamp(path: Path) -> tuple[int, int]:
    state = path.stat()
    return state.st_mtime_ns, state.st_size
