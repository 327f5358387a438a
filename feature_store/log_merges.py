"""Which files of an event log were merged into others, kept beside them as `_merged-<topic>-<partition>.json`.

A file that was merged stays on disk for an hour, for readers that listed it before; whoever lists the log meanwhile leaves
it out. It is known by its name and the time of its last change: one that was written again since then counts again.
Readers that do not know of this see its rows twice, and count each once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from feature_store.durable import write_whole
from feature_store.errors import DataError

KEPT_US = 3_600_000_000
"""How long a merged file stays, in microseconds: longer than a reader of the whole log takes."""


class LogMerges:
    """The merges of one partition. One writer: the partition's."""

    def __init__(self, directory: Path, topic: str, partition: int) -> None:
        self._directory = directory
        self._path = directory / f"_merged-{topic}-{partition}.json"

    def add(self, successor: Path, merged: Iterable[tuple[Path, int]]) -> None:
        """`successor`, which is on disk, holds every row of these files (with `st_mtime_ns` from before they were read)."""
        names = {path.name: changed for path, changed in merged if path != successor}
        write_whole(self._path, json.dumps(_read(self._path) | {successor.name: names}).encode())

    def clean(self, now_us: int) -> None:
        """Removes what was merged more than an hour before this time (the machine's clock). Safe to kill and repeat."""
        merges = _read(self._path)
        standing = [(_changed(self._directory / s) or 0, s) for s in merges]
        left = dict(merges)
        for changed, successor in sorted(standing):  # a successor that was merged itself goes after what it replaced
            if changed and now_us - changed // 1000 <= KEPT_US:
                continue
            for name, at in merges[successor].items() if changed else ():
                if _changed(self._directory / name) == at:
                    (self._directory / name).unlink(missing_ok=True)
            del left[successor]
        if left != merges:
            write_whole(self._path, json.dumps(left).encode())


def merged_files(directory: Path) -> set[Path]:
    """The files below a directory that count no more. Call it before listing them: a successor is there before its entry."""
    return {
        path.parent / name
        for path in directory.rglob("_merged-*.json")
        for successor, names in _read(path).items()
        if (path.parent / successor).exists()
        for name, changed in names.items()
        if _changed(path.parent / name) == changed
    }


def forget_merges(directory: Path, topic: str) -> None:
    """Call when the log was written anew, and no merged file is left."""
    for path in directory.glob(f"_merged-{topic}-*.json"):
        if path.stem.removeprefix(f"_merged-{topic}-").isdecimal():
            path.unlink(missing_ok=True)


def _changed(path: Path) -> int | None:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(path: Path) -> dict[str, dict[str, int]]:
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return {str(s): {str(n): int(at) for n, at in names.items()} for s, names in stored.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as e:
        raise DataError(
            "the list of merged log files cannot be read", value=str(path), next_step="remove it: its files count again"
        ) from e
