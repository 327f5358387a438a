"""A seeded telco: customers join, use the service, call support, and leave by a law that is known (`telco_oracle.py`).

A source for learning and for tests: since the law is known, so is the best reachable AUC. The same options give the
same bytes. Late events and corrections are part of it, because real data has them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_store.clock import to_micros
from feature_store.errors import UsageError
from predictflow.sources.base import Progress, SourceOptions
from predictflow.sources.raw import Summary, write_table
from predictflow.sources.schedule import Schedule, schedule
from predictflow.sources.telco_oracle import CONTRACT_MONTHS, PRICES, ChurnLaw, ChurnOracle, Floats, Ints

START = datetime(2025, 1, 1, tzinfo=UTC)
HORIZON_DAYS = 30
LIVE_DAYS = 8
"""Days after the cut: some thousands of events for the live stream at the default size."""
LATE_SHARE = 0.03
CORRECTED_SHARE = 0.015
PAYMENT = np.array(["bank transfer", "card", "invoice"])

SECOND = 1_000_000
DAY = 86_400 * SECOND
NEVER = np.iinfo(np.int64).max // (2 * DAY)
CUSTOMERS_AT_ONCE = 500

Columns = dict[str, npt.NDArray]


@dataclass(frozen=True)
class Customers:
    """A block of simulated customers: one entry (row) per customer; matrices are customer x day."""

    number: Ints
    joined: Ints
    """Microseconds after the start."""
    contract: Ints
    plan: Ints
    payment: Ints
    engagement: Floats
    risen: npt.NDArray[np.bool_]
    """Whether the price in force on that day has risen."""
    last_day: Ints
    """The day at whose end the customer left; NEVER for one who stayed."""

    @property
    def first_day(self) -> Ints:
        return self.joined // DAY


class Telco:
    """The simulator as a data source: `--customers` (2,000), `--days` (270) and `--seed` (7) are its options."""

    name = "telco"

    def __init__(self, options: SourceOptions, law: ChurnLaw | None = None) -> None:
        options.only(self.name, "customers", "days", "seed")
        self.customers = 2_000 if options.customers is None else options.customers
        self.days = 270 if options.days is None else options.days
        self.seed = 7 if options.seed is None else options.seed
        self.law = law or ChurnLaw()
        if self.customers < 1:
            raise UsageError("--customers must be at least 1", value=self.customers)
        if self.seed < 0:
            raise UsageError("--seed must not be negative", value=self.seed)
        if not 1 <= self.days <= 3_650:
            raise UsageError("--days must be between 1 and 3650", value=self.days)

    @classmethod
    def accepts(cls, path: Path) -> bool:  # noqa: ARG003  # the interface of a data source
        """Never: it reads no file."""
        return False

    def write(self, raw_dir: Path, progress: Progress) -> Summary:
        """Simulates and writes; safe to run again. UsageError when `--days` is too short to train on."""
        cut, end = START + timedelta(days=self.days - LIVE_DAYS), START + timedelta(days=self.days)
        plan = schedule(START, cut, timedelta(days=HORIZON_DAYS))
        oracle = ChurnOracle(self.law, HORIZON_DAYS)
        parts: dict[str, list[Columns]] = {"accounts": [], "events": [], "labels": []}
        with progress("simulate customers", total=self.customers, unit="customers") as advance:
            for rng, numbers in self._blocks():
                block = self._customers(rng, numbers)
                parts["accounts"].append(self._statements(rng, block))
                parts["events"].append(self._events(rng, block))
                parts["labels"].append(self._labels(block, plan, oracle))
                advance(len(numbers))
        tables = {
            name: {c: np.concatenate([p[c] for p in blocks]) for c in blocks[0]} for name, blocks in parts.items()
        }
        tables["events"]["event_id"] = _numbered(tables["events"]["event_timestamp"])
        for name, columns in tables.items():
            write_table(raw_dir, name, {c: _finished(c, values) for c, values in columns.items()})
        return Summary(
            dataset=self.name,
            customers=self.customers,
            events=len(tables["events"]["event_timestamp"]),
            rejected_by_reason={},
            start=START,
            cut=cut,
            end=end,
            horizon_days=HORIZON_DAYS,
            train_until=plan.train_until,
            future_from=plan.future_from,
        )

    def _blocks(self) -> Iterator[tuple[np.random.Generator, Ints]]:
        """Blocks keep memory flat; each has its own random stream, so a block does not depend on those before it."""
        starts = range(0, self.customers, CUSTOMERS_AT_ONCE)
        for first, seed in zip(starts, np.random.SeedSequence(self.seed).spawn(len(starts))):
            yield np.random.default_rng(seed), np.arange(first, min(first + CUSTOMERS_AT_ONCE, self.customers))

    def _customers(self, rng: np.random.Generator, number: Ints) -> Customers:
        n, days, law = len(number), self.days, self.law
        # Half of them join in the first four weeks, the others over the whole time until two weeks before the end.
        span = np.where(rng.random(n) < 0.5, min(28, days), max(days - 14, 1)) * DAY
        joined = (rng.random(n) * span).astype(np.int64)
        contract = rng.choice(len(CONTRACT_MONTHS), n, p=[0.55, 0.27, 0.18])
        plan = rng.choice(len(PRICES), n, p=[0.2, 0.25, 0.25, 0.2, 0.1])
        payment = rng.choice(len(PAYMENT), n, p=[0.35, 0.45, 0.2])
        engagement = np.empty((n, days))
        e = rng.standard_normal(n)
        for today in range(days):
            engagement[:, today] = e = law.persistence * e + law.innovation * rng.standard_normal(n)
        day = np.arange(days)
        since_joined = day[None, :] >= (joined // DAY)[:, None]
        risen = np.logical_or.accumulate((rng.random((n, days)) < law.rise_per_day) & since_joined, axis=1)
        hazard = law.hazard(engagement, contract[:, None], law.charges(plan[:, None], risen))
        leaves = (rng.random((n, days)) < hazard) & since_joined
        last_day = np.where(leaves.any(axis=1), leaves.argmax(axis=1), NEVER)
        return Customers(number, joined, contract, plan, payment, engagement, risen, last_day)

    def _statements(self, rng: np.random.Generator, c: Customers) -> Columns:
        """One at joining and every 7 days after it while the customer stays; a few are wrong and corrected later."""
        weeks = np.arange(self.days // 7 + 1)
        time = c.joined[:, None] + weeks * 7 * DAY
        row, week = np.nonzero(time < np.minimum(self.days, c.last_day + 1)[:, None] * DAY)
        at = time[row, week]
        right = self.law.charges(c.plan[row], c.risen[row, at // DAY])
        created = at + rng.integers(SECOND // 20, SECOND, len(at))
        wrong = np.flatnonzero(rng.random(len(at)) < CORRECTED_SHARE)
        first = right.copy()
        first[wrong] = np.round(right[wrong] * rng.choice([0.5, 0.8, 1.25, 2.0], len(wrong)), 2)
        corrected = created[wrong] + rng.integers(3_600 * SECOND, 6 * DAY, len(wrong))
        rows = np.concatenate([row, row[wrong]])
        columns: Columns = {
            "customer_id": c.number[rows],
            "event_timestamp": np.concatenate([at, at[wrong]]),
            "created": np.concatenate([created, corrected]),
            "joined_at": c.joined[rows],
            "monthly_charges": np.concatenate([first, right[wrong]]),
            "contract_months": CONTRACT_MONTHS[c.contract[rows]],
            "payment_method": PAYMENT[c.payment[rows]],
        }
        return self._known_by_end(columns)

    def _events(self, rng: np.random.Generator, c: Customers) -> Columns:
        """Usage (minutes; cents beyond the plan's allowance) and support tickets, Poisson per day by engagement."""
        day = np.arange(self.days)
        present = (day >= c.first_day[:, None]) & (day <= c.last_day[:, None])
        usage = self._happen(rng, c, np.where(present, np.exp(-0.75 + 0.55 * c.engagement), 0))
        ticket = self._happen(rng, c, np.where(present, np.exp(-4.3 - 0.7 * c.engagement), 0))
        row, at = np.concatenate([usage[0], ticket[0]]), np.concatenate([usage[1], ticket[1]])
        minutes = np.ceil(rng.lognormal(2.3 + 0.35 * c.engagement[usage[0], usage[1] // DAY], 0.8)).astype(np.int64)
        allowance = (PRICES[c.plan[usage[0]]] * 0.8).astype(np.int64)
        none = np.zeros(len(ticket[0]), np.int64)
        late = rng.random(len(at)) < LATE_SHARE
        minute_to_days = np.exp(rng.uniform(np.log(60), np.log(5 * 86_400), len(at))) * SECOND
        soon = rng.uniform(0.05, 1.0, len(at)) * SECOND
        columns: Columns = {
            "customer_id": c.number[row],
            "event_type": np.repeat(["usage", "ticket"], [len(usage[0]), len(ticket[0])]),
            "event_timestamp": at,
            "created": at + np.where(late, minute_to_days, soon).astype(np.int64),
            "quantity": np.concatenate([minutes, none]),
            "amount_cents": np.concatenate([np.maximum(minutes - allowance, 0) * 10, none]),
        }
        return self._known_by_end(columns)

    @staticmethod
    def _happen(rng: np.random.Generator, c: Customers, rate: Floats) -> tuple[Ints, Ints]:
        """(customer row, time) of Poisson events, uniform within their day; on the first day, after joining."""
        times = rng.poisson(rate)
        row, day = (np.repeat(index, times[times > 0]) for index in np.nonzero(times))
        opens = np.maximum(day * DAY, c.joined[row])
        return row, opens + (rng.random(len(row)) * ((day + 1) * DAY - opens)).astype(np.int64)

    def _known_by_end(self, columns: Columns) -> Columns:
        """What had not arrived by the end of the simulated time is not in the data yet."""
        kept = columns["created"] < self.days * DAY
        return {name: values[kept] for name, values in columns.items()}

    @staticmethod
    def _labels(c: Customers, plan: Schedule, oracle: ChurnOracle) -> Columns:
        """Customers present at t: whether they left in (t, t + horizon], and the true probability that they would."""
        parts = []
        for t in plan.times:
            day = (t - START).days
            rows = np.flatnonzero((c.first_day < day) & (c.last_day >= day))
            state = c.engagement[rows, day - 1], c.contract[rows], c.plan[rows], c.risen[rows, day - 1]
            probability = oracle.probability(*state)
            parts.append((rows, np.full(len(rows), day * DAY), c.last_day[rows] < day + HORIZON_DAYS, probability))
        rows, at, churned, probability = (np.concatenate(column) for column in zip(*parts))
        return {
            "customer_id": c.number[rows],
            "event_timestamp": at,
            "churned": churned.astype(np.int8),
            # Rounded, because the last bits of a matrix product differ between processors.
            "best_probability": np.round(probability, 9),
        }


def _numbered(times: Ints) -> npt.NDArray:
    """Event ids in order of event time."""
    ids = np.empty(len(times), dtype=object)
    ids[np.argsort(times, kind="stable")] = [f"E{i:08d}" for i in range(len(times))]
    return ids


def _finished(column: str, values: npt.NDArray) -> object:
    if column == "customer_id":
        names = pa.array([f"C{i:06d}" for i in range(int(values.max(initial=0)) + 1)])
        return names.take(pa.array(values))
    if column in ("event_timestamp", "created", "joined_at"):
        return values + to_micros(START)
    return values
