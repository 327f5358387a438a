"""The erasure list: entities that were erased and must not come back, as `_erasures.json` in the offline store.

It stands beside the data it guards, so that whoever copies or rebuilds the data has it too, and holds digests instead of
keys. (A digest of a guessable key can be guessed: the file is as private as the data.) Backfill leaves listed entities
out, whenever their rows were created: a key that was listed stays out. Sync and bootstrap leave out the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from feature_store.durable import locked, write_whole
from feature_store.errors import DataError
from feature_store.point_in_time.engine import ident

FILE = "_erasures.json"


def digest_of(join_key: str, value: object) -> str:
    """What stands in the list for one entity: SHA-256 over `join key=value`, in hex."""
    return hashlib.sha256(f"{join_key}={value}".encode()).hexdigest()


@dataclass(frozen=True)
class Erased:
    """One entry: when the entity with this join key and digest was erased (UTC)."""

    join_key: str
    sha256: str
    erased_at: datetime


class ErasureList:
    """The list of one offline store. Reading is cheap; adding is atomic and safe to repeat and to run at once."""

    def __init__(self, offline_path: str | Path) -> None:
        self.path = Path(offline_path) / FILE

    def entries(self) -> list[Erased]:
        """All entries, by join key and digest; DataError for a file that cannot be read: a rebuild must not guess."""
        try:
            stored = json.loads(self.path.read_text(encoding="utf-8"))
            return [
                Erased(e["join_key"], e["sha256"], datetime.fromisoformat(e["erased_at"])) for e in stored["erased"]
            ]
        except FileNotFoundError:
            return []
        except (ValueError, KeyError, TypeError) as e:
            raise DataError("the erasure list cannot be read", value=str(self.path), next_step="restore it") from e

    def digests_of(self, join_key: str) -> frozenset[str]:
        """The digests listed for one join key; compare with `digest_of`."""
        return frozenset(e.sha256 for e in self.entries() if e.join_key == join_key)

    def changed(self) -> tuple[int, ...] | None:
        """What differs when the file was written anew since, None where there is no file: cheaper than reading it."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            return None
        return (found.st_ino, found.st_mtime_ns, found.st_size)

    def add(self, join_key: str, value: object, at: datetime) -> None:
        """Lists an entity as erased at `at`; one that is listed keeps its first time."""
        with locked(self.path.parent / ".locks" / "erasures"):
            entries = self.entries()
            new = Erased(join_key, digest_of(join_key, value), at)
            if any((e.join_key, e.sha256) == (new.join_key, new.sha256) for e in entries):
                return
            ordered = sorted([*entries, new], key=lambda e: (e.join_key, e.sha256))
            rows = [{"join_key": e.join_key, "sha256": e.sha256, "erased_at": e.erased_at.isoformat()} for e in ordered]
            write_whole(self.path, json.dumps({"erased": rows}, indent=1).encode())


def not_erased(columns: Iterable[tuple[str, str, frozenset[str]]]) -> list[str]:
    """SQL conditions that leave listed entities out, from (source column, join key, digests)."""
    return [
        f"sha256({_prefix(key)} || CAST({ident(column)} AS VARCHAR)) NOT IN ({', '.join(map(_text, sorted(digests)))})"
        for column, key, digests in columns
        if digests
    ]


def _prefix(join_key: str) -> str:
    return _text(f"{join_key}=")


def _text(value: str) -> str:
    return "'" + value.replace("'", "''") + "'"
