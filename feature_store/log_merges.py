"""Which files of an event log were merged into others, kept beside them in `_merged/<topic>-<partition>/`.

A file that was merged stays on disk for an hour, for readers that listed it before; whoever lists the log meanwhile leaves
it out. It is known by its name and the time of its last change: one that was written again since then counts again.
Readers that do not know of this see its rows twice, and count each once. Each merge has a record of its own, so that noting
one costs the same however many there were in the last hour.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path

from feature_store.durable import write_whole
from feature_store.errors import DataError

KEPT_US = 3_600_000_000
"""How long a merged file stays, in microseconds: longer than a reader of the whole log takes."""
_MERGED = "_merged"


class LogMerges:
    """The merges of one partition. One writer: the partition's."""

    def __init__(self, directory: Path, topic: str, partition: int) -> None:
        self._directory = directory
        self._records = directory / _MERGED / f"{topic}-{partition}"

    def add(self, successor: Path, merged: Iterable[tuple[Path, int]]) -> list[Path]:
        """`successor`, which is on disk, holds every row of these files (with `changed_at` from before they were read).

        Those of them that count no more.
        """
        names = {path.name: changed for path, changed in merged if path != successor}
        record = self._records / f"{successor.name}.json"
        write_whole(record, json.dumps(_read(record) | names).encode())
        return [self._directory / name for name, at in names.items() if changed_at(self._directory / name) == at]

    def clean(self, now_us: int) -> list[Path]:
        """Removes what was merged more than an hour before this time (the machine's clock). Safe to kill and repeat.

        Files that were written again since they were merged, which count again.
        """
        again = []
        records = list(self._records.glob("*.json"))
        standing = [(changed_at(self._directory / record.stem) or 0, record) for record in records]
        for changed, record in sorted(standing):  # a successor that was merged itself goes after what it replaced
            if changed and now_us - changed // 1000 <= KEPT_US:
                continue
            for name, at in _read(record).items() if changed else ():
                path = self._directory / name
                if (now := changed_at(path)) == at:
                    path.unlink(missing_ok=True)
                elif now is not None:
                    again.append(path)
            record.unlink(missing_ok=True)
        return again


def merged_files(directory: Path) -> set[Path]:
    """The files below a directory that count no more. Call it before listing them: a successor is there before its entry."""
    found = set()
    for record in directory.rglob(f"{_MERGED}/*/*.json"):
        log = record.parents[2]
        if (log / record.stem).exists():
            found |= {log / name for name, at in _read(record).items() if changed_at(log / name) == at}
    return found


def forget_merges(directory: Path, topic: str) -> None:
    """Call when the log was written anew, and no merged file is left."""
    for record in (directory / _MERGED).glob("*/*.json"):
        if record.parent.name.rpartition("-")[0] == topic:
            record.unlink(missing_ok=True)


def changed_at(path: Path) -> int | None:
    """`st_mtime_ns`; None: no such file."""
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return None


def _read(record: Path) -> dict[str, int]:
    try:
        stored = json.loads(record.read_text(encoding="utf-8"))
        return {str(name): int(at) for name, at in stored.items()}
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as e:
        raise DataError(
            "a list of merged log files cannot be read", value=str(record), next_step="remove it: its files count again"
        ) from e
