"""Online Retail: every line of a dirty CSV is accounted for, and accounts and labels equal a brute-force recomputation."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from feature_store.errors import DataError, NotFoundError, UsageError
from predictflow.progress import no_progress, progress
from predictflow.sources.base import SourceOptions
from predictflow.sources.invoice_lines import InvoiceLines, read_invoice_lines
from predictflow.sources.online_retail import ACTIVE_DAYS, HORIZON_DAYS, OnlineRetail
from predictflow.sources.raw import Rejects, Summary, publish

HEADER = "InvoiceNo,StockCode,Description,Quantity,InvoiceDate,UnitPrice,CustomerID,Country"
START = datetime(2010, 12, 1, 8, 26, tzinfo=UTC)


def write(out: Path, path: Path) -> Summary:
    return publish(out, lambda raw_dir: OnlineRetail(SourceOptions(path=path)).write(raw_dir, progress))


def read(tmp_path: Path, data: bytes, name: str = "data.csv") -> tuple[InvoiceLines, list[dict], Counter[str]]:
    path = tmp_path / name
    path.write_bytes(data)
    with Rejects(tmp_path) as rejects:
        lines = read_invoice_lines(path, rejects, no_progress)
    return lines, [json.loads(r) for r in (tmp_path / "rejects.jsonl").open(encoding="utf-8")], rejects.by_reason


def csv_line(
    invoice="536365", quantity="6", date="2010-12-01 08:26:00", price="2.55", customer="17850.0", description="MUG"
) -> str:
    return f"{invoice},85123A,{description},{quantity},{date},{price},{customer},United Kingdom"


def shop(days: int = 260, customers: int = 12) -> list[str]:
    """Customers who buy every few days, some of whom stop; each takes back a part now and then."""
    lines = []
    for customer in range(customers):
        every, until = 3 + customer * 4, days if customer % 3 else 40 + customer * 13
        for i, day in enumerate(range(customer, until, every)):
            date = f"{START + timedelta(days=day, minutes=customer):%Y-%m-%d %H:%M:%S}"
            lines.append(csv_line(f"{customer:02d}{i:04d}", str(1 + i % 5), date, f"{1 + i % 7}.{i % 10}5", f"{customer + 12000}.0"))  # fmt: skip
            if i % 4 == 3:
                lines.append(csv_line(f"C{customer:02d}{i:04d}", "-1", date, "1.05", f"{customer + 12000}.0"))
    return lines


@pytest.fixture(scope="module")
def retail(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("retail")
    (folder / "shop.csv.gz").write_bytes(gzip.compress("\n".join([HEADER, *shop(), csv_line(customer="")]).encode()))
    write(folder / "raw", folder / "shop.csv.gz")
    return folder / "raw"


def table(raw: Path, name: str):
    return pq.read_table(raw / f"{name}.parquet").to_pandas()


def test_each_kind_of_bad_line_is_rejected_with_its_reason_and_its_raw_text(tmp_path):
    bad = {
        "no customer": csv_line(customer=""),
        "bad customer number": csv_line(customer="anna"),
        "bad quantity": csv_line(quantity="1.5"),
        "bad unit price": csv_line(price="NaN"),
        "bad date": csv_line(date="13/13/2010 8:26"),
        "date out of range": csv_line(date="0201-12-01 08:26:00"),
        "no invoice number": csv_line(invoice=" "),
        "wrong number of columns": "536365,85123A",
        "unbalanced quotes": csv_line(description='"MUG'),
        "blank line": "",
        "line total out of range": csv_line(quantity="9223372036854775807", price="2"),
    }
    text = "\r\n".join([HEADER, *bad.values(), csv_line()]) + "\r\n"
    accepted, rejects, by_reason = read(tmp_path, text.encode())
    assert [(r["line"], r["reason"], r["raw"]) for r in rejects] == [
        (i, *b) for i, b in enumerate(bad.items(), start=2)
    ]
    assert by_reason == dict.fromkeys(bad, 1)
    assert accepted.line == [len(bad) + 2]


def test_a_stray_quote_costs_its_own_line_only(tmp_path):
    lines = [csv_line() for _ in range(3000)]
    lines[10] = csv_line(description='"OPEN')
    lines[20] = csv_line(description='"AIRLINE ""LOUNGE"",METAL SIGN"')
    accepted, _, by_reason = read(tmp_path, "\n".join([HEADER, *lines]).encode())
    assert by_reason == {"unbalanced quotes": 1}
    assert len(accepted.line) == 2999


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("2010-12-01 08:26:00", START),
        ("12/1/2010 8:26", START),
        ("12/01/2010 08:26:00", START),
        ("2010-12-01T08:26:00.000001", START + timedelta(microseconds=1)),
        ("2010-12-01T10:26:00+02:00", START),
        ("2010-12-01", START.replace(hour=0, minute=0)),
    ],
)
def test_dates_are_iso_or_as_published_and_utc_unless_they_say_otherwise(tmp_path, text, expected):
    accepted, _, _ = read(tmp_path, f"{HEADER}\n{csv_line(date=text)}\n".encode())
    assert accepted.time == [int(expected.timestamp()) * 1_000_000 + expected.microsecond]


@pytest.mark.parametrize(
    ("quantity", "price", "cents"),
    [("6", "2.55", 1530), ("3", "0.001", 0), ("5", "0.001", 1), ("-5", "0.001", -1), ("1", "1e2", 10000), ("2", "0.0", 0),
     ("100000", "1.1", 11000000), ("7", "0.29", 203)],
)  # fmt: skip
def test_amounts_are_exact_and_half_a_cent_rounds_away_from_zero(tmp_path, quantity, price, cents):
    accepted, _, _ = read(tmp_path, f"{HEADER}\n{csv_line(quantity=quantity, price=price)}\n".encode())
    assert accepted.amount == [cents]
    assert abs(Decimal(quantity) * Decimal(price) * 100 - cents) <= Decimal("0.5")


def test_latin1_utf8_bom_line_ends_column_order_and_the_second_edition_are_read(tmp_path):
    second = "Customer ID,Price,Invoice,Quantity,InvoiceDate,Description"
    row = '17850,2.55,536365,6,12/1/2010 8:26,"CAFÉ, £"'
    for encoding, end in (("latin-1", "\n"), ("utf-8-sig", "\r\n"), ("utf-8", "\n")):
        accepted, _, by_reason = read(tmp_path, (second + end + row + end).encode(encoding))
        assert (accepted.customer, accepted.amount, accepted.invoice) == (["17850"], [1530], ["536365"])
        assert not by_reason
    _, rejects, _ = read(
        tmp_path, f"{HEADER}\n{csv_line()}\n{csv_line(customer='', description='CAFÉ')}".encode("latin-1")
    )
    assert "CAFÉ" in rejects[0]["raw"]


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    st.lists(
        st.one_of(
            st.text(alphabet=st.characters(blacklist_characters="\n", codec="utf-8"), max_size=40),
            st.builds(
                csv_line,
                quantity=st.one_of(st.integers().map(str), st.text("0123456789.-+einf ", max_size=6)),
                price=st.one_of(st.decimals().map(str), st.just("2.55")),
                date=st.sampled_from(["2010-12-01 08:26:00", "12/1/2010 8:26", "1/13/2010 25:00", ""]),
                customer=st.sampled_from(["17850.0", "17850", "", "x", "1e5", "٣"]),
                description=st.sampled_from(["MUG", '"A,B"', '"', 'A"B', "\x00", "\x85\u2028", "\r"]),
            ),
        ),
        max_size=8,
    )
)
@example(["\x0c", "\x1e", csv_line(quantity="1e999999")])
def test_every_line_of_a_dirty_file_is_accepted_or_rejected_once_with_its_number(tmp_path, dirt):
    data = "\n".join([HEADER, csv_line(), *dirt]).encode()
    accepted, rejects, by_reason = read(tmp_path, data)
    in_file = data.count(b"\n") + (0 if data.endswith(b"\n") else 1)
    assert sorted([*accepted.line, *(r["line"] for r in rejects)]) == list(range(2, in_file + 1))
    assert sum(by_reason.values()) == len(rejects)
    physical = data.decode().split("\n")
    assert all(r["raw"] == physical[r["line"] - 1].rstrip("\r") for r in rejects)


def test_identical_lines_stay_two_facts_and_cancellations_compensate(retail, tmp_path):
    path = tmp_path / "twice.csv"
    path.write_text("\n".join([HEADER, csv_line(), csv_line(), csv_line("C536379", "-2"), *shop()]))
    write(tmp_path / "raw", path)
    events = table(tmp_path / "raw", "events")
    assert events.event_id.is_unique
    first = events[events.customer_id == "17850"]
    assert first.event_type.tolist() == ["purchase", "purchase", "cancellation"]
    assert first.quantity.tolist() == [6, 6, -2]
    assert first.amount_cents.sum() == 2 * 1530 - 510
    assert first.event_id.tolist() == ["536365-0000002", "536365-0000003", "C536379-0000004"]


def test_the_summary_counts_what_the_files_hold(retail):
    summary, events = Summary.read(retail), table(retail, "events")
    assert (summary.events, summary.rejected, summary.rejected_by_reason) == (len(shop()), 1, {"no customer": 1})
    assert (len(events), events.customer_id.nunique()) == (summary.events, summary.customers)
    assert (events.created == events.event_timestamp).all()
    assert summary.start <= events.event_timestamp.min() < events.event_timestamp.max() < summary.end
    assert events[events.created > summary.cut].shape[0] > 0


def test_statements_come_weekly_and_know_only_the_events_until_then(retail):
    summary, accounts, events = Summary.read(retail), table(retail, "accounts"), table(retail, "events")
    assert accounts.contract_months.isna().all()
    assert accounts.payment_method.isna().all()
    expected = []
    for customer, own in events.groupby("customer_id"):
        joined = at = own[own.event_type == "purchase"].event_timestamp.min()
        while at < summary.end:
            spend = int(own[own.event_timestamp <= at].amount_cents.sum()) / 100
            months = max((at - joined) / timedelta(days=30.4375), 1.0)
            expected.append((customer, at, joined, pytest.approx(spend / months, abs=0.0051)))
            at += timedelta(days=7)
    got = accounts.sort_values(["customer_id", "event_timestamp"])
    assert list(zip(got.customer_id, got.event_timestamp, got.joined_at, got.monthly_charges)) == expected


def test_labels_agree_with_a_recomputation_from_the_events(retail):
    summary, labels, events = Summary.read(retail), table(retail, "labels"), table(retail, "events")
    bought = events[events.event_type == "purchase"].groupby("customer_id").event_timestamp.agg(list)
    expected = set()
    for t in set(labels.event_timestamp):
        assert t + timedelta(days=HORIZON_DAYS) <= summary.cut
        for customer, times in bought.items():
            if any(t - timedelta(days=ACTIVE_DAYS) < x <= t for x in times):
                gone = not any(t < x <= t + timedelta(days=HORIZON_DAYS) for x in times)
                expected.add((customer, t, int(gone)))
    got = list(zip(labels.customer_id, labels.event_timestamp, labels.churned))
    assert set(got) == expected
    assert len(got) == len(expected)
    assert 0 < labels.churned.mean() < 1
    assert labels.best_probability.isna().all()


def test_a_customer_who_only_cancels_has_events_and_no_statement(tmp_path):
    path = tmp_path / "data.csv"
    path.write_text("\n".join([HEADER, csv_line("C1", "-1", customer="99999.0"), *shop()]))
    write(tmp_path / "raw", path)
    assert "99999" in set(table(tmp_path / "raw", "events").customer_id)
    assert "99999" not in set(table(tmp_path / "raw", "accounts").customer_id)


@pytest.mark.parametrize(
    ("content", "name", "message"),
    [
        (b"", "data.csv", "the file is empty"),
        (gzip.compress(b"", mtime=0), "data.csv.gz", "the file is empty"),
        (b"InvoiceNo,Quantity\n1,2\n", "data.csv", "the header has no column InvoiceDate, UnitPrice, CustomerID"),
        ((HEADER + "\n").encode(), "data.csv", "no acceptable line in the file (no line at all)"),
        (f"{HEADER}\n{csv_line(customer='')}\n1\n".encode(), "data.csv", "no customer: 1, wrong number of columns: 1"),
        (b"plain text", "data.csv.gz", "named .gz, but not a gzip file"),
        (
            gzip.compress(f"{HEADER}\n".encode() + csv_line().encode() * 9, mtime=0)[:-12],
            "data.csv.gz",
            "damaged gzip file",
        ),
        (f"{HEADER}\n{csv_line()}\n".encode(), "data.csv", "history is too short to train on"),
        (b'"InvoiceNo,Quantity\n', "data.csv", "the header has unbalanced quotes"),
    ],
)
def test_a_file_that_cannot_be_used_is_one_clear_error_and_leaves_nothing(tmp_path, content, name, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        write(tmp_path / "out" / "raw", tmp_path / name)
    assert message in error.value.message
    assert "\n" not in error.value.message
    assert not list((tmp_path / "out").glob("*"))
    assert not list((tmp_path / "out").glob(".*"))


def test_a_missing_file_a_directory_and_no_file_are_named(tmp_path):
    with pytest.raises(NotFoundError, match="no such file"):
        write(tmp_path / "raw", tmp_path / "nowhere.csv")
    with pytest.raises(UsageError, match="a directory"):
        write(tmp_path / "raw", tmp_path)
    with pytest.raises(UsageError, match="--path"):
        OnlineRetail(SourceOptions())
    with pytest.raises(UsageError, match="--seed"):
        OnlineRetail(SourceOptions(path=tmp_path, seed=1))
