"""Compaction: the same values from fewer files, whole for every reader, and safe to stop anywhere."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from point_in_time_oracle import feast_store
from test_backfill import TIME, account_view, at, behaviour_view, contents, customer, write_accounts

from feature_store import compaction
from feature_store.backfill import backfill
from feature_store.compaction import compact
from feature_store.errors import DataError, UsageError
from feature_store.point_in_time.layout import FOOTER
from feature_store.point_in_time.source import parquet_files
from feature_store.published import FILE, compacted


class Killed(BaseException):
    """Stands for a process that ends here."""


def append(store: Any, rows: list[tuple[str, float, float, float | None]]) -> None:
    columns = ("customer", "event_timestamp", "created", "charges")
    times = [(c, at(e), at(k), v) for c, e, k, v in rows]
    store.write_to_offline_store("account", pd.DataFrame(dict(zip(columns, zip(*times, strict=True), strict=True))))


def values(store: Any) -> list[dict[str, Any]]:
    """As the join sees them at many times, for every key."""
    asked = [(c, at(d)) for c in "abcdx" for d in range(0, 120, 3)]
    entities = pa.table({"customer": [a[0] for a in asked], "event_timestamp": pa.array([a[1] for a in asked], TIME)})
    out: list[dict[str, Any]] = []
    for as_known in (False, True):
        job = store.get_historical_features(
            entity_df=entities, features=["account:charges"], filter_by_created_timestamp=as_known
        )
        out += job.to_arrow().to_pylist()
    return out


@pytest.fixture
def store(tmp_path: Path) -> Any:
    """Backfilled months, and appended files with corrections, exact ties and rows of other months."""
    write_accounts(tmp_path / "raw", [(c, at(d), at(d), float(d)) for d in range(0, 60, 5) for c in "abc"])
    store = feast_store(tmp_path, [customer(), account_view()])
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline")
    rng = random.Random(4)
    for _ in range(12):
        days = [rng.randrange(0, 100, 5) for _ in range(8)]
        append(store, [(rng.choice("abcd"), d, d + rng.choice([0, 0, 7]), rng.random()) for d in days])
    return store


def test_values_stay_and_files_become_one_per_month(tmp_path: Path, store: Any) -> None:
    table = tmp_path / "offline/account"
    before, months = values(store), contents(table)
    planned = compact(account_view(), offline_path=tmp_path / "offline", dry_run=True)
    assert contents(table) == months
    done = compact(account_view(), offline_path=tmp_path / "offline")
    assert (done.absorbed, done.written) == (planned.absorbed, planned.written) == (12, 5)
    assert (done.rows + done.shadowed, done.shadowed > 0) == (96, True)
    assert values(store) == before
    read = [Path(f) for f in parquet_files(str(table))]
    assert sorted(p.name[:13] for p in read if p.name.startswith("added")) == [
        "added-2024-01", "added-2024-02", "added-2024-03", "added-2024-04", "added-2024-05",
    ]  # fmt: skip
    assert not [p for p in read if p.name.startswith("append-")]
    assert all(FOOTER in pq.ParquetFile(p).metadata.metadata for p in read)
    assert {n: d for n, d in months.items() if n.startswith("2024")}.items() <= contents(table).items()


def test_what_was_replaced_goes_with_the_next_compaction_and_newer_appends_still_win(
    tmp_path: Path, store: Any
) -> None:
    table = tmp_path / "offline/account"
    compact(account_view(), offline_path=tmp_path / "offline")
    assert len(list(table.glob("append-*"))) == 12  # a reader that has listed them can still open them
    append(store, [("a", 0, 0, 77.0), ("a", 50, 50, 78.0)])
    append(store, [("a", 0, 0, 79.0)])
    before = values(store)
    assert {r["charges"] for r in before if r["customer"] == "a"} & {77.0, 78.0, 79.0}
    done = compact(account_view(), offline_path=tmp_path / "offline")
    assert (done.absorbed, done.written) == (2, 2)
    assert values(store) == before
    assert len(list(table.glob("append-*"))) == 2
    compact(account_view(), offline_path=tmp_path / "offline")
    assert not list(table.glob("append-*"))
    assert len(list(table.glob("added-*"))) == 5
    assert values(store) == before


def test_a_rerun_of_the_backfill_keeps_compacted_rows(tmp_path: Path, store: Any) -> None:
    compact(account_view(), offline_path=tmp_path / "offline")
    before = values(store)
    backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=tmp_path / "offline")
    assert values(store) == before


@pytest.mark.parametrize("where", ["write_chunk", "change", "sync_directory"])
@pytest.mark.parametrize("after", [False, True])
def test_stopped_anywhere_every_reader_sees_one_side_and_the_next_run_ends_alike(
    tmp_path: Path, store: Any, monkeypatch: pytest.MonkeyPatch, where: str, after: bool
) -> None:
    table = tmp_path / "offline/account"
    before, listed = values(store), parquet_files(str(table))
    real = getattr(compaction, where)
    calls = 0

    def dying(*args: Any, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        if where == "write_chunk" and calls == 1:
            return real(*args, **kwargs)
        if after:
            real(*args, **kwargs)
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(compaction, where, dying)
        with pytest.raises(Killed):
            compact(account_view(), offline_path=tmp_path / "offline")
    seen = parquet_files(str(table))
    assert values(store) == before
    names = {Path(f).name.partition("-")[0] for f in seen}
    if where == "change" and after:
        assert names == {"2024", "added"}
    else:
        assert seen == listed
    for _ in range(2):
        compact(account_view(), offline_path=tmp_path / "offline")
    assert values(store) == before
    assert set(parquet_files(str(table))) == {str(p) for p in table.glob("*.parquet")}
    assert not [f for f in parquet_files(str(table)) if "append-" in f]


def test_files_of_other_types_and_of_other_owners_are_left_alone(tmp_path: Path, store: Any) -> None:
    table = tmp_path / "offline/account"
    # Appends from pandas are in nanoseconds.
    rows = {"customer": ["a"], "event_timestamp": pa.array([at(90)], TIME),
            "created": pa.array([at(90)], TIME), "charges": [5.0]}  # fmt: skip
    odd = f"append-{'f' * 24}.parquet"
    pq.write_table(pa.table(rows), table / odd)
    pq.write_table(pa.table(rows), table / "part-0001.parquet")
    before = values(store)
    done = compact(account_view(), offline_path=tmp_path / "offline")
    assert done.skipped == (odd,)
    assert values(store) == before
    assert {Path(f).name for f in parquet_files(str(table))} >= {odd, "part-0001.parquet"}


def test_few_files_and_an_absent_table_are_left_as_they_are(tmp_path: Path, store: Any) -> None:
    before = contents(tmp_path / "offline/account")
    assert compact(account_view(), offline_path=tmp_path / "offline", at_least=13).absorbed == 0
    assert contents(tmp_path / "offline/account") == before
    assert compact(account_view(), offline_path=tmp_path / "nowhere").absorbed == 0


def test_bad_input_is_one_clear_line(tmp_path: Path, store: Any) -> None:
    with pytest.raises(UsageError, match="sync compacts its log: 'behaviour'"):
        compact(behaviour_view(), offline_path=tmp_path / "offline")
    table = tmp_path / "offline/account"
    broken = table / f"append-{'0' * 24}.parquet"
    broken.write_bytes(b"PAR1nothingPAR1")
    with pytest.raises(DataError, match=broken.name) as caught:
        compact(account_view(), offline_path=tmp_path / "offline")
    assert "\n" not in caught.value.message
    assert not list(table.glob("added-*"))
    broken.unlink()
    compact(account_view(), offline_path=tmp_path / "offline")
    (table / sorted(compacted(table).files)[0]).unlink()
    with pytest.raises(DataError, match="a compacted file is missing"):
        parquet_files(str(table))
    (table / FILE).write_text("{")
    with pytest.raises(DataError, match=FILE):
        parquet_files(str(table))
