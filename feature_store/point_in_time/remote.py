"""Remote sources (`s3://bucket/path` and what else Arrow has a file system for): copied to local disk for one read.

Credentials, region and endpoint come from the environment, as Arrow and the AWS tools read it (`AWS_ACCESS_KEY_ID`,
`AWS_PROFILE`, `AWS_ENDPOINT_URL`, ...). Every read copies the finished Parquet files of the place whole: the price of
needing no extension of the engine, which would have to be downloaded.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.fs as pafs

from feature_store.errors import DataError, UnavailableError

COPY_BYTES = 8 << 20


def copy_in(uri: str, directory: Path, label: str) -> Path:
    """The local copy of a remote file or directory, made once per `directory`; an empty directory when nothing is there.

    Safe to run twice. UnavailableError when the remote does not answer or refuses, DataError when the local disk is full.
    """
    target = directory / f"remote-{hashlib.sha256(uri.encode()).hexdigest()[:16]}"
    if target.exists():
        return target
    temporary = target.with_suffix(".tmp")
    try:
        fs, root = pafs.FileSystem.from_uri(uri.rstrip("/"))
        files = _listed(fs, root)
    except (OSError, pa.ArrowException) as e:
        raise UnavailableError(
            f"{label}: the remote cannot be listed: {_line(e)}", value=uri, next_step="check AWS_* in the environment"
        ) from e
    for path in files:
        local = temporary / (path[len(root) :].lstrip("/") or Path(path).name)
        try:
            remote = fs.open_input_stream(path)
        except (OSError, pa.ArrowException) as e:
            raise UnavailableError(f"{label}: cannot be read: {_line(e)}", value=path) from e
        try:
            local.parent.mkdir(parents=True, exist_ok=True)
            with remote, local.open("wb") as out:
                shutil.copyfileobj(remote, out, COPY_BYTES)
        except OSError as e:
            raise DataError(
                f"{label}: copying {path} failed: {_line(e)}", next_step="check the disk, run it again"
            ) from e
    temporary.mkdir(parents=True, exist_ok=True)
    temporary.rename(target)
    return target


def _listed(fs: pafs.FileSystem, root: str) -> list[str]:
    """The Parquet files below `root`, and the underscore files that say how to read them."""
    info = fs.get_file_info(root)
    if info.type is pafs.FileType.File:
        return [root]
    found = fs.get_file_info(pafs.FileSelector(root, recursive=True, allow_not_found=True))
    names = [f.path for f in found if f.type is pafs.FileType.File]
    return sorted(n for n in names if n.endswith((".parquet", ".json")))


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
