"""Erasing one entity: every file that holds it is rewritten, the others keep their bytes, and it does not come back."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from point_in_time_oracle import feast_store
from test_backfill import account_view, at, behaviour_view, contents, customer, write_accounts, write_events

from feature_store import erasure
from feature_store.backfill import backfill
from feature_store.compaction import compact
from feature_store.erasure import erase
from feature_store.erasure_list import ErasureList, digest_of
from feature_store.errors import DataError, UsageError
from feature_store.event_log import EventLog
from feature_store.point_in_time.layout import FOOTER


@pytest.fixture
def offline(tmp_path: Path) -> Path:
    """Two views' tables, appended and compacted files, a stream log and a served dataset."""
    write_accounts(tmp_path / "raw", [(c, at(d), at(d), float(d)) for d in range(70) for c in ("C1", "C2", "C10")])
    events = [
        {"event_id": f"e{i}", "customer": ("C1", "C2")[i % 2], "kind": "ok", "event_timestamp": at(i), "created": at(i),
         "quantity": i} for i in range(40)
    ]  # fmt: skip
    write_events(tmp_path / "raw", events)
    store = feast_store(tmp_path, [customer(), account_view(), behaviour_view()])
    where: dict[str, Any] = {"raw_dir": tmp_path / "raw", "offline_path": tmp_path / "offline"}
    backfill(account_view(), **where)
    backfill(behaviour_view(), **where)
    for day, who in ((1, "C1"), (2, "C2"), (80, "C1")):
        for late in range(2):
            frame = {"customer": [who], "event_timestamp": [at(day)], "created": [at(day + late)], "charges": [-1.0]}
            store.write_to_offline_store("account", pd.DataFrame(frame))
        if day == 2:
            compact(account_view(), offline_path=tmp_path / "offline")
    history = pq.read_table(tmp_path / "offline/events/history")
    rows = history.slice(0, 6).drop_columns(["_partition"]).append_column("_partition", pa.array([0] * 6, pa.int32()))
    EventLog(tmp_path / "offline/events/stream", "events").append(rows)
    served = pa.table({"customer": ["C1", "C2", "C1"], "n": [1, 2, 3]})
    (tmp_path / "offline/saved/churn").mkdir(parents=True)
    pq.write_table(served, tmp_path / "offline/saved/churn/data.parquet")
    pq.write_table(pa.table({"n": [1]}), tmp_path / "offline/saved/churn/other.parquet")
    return tmp_path / "offline"


def run(offline: Path, value: str = "C1", **options: Any) -> erasure.Erasure:
    return erase("customer", value, offline_path=offline, views=[account_view(), behaviour_view()], at=at(0), **options)


def holders(offline: Path, value: str) -> set[str]:
    """Every Parquet file on disk, hidden ones too, that has the value in any column."""
    found = set()
    for path in offline.rglob("*"):
        if path.is_file() and ".parquet" in path.name:
            table = pq.ParquetFile(path).read()
            strings = [c for c in table.column_names if pa.types.is_string(table.schema.field(c).type)]
            if any(pc.any(pc.equal(table.column(c), value)).as_py() for c in strings):
                found.add(str(path.relative_to(offline)))
    return found


def rows_of(offline: Path, value: str) -> int:
    files = list(offline.rglob("*.parquet"))
    columns = [pq.ParquetFile(p).read() for p in files]
    return sum(
        c.filter(pc.equal(c.column("customer"), value)).num_rows for c in columns if "customer" in c.column_names
    )


def test_the_entity_is_gone_from_every_file_and_other_files_and_rows_stay(offline: Path) -> None:
    before, holding = contents(offline), holders(offline, "C1")
    kinds = {p.split("/")[0] + "/" + p.split("/")[1][:5] for p in holding}
    assert kinds == {"account/2024-", "account/added", "account/appen", "events/histo", "events/strea", "saved/churn"}
    others = {who: rows_of(offline, who) for who in ("C2", "C10")}
    gone = rows_of(offline, "C1")
    planned = run(offline, dry_run=True)
    assert contents(offline) == before
    done = run(offline)
    assert {str(f.path.relative_to(offline)) for f in done.files} == holding
    assert planned.files == done.files
    assert done.rows == gone
    assert holders(offline, "C1") == set()
    assert {who: rows_of(offline, who) for who in ("C2", "C10")} == others
    after = contents(offline)
    kept = {n: d for n, d in before.items() if n not in holding and n.endswith(".parquet")}
    assert kept.items() <= after.items()
    months = list(offline.glob("account/2024-*.parquet"))
    assert all(FOOTER in pq.ParquetFile(p).metadata.metadata for p in months)
    assert "C1" not in str(done.to_json())
    assert "C1" not in (offline / "_erasures.json").read_text()


