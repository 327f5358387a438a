"""The telco simulator: deterministic, late and corrected as promised, and churning by the law that the oracle integrates."""

from __future__ import annotations

import hashlib
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest

from feature_store.errors import UsageError
from predictflow.progress import progress
from predictflow.sources.base import SourceOptions
from predictflow.sources.raw import FILES, Summary, publish
from predictflow.sources.schedule import schedule
from predictflow.sources.telco import DAY, HORIZON_DAYS, START, Telco
from predictflow.sources.telco_oracle import ChurnLaw, ChurnOracle

SMALL = SourceOptions(customers=600, days=150, seed=3)


def write(out: Path, options: SourceOptions = SMALL) -> Summary:
    return publish(out, lambda raw_dir: Telco(options).write(raw_dir, progress))


def digests(raw: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in raw.iterdir()}


@pytest.fixture(scope="module")
def raw(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("telco") / "raw"
    write(out)
    return out


def table(raw: Path, name: str):
    return pq.read_table(raw / f"{name}.parquet").to_pandas()


def test_the_same_options_give_the_same_bytes_and_another_seed_does_not(raw, tmp_path):
    write(tmp_path / "again")
    assert digests(raw) == digests(tmp_path / "again")
    assert set(digests(raw)) == FILES
    write(tmp_path / "other", SourceOptions(customers=600, days=150, seed=4))
    assert digests(raw)["events.parquet"] != digests(tmp_path / "other")["events.parquet"]


def test_about_three_percent_of_the_events_arrive_late_by_minutes_to_days(raw):
    events = table(raw, "events")
    delay = (events.created - events.event_timestamp).dt.total_seconds()
    late = delay > 1
    assert 0.025 < late.mean() < 0.035
    assert delay[late].min() >= 60
    assert delay[late].max() > 86_400
    assert (delay[~late] > 0).all()


def test_every_customer_has_a_statement_at_joining_and_every_week_while_staying(raw):
    accounts = table(raw, "accounts")
    first = accounts.groupby("customer_id").event_timestamp.min()
    joined = accounts.groupby("customer_id").joined_at.first()
    # A first statement of the very last second may not have arrived by the end.
    assert (first == joined).all()
    times = accounts.drop_duplicates(["customer_id", "event_timestamp"]).sort_values(["customer_id", "event_timestamp"])
    gaps = times.groupby("customer_id").event_timestamp.diff().dropna()
    assert (gaps == timedelta(days=7)).all()


def test_some_statements_are_corrected_and_some_prices_rise(raw):
    accounts = table(raw, "accounts").sort_values("created")
    same = accounts.groupby(["customer_id", "event_timestamp"])
    sizes = same.size()
    assert 0.005 < (sizes == 2).mean() < 0.03
    assert sizes.max() == 2
    assert (same.monthly_charges.nunique() == sizes).all()
    newest = same.tail(1).sort_values(["customer_id", "event_timestamp"])
    ratio = newest.groupby("customer_id").monthly_charges.agg(lambda c: c.iloc[-1] / c.iloc[0])
    assert 0.02 < (ratio > 1.1).mean() < 0.4


def test_labels_agree_with_who_still_gets_statements_after_the_horizon(raw):
    summary, accounts, labels = Summary.read(raw), table(raw, "accounts"), table(raw, "labels")
    newest = accounts.groupby("customer_id").event_timestamp.max()
    horizon, week = timedelta(days=HORIZON_DAYS), timedelta(days=7)
    assert summary.end - summary.cut > week
    newest_of = labels.customer_id.map(newest)
    # Statements come weekly: the last lies in the week before leaving, and one follows within a week of t + horizon.
    stayed = newest_of > labels.event_timestamp + horizon
    assert not labels.churned[stayed].any()
    assert labels.churned[newest_of <= labels.event_timestamp + horizon - week].all()
    assert (newest_of[labels.churned == 1] > labels.event_timestamp[labels.churned == 1] - week).all()
    joined = labels.customer_id.map(accounts.groupby("customer_id").joined_at.first())
    assert (joined < labels.event_timestamp).all()
    assert labels.churned.sum() > 50


def test_labels_and_silence_agree_with_the_simulated_last_day():
    telco = Telco(SMALL)
    rng, numbers = next(telco._blocks())
    block = telco._customers(rng, numbers)
    statements, events = telco._statements(rng, block), telco._events(rng, block)
    for columns in (statements, events):
        assert (columns["event_timestamp"] < (block.last_day[columns["customer_id"]] + 1) * DAY).all()
        assert (columns["event_timestamp"] >= block.joined[columns["customer_id"]]).all()
    plan = schedule(START, START + timedelta(days=142), timedelta(days=HORIZON_DAYS))
    labels = telco._labels(block, plan, ChurnOracle(telco.law, HORIZON_DAYS))
    expected = []
    for t in plan.times:
        day = (t - START).days
        for customer in range(len(numbers)):
            left = int(block.last_day[customer]) + 1  # midnight after the last day
            if block.joined[customer] < day * DAY and block.joined[customer] // DAY < day < left:
                expected.append((customer, day * DAY, int(day < left <= day + HORIZON_DAYS)))
    got = zip(labels["customer_id"].tolist(), labels["event_timestamp"].tolist(), labels["churned"].tolist())
    assert list(got) == expected


def test_the_oracle_agrees_with_simulation():
    law = ChurnLaw(base=-5.5, rise_per_day=0.01)
    oracle, rng, n = ChurnOracle(law, HORIZON_DAYS), np.random.default_rng(1), 40_000
    for engagement, contract, plan, risen in ((-1.5, 0, 4, False), (0.0, 1, 2, True), (1.0, 2, 0, False)):
        state = np.array([engagement]), np.array([contract]), np.array([plan]), np.array([risen])
        exact = float(oracle.probability(*state)[0])
        e, raised, left = np.full(n, engagement), np.full(n, risen), np.zeros(n, bool)
        for _ in range(HORIZON_DAYS):
            e = law.persistence * e + law.innovation * rng.standard_normal(n)
            raised |= rng.random(n) < law.rise_per_day
            charges = law.charges(np.full(n, plan), raised)
            left |= rng.random(n) < law.hazard(e, np.full(n, contract), charges)
        sigma = np.sqrt(exact * (1 - exact) / n)
        assert abs(left.mean() - exact) < 4.5 * sigma


def test_the_oracle_does_not_depend_on_its_grid_and_knows_the_closed_form():
    state = np.linspace(-3, 3, 7), np.zeros(7, int), np.full(7, 2), np.zeros(7, bool)
    constant = ChurnLaw(engagement=0.0, rise_per_day=0.0)
    hazard = constant.hazard(np.zeros(1), np.zeros(1, int), constant.charges(np.array([2]), np.array([False])))[0]
    np.testing.assert_allclose(ChurnOracle(constant, 30).probability(*state), 1 - (1 - hazard) ** 30, rtol=1e-12)
    coarse, fine = ChurnOracle(ChurnLaw(), 30), ChurnOracle(ChurnLaw(), 30, nodes_per_sigma=7)
    np.testing.assert_allclose(coarse.probability(*state), fine.probability(*state), atol=1e-9)


def test_the_true_probabilities_are_calibrated_and_separate(raw):
    labels = table(raw, "labels")
    assert labels.best_probability.between(0, 1).all()
    assert abs(labels.best_probability.mean() - labels.churned.mean()) < 0.015
    positive, ranks = labels.churned == 1, labels.best_probability.rank()
    auc = (ranks[positive].mean() - (positive.sum() + 1) / 2) / (~positive).sum()
    assert 0.68 < auc < 0.85


def test_every_label_is_known_at_the_cut_and_the_future_does_not_overlap(raw):
    summary, horizon = Summary.read(raw), timedelta(days=HORIZON_DAYS)
    times = set(table(raw, "labels").event_timestamp)
    assert max(times) + horizon <= summary.cut
    assert summary.train_until in times
    assert summary.future_from in times
    assert summary.future_from - summary.train_until >= horizon
    events = pq.read_table(raw / "events.parquet")
    assert pc.sum(pc.greater(events["created"], summary.cut)).as_py() > 500


def test_few_customers_are_enough_and_too_few_days_are_refused_with_the_number_needed(tmp_path):
    with pytest.raises(Exception, match="history is too short to train on: 52 days before the cut, needed 93"):
        write(tmp_path / "raw", SourceOptions(days=60))
    for options in (SourceOptions(customers=0), SourceOptions(days=-3), SourceOptions(seed=-1)):
        with pytest.raises(UsageError):
            Telco(options)
    with pytest.raises(UsageError, match="--path"):
        Telco(SourceOptions(path=Path("x.csv")))
    write(tmp_path / "edge", SourceOptions(customers=40, days=101))
