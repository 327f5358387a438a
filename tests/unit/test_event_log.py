"""The Parquet log: whole files only, each event once, whatever was killed or written again."""

from __future__ import annotations

import os
import threading
import time

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store import event_log
from feature_store.durable import locked
from feature_store.errors import DataError
from feature_store.event_log import LOG_FIELDS, UTC_MICROS, EventLog, log_files
from feature_store.logged import NEVER
from feature_store.published import table_lock

SCHEMA = pa.schema([pa.field("customer_id", pa.string()), *LOG_FIELDS])


def rows(offsets, partition=0, visible=None, topic_id="id"):
    return pa.Table.from_pylist(
        [
            {
                "customer_id": f"C{o}",
                "_topic_id": topic_id,
                "_partition": partition,
                "_offset": o,
                "_visible_at": o if visible is None else visible,
                "_watermark": None,
                "_dropped": None,
            }
            for o in offsets
        ],
        SCHEMA,
    )


@pytest.fixture
def log(tmp_path) -> EventLog:
    return EventLog(tmp_path / "stream", "customer-events")


def offsets(log: EventLog) -> list[tuple[int, int]]:
    table = log.read()
    return [] if table is None else list(zip(table["_partition"].to_pylist(), table["_offset"].to_pylist()))


def logged(log: EventLog, partition: int, offset: int) -> dict[int, int]:
    found = log.logged(partition, offset)
    return dict(zip(found.offsets.tolist(), found.visible_at.tolist(), strict=True))


def later(minutes: float) -> int:
    """The machine's clock so long after the newest file was written, in microseconds."""
    return int((time.time() + 60 * minutes) * 1e6)


def on_disk(log: EventLog) -> list[str]:
    return sorted(p.name for p in log.directory.glob("*.parquet"))


def idle_row(offset, visible, watermark, partition=0):
    row = dict.fromkeys(SCHEMA.names) | {"_topic_id": "id", "_partition": partition, "_offset": offset}
    return pa.Table.from_pylist([row | {"_visible_at": visible, "_watermark": watermark, "_dropped": "idle"}], SCHEMA)


def test_rows_come_back_in_order_one_file_per_partition(log):
    log.append(pa.concat_tables([rows([5, 3], 1), rows([0, 2])]))
    assert [f.path.name for f in log.files()] == [
        "customer-events-0-0000000000000000000-0000000000000000002.parquet",
        "customer-events-1-0000000000000000003-0000000000000000005.parquet",
    ]
    assert offsets(log) == [(0, 0), (0, 2), (1, 3), (1, 5)]
    assert log.read().schema.names == SCHEMA.names


def test_the_same_batch_again_changes_nothing(log):
    log.append(rows([0, 1]))
    log.append(rows([0, 1]))
    assert offsets(log) == [(0, 0), (0, 1)]


def test_of_an_event_in_two_files_the_first_visible_counts(log):
    log.append(rows([0, 1], visible=10))
    log.append(rows([1, 2], visible=20))
    assert logged(log, 0, 0) == {0: 10, 1: 10, 2: 20}
    assert logged(log, 0, 2) == {2: 20}
    assert logged(log, 1, 0) == {}
    assert offsets(log) == [(0, 0), (0, 1), (0, 2)]


def test_other_topics_and_half_written_files_are_not_seen(log):
    log.append(rows([0]))
    EventLog(log.directory, "events").append(rows([7]))
    (log.directory / ".customer-events-0-x.parquet.1.tmp").write_bytes(b"half")
    (log.directory / ".hidden.parquet").write_bytes(b"half")
    assert offsets(log) == [(0, 0)]
    assert len(log_files(log.directory.parent)) == 2


