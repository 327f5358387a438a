"""UCI Online Retail as a data source: customers from invoices, an event per invoice line, cancellations included.

Source: D. Chen, S. L. Sain, K. Guo (2012), UCI Machine Learning Repository, "Online Retail", CC BY 4.0.
It knows no lateness: `created` is the event time. It knows no contracts: those account columns are null.
"""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from feature_store.clock import from_micros, to_micros
from feature_store.errors import UsageError
from predictflow.sources.base import Progress, SourceOptions
from predictflow.sources.invoice_lines import InvoiceLines, check_header, read_invoice_lines
from predictflow.sources.raw import Rejects, Summary, write_table
from predictflow.sources.schedule import schedule

HORIZON_DAYS = 60
ACTIVE_DAYS = 120
LIVE_DAYS = 7
"""Days after the cut, for the live stream."""

DAY = 86_400_000_000
MONTH = 30.4375 * DAY

Ints = npt.NDArray[np.int64]


class OnlineRetail:
    """The raw CSV (or csv.gz) at `--path` as a data source."""

    name = "online_retail"

    def __init__(self, options: SourceOptions) -> None:
        options.only(self.name, "path")
        if options.path is None:
            raise UsageError(
                "source online_retail reads a file, and none is given",
                next_step="pass --path path/to/online_retail.csv.gz",
            )
        self.path = options.path

    @classmethod
    def accepts(cls, path: Path) -> bool:
        """A name that ends in .csv or .csv.gz."""
        return path.name.lower().endswith((".csv", ".csv.gz"))

    def check_input(self) -> None:
        """Whether the file's header is that of invoice lines; errors as for `write`."""
        check_header(self.path)

    def write(self, raw_dir: Path, progress: Progress) -> Summary:
        """Reads and writes; safe to run again. Errors: see `read_invoice_lines`; DataError for too short a period."""
        size = self.path.stat().st_size if self.path.is_file() else None
        with (
            Rejects(raw_dir) as rejects,
            progress(f"read {self.path.name}", total=size, unit="bytes") as advance,
        ):
            lines = read_invoice_lines(self.path, rejects, advance)
        encoded = pa.array(lines.customer, pa.string()).dictionary_encode()
        names, customer = encoded.dictionary, encoded.indices.to_numpy().astype(np.int64)
        time = np.array(lines.time, np.int64)
        start, end = (from_micros(int(day) * DAY) for day in (time.min() // DAY, time.max() // DAY + 1))
        cut = end - timedelta(days=LIVE_DAYS)
        plan = schedule(start, cut, timedelta(days=HORIZON_DAYS), every=timedelta(days=14))
        amount = np.array(lines.amount, np.int64)
        kind = _event_types(lines)
        write_table(raw_dir, "events", _events(lines, encoded.cast(pa.string()), kind, time, amount))
        purchase = kind == "purchase"
        who, at, joined, charges = _statements(customer, time, amount, purchase, to_micros(end))
        nothing = pa.nulls(len(who))
        statements = {
            "customer_id": names.take(pa.array(who)),
            "event_timestamp": at,
            "created": at,
            "joined_at": joined,
            "monthly_charges": charges,
            "contract_months": nothing,
            "payment_method": nothing,
        }
        write_table(raw_dir, "accounts", statements)
        who, at, churned = _labels(customer[purchase], time[purchase], [to_micros(t) for t in plan.times])
        labels = {
            "customer_id": names.take(pa.array(who)),
            "event_timestamp": at,
            "churned": churned.astype(np.int8),
            "best_probability": pa.nulls(len(who)),
        }
        write_table(raw_dir, "labels", labels)
        return Summary(
            dataset=self.name,
            customers=len(names),
            events=len(time),
            rejected_by_reason=rejects.by_reason,
            start=start,
            cut=cut,
            end=end,
            horizon_days=HORIZON_DAYS,
            train_until=plan.train_until,
            future_from=plan.future_from,
        )


def _event_types(lines: InvoiceLines) -> npt.NDArray:
    """A cancellation is a line of an invoice `C...`, or one that takes goods back: a compensating event."""
    is_cancelled = np.array([i[0] in "Cc" for i in lines.invoice]) | (np.array(lines.quantity, np.int64) < 0)
    return np.where(is_cancelled, "cancellation", "purchase")


def _events(lines: InvoiceLines, customer: pa.Array, kind: npt.NDArray, time: Ints, amount: Ints) -> dict[str, object]:
    """Two identical lines of one invoice are two facts: the line number is part of the id."""
    return {
        "event_id": pa.array([f"{invoice}-{line:07d}" for invoice, line in zip(lines.invoice, lines.line)]),
        "customer_id": customer,
        "event_type": pa.array(kind),
        "event_timestamp": time,
        "created": time,
        "quantity": pa.array(lines.quantity, pa.int64()),
        "amount_cents": amount,
    }


def _statements(
    customer: Ints, time: Ints, amount: Ints, purchase: npt.NDArray[np.bool_], end: int
) -> tuple[Ints, Ints, Ints, npt.NDArray[np.float64]]:
    """(customer, time, joined, charges) every 7 days from the first purchase on, before `end`.

    Charges: net spend so far per month of tenure, in currency; the first month counts in full. Only events up to the
    statement's time count, so a statement knows nothing that its reader could not.
    """
    order = np.lexsort((time, customer))
    customer, time, amount, purchase = customer[order], time[order], amount[order], purchase[order]
    # Customers whose purchases lie before the data (they only cancel here) never join, and get no statement.
    buyers, first = np.unique(customer[purchase], return_index=True)
    joined = time[purchase][first]
    count = (end - 1 - joined) // (7 * DAY) + 1
    who = np.repeat(buyers, count)
    joined = np.repeat(joined, count)
    week = np.arange(len(who)) - np.repeat(np.cumsum(count) - count, count)
    at = joined + week * 7 * DAY
    # One sorted key over (customer, time) finds the newest event up to each statement for all customers at once.
    origin, span = time.min(), np.int64(end - time.min() + 1)
    newest = np.searchsorted(customer * span + (time - origin), who * span + (at - origin), side="right")
    total = np.concatenate([[0], np.cumsum(amount)])
    before = np.searchsorted(customer, who, side="left")
    spend = (total[newest] - total[before]) / 100
    return who, at, joined, np.round(spend / np.maximum((at - joined) / MONTH, 1.0), 2)


def _labels(customer: Ints, time: Ints, times: list[int]) -> tuple[Ints, Ints, npt.NDArray[np.bool_]]:
    """(customer, t, churned) of customers with a purchase in (t - 120 d, t]: churned is no purchase in (t, t + 60 d]."""
    who, at, churned = [], [], []
    for t in times:
        active = np.unique(customer[(time > t - ACTIVE_DAYS * DAY) & (time <= t)])
        buys = np.unique(customer[(time > t) & (time <= t + HORIZON_DAYS * DAY)])
        who.append(active)
        at.append(np.full(len(active), t))
        churned.append(~np.isin(active, buys))
    return np.concatenate(who), np.concatenate(at), np.concatenate(churned)
