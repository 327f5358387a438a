"""The Parquet log of applied events: the record from which every served windowed value can be recomputed.

One file per partition and batch, named by its offset range, so that writing a batch again replaces it. Readers count a
(partition, offset) once, whatever the files: compaction may show a row in two of them for a while. A file appears whole
or not at all, and is on disk when `append` returns.
"""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.errors import DataError

UTC_MICROS = pa.timestamp("us", tz="UTC")
LOG_FIELDS = [
    pa.field("_topic_id", pa.string()),
    pa.field("_partition", pa.int32()),
    pa.field("_offset", pa.int64()),
    pa.field("_visible_at", UTC_MICROS),
    pa.field("_watermark", UTC_MICROS),
    pa.field("_dropped", pa.string()),
]
"""What the log adds to an event. `_dropped` null: counted; else why not (`duplicate`)."""

STREAM, HISTORY = "stream", "history"
"""Directories below a windowed view's path: written by sync, and by backfill."""

_NAME = re.compile(r"(?P<topic>.+)-(?P<partition>\d+)-(?P<first>\d{19})-(?P<last>\d{19})\.parquet")
_SMALL_BYTES = 4_000_000


@dataclass(frozen=True, order=True)
class LogFile:
    """One file: the offsets `first` to `last` of a partition, both inclusive; offsets between may be missing."""

    partition: int
    first: int
    last: int
    path: Path

    def within(self, other: LogFile) -> bool:
        return (
            self is not other
            and self.partition == other.partition
            and other.first <= self.first <= self.last <= other.last
        )


class EventLog:
    """The log of one topic in one directory. One writer per partition; any number of readers."""

    def __init__(self, directory: Path, topic: str) -> None:
        self.directory = directory
        self.topic = topic

    def files(self, partition: int | None = None) -> list[LogFile]:
        """The files of the topic, or of one partition, by partition and offset."""
        found = []
        for path in self.directory.glob("*.parquet"):
            name = _NAME.fullmatch(path.name)
            if name and name["topic"] == self.topic and partition in (None, int(name["partition"])):
                found.append(LogFile(int(name["partition"]), int(name["first"]), int(name["last"]), path))
        return sorted(found)

    def append(self, rows: pa.Table) -> None:
        """Writes rows (the event's columns and LOG_FIELDS), one file per partition. Safe to repeat.

        OSError when the disk is full or not writable: nothing of the file is then visible.
        """
        for partition in sorted(set(rows["_partition"].to_pylist())):
            part = rows.filter(pc.equal(rows["_partition"], partition)).sort_by("_offset")
            self._write(part, partition)

    def logged(self, partition: int, from_offset: int) -> dict[int, int]:
        """offset -> first `_visible_at` (microseconds) of the rows from an offset on: what a restart must repeat."""
        out: dict[int, int] = {}
        for file in self.files(partition):
            if file.last < from_offset:
                continue
            table = self._read(file, ["_offset", "_visible_at"])
            times = pc.cast(table["_visible_at"], pa.int64()).to_pylist()
            for offset, time in zip(table["_offset"].to_pylist(), times):
                if offset >= from_offset:
                    out[offset] = min(time, out.get(offset, time))
        return out

    def topic_id(self) -> str | None:
        """The `_topic_id` of the newest file that has one; None for an empty log."""
        for file in reversed(self.files()):
            ids = [i for i in self._read(file, ["_topic_id"])["_topic_id"].unique().to_pylist() if i]
            if ids:
                return str(ids[-1])
        return None

    def read(self, columns: list[str] | None = None) -> pa.Table | None:
        """All rows, each (partition, offset) once, by partition and offset; None for an empty log.

        `columns`: of these, with `_partition`, `_offset` and `_visible_at` among them; default all.
        """
        tables = [self._read(f, columns) for f in self.files()]
        return _once(pa.concat_tables(tables, promote_options="default")) if tables else None

    def compact(self, partition: int, at_least: int = 64) -> None:
        """Merges small files into one; what it replaces stays until the next call, for readers that listed it before.

        Does nothing under `at_least` small files. Safe to kill and repeat.
        """
        files = self.files(partition)
        for old in files:
            if any(old.within(f) for f in files):
                old.path.unlink(missing_ok=True)
        small = [f for f in self.files(partition) if f.path.stat().st_size < _SMALL_BYTES]
        if len(small) >= at_least:
            tables = [self._read(f, None) for f in small]
            self._write(_once(pa.concat_tables(tables, promote_options="default")), partition)

    def rewind(self, known_by_us: int, topic_id: str = "") -> int:
        """Forgets the rows that `split` finds; the number of rows forgotten. Stop sync first."""
        rows = self.read()
        if rows is None:
            return 0
        keep, _ = split(rows, known_by_us, topic_id)
        forgotten = rows.num_rows - keep.num_rows
        if forgotten:
            old = self.files()
            if keep.num_rows:
                self.append(keep)
            fresh = (
                set() if not keep.num_rows else {self._path_of(keep, p) for p in set(keep["_partition"].to_pylist())}
            )
            for file in old:
                if file.path not in fresh:
                    file.path.unlink(missing_ok=True)
            self._sync_directory()
        return forgotten

    def _path_of(self, rows: pa.Table, partition: int) -> Path:
        offsets = rows.filter(pc.equal(rows["_partition"], partition))["_offset"]
        ends = pc.min_max(offsets).as_py()
        return self.directory / f"{self.topic}-{partition}-{ends['min']:019d}-{ends['max']:019d}.parquet"

    def _write(self, rows: pa.Table, partition: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self._path_of(rows, partition)
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as f:
                pq.write_table(rows, f)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        self._sync_directory()

    def _sync_directory(self) -> None:
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _read(self, file: LogFile, columns: list[str] | None) -> pa.Table:
        try:
            with pq.ParquetFile(file.path) as f:
                return f.read(columns)
        except pa.ArrowInvalid as e:
            raise DataError(
                "event log file cannot be read",
                value=str(file.path),
                next_step="restore it from a backup; or remove it, then `predictflow windows bootstrap --rewind --known-by TIME` "
                "with a time before its first event, so that sync reads the topic again",
            ) from e


def _once(rows: pa.Table) -> pa.Table:
    """The first visible of each (partition, offset), in their order."""
    rows = rows.sort_by([("_partition", "ascending"), ("_offset", "ascending"), ("_visible_at", "ascending")])
    if rows.num_rows < 2:
        return rows
    partitions, offsets = rows["_partition"].combine_chunks(), rows["_offset"].combine_chunks()
    same = pc.and_(pc.equal(partitions[1:], partitions[:-1]), pc.equal(offsets[1:], offsets[:-1]))
    return rows.filter(pa.concat_arrays([pa.array([True]), pc.invert(same)]))


def split(rows: pa.Table, known_by_us: int, topic_id: str) -> tuple[pa.Table, pa.Table]:
    """Rows that a rewind keeps, and those it forgets: visible after a time, or of another topic than this id ('': any)."""
    keep = pc.less_equal(pc.cast(rows["_visible_at"], pa.int64()), known_by_us)
    if topic_id:
        keep = pc.and_(keep, pc.fill_null(pc.is_in(rows["_topic_id"], pa.array([topic_id, ""])), True))
    return rows.filter(keep), rows.filter(pc.invert(keep))


def log_files(directory: Path) -> list[str]:
    """The Parquet files of a windowed view's path, history and stream; files being written are not among them."""
    found = [p for part in (HISTORY, STREAM) for p in (directory / part).rglob("*.parquet")]
    return sorted(str(p) for p in found if not p.name.startswith("."))
