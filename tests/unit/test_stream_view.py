"""What a windowed view does with a batch of its topic: real log, real states, their bytes kept here instead of in Redis."""

from __future__ import annotations

import contextlib
import os
import subprocess
from datetime import timedelta
from types import SimpleNamespace

import duckdb
import orjson
import pyarrow as pa
import pytest

from feature_store import stream_view
from feature_store.clock import from_micros
from feature_store.errors import UnavailableError
from feature_store.event_decode import Raw, RawBatch
from feature_store.stream_view import StreamView
from feature_store.window_store import WriteResult
from feature_store.windows.definition import EventSource, WindowedView
from feature_store.windows.history import history_sql
from feature_store.windows.state import States

SECOND = 1_000_000
T = 1_700_000_040 * SECOND
DAILY = """SELECT k, COUNT(*) OVER (PARTITION BY k ORDER BY ts RANGE BETWEEN INTERVAL '1' DAYS PRECEDING AND CURRENT ROW) AS c
FROM events"""
CLOSING = "SELECT k, COUNT(*) AS c FROM events GROUP BY k, TUMBLE(ts, INTERVAL '1' MINUTE) EMIT ON WINDOW CLOSE"


class Online:
    """The states by entity; a state of older offsets never replaces a newer one, as in Redis."""

    def __init__(self, definition):
        self.definition = definition
        self.held = {}
        self.damaged = {}
        self.forgotten = 0
        self.marks = {}
        self.failing = False

    def forget(self):
        self.forgotten += 1

    def load(self, keys):
        return (
            States.decode(self.definition, [self.held.get(k) for k in keys])
            if keys
            else States.empty(self.definition, 0)
        )

    def load_held(self, keys):
        return None

    def begin_write(self, keys, states, watermarks=None):
        if self.failing:
            raise UnavailableError("no Redis")
        return SimpleNamespace(finish=lambda: self.write(keys, states, watermarks))

    def write(self, keys, states, watermarks=None):
        self.marks |= watermarks or {}
        for k, blob in zip(keys, states.encode(), strict=True):
            if not self.held.get(k) or self.held[k][16:24] <= blob[16:24]:
                self.held[k] = blob
        return WriteResult()


class World:
    """One offline directory and one online store; each `owner` is a process that starts."""

    def __init__(self, tmp_path, monkeypatch, sql=DAILY, **source):
        settings = {"topic": "t", "columns": {}, "retention_us": 60 * SECOND, "timestamp": "ts"}
        self.definition = WindowedView("v", ("k",), ("string",), EventSource(**settings | source), sql, timedelta(0))
        self.online = Online(self.definition)
        self.path = str(tmp_path)
        monkeypatch.setattr(stream_view, "WindowStore", lambda *_: self.online)

    def owner(self, *partitions, offset=0, at=T) -> StreamView:
        view = StreamView(None, SimpleNamespace(name="v", batch_source=None), self.path, "x", "wall")
        for p in partitions or (0,):
            view.start_partition(p, offset, at)
        return view

    def values(self, t, key="a"):
        """The count at a time: online, and in history."""
        online = self.online.load([(key,)]).values(t).columns["c"][0]
        with duckdb.connect() as con:
            con.execute("SET TimeZone = 'UTC'")
            con.execute("CREATE TABLE log AS SELECT * FROM read_parquet(?)", [f"{self.path}/v/stream/*.parquet"])
            asked = {"_row": pa.array([0]), "k": [key], "_t": pa.array([t]).cast(pa.timestamp("us", "UTC"))}
            con.register("asked", pa.table(asked))
            past = con.sql(history_sql(self.definition, "asked", "log")).to_arrow_table()["c"].to_pylist()
        return online, past[0]


def message(offset, at, key="a", partition=0):
    return Raw(partition, offset, key.encode(), orjson.dumps({"k": key, "ts": from_micros(at).isoformat()}))


def batch(*messages):
    return RawBatch.of(list(messages))


@pytest.fixture
def world(tmp_path, monkeypatch):
    return World(tmp_path, monkeypatch)


def test_what_was_refused_as_early_is_no_event_when_it_comes_again(world):
    both = batch(message(0, T + 8 * SECOND), message(1, T))
    first = world.owner().apply(both, T, T)
    assert [raw.offset for raw, _ in first.refused] == [0]
    again = world.owner(at=T + 10 * SECOND)
    result = again.apply(both, T + 10 * SECOND, T + 10 * SECOND)
    assert (result.refused, result.partitions[0].replayed, result.partitions[0].applied) == ([], 2, 0)
    assert again.log.read()["_offset"].to_pylist() == [1]
    assert world.values(T + 60 * SECOND) == (1, 1)


def test_what_another_owner_logged_meanwhile_stays_as_it_was_logged(world):
    old, new = world.owner(), world.owner()
    both = batch(message(0, T), message(1, T - 3600 * SECOND))
    assert old.apply(both, T + SECOND, T + SECOND).partitions[0].dropped == 1
    logged = old.log.read().to_pylist()
    result = new.apply(both, T + 9 * SECOND, T + 9 * SECOND)
    assert result.partitions[0].replayed == 2
    assert new.log.read().to_pylist() == logged
    assert world.values(T + 60 * SECOND) == (1, 1)


