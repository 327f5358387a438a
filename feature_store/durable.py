"""Files that appear whole or not at all, and locks that die with their holder. Local and POSIX network file systems."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from feature_store.errors import PredictFlowError

LOCK_SECONDS = 60.0
_POLL_SECONDS = 0.02


class BusyError(PredictFlowError):
    """Another process works on the same files; the same command may be run again."""

    code = "busy"


class StorageError(PredictFlowError):
    """A file could not be written: full disk, quota, no permission. Nothing of it is visible."""

    code = "storage"


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turns the system's refusal to write `path` into one StorageError line."""
    try:
        yield
    except PredictFlowError:
        raise
    except OSError as e:
        # Arrow's own text repeats the system's; errno is set by both.
        reason = os.strerror(e.errno) if e.errno else str(e).splitlines()[0]
        full = e.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        step = "free space, then run the same command again" if full else "check the directory, then run it again"
        raise StorageError(f"cannot write {path}: {reason}", next_step=step) from e


def write_whole(path: Path, data: bytes) -> None:
    """Writes `data` to `path` under a temporary name, makes it durable, then renames. Safe to kill and to repeat."""
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as f:
                f.write(data)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        finally:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
        sync_directory(path.parent)


def sync_directory(directory: Path) -> None:
    """Makes renames and new names in `directory` durable."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def locked(path: Path, *, shared: bool = False, seconds: float = LOCK_SECONDS) -> Iterator[None]:
    """Holds the lock file `path`, alone or with other `shared` holders; the system frees it when the process dies.

    Waits up to `seconds` (monotonic), then BusyError. Threads exclude each other as processes do. Not reentrant.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        how = (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB
        until = time.monotonic() + seconds
        while True:
            try:
                fcntl.flock(handle, how)
                break
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise BusyError(
                        f"another process has been writing here for {seconds:.0f} s",
                        value=str(path),
                        next_step="run the same command again when it has ended",
                    ) from None
                time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(handle)
