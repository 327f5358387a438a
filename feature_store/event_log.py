"""The Parquet log of applied events: the record from which every served windowed value can be recomputed.

One file per partition and batch, named by its offset range, so that writing a batch again replaces it. Readers count a
(partition, offset) once, whatever the files: compaction may show a row in two of them for a while (`log_merges.py`). A
file appears whole or not at all, and is on disk when `append` returns.

A row with `_dropped` = `idle` is no event: from its `_visible_at` on, the watermark of its partition, of which offsets up
to and including `_offset` have been read, is at least its `_watermark`. Such rows have files of their own, named by time.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import TypeAlias

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from feature_store.durable import BusyError, locked
from feature_store.errors import DataError
from feature_store.log_merges import LogMerges, forget_merges, merged_files
from feature_store.logged import NEVER, Ints, Logged
from feature_store.published import table_lock

UTC_MICROS = pa.timestamp("us", tz="UTC")
LOG_FIELDS = [
    pa.field("_topic_id", pa.string()),
    pa.field("_partition", pa.int32()),
    pa.field("_offset", pa.int64()),
    pa.field("_visible_at", UTC_MICROS),
    pa.field("_watermark", UTC_MICROS),
    pa.field("_dropped", pa.string()),
]
"""What the log adds to an event. `_watermark`: of the partition before the event, null: none yet. `_dropped` null: counted;
else why not (`late`, `duplicate`), or `idle`: no event."""

IDLE = "idle"

STREAM, HISTORY = "stream", "history"
"""Directories below a windowed view's path: written by sync, and by backfill."""

_NAME = re.compile(r"(?P<topic>.+)-(?P<partition>\d+)-(?P<idle>idle-)?(?P<first>\d{19})-(?P<last>\d{19})\.parquet")
_SMALL_BYTES = 1_000_000
_REST, _LONGEST_REST = 2.0, 0.05
"""Seconds of rest per second of reading: a stream beside feels that as a third of a processor. A slow disk is no work."""
_BEHIND = 8
"""Times as many small files as there need be, from which on there is no rest."""
_AT_ONCE = 512
"""Files whose rows are in memory together."""
_ROWS_OF_THREADS = 100_000
"""Rows of a file from which on reading it with several threads costs less time than it costs processors."""


Rest: TypeAlias = Callable[[float], object]


@dataclass(frozen=True, order=True)
class LogFile:
    """One file: the offsets `first` to `last` of a partition, both inclusive; offsets between may be missing. Of idle rows
    the times (microseconds) `first` to `last`."""

    partition: int
    first: int
    last: int
    path: Path
    idle: bool = False


