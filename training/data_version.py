"""The version of a directory or file as DVC names it, so that a model's tag and `dvc.lock` say the same."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

from feature_store.errors import NotFoundError

CHUNK = 1 << 20


def data_version(path: Path) -> str:
    """The md5 that `dvc.lock` records for `path`: of a file's bytes, or `<md5>.dir` over a directory's files.

    Computed from what is on disk, not read from `dvc.lock`: the answer is right outside of `dvc repro` too, and after
    someone changed the files by hand.
    """
    path = Path(path)
    if path.is_file():
        return _md5(path)
    if not path.is_dir():
        raise NotFoundError("no such file or directory", value=str(path))
    files = sorted((f.relative_to(path).as_posix(), f) for f in path.rglob("*") if f.is_file())
    listing = [{"md5": _md5(file), "relpath": name} for name, file in files]
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode(), usedforsecurity=False).hexdigest() + ".dir"


def _md5(path: Path) -> str:
    digest = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
