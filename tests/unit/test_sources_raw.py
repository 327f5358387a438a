"""The raw directory: published as a whole or not at all, never over foreign files, and only when it keeps the contract."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from click.testing import CliRunner

from feature_store.errors import DataError, NotFoundError, PredictFlowError, UsageError
from predictflow.cli_data import data
from predictflow.sources.online_retail import OnlineRetail
from predictflow.sources.raw import FILES, Summary, publish, write_table
from predictflow.sources.registry import choose
from predictflow.sources.schedule import schedule
from predictflow.sources.telco import Telco

ROOT = Path(__file__).parents[2]
START = datetime(2025, 1, 1, tzinfo=UTC)
AT = START + timedelta(days=50)
SUMMARY = Summary(
    dataset="mine",
    customers=1,
    events=1,
    rejected_by_reason={},
    start=START,
    cut=START + timedelta(days=200),
    end=START + timedelta(days=210),
    horizon_days=30,
    train_until=START + timedelta(days=100),
    future_from=START + timedelta(days=130),
)
TABLES = {
    "accounts": {
        "customer_id": ["a"],
        "event_timestamp": [AT],
        "created": [AT],
        "joined_at": [AT],
        "monthly_charges": [1.5],
        "contract_months": [None],
        "payment_method": [None],
    },
    "events": {
        "event_id": ["1"],
        "customer_id": ["a"],
        "event_type": ["purchase"],
        "event_timestamp": [AT],
        "created": [AT],
        "quantity": [1],
        "amount_cents": [100],
    },
    "labels": {"customer_id": ["a"], "event_timestamp": [AT], "churned": [0], "best_probability": [None]},
}


def writer(summary: Summary = SUMMARY, **changes: dict) -> Callable[[Path], Summary]:
    def write(raw_dir: Path) -> Summary:
        for name, columns in TABLES.items():
            write_table(raw_dir, name, {**columns, **changes.get(name, {})})
        return summary

    return write


def hidden(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if p.name.startswith(".")]


def test_a_written_directory_is_complete_and_its_summary_reads_back(tmp_path):
    out = tmp_path / "a" / "raw"
    assert publish(out, writer()) == SUMMARY == Summary.read(out)
    assert {p.name for p in out.iterdir()} == FILES
    document = json.loads((out / "summary.json").read_text())
    assert document["rows"] == {"customers": 1, "events": 1, "rejected": 0}
    assert document["cut"] == "2025-07-20T00:00:00+00:00"
    assert hidden(tmp_path / "a") == []


@pytest.mark.parametrize("error", [DataError("broken"), KeyboardInterrupt(), OSError(28, "No space left on device")])
def test_a_failure_leaves_the_earlier_run_and_nothing_half_written(tmp_path, error):
    publish(tmp_path / "raw", writer())

    def fails(raw_dir: Path) -> Summary:
        writer()(raw_dir)
        raise error

    with pytest.raises((PredictFlowError, KeyboardInterrupt)):
        publish(tmp_path / "raw", fails)
    assert Summary.read(tmp_path / "raw") == SUMMARY
    assert hidden(tmp_path) == []


def test_a_rerun_replaces_the_earlier_one_and_sweeps_what_a_killed_run_left(tmp_path):
    publish(tmp_path / "raw", writer())
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    (tmp_path / f".raw.{dead.pid}.partial").mkdir()
    (tmp_path / f".raw.{os.getppid()}.partial").mkdir()
    publish(tmp_path / "raw", writer(replace(SUMMARY, dataset="other")))
    assert Summary.read(tmp_path / "raw").dataset == "other"
    assert hidden(tmp_path) == [f".raw.{os.getppid()}.partial"]


def test_a_directory_with_other_files_is_never_replaced(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageError, match=r"thesis\.txt"):
        publish(tmp_path, writer())
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    with pytest.raises(UsageError, match="is a file"):
        publish(tmp_path / "thesis.txt", writer())
    with pytest.raises(PredictFlowError, match="cannot be written"):
        publish(tmp_path / "thesis.txt" / "raw", writer())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"events": {"quantity": ["many"]}}, "table events"),
        ({"events": {"event_id": [None]}}, "nulls in a required column: 'event_id'"),
        ({"events": {"surprise": [1]}}, "missing or unknown columns"),
        ({"events": {"event_timestamp": [AT + timedelta(days=1)]}}, "created before event_timestamp"),
        ({"accounts": {"event_timestamp": [START - timedelta(days=1)]}}, "outside of start <= time < end"),
        ({"labels": {"event_timestamp": [START + timedelta(days=171)]}}, "not known at the cut"),
        ({"labels": {c: pa.array([], pa.null()) for c in TABLES["labels"]}}, "delivered no rows"),
        ({"events": {c: [v[0], v[0]] for c, v in TABLES["events"].items()}}, "event_id is not unique"),
    ],
)
def test_data_that_breaks_the_contract_is_not_published(tmp_path, changes, message):
    with pytest.raises(DataError) as error:
        publish(tmp_path / "raw", writer(**changes))
    assert message in error.value.message
    assert not (tmp_path / "raw").exists()


def test_a_table_written_without_our_help_is_checked_too(tmp_path):
    def write(raw_dir: Path) -> Summary:
        writer()(raw_dir)
        table = pq.read_table(raw_dir / "events.parquet")
        pq.write_table(table.append_column("more", [[1]]), raw_dir / "events.parquet")
        return SUMMARY

    with pytest.raises(DataError, match=r"events\.parquet: columns differ"):
        publish(tmp_path / "raw", write)
    with pytest.raises(DataError, match="did not write"):
        publish(tmp_path / "raw", lambda raw_dir: SUMMARY)
    with pytest.raises(DataError, match="time zone"):
        replace(SUMMARY, cut=datetime(2025, 1, 1))
    with pytest.raises(DataError, match="overlap"):
        publish(tmp_path / "raw", writer(replace(SUMMARY, future_from=SUMMARY.train_until)))


def test_a_missing_or_damaged_summary_is_one_clear_error(tmp_path):
    with pytest.raises(DataError, match="predictflow data --out"):
        Summary.read(tmp_path)
    (tmp_path / "summary.json").write_text('{"dataset": "x"}')
    with pytest.raises(DataError, match="cannot be read"):
        Summary.read(tmp_path)


@pytest.mark.parametrize("days", range(70, 400, 13))
@pytest.mark.parametrize("every", [7, 14])
def test_a_schedule_keeps_training_the_future_and_the_cut_apart_or_says_what_is_needed(days, every):
    cut, horizon = START + timedelta(days=days), timedelta(days=30)
    needed = 28 + 30 + (35 if every == 7 else 42)
    if days < needed:
        with pytest.raises(DataError, match=f"needed {needed}"):
            schedule(START, cut, horizon, timedelta(days=every))
        return
    plan = schedule(START, cut, horizon, timedelta(days=every))
    assert plan.future_from >= plan.train_until + horizon
    assert plan.times[-1] + horizon <= cut
    assert {t <= plan.train_until or t >= plan.future_from for t in plan.times} == {True}
    assert plan.times[0] == START + timedelta(days=28)


def test_the_source_is_chosen_by_name_or_by_the_file_it_accepts(tmp_path):
    assert choose(None, None) is Telco
    assert choose("online_retail", None) is OnlineRetail
    for name in ("a.csv", "B.CSV.GZ"):
        (tmp_path / name).touch()
        assert choose(None, tmp_path / name) is OnlineRetail
    (tmp_path / "a.xlsx").touch()
    with pytest.raises(UsageError, match="no built-in source accepts"):
        choose(None, tmp_path / "a.xlsx")
    with pytest.raises(NotFoundError, match="did you mean 'telco'"):
        choose("telko", None)
    with pytest.raises(NotFoundError, match="no such file"):
        choose(None, tmp_path / "none.csv")
    with pytest.raises(NotFoundError, match="cannot be imported"):
        choose("no_such_module_here:Source", None)
    with pytest.raises(NotFoundError, match="did you mean 'Telco'"):
        choose("predictflow.sources.telco:Telko", None)
    with pytest.raises(UsageError, match="it lacks accepts, write"):
        choose("pathlib:Path", None)


def test_the_command_prints_a_summary_and_wrong_use_exits_with_2(tmp_path):
    run = CliRunner().invoke
    done = run(data, ["--out", str(tmp_path / "raw"), "--customers", "60", "--days", "110"])
    assert done.exit_code == 0, done.output
    assert "telco: 60 customers" in done.stdout
    assert Summary.read(tmp_path / "raw").dataset == "telco"
    for arguments in (["--path", str(tmp_path / "none.csv")], ["--source", "x"], ["--customers", "0"], []):
        failed = run(data, [*arguments, *(["--out", str(tmp_path / "b")] if arguments else [])])
        assert failed.exit_code == 2, failed.output
        assert not (tmp_path / "b").exists()


def test_the_source_of_the_how_to_works_as_printed(tmp_path):
    page = (ROOT / "docs/how-to/add-a-data-source.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.S)
    (tmp_path / "my_shop.py").write_text(code)
    orders = ["order_id,customer,ordered_at,total", "bad,anna,yesterday,1.00"]
    for customer in range(6):
        for i, day in enumerate(range(customer, 40 if customer == 5 else 130, 3 + 5 * customer)):
            orders.append(f"{customer}-{i},c{customer},{START + timedelta(days=day):%Y-%m-%d %H:%M:%S},12.34")
    (tmp_path / "orders.csv").write_text("\n".join(orders))
    command = re.findall(r"`predictflow (data --out work/raw --source [^`]*)`", page)[0].split()
    done = subprocess.run(
        [sys.executable, "-m", "predictflow.cli", *command], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    summary = Summary.read(tmp_path / "work" / "raw")
    assert (summary.dataset, summary.events, summary.rejected) == ("my_shop", len(orders) - 2, 1)
    assert json.loads((tmp_path / "work/raw/rejects.jsonl").read_text())["raw"] == "bad,anna,yesterday,1.00"
    labels = pq.read_table(tmp_path / "work/raw/labels.parquet").to_pandas()
    assert set(labels[labels.churned == 1].customer_id) == {"c5"}