def test_a_full_disk_leaves_nothing_behind(log, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        log.append(rows([0]))
    assert list(log.directory.iterdir()) == []


def test_compaction_merges_and_leaves_replaced_files_to_readers_for_an_hour(log):
    for i in range(10):
        log.append(rows([i]))
    log.append(rows([0], partition=1))
    log.compact(0, later(0), at_least=64)
    assert len(log.files(0)) == 10
    log.compact(0, later(0), at_least=5)
    assert len(on_disk(log)) == 12
    assert len(log.files(0)) == 1
    assert len(log_files(log.directory.parent)) == 2
    assert offsets(log) == [*((0, i) for i in range(10)), (1, 0)]
    log.compact(0, later(59), at_least=2)
    assert len(on_disk(log)) == 12
    log.compact(0, later(61), at_least=2)
    assert len(on_disk(log)) == 2
    assert offsets(log) == [*((0, i) for i in range(10)), (1, 0)]
    assert logged(log, 0, 8) == {8: 8, 9: 9}


def test_compaction_never_claims_what_a_large_file_holds(log, monkeypatch):
    monkeypatch.setattr(event_log, "_SMALL_BYTES", 20_000)
    for i in range(3):
        log.append(rows([i]))
    log.append(rows(range(3, 3000)))
    for i in range(3000, 3003):
        log.append(rows([i]))
    for minutes in (0, 61, 122):
        log.compact(0, later(minutes), at_least=2)
        assert offsets(log) == [(0, i) for i in range(3003)]
    assert [(f.first, f.last) for f in log.files()] == [(0, 2), (3, 2999), (3000, 3002)]
    assert len(on_disk(log)) == 3
    assert log.newest(0, 2000, "_visible_at") == (NEVER, 1999)


def test_a_file_whose_range_covers_another_does_not_replace_it(log):
    """What was refused first and counted later: its batch spans rows that stand in another file."""
    log.append(rows([1, 2]))
    log.append(rows([0, 3]))
    for minutes in (0, 61, 122):
        log.compact(0, later(minutes))
        assert offsets(log) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    assert log.newest(0, 3, "_visible_at") == (NEVER, 2)
    log.compact(0, later(0), at_least=2)
    log.compact(0, later(61), at_least=2)
    assert [(f.first, f.last) for f in log.files()] == [(0, 3)]
    assert offsets(log) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_batch_of_the_same_range_keeps_the_rows_that_are_there(log):
    log.append(rows([0, 1, 3], visible=10))
    log.append(rows([0, 2, 3], visible=20))
    assert logged(log, 0, 0) == {0: 10, 1: 10, 2: 20, 3: 10}


def test_rewinding_forgets_also_in_files_that_were_merged(log):
    for i in range(4):
        log.append(rows([i]))
    log.compact(0, later(0), at_least=2)
    log.append(rows([4]))
    log.compact(0, later(0), at_least=2)
    assert log.rewind(2) == 2
    assert len(on_disk(log)) == 1
    for minutes in (0, 61):
        log.compact(0, later(minutes), at_least=2)
        assert offsets(log) == [(0, 0), (0, 1), (0, 2)]
    log.append(rows([3]))
    assert offsets(log) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_a_merged_file_that_is_written_again_counts_again(log):
    log.append(rows([0, 2]))
    log.append(rows([3]))
    log.compact(0, later(0), at_least=2)
    assert len(log.files()) == 1
    log.append(rows([0, 1, 2]))
    assert offsets(log) == [(0, 0), (0, 1), (0, 2), (0, 3)]
    log.compact(0, later(61))
    assert offsets(log) == [(0, 0), (0, 1), (0, 2), (0, 3)]


def test_rewinding_forgets_what_became_visible_later(log):
    log.append(rows([0, 1, 2]))
    log.append(rows([3, 4]))
    log.append(rows([3], partition=1))
    assert log.rewind(1) == 4
    assert offsets(log) == [(0, 0), (0, 1)]
    assert log.rewind(1) == 0
    assert log.rewind(-1) == 2
    assert log.files() == []


def test_the_topic_id_is_that_of_the_newest_rows(log):
    assert log.topic_id() is None
    log.append(rows([0], topic_id="a"))
    log.append(rows([1], topic_id="b"))
    log.append(rows([2], topic_id=""))
    assert log.topic_id() == "b"


def test_a_damaged_file_is_named(log):
    log.append(rows([0]))
    (file,) = log.files()
    file.path.write_bytes(b"not parquet")
    with pytest.raises(DataError, match=file.path.name):
        log.read()


def test_files_are_plain_parquet_with_the_columns_of_the_contract(log):
    log.append(rows([0]))
    (file,) = log.files()
    schema = pq.read_schema(file.path)
    assert [schema.field(f.name).type for f in LOG_FIELDS] == [f.type for f in LOG_FIELDS]


def test_idle_rows_stand_beside_the_event_of_their_offset(log):
    log.append(rows([0, 1]))
    log.append(idle_row(1, 50, 40))
    log.append(idle_row(1, 60, 50))
    log.append(idle_row(1, 60, 50))
    log.append(rows([2]))
    assert offsets(log) == [(0, 0), (0, 1), (0, 1), (0, 1), (0, 2)]
    assert log.read()["_dropped"].to_pylist() == [None, None, "idle", "idle", None]
    assert log.read(["_partition", "_offset", "_visible_at"]).num_columns == 3
    assert logged(log, 0, 1) == {1: 1, 2: 2}
    assert log.idle(0) == [(1, 40), (1, 50)]
    assert log.idle(1) == []
    log.compact(0, later(0), at_least=2)
    log.compact(0, later(0), at_least=2)
    assert [len(log.files(0)), len(log.files(0, idle=True))] == [1, 1]
    assert offsets(log) == [(0, 0), (0, 1), (0, 1), (0, 1), (0, 2)]
    assert log.idle(0) == [(1, 40), (1, 50)]


def test_rewinding_forgets_idle_rows_too(log):
    log.append(rows([0, 1]))
    log.append(idle_row(1, 50, 40))
    log.append(idle_row(1, 60, 50))
    assert log.rewind(55) == 1
    assert log.idle(0) == [(1, 40)]
    assert log.rewind(10) == 1
    assert (log.idle(0), offsets(log)) == ([], [(0, 0), (0, 1)])


def test_the_newest_row_before_an_offset(log):
    times = SCHEMA.append(pa.field("at", UTC_MICROS))
    log.append(pa.Table.from_pylist([r | {"at": 100 - r["_offset"]} for r in rows([0, 1, 2]).to_pylist()], times))
    assert log.newest(0, 0, "at") is None
    assert log.newest(0, 2, "at") == (NEVER, 99)
    assert log.newest(0, 9, "at") == (NEVER, 98)
    assert log.newest(1, 9, "at") is None


def test_compaction_counts_what_is_appended_between_its_rounds(log):
    for i in range(3):
        log.append(rows([i]))
    log.compact(0, later(0), at_least=2)
    for i in range(3, 6):
        log.append(rows([i]))
    log.compact(0, later(0), at_least=2)
    assert [(f.first, f.last) for f in log.files()] == [(0, 5)]
    assert offsets(log) == [(0, i) for i in range(6)]
    for minutes in (61, 122):
        log.compact(0, later(minutes), at_least=2)
    assert len(on_disk(log)) == 1
    assert offsets(log) == [(0, i) for i in range(6)]


def test_a_file_that_went_meanwhile_does_not_stop_compaction_for_good(log):
    for i in range(3):
        log.append(rows([i]))
    log.compact(0, later(0), at_least=99)
    log.files()[1].path.unlink()
    with pytest.raises(FileNotFoundError):
        log.compact(0, later(0), at_least=2)
    log.compact(0, later(0), at_least=2)
    assert offsets(log) == [(0, 0), (0, 2)]
    assert len(log.files()) == 1


def test_what_another_owner_wrote_is_compacted_once_the_partition_comes_back(log):
    other = EventLog(log.directory, log.topic)
    log.append(rows([0]))
    log.compact(0, later(0), at_least=2)
    other.append(rows([1]))
    log.append(rows([2]))
    log.forget(0)
    log.compact(0, later(0), at_least=2)
    assert [(f.first, f.last) for f in log.files()] == [(0, 2)]
    assert offsets(log) == [(0, 0), (0, 1), (0, 2)]


def test_merges_of_topics_with_like_names_are_forgotten_apart(log):
    other = EventLog(log.directory, f"{log.topic}-1")
    for one in (log, other):
        for i in range(3):
            one.append(rows([i]))
        one.compact(0, later(0), at_least=2)
    assert log.rewind(1) == 1
    assert len(other.files()) == 1
    assert offsets(log) == [(0, 0), (0, 1)]


def test_nothing_is_merged_while_an_erasure_rewrites_files(log):
    """Else the merged file would bring back the rows that it was made of."""
    for i in range(3):
        log.append(rows([i]))
    with locked(table_lock(log.directory.parent)):
        log.compact(0, later(0), at_least=2)
    assert len(on_disk(log)) == 3
    log.compact(0, later(0), at_least=2)
    assert len(log.files()) == 1


def test_merged_files_that_were_written_again_are_merged_again(log):
    for i in range(4):
        log.append(rows([i]))
    log.compact(0, later(0), at_least=2)
    for name in on_disk(log)[:2]:  # as an erasure does
        pq.write_table(pq.read_table(log.directory / name), log.directory / name)
    assert len(log.files()) >= 2
    for minutes in (61, 61, 122):
        log.compact(0, later(minutes), at_least=2)
    assert (len(on_disk(log)), offsets(log)) == (1, [(0, i) for i in range(4)])


def test_batches_are_logged_while_files_are_merged(log):
    """With a rest after each file that is read, in which the next batch comes; nothing is lost, or there twice."""
    batches = iter(range(5, 60))
    going = threading.Event()

    def rest(seconds: float) -> None:
        assert 0 <= seconds <= 0.05
        if (i := next(batches, None)) is not None:
            log.append(rows([i]))
        else:
            going.set()

    for i in range(5):
        log.append(rows([i]))
    log.compact(0, later(0), at_least=99)
    merging = threading.Thread(target=lambda: [log.compact(0, later(0), at_least=2, rest=rest) for _ in range(20)])
    merging.start()
    i = 100
    while merging.is_alive():
        log.append(rows([i]))
        i += 1
    merging.join()
    log.compact(0, later(0), at_least=2)
    assert going.is_set()
    assert offsets(log) == [*((0, n) for n in range(60)), *((0, n) for n in range(100, i))]
    assert len(log.files()) == 1
    log.compact(0, later(61), at_least=2)
    assert len(on_disk(log)) == 1


def test_far_behind_there_is_no_rest_and_a_bound_on_what_is_in_memory(log, monkeypatch):
    monkeypatch.setattr(event_log, "_AT_ONCE", 10)
    for i in range(25):
        log.append(rows([i]))
    rests = []
    log.compact(0, later(0), at_least=2, rest=rests.append)
    assert rests == []
    assert [(f.first, f.last) for f in log.files()] == [(0, 9), (10, 19), (20, 24)]
    log.compact(0, later(0), at_least=2, rest=rests.append)
    assert len(rests) == 3
    assert offsets(log) == [(0, i) for i in range(25)]
