"""Which appended files of a row view's directory still count: `_compacted.json`, replaced by one rename.

Backfill's chunks need no list: one file, one rename. Compaction turns many appended files into few, and a reader must see
either side whole: what compaction writes counts once it is listed here, and what it absorbed counts until the same rename
marks it as replaced. A replaced file stays on disk until the next compaction, for readers that listed it before.
A directory without the list is read whole, as any Parquet directory.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from feature_store.durable import write_whole
from feature_store.errors import DataError

FILE = "_compacted.json"
APPENDED = re.compile(r"append-[0-9a-f]{24}\.parquet")
COMPACTED = re.compile(r"added-(?P<month>\d{4}-\d{2}|none)-[0-9a-f]{16}\.parquet")
"""Sorts after backfill's chunks and before appended files, as its rows do: of exact ties the later place wins."""


@dataclass(frozen=True)
class Compacted:
    """File names: `files` came out of compaction and stand, `replaced` were absorbed and no longer count."""

    files: frozenset[str] = frozenset()
    replaced: frozenset[str] = frozenset()

    def counts(self, name: str) -> bool:
        """Whether a reader of the directory reads the file of this name."""
        return name not in self.replaced and (name in self.files or not COMPACTED.fullmatch(name))


def compacted(table: Path) -> Compacted:
    """The list of a table directory; an empty one where there is none. DataError when it cannot be read."""
    path = table / FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        return Compacted(frozenset(map(str, stored["files"])), frozenset(map(str, stored["replaced"])))
    except (FileNotFoundError, NotADirectoryError):
        return Compacted()
    except (ValueError, KeyError, TypeError) as e:
        raise DataError("the list of compacted files cannot be read", value=str(path), next_step="restore it") from e


def counting(table: Path, find: Callable[[], Iterable[Path]]) -> list[Path]:
    """Those of the files that `find()` lists below `table` which a reader reads, as of one moment."""
    # The list first: found before it was read, a file that it names could be missing.
    while True:
        listed = compacted(table)
        found = [p for p in find() if p.parent != table or listed.counts(p.name)]
        missing = sorted(listed.files - {p.name for p in found})
        if not missing:
            return found
        if compacted(table) == listed:
            raise DataError("a compacted file is missing", value=str(table / missing[0]), next_step="restore it")


def change(table: Path, files: Iterable[str], replaced: Iterable[str]) -> None:
    """Sets the list, durably and at once. The caller holds the table's lock; `files` are on disk."""
    text = json.dumps({"files": sorted(files), "replaced": sorted(replaced)}, indent=1)
    write_whole(table / FILE, text.encode())


def locks_of(table: Path) -> Path:
    """Where the lock files of a table are: beside it, so that its own directory holds data only."""
    return table.parent / ".locks" / table.name


def table_lock(table: Path) -> Path:
    """Held by one writer that changes any file (compaction, erasure), shared by those that publish chunks."""
    return locks_of(table) / "table"
