"""Backfill as a job: chunks done before are not computed again, late rows, erasures, and what bad input or a full disk leave."""

from __future__ import annotations

import os
import resource
import threading
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from test_backfill import TIME, account_view, at, behaviour_view, contents, read, write_accounts, write_events

from feature_store import backfill_chunks
from feature_store.backfill import backfill
from feature_store.backfill_state import MemoryState
from feature_store.durable import BusyError, locked
from feature_store.erasure_list import ErasureList
from feature_store.errors import DataError, PredictFlowError, UsageError
from feature_store.published import locks_of

Rows = list[tuple[str | None, Any, Any, float | None]]
DAILY: Rows = [(c, at(d), at(d), float(d)) for d in range(100) for c in "abc"]


def run(directory: Path, **options: Any) -> Any:
    return backfill(account_view(), raw_dir=directory / "raw", offline_path=directory / "off", **options)


def inodes(directory: Path) -> dict[str, int]:
    return {p.name: p.stat().st_ino for p in directory.glob("*.parquet")}


def test_a_run_repeated_writes_nothing_and_says_the_same(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    state = MemoryState()
    first = run(tmp_path, state=state)
    before = inodes(tmp_path / "off/account")
    again = run(tmp_path, state=state)
    assert inodes(tmp_path / "off/account") == before
    assert (first.skipped, again.skipped, again.chunks) == (0, 5, 5)
    assert (again.run_id, again.rows, again.files, again.bytes) == (first.run_id, 300, 5, first.bytes)


def test_a_published_file_that_is_gone_or_altered_is_written_again_and_the_others_stay(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    state = MemoryState()
    run(tmp_path, state=state)
    table = tmp_path / "off/account"
    whole, before = contents(table), inodes(table)
    (table / "2024-02.parquet").unlink()
    (table / "2024-03.parquet").write_bytes(b"PAR1 half a file")
    again = run(tmp_path, state=state)
    assert again.skipped == 3
    assert contents(table) == whole
    kept = {n for n, i in inodes(table).items() if before[n] == i}
    assert kept >= {"2024-01.parquet", "2024-04.parquet", "2024-05.parquet"}


def test_a_run_after_another_one_over_the_same_files_is_not_taken_for_done(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    state = MemoryState()
    run(tmp_path, state=state, known_by=at(40))
    small = contents(tmp_path / "off/account")
    run(tmp_path, state=state)
    run(tmp_path, state=state, known_by=at(40))
    assert contents(tmp_path / "off/account") == small


@pytest.mark.parametrize("change", ["raw", "definition", "range", "erasure"])
def test_the_run_id_changes_with_what_the_result_depends_on(tmp_path: Path, change: str) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    once = run(tmp_path)
    view, options = account_view(), {}
    if change == "raw":
        write_accounts(tmp_path / "raw", [*DAILY, ("d", at(3), at(3), 0.0)])
    elif change == "definition":
        view = account_view("SELECT customer, event_timestamp, created, charges * 2 AS charges FROM accounts")
    elif change == "range":
        options = {"start": at(1)}
    else:
        ErasureList(tmp_path / "off").add("customer", "a", at(0))
    other = backfill(view, raw_dir=tmp_path / "raw", offline_path=tmp_path / "off", **options)
    assert other.run_id != once.run_id
    assert run(tmp_path).run_id == (once.run_id if change in ("definition", "range") else other.run_id)


def test_any_number_of_workers_gives_the_same_bytes(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    done = []
    for workers in (1, 4):
        backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / str(workers), workers=workers)
        done.append(contents(tmp_path / str(workers) / "account"))
    assert done[0] == done[1]
    with pytest.raises(UsageError, match="workers must be at least 1: 0"):
        run(tmp_path, workers=0)


def test_late_corrections_are_added_with_their_own_created_and_touch_only_their_months(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    run(tmp_path, known_by=at(120))
    table = tmp_path / "off/account"
    before = inodes(table)
    late: Rows = [("a", at(40), at(130), -1.0), ("b", at(41), at(131), None)]
    write_accounts(tmp_path / "raw", [*DAILY, *late])
    added = run(tmp_path, known_after=at(120), known_by=at(140))
    assert added.rows == 2
    assert [n for n, i in inodes(table).items() if before[n] != i] == ["2024-03.parquet"]
    assert len(read(table)) == 302
    assert {r["created"] for r in read(table) if r["charges"] in (-1.0, None)} == {at(130), at(131)}
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "whole", known_by=at(140))
    assert contents(table) == contents(tmp_path / "whole/account")
    assert run(tmp_path, known_after=at(120), known_by=at(140)).rows == 2
    assert contents(table) == contents(tmp_path / "whole/account")


def test_a_select_that_is_not_row_by_row_gives_the_same_files(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    run(tmp_path)
    staged = account_view(
        "SELECT customer, event_timestamp, max(created) AS created, max(charges) AS charges FROM accounts GROUP BY 1, 2"
    )
    backfill(staged, raw_dir=tmp_path / "raw", offline_path=tmp_path / "staged")
    assert contents(tmp_path / "staged/account") == contents(tmp_path / "off/account")


def test_erased_entities_do_not_come_back_and_other_events_keep_their_numbers(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    events = [
        {"event_id": f"e{i}", "customer": "abc"[i % 3], "kind": "ok", "event_timestamp": at(i), "created": at(i), "quantity": 1}
        for i in range(30)
    ]  # fmt: skip
    write_events(tmp_path / "raw", events)
    behaviour = {"raw_dir": tmp_path / "raw", "offline_path": tmp_path / "off"}
    backfill(behaviour_view(), **behaviour)
    numbers = {r["event_id"]: r["_offset"] for r in read(tmp_path / "off/events")}
    ErasureList(tmp_path / "off").add("customer", "b", at(0))
    run(tmp_path)
    backfill(behaviour_view(), **behaviour)
    assert {r["customer"] for r in read(tmp_path / "off/account")} == {"a", "c"}
    left = {r["event_id"]: r["_offset"] for r in read(tmp_path / "off/events")}
    assert left == {e: n for e, n in numbers.items() if int(e[1:]) % 3 != 1}


def test_an_erasure_while_a_backfill_runs_stops_it_before_it_writes_the_entity(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    with pytest.raises(BusyError, match="erased while this ran"):
        run(tmp_path, planned=lambda _: ErasureList(tmp_path / "off").add("customer", "a", at(0)))
    assert not list((tmp_path / "off/account").glob("*.parquet"))
    assert {r["customer"] for r in read(tmp_path / "off")} == set()
    assert run(tmp_path).rows == 200


def test_a_chunk_waits_for_the_one_who_writes_it(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    holding, seen = threading.Event(), []
    lock = locks_of(tmp_path / "off/account") / "2024-03"

    def other() -> None:
        with locked(lock):
            holding.set()
            threading.Event().wait(0.3)
            seen.append((tmp_path / "off/account/2024-03.parquet").exists())

    thread = threading.Thread(target=other)
    thread.start()
    holding.wait()
    run(tmp_path, workers=1)
    thread.join()
    assert seen == [False]
    assert (tmp_path / "off/account/2024-03.parquet").exists()


def test_a_lock_that_stays_taken_says_try_again(tmp_path: Path) -> None:
    with locked(tmp_path / "l"), pytest.raises(BusyError, match="another process"), locked(tmp_path / "l", seconds=0):
        pass
    with locked(tmp_path / "l", shared=True), locked(tmp_path / "l", shared=True, seconds=0):
        pass


# Bad input


def test_a_damaged_raw_file_is_named_with_row_group_and_column(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    path = tmp_path / "raw/accounts.parquet"
    pq.write_table(pq.read_table(path), path, row_group_size=100, compression="zstd", use_dictionary=False)
    column = pq.ParquetFile(path).metadata.row_group(1).column(3)
    assert column.path_in_schema == "charges"
    data = bytearray(path.read_bytes())
    data[column.data_page_offset : column.data_page_offset + column.total_compressed_size] = bytes(
        column.total_compressed_size
    )
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"accounts\.parquet, row group 1, column charges cannot be read") as caught:
        run(tmp_path)
    assert "\n" not in caught.value.message
    write_accounts(tmp_path / "raw", DAILY)
    run(tmp_path)
    assert len(read(tmp_path / "off/account")) == 300


def test_a_truncated_raw_file_is_named(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    path = tmp_path / "raw/accounts.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match=r"raw file .*accounts\.parquet cannot be read"):
        run(tmp_path)
    assert not (tmp_path / "off/account").exists()


def test_missing_timestamps_are_counted_and_named_whatever_the_range(tmp_path: Path) -> None:
    (tmp_path / "raw").mkdir()
    columns = {"customer": ["a", "b"], "event_timestamp": pa.array([at(0), None], TIME)}
    rest = {"created": pa.array([at(0), at(0)], TIME), "charges": [1.0, 2.0]}
    pq.write_table(pa.table({**columns, **rest}), tmp_path / "raw/accounts.parquet")
    with pytest.raises(DataError, match=r"1 row\(s\) of accounts have no event_timestamp \(.*accounts\.parquet\)"):
        run(tmp_path, start=at(-5), end=at(5))
    assert not (tmp_path / "off/account").exists()


def test_a_stored_type_that_no_longer_fits_is_refused_with_file_and_column(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    table = tmp_path / "off/account"
    table.mkdir(parents=True)
    stored = {"customer": ["a"], "event_timestamp": pa.array([at(0)], TIME), "created": pa.array([at(0)], TIME)}
    pq.write_table(pa.table({**stored, "charges": ["many"]}), table / "2024-01.parquet")
    with pytest.raises(DataError, match=r"2024-01\.parquet, column charges: stored as VARCHAR"):
        run(tmp_path, start=at(1))


def test_rows_kept_from_a_file_without_a_newer_column_have_null_there(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    table = tmp_path / "off/account"
    table.mkdir(parents=True)
    stored = {"customer": ["old"], "event_timestamp": pa.array([at(0)], TIME), "created": pa.array([at(0)], TIME)}
    pq.write_table(pa.table(stored), table / "2024-01.parquet")
    run(tmp_path, start=at(1))
    rows = read(table)
    assert [r["charges"] for r in rows if r["customer"] == "old"] == [None]
    assert len(rows) == 298


@pytest.mark.parametrize("windowed", [False, True])
def test_a_full_disk_is_one_clear_line_leaves_nothing_half_written_and_a_rerun_goes_on(
    tmp_path: Path, windowed: bool
) -> None:
    """The limit on file size stands for a disk: the third month is larger than what is left."""
    sizes = {0: 20, 40: 20, 70: 20_000}
    days = [(d, i) for d, n in sizes.items() for i in range(n)]
    write_accounts(tmp_path / "raw", [(f"c{i * 7919 % 99991}", at(d), at(d + 1), i * 0.37) for d, i in days])
    write_events(
        tmp_path / "raw",
        [
            {"event_id": f"{d}-{i * 7919 % 99991}", "customer": "a", "kind": "ok", "event_timestamp": at(d), "created": at(d),
             "quantity": i}
            for d, i in days
        ],
    )  # fmt: skip
    view = behaviour_view() if windowed else account_view()
    table = tmp_path / "off/events/history" if windowed else tmp_path / "off/account"
    state = MemoryState()
    options: dict[str, Any] = {
        "raw_dir": tmp_path / "raw", "offline_path": tmp_path / "off", "workers": 1, "state": state,
    }  # fmt: skip
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, limits[1]))
    try:
        with pytest.raises(PredictFlowError, match=r"2024-04\.parquet.*next: free s") as caught:
            backfill(view, **options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "\n" not in caught.value.message
    assert sorted(p.name for p in table.glob("*.parquet")) == ["2024-01.parquet", "2024-03.parquet"]
    assert not list(table.glob(".*"))
    assert [e for e in state.errors.values() if "2024-04.parquet" in e]
    again = backfill(view, **options)
    assert (again.skipped, again.files) == (2, 3)
    other = backfill(view, **{**options, "offline_path": tmp_path / "fresh"})
    assert contents(table) == contents(Path(str(table).replace("/off/", "/fresh/")))
    assert other.run_id != again.run_id


def test_a_chunk_that_fails_keeps_the_others_and_the_error_reaches_the_caller(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    state = MemoryState()
    write = backfill_chunks.Table.write

    def broken(self: Any, con: Any, month: Any, wanted: Any) -> Any:
        if month.name == "2024-03":
            raise DataError("broken on purpose")
        return write(self, con, month, wanted)

    with monkeypatch.context() as patch:
        patch.setattr(backfill_chunks.Table, "write", broken)
        with pytest.raises(DataError, match="broken on purpose"):
            run(tmp_path, state=state, workers=1)
    assert len(state.errors) == 1
    again = run(tmp_path, state=state)
    assert again.skipped == 2
    assert len(read(tmp_path / "off/account")) == 300


def test_unfinished_files_of_a_killed_process_are_removed(tmp_path: Path) -> None:
    write_accounts(tmp_path / "raw", DAILY)
    run(tmp_path)
    whole = contents(tmp_path / "off/account")
    left = tmp_path / f"off/account/.2024-02.parquet.{os.getpid() + 1}.tmp"
    left.write_bytes(b"half")
    run(tmp_path)
    assert contents(tmp_path / "off/account") == whole


def test_bounds_at_a_month_and_at_the_turn_of_the_year(tmp_path: Path) -> None:
    turn = at(-30)  # 2023-12-31
    rows: Rows = [("a", turn + timedelta(hours=h), turn + timedelta(hours=h), float(h)) for h in (0, 23, 24, 25)]
    write_accounts(tmp_path / "raw", rows)
    run(tmp_path, start=turn, end=turn + timedelta(days=1))
    assert [p.name for p in sorted((tmp_path / "off/account").glob("*.parquet"))] == ["2023-12.parquet"]
    run(tmp_path, start=turn + timedelta(days=1))
    assert [r["charges"] for r in read(tmp_path / "off/account")] == [0.0, 23.0, 24.0, 25.0]
