"""The README's commands, run in a copy of the checkout as a stranger would: both data sets, small, and what must hold."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import duckdb
import pytest
from readme_support import ROOT, Checkout, as_printed, copy_checkout, sample

RETAIL = ROOT.parent / "shared" / "data" / "online_retail" / "online_retail.csv.gz"
ENV = 'eval "$(.venv/bin/predictflow env)"\n'
SMALL = "--customers 600 --days 200 --events 400"
RUN_HERE = (
    "spell_events",
    "make demo\n",
    "AUC held-out",
    "make demo DATA=",
    "feast apply",
    "get_online_features",
    "curl",
    "predictflow lineage",
)
NOT_RUN_HERE = ("make test",)  # it runs this file
# What a notebook does with a cell: the value of its last expression is shown.
CELL = """
import ast, sys
for statement in ast.parse(sys.stdin.read()).body:
    exec(compile(ast.Interactive([statement]), "README", "single"))
"""

# Against a hang, not a measure: the first demo counts into the test that asks for it, and other programs may run.
pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Checkout]:
    here = Checkout(copy_checkout(tmp_path_factory.mktemp("stranger") / "predictflow"))
    yield here
    stopped = here.run("make down")
    assert stopped.returncode == 0, stopped.stderr


def _demo(checkout: Checkout, args: str, block: str = "make demo\n") -> tuple[str, dict[str, Any]]:
    """The README's block as it stands; make takes DEMO_ARGS from the environment."""
    done = checkout.run(checkout.block(block), DEMO_ARGS=args)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout, checkout.summary()


def _read(checkout: Checkout, *customers: str) -> dict[str, dict[str, Any]]:
    """The online features of each customer, over REST."""
    body = json.dumps({"feature_service": "churn_v1", "entities": {"customer_id": customers}})
    url = f"{checkout.summary()['rest_url']}/api/v1/features/online"
    done = checkout.run(f"curl -sf --noproxy '*' {url} -H 'Content-Type: application/json' -d '{body}'")
    assert done.returncode == 0, done.stderr
    return {row["entity"]["customer_id"]: row for row in json.loads(done.stdout)["rows"]}


def _known(checkout: Checkout, customers: list[str]) -> list[str]:
    """Those of the customers of whom the online store holds anything."""
    rows = _read(checkout, *customers)
    return [c for c in customers if set(rows[c]["statuses"].values()) != {"NOT_FOUND"}]


def _holds(summary: dict[str, Any]) -> None:
    """What the issue asks of every run."""
    assert summary["consistency"]["checked"] >= 1000
    assert summary["consistency"]["different"] == 0
    assert summary["consistency"]["stale"] == 0  # every read waits for what was sent
    assert summary["consistency"]["lost_events"] == 0
    assert summary["consistency"]["dead_lettered"] == 2
    assert summary["consistency"]["reads_ahead"] > 0
    assert summary["auc"]["leaky_heldout"] - summary["auc"]["pit_heldout"] > 0.05
    if os.environ.get("PREDICTFLOW_REQUIRE_REAL_KAFKA") == "1":
        assert summary["kafka"]["mode"] == "real"


def _same_figures(a: dict[str, Any], b: dict[str, Any]) -> bool:
    keys = ("dataset", "rows", "rejected_by_reason", "auc", "consistency", "model")
    return all(a[k] == b[k] for k in keys)


@pytest.fixture(scope="module")
def first_run(checkout: Checkout) -> tuple[str, dict[str, Any]]:
    return _demo(checkout, SMALL)


def test_every_block_of_the_readme_is_run_here(checkout: Checkout) -> None:
    for block in checkout.blocks():
        assert sum(text in block for text in (*RUN_HERE, *NOT_RUN_HERE)) == 1, block
    assert "pytest" in checkout.run(checkout.block("make test").replace("make", "make -n")).stdout


def test_the_sql_of_the_readme_is_a_part_of_what_the_demo_serves(checkout: Checkout) -> None:
    defined = " ".join((checkout.path / "features" / "behavioral_features.py").read_text().split())
    assert " ".join(checkout.block("spell_events").split()) in defined