def test_what_cannot_be_logged_is_not_written_and_changes_nothing(world, monkeypatch):
    view = world.owner()
    view.apply(batch(message(0, T)), T, T)
    held = dict(world.online.held)
    # The first of these two is behind the watermark that the second one makes.
    both = batch(message(1, T - 5 * SECOND), message(2, T + 3600 * SECOND))
    with monkeypatch.context() as full:
        full.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            view.apply(both, T + 3600 * SECOND, T + 3600 * SECOND)
    assert (world.online.held, view.watermark(0)) == (held, T)
    assert view.log.read()["_offset"].to_pylist() == [0]
    result = view.apply(both, T + 3601 * SECOND, T + 3601 * SECOND)
    assert (result.partitions[0].applied, result.partitions[0].dropped) == (2, 0)
    assert world.values(T + 3700 * SECOND) == (3, 3)


def test_what_is_logged_keeps_its_times_when_it_could_not_be_written(world):
    view = world.owner()
    both = batch(message(0, T), message(1, T - 5 * SECOND))
    world.online.failing = True
    with pytest.raises(UnavailableError):
        view.apply(both, T, T)
    assert world.online.held == {}
    logged = view.log.read().to_pylist()
    assert [row["_offset"] for row in logged] == [0, 1]
    world.online.failing = False
    assert view.apply(both, T + 60 * SECOND, T + 60 * SECOND).partitions[0].applied == 2
    assert view.log.read().to_pylist() == logged
    assert world.values(T + 100 * SECOND) == (2, 2)


def test_a_pause_of_our_own_is_no_silence(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, CLOSING, idle_timeout_us=30 * SECOND)
    view = world.owner(0, 1)
    view.apply(batch(message(0, T), message(0, T, "b", 1)), T, T)
    now = T + 121 * SECOND
    assert view.silent({0: 1, 1: 1}, now) == {0: 1, 1: 1}
    view.listened(now)  # Redis was away so long
    assert view.silent({0: 1, 1: 1}, now + 29 * SECOND) == {}
    assert view.advance_idle({0: 1, 1: 1}, now + 29 * SECOND) == 0
    view.apply(batch(message(1, T + SECOND)), now + 29 * SECOND, now + 29 * SECOND)
    later = batch(*(message(i, T + i * SECOND, "b", 1) for i in range(1, 120)))
    assert view.apply(later, now + 30 * SECOND, now + 30 * SECOND).partitions[1].dropped == 0
    assert view.advance_idle({0: 2}, now + 60 * SECOND) == 1


def test_the_row_that_was_visible_first_says_whether_an_event_counts(world):
    """In history, while an event stands in two files."""
    view = world.owner()
    view.apply(batch(message(0, T), message(1, T - 3600 * SECOND)), T + SECOND, T + SECOND)
    rows = view.log.read()
    late = rows.slice(1)
    place = late.schema.get_field_index("_dropped")
    counted = late.set_column(place, "_dropped", pa.nulls(1, pa.string()))
    place = late.schema.get_field_index("_visible_at")
    counted = counted.set_column(place, "_visible_at", pa.array([T + 5 * SECOND]).cast(late["_visible_at"].type))
    view.log.append(counted)
    assert world.values(T + 60 * SECOND) == (1, 1)


def test_states_are_read_again_when_another_process_may_have_written_them(world):
    view = world.owner(0)
    assert world.online.forgotten == 1
    view.start_partition(1, 0, T)
    assert world.online.forgotten == 2
    view.went_back()
    assert world.online.forgotten == 3


def test_watermarks_that_a_killed_owner_did_not_tell_are_told_when_its_events_come_again(tmp_path, monkeypatch):
    world = World(tmp_path, monkeypatch, sql=CLOSING)
    both = batch(message(0, T), message(1, T + 90 * SECOND, "b"))
    world.owner().apply(both, T + 100 * SECOND, T + 100 * SECOND)
    told, world.online.marks = world.online.marks, {}
    assert world.owner().apply(both, T + 101 * SECOND, T + 101 * SECOND).total("replayed") == 2
    assert world.online.marks == told == {0: (T + 90 * SECOND, T + 100 * SECOND)}


def full_disk(tmp_path):
    """A real file system of 1 MB, mounted at a path below; unmounted by the caller."""
    place = tmp_path / "small"
    place.mkdir()
    if os.geteuid() != 0:
        pytest.skip("only root may mount a small file system")
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, text=True
    )
    if done.returncode:
        pytest.skip(f"no small file system can be mounted here: {done.stderr.strip()}")
    return place


def test_a_partition_starts_on_a_full_disk(tmp_path, monkeypatch, caplog):
    """Merging its files can wait; sync waits for room when there is something to write."""
    place = full_disk(tmp_path)
    try:
        world = World(place, monkeypatch)
        view = world.owner()
        for n in range(70):  # as many small files as are merged
            view.apply(batch(message(n, T + n)), T + n, T + n)
        with contextlib.suppress(OSError), (place / "filler").open("wb") as f:
            while True:
                f.write(bytes(4096))
                f.flush()
        again = world.owner(offset=70)
        assert "not compacted: [Errno 28] No space left on device" in caplog.text
        with pytest.raises(OSError, match="No space left"):
            again.apply(batch(message(70, T + 70)), T + 70, T + 70)
        (place / "filler").unlink()
        assert again.apply(batch(message(70, T + 70)), T + 70, T + 70).partitions[0].applied == 1
    finally:
        subprocess.run(["umount", str(place)], check=True)