class EventLog:
    """The log of one topic in one directory. One writer per partition; any number of readers."""

    def __init__(self, directory: Path, topic: str) -> None:
        self.directory = directory
        self.topic = topic
        self._live: dict[int, set[LogFile]] = {}  # of a partition that we compact: the files that count

    def files(self, partition: int | None = None, *, idle: bool = False) -> list[LogFile]:
        """The files of the topic, or of one partition, by partition and offset: those of events, or those of idle rows."""
        merged = merged_files(self.directory)
        return [f for f in self._on_disk(partition) if f.idle == idle and f.path not in merged]

    def _on_disk(self, partition: int | None = None) -> list[LogFile]:
        """Of events and idle rows, also those that were merged into others."""
        found = []
        for path in self.directory.glob("*.parquet"):
            file = self._named(path)
            if file is not None and partition in (None, file.partition):
                found.append(file)
        return sorted(found)

    def _named(self, path: Path) -> LogFile | None:
        """The file of this name; None: none of the topic."""
        name = _NAME.fullmatch(path.name)
        if name is None or name["topic"] != self.topic:
            return None
        return LogFile(int(name["partition"]), int(name["first"]), int(name["last"]), path, bool(name["idle"]))

    def append(self, rows: pa.Table, *, anew: bool = False) -> None:
        """Writes rows (the event's columns and LOG_FIELDS), one file per partition and kind. Safe to repeat.

        A file of the same name keeps its rows, as they became visible first; `anew`: it is replaced.
        OSError when the disk is full or not writable: nothing of the file is then visible.
        """
        partitions, idle = rows["_partition"], _is_idle(rows)
        both = pc.any(idle).as_py()
        for partition in sorted(partitions.unique().to_pylist()):
            mine = pc.equal(partitions, partition)
            for kind in (False, True) if both else (False,):
                wanted = pc.and_(mine, pc.equal(idle, kind)) if both else mine
                part = rows if pc.all(wanted).as_py() else rows.filter(wanted)
                if part.num_rows:
                    offsets = part["_offset"].to_numpy()
                    ordered = part if (offsets[1:] > offsets[:-1]).all() else part.sort_by("_offset")
                    self._write(ordered, partition, kind, anew=anew)
        if rows.num_rows:
            self._sync_directory()

    def logged(self, partition: int, from_offset: int) -> Logged:
        """The events' rows from an offset on, as they became visible first: what a restart must repeat."""
        tables = [
            self._read(f, ["_offset", "_visible_at", "_watermark"])
            for f in self.files(partition)
            if f.last >= from_offset
        ]
        if not tables:
            return Logged.none()
        rows = pa.concat_tables(tables)
        rows = rows.filter(pc.greater_equal(rows["_offset"], from_offset))
        rows = rows.sort_by([("_offset", "ascending"), ("_visible_at", "ascending")])
        offsets = rows["_offset"].to_numpy()
        first = np.append(True, offsets[1:] != offsets[:-1])[: len(offsets)]
        visible, watermarks = (_micros(rows[c]) for c in ("_visible_at", "_watermark"))
        return Logged(offsets[first], visible[first], watermarks[first])

    def newest(self, partition: int, before_offset: int, timestamp: str) -> tuple[int, int] | None:
        """(`_watermark` or NEVER, event time) of the event row with the greatest offset below one, in microseconds."""
        best: tuple[int, int, int] | None = None
        # Ranges may overlap, with offsets of one missing in the other: until none can hold a greater offset.
        for file in sorted(self.files(partition), key=lambda f: f.last, reverse=True):
            if file.first >= before_offset:
                continue
            if best is not None and best[0] >= min(file.last, before_offset - 1):
                break
            rows = self._read(file, ["_offset", "_watermark", timestamp])
            rows = rows.filter(pc.less(rows["_offset"], before_offset))
            if rows.num_rows:
                at = int(np.argmax(rows["_offset"].to_numpy()))
                held = (int(_micros(rows[c])[at]) for c in ("_watermark", timestamp))
                best = max(best or (-1, 0, 0), (rows["_offset"][at].as_py(), *held))
        return None if best is None else best[1:]

    def idle(self, partition: int) -> list[tuple[int, int]]:
        """(offset, watermark in microseconds) of the partition's idle rows, oldest first."""
        rows = [self._read(f, ["_offset", "_watermark"]) for f in self.files(partition, idle=True)]
        return sorted({p for r in rows for p in zip(r["_offset"].to_pylist(), _micros(r["_watermark"]).tolist())})

    def topic_id(self) -> str | None:
        """The `_topic_id` of the newest file that has one; None for an empty log."""
        for file in reversed(self.files()):
            ids = [i for i in self._read(file, ["_topic_id"])["_topic_id"].unique().to_pylist() if i]
            if ids:
                return str(ids[-1])
        return None

    def read(self, columns: list[str] | None = None) -> pa.Table | None:
        """All rows, each event and each idle row once, by partition, offset and time; None for an empty log.

        `columns`: of these, with `_partition`, `_offset` and `_visible_at` among them; default all.
        """
        wanted = None if columns is None else list(dict.fromkeys([*columns, "_dropped"]))
        tables = [self._read(f, wanted) for f in [*self.files(), *self.files(idle=True)]]
        if not tables:
            return None
        rows = _once(pa.concat_tables(tables, promote_options="default"))
        return rows if columns is None else rows.select(columns)

    def compact(self, partition: int, now_us: int, at_least: int = 64, *, rest: Rest | None = None) -> None:
        """Merges adjacent small files; what they replace stays for an hour, for readers that listed it before.

        Does nothing under `at_least` small files, or while an erasure rewrites files. `now_us`: the machine's clock. `rest`
        sleeps for seconds between reads, where a stream works beside. Safe to kill and repeat, and to call beside `append`
        from another thread. The directory is listed once, until `forget`: an hour of a busy topic is 100,000 files.
        OSError, StorageError: the disk is full or not writable.
        """
        with suppress(BusyError), locked(table_lock(self.directory.parent), seconds=0.0):
            try:
                self._compact(partition, now_us, at_least, rest)
            except BaseException:
                self.forget(partition)
                raise

    def _compact(self, partition: int, now_us: int, at_least: int, rest: Rest | None) -> None:
        merges = LogMerges(self.directory, self.topic, partition)
        if partition not in self._live:
            self._live[partition] = set()  # first: what is appended while we list must not be missed
            self._live[partition].update(self.files(partition), self.files(partition, idle=True))
        live = self._live[partition]
        live.update(f for path in merges.clean(now_us) if (f := self._named(path)) is not None)
        for idle in (False, True):
            files = sorted(f for f in list(live) if f.idle == idle)
            small = {f for f in files if f.path.stat().st_size < _SMALL_BYTES}
            if len(small) < at_least:
                continue
            if len(small) > _BEHIND * at_least:
                rest = None
            # Never across a large file: the merged file's name would claim offsets that it does not hold.
            for is_small, run in groupby(files, key=small.__contains__):
                if is_small:
                    whole = list(run)
                    for i in range(0, len(whole), _AT_ONCE):
                        live -= self._merged(merges, whole[i : i + _AT_ONCE], partition, idle, rest)

    def _merged(
        self, merges: LogMerges, run: Sequence[LogFile], partition: int, idle: bool, rest: Rest | None
    ) -> set[LogFile]:
        """Those of the files that count no more, since one file holds their rows."""
        if len(run) < 2:
            return set()
        changed, parts = [(f.path, f.path.stat().st_mtime_ns) for f in run], []
        for file in run:
            began = time.perf_counter()
            parts.append(self._read(file, None))
            if rest is not None:
                rest(min(_LONGEST_REST, _REST * (time.perf_counter() - began)))
        rows = _once(pa.concat_tables(parts, promote_options="default"))
        merged = self._write(rows, partition, idle)
        self._sync_directory()
        gone = set(merges.add(merged, changed))
        return {f for f in run if f.path in gone}

    def forget(self, partition: int) -> None:
        """Call when another process may have written the partition."""
        self._live.pop(partition, None)

    def rewind(self, known_by_us: int, topic_id: str = "") -> int:
        """Forgets the rows that `split` finds; the number of rows forgotten. Stop sync first."""
        rows = self.read()
        if rows is None:
            return 0
        keep, _ = split(rows, known_by_us, topic_id)
        forgotten = rows.num_rows - keep.num_rows
        if forgotten:
            old = self._on_disk()
            fresh = set()
            if keep.num_rows:
                self.append(keep, anew=True)
                idle = _is_idle(keep)
                for partition in set(keep["_partition"].to_pylist()):
                    for kind in (False, True):
                        mine = pc.and_(pc.equal(keep["_partition"], partition), pc.equal(idle, kind))
                        if pc.any(mine).as_py():
                            fresh.add(self._file_of(keep.filter(mine), partition, kind))
            for file in old:
                if file not in fresh:
                    file.path.unlink(missing_ok=True)
            forget_merges(self.directory, self.topic)
            self._live.clear()
            self._sync_directory()
        return forgotten

    def _file_of(self, rows: pa.Table, partition: int, idle: bool) -> LogFile:
        ends = pc.min_max(rows["_visible_at"].cast(pa.int64()) if idle else rows["_offset"]).as_py()
        kind = f"{IDLE}-" if idle else ""
        name = f"{self.topic}-{partition}-{kind}{ends['min']:019d}-{ends['max']:019d}.parquet"
        return LogFile(partition, ends["min"], ends["max"], self.directory / name, idle)

    def _write(self, rows: pa.Table, partition: int, idle: bool, *, anew: bool = False) -> Path:
        """One file, whose name is on disk after `_sync_directory`."""
        self.directory.mkdir(parents=True, exist_ok=True)
        file = self._file_of(rows, partition, idle)
        path = file.path
        if not anew and path.exists():
            rows = _once(pa.concat_tables([self._read(file, None), rows], promote_options="default"))
        temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        try:
            with temporary.open("wb") as f:
                pq.write_table(rows, f)
                f.flush()
                os.fsync(f.fileno())
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise
        if (live := self._live.get(partition)) is not None:
            live.add(file)
        return path

    def _sync_directory(self) -> None:
        handle = os.open(self.directory, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)

    def _read(self, file: LogFile, columns: list[str] | None) -> pa.Table:
        try:
            with pq.ParquetFile(file.path, pre_buffer=False) as f:
                return f.read(columns, use_threads=f.metadata.num_rows >= _ROWS_OF_THREADS)
        except pa.ArrowInvalid as e:
            raise DataError(
                "event log file cannot be read",
                value=str(file.path),
                next_step="restore it from a backup; or remove it, then `predictflow windows bootstrap --rewind --known-by TIME` "
                "with a time before its first event, so that sync reads the topic again",
            ) from e