def test_make_demo_runs_the_main_job_and_its_proof_holds(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    output, summary = first_run
    _holds(summary)
    assert summary["dataset"] == "telco"
    assert "0 differ" in output
    end = output[output.rindex("done in") :]
    for line in as_printed(checkout.block("AUC held-out")):
        found = re.search(line, end)
        assert found, f"the README shows {line!r}, the demo ends with {end}"
        end = end[found.end() :]


def test_the_report_is_one_page_that_needs_no_network(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    page = (checkout.home / "report" / "index.html").read_text()
    assert page.count("<svg") >= 4
    assert re.findall(r'(?:src|href)="(?!#)[^"]+"', re.sub(r"<svg.*?</svg>", "", page, flags=re.S)) == []


@pytest.mark.long
def test_a_second_demo_repeats_no_finished_stage_and_gives_the_same_figures(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    output, again = _demo(checkout, SMALL)
    assert "stages run: none" in output
    assert _same_figures(again, first_run[1])


def test_feast_commands_of_the_readme_work_beside_the_demo(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    done = checkout.run(f"set -e\n{checkout.block('feast apply')}")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "churn_features" in done.stdout
    assert "customer_behavior" in done.stdout


def test_the_notebook_cell_of_the_readme_prints_a_list_per_feature(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    cell = shlex.quote(checkout.block("get_online_features"))
    done = checkout.run(f"{ENV}.venv/bin/python -c {shlex.quote(CELL)} <<< {cell}")
    assert done.returncode == 0, done.stderr[-3000:]
    values = ast.literal_eval(done.stdout.splitlines()[-1])
    assert values["customer_id"] == ["C000183"]
    assert [len(values[name]) for name in ("tenure_months", "events_7d", "spend_cents_30d")] == [1, 1, 1]


def test_the_curl_of_the_readme_answers_with_a_probability_and_statuses(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    address = checkout.summary()["rest_url"].removeprefix("http://")
    # Another program may hold port 9094 of this machine.
    command = checkout.block("curl").replace("localhost:9094", address).replace("curl", "curl --noproxy '*'", 1)
    done = checkout.run(command)
    (row,) = json.loads(done.stdout)["predictions"]
    assert 0 < row["probability"] < 1
    assert row["statuses"].keys() == row["values"].keys()
    assert row["statuses"]["tenure_months"] == "PRESENT"


def test_feast_materialize_leaves_windowed_values_alone(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    """`feast materialize` of all views rewrites row features and skips windowed ones: what is served still checks."""
    who = ("C000001", "C000002", "C000003")
    before = _read(checkout, *who)
    done = checkout.run(f"{ENV}.venv/bin/feast materialize 2025-06-01T00:00:00 2025-07-12T00:00:00")
    assert done.returncode == 0, done.stderr[-3000:]
    after = _read(checkout, *who)
    assert [before[c]["values"] for c in who] == [after[c]["values"] for c in who]
    assert before["C000001"]["statuses"]["events_30d"] in ("PRESENT", "OUTSIDE_MAX_AGE")


def test_lineage_leads_from_the_raw_column_to_the_endpoint(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    shown = checkout.run(f"{ENV}{checkout.block('predictflow lineage')}")
    assert [line.strip() for line in shown.stdout.splitlines()] == [
        "feature:customer_behavior:quantity_7d",
        "column:events.event_timestamp",
        "column:events.quantity",
    ], shown.stderr
    done = checkout.run(f"{ENV}.venv/bin/predictflow lineage column:events.quantity --downstream")
    assert done.returncode == 0, done.stderr
    for node in (
        "feature:customer_behavior:quantity_7d",
        "feature_service:churn_v1",
        "model_version:churn-predictor/1",
        "endpoint:",
    ):
        assert node in done.stdout


@pytest.mark.long
def test_a_demo_of_another_size_shows_its_own_figures_only(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]]
) -> None:
    only_first = _known(checkout, [f"C{n:06}" for n in range(251, 601)])
    assert only_first
    _, summary = _demo(checkout, "--customers 250 --days 160 --seed 8 --events 150")
    assert summary["consistency"]["different"] == summary["consistency"]["lost_events"] == 0
    assert summary["rows"]["customers"] == 250
    assert summary["rows"]["events"] < first_run[1]["rows"]["events"]
    assert summary["model"]["data_version"] != first_run[1]["model"]["data_version"]
    assert f"{summary['rows']['events']:,} events" in (checkout.home / "report" / "index.html").read_text()
    assert _known(checkout, [f"C{n:06}" for n in range(1, 251)])
    assert _known(checkout, only_first) == []


@pytest.mark.skipif(not RETAIL.is_file(), reason="needs the UCI Online Retail file beside the checkout (shared/data)")
@pytest.mark.long
def test_the_demo_on_real_data_after_the_simulator(checkout: Checkout, first_run: tuple[str, dict[str, Any]]) -> None:
    # Where the README's command looks for it.
    copy = checkout.path / re.search(r"DATA=(\S+)", checkout.block("make demo DATA="))[1]
    copy.parent.mkdir(parents=True, exist_ok=True)
    kept, dirty = sample(RETAIL, copy, every=6)
    simulated = _known(checkout, [f"C{n:06}" for n in range(1, 251)])
    assert simulated
    _, summary = _demo(checkout, "--events 400", block="make demo DATA=")
    _holds(summary)
    assert summary["dataset"] == "online_retail"
    assert summary["rows"]["events"] + summary["rows"]["rejected"] == kept + dirty
    assert summary["rows"]["rejected"] >= dirty
    assert "/online_retail/work/offline" in (checkout.home / "env").read_text()
    page = (checkout.home / "report" / "index.html").read_text()
    hero = re.search(r"Customer <code>(\w+)</code>", page)[1]
    assert _known(checkout, [hero, *simulated]) == [hero]


def test_bad_input_is_one_clear_line_and_leaves_the_last_run_as_it_was(
    checkout: Checkout, first_run: tuple[str, dict[str, Any]], tmp_path: Path
) -> None:
    header = "InvoiceNo,Quantity,InvoiceDate,UnitPrice,CustomerID\n"
    given = {
        "wrong header.csv": ("a,b\n1,2\n", "InvoiceNo"),
        "empty.csv": ("", "the file is empty"),
        "not.csv.gz": ("plain text", "not a gzip file"),
        "orders.txt": ("a,b\n", "takes a .csv or .csv.gz"),
        "nothing good.csv": (f"{header}1,2,3,4,5\n", "no acceptable line"),
    }
    customers = _customers_of_the_last_run(checkout)
    before, served = checkout.left(), _served_now(checkout, customers)
    assert {"serve", "sync", "postgres", "redis", "kafka"} <= before["processes"].keys()
    for name, (text, _) in given.items():
        (tmp_path / name).write_text(text)
    said = {**{name: said for name, (_, said) in given.items()}, "none.csv": "no such data file", "": "not a file"}
    for name, message in said.items():
        done = checkout.run(f".venv/bin/predictflow demo --data '{tmp_path / name}'")
        assert done.returncode in (1, 2), done.stdout
        assert message in done.stderr
        assert "Traceback" not in done.stderr
    done = checkout.run(".venv/bin/predictflow demo --customers 300", KAFKA_BOOTSTRAP_SERVERS="127.0.0.1:1")
    assert "KAFKA_BOOTSTRAP_SERVERS" in done.stderr
    assert done.returncode == 1
    assert checkout.left() == before
    assert _served_now(checkout, customers) == served


def _customers_of_the_last_run(checkout: Checkout) -> list[str]:
    raw = checkout.home / checkout.summary()["dataset"] / "work" / "raw" / "accounts.parquet"
    keys = duckdb.execute(
        "SELECT DISTINCT customer_id FROM read_parquet(?) ORDER BY ALL LIMIT 5", [str(raw)]
    ).fetchall()
    return [k for (k,) in keys]


def _served_now(checkout: Checkout, customers: list[str]) -> list[dict[str, Any]]:
    """Predictions of the server that the last run left running."""
    body = json.dumps({"entities": {"customer_id": customers}})
    url = f"{checkout.summary()['rest_url']}/api/v1/predict/churn-predictor"
    done = checkout.run(f"curl -sf --noproxy '*' {url} -H 'Content-Type: application/json' -d '{body}'")
    assert done.returncode == 0, done.stderr
    predictions: list[dict[str, Any]] = json.loads(done.stdout)["predictions"]
    assert len(predictions) == len(customers) > 0
    return predictions