def test_an_erased_table_equals_one_that_never_had_the_entity_and_a_rebuild_keeps_it_so(
    tmp_path: Path, offline: Path
) -> None:
    run(offline)
    erased = {n: d for n, d in contents(offline).items() if n.startswith(("account/2024", "events/history"))}
    shutil.rmtree(offline / "events/stream")  # it repeats history here, and a backfill refuses to count events twice
    for view in (account_view(), behaviour_view()):
        backfill(view, raw_dir=tmp_path / "raw", offline_path=offline)
    assert erased.items() <= contents(offline).items()
    assert holders(offline, "C1") == set()


def test_erasing_twice_changes_nothing_and_the_list_keeps_the_first_time(offline: Path) -> None:
    run(offline)
    once = contents(offline)
    assert run(offline).files == ()
    assert contents(offline) == once
    (entry,) = ErasureList(offline).entries()
    assert (entry.join_key, entry.sha256, entry.erased_at) == ("customer", digest_of("customer", "C1"), at(0))
    run(offline, "C2")
    assert ErasureList(offline).digests_of("customer") == {digest_of("customer", c) for c in ("C1", "C2")}
    assert ErasureList(offline).digests_of("other") == frozenset()


def test_an_interrupted_erasure_is_taken_up(offline: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite, calls = erasure._rewrite, []

    def dying(*args: Any) -> None:
        if len(calls) == 3:
            raise KeyboardInterrupt
        calls.append(args)
        rewrite(*args)

    with monkeypatch.context() as patch:
        patch.setattr(erasure, "_rewrite", dying)
        with pytest.raises(KeyboardInterrupt):
            run(offline)
    left = holders(offline, "C1")
    assert left
    assert ErasureList(offline).digests_of("customer")
    assert {str(f.path.relative_to(offline)) for f in run(offline).files} == left
    assert holders(offline, "C1") == set()


def test_an_unknown_entity_changes_no_file_but_is_kept_out(offline: Path) -> None:
    before = contents(offline)
    assert run(offline, "nobody").files == ()
    assert {n: d for n, d in contents(offline).items() if n.endswith(".parquet")} == {
        n: d for n, d in before.items() if n.endswith(".parquet")
    }
    assert ErasureList(offline).digests_of("customer") == {digest_of("customer", "nobody")}


def test_integer_keys_are_matched_and_listed_by_value(tmp_path: Path) -> None:
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Int64

    number = Entity(name="customer", join_keys=["customer"], value_type=ValueType.INT64)
    fields = [Field(name="v", dtype=Int64), Field(name="customer", dtype=Int64)]
    view = FeatureView(name="t", entities=[number], schema=fields, source=FileSource(name="s", path="t.parquet"))
    pq.write_table(pa.table({"customer": [1, 11, 1], "v": [1, 2, 3]}), tmp_path / "t.parquet")
    assert erase("customer", "01", offline_path=tmp_path, views=[view], at=at(0)).rows == 2
    assert pq.read_table(tmp_path / "t.parquet").to_pydict() == {"customer": [11], "v": [2]}
    assert ErasureList(tmp_path).digests_of("customer") == {digest_of("customer", 1)}
    with pytest.raises(UsageError, match="keys customer are whole numbers: 'C1'"):
        erase("customer", "C1", offline_path=tmp_path, views=[view], at=at(0))
    assert erase("customer", "11", offline_path=tmp_path, views=[view], at=at(0)).rows == 1
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 0


def test_a_damaged_file_or_list_is_named(offline: Path, tmp_path: Path) -> None:
    (offline / "saved/broken.parquet").write_bytes(b"PAR1")
    before = contents(offline)
    with pytest.raises(DataError, match=r"broken\.parquet") as caught:
        run(offline)
    assert "\n" not in caught.value.message
    assert contents(offline) == before
    (offline / "_erasures.json").write_text("{}")
    with pytest.raises(DataError, match=r"_erasures\.json"):
        backfill(account_view(), raw_dir=tmp_path / "raw", offline_path=offline)