def _once(rows: pa.Table) -> pa.Table:
    """The first visible of each event, and each idle row, in their order."""
    partition, offset = rows["_partition"].to_numpy(), rows["_offset"].to_numpy()
    if (partition[1:] == partition[:-1]).all() and (offset[1:] > offset[:-1]).all():
        return rows  # as most are, and sorting takes as long as reading
    idle = _is_idle(rows)
    rows = rows.append_column("_idle", idle)
    order = [(c, "ascending") for c in ("_partition", "_offset", "_idle", "_visible_at")]
    rows = rows.sort_by(order)
    if rows.num_rows > 1:
        p, o, i, t = (rows[c].to_numpy(zero_copy_only=False) for c in ("_partition", "_offset", "_idle", "_visible_at"))
        same = (p[1:] == p[:-1]) & (o[1:] == o[:-1]) & (i[1:] == i[:-1]) & (~i[1:] | (t[1:] == t[:-1]))
        rows = rows.filter(pa.array(np.append(True, ~same)))
    return rows.drop_columns(["_idle"])


def _is_idle(rows: pa.Table) -> pa.ChunkedArray:
    return pc.fill_null(pc.equal(rows["_dropped"].cast(pa.string()), IDLE), False)


def _micros(times: pa.ChunkedArray) -> Ints:
    """Microseconds since the epoch, NEVER for null."""
    return np.asarray(pc.fill_null(times.cast(pa.int64()), NEVER).to_numpy())


def split(rows: pa.Table, known_by_us: int, topic_id: str) -> tuple[pa.Table, pa.Table]:
    """Rows that a rewind keeps, and those it forgets: visible after a time, or of another topic than this id ('': any)."""
    keep = pc.less_equal(pc.cast(rows["_visible_at"], pa.int64()), known_by_us)
    if topic_id:
        keep = pc.and_(keep, pc.fill_null(pc.is_in(rows["_topic_id"], pa.array([topic_id, ""])), True))
    return rows.filter(keep), rows.filter(pc.invert(keep))


def log_files(directory: Path) -> list[str]:
    """The Parquet files of a windowed view's path, history and stream; files being written are not among them."""
    merged = merged_files(directory)
    found = [p for part in (HISTORY, STREAM) for p in (directory / part).rglob("*.parquet")]
    return sorted(str(p) for p in found if not p.name.startswith(".") and p not in merged)
