"""Reads the lines of an Online Retail CSV: every physical line is accepted as a fact or rejected with a reason.

One line is one record (the published file has no line breaks inside quotes), so a stray quote costs its own line and
not the thousands after it, and `accepted + rejected = lines` holds for any input.
"""

from __future__ import annotations

import csv
import gzip
import io
import re
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from decimal import ROUND_HALF_UP, Context, Decimal, InvalidOperation
from pathlib import Path
from typing import BinaryIO

from feature_store.clock import to_micros
from feature_store.errors import DataError, NotFoundError, UsageError
from predictflow.progress import Advance
from predictflow.sources.raw import Rejects

COLUMNS = ("InvoiceNo", "Quantity", "InvoiceDate", "UnitPrice", "CustomerID")
"""What we need of the header; further columns are ignored. The names of the second edition are in ALIASES."""
ALIASES = {"invoice": "invoiceno", "price": "unitprice"}
LIMIT = 2**63
EXACT = Context(prec=200)
"""Digits enough that no product is rounded before the one rounding to cents."""
GZIP_MAGIC = b"\x1f\x8b"
PUBLISHED_DATE = re.compile(r"(\d{1,2})/(\d{1,2})/(\d{4}) (\d{1,2}):(\d{2})(?::(\d{2}))?")
CUSTOMER = re.compile(r"(\d+)(?:\.0*)?")


class Rejected(Exception):
    """The reason why a line is not a fact."""


@dataclass
class InvoiceLines:
    """Accepted lines as columns, in file order; times in microseconds (UTC), amounts in cents."""

    line: list[int]
    invoice: list[str]
    customer: list[str]
    time: list[int]
    quantity: list[int]
    amount: list[int]


def read_invoice_lines(path: Path, rejects: Rejects, advance: Advance) -> InvoiceLines:
    """Reads `path` (CSV or gzip of it, UTF-8 or Latin-1) once; `advance` gets the bytes read of the file.

    Line numbers are those of an editor: the header is line 1. NotFoundError or DataError when the file as a whole
    cannot be used.
    """
    accepted = InvoiceLines([], [], [], [], [], [])
    with _opened(path) as (file, position):
        parse = _parser(file, path)
        reported = 0
        for number, raw in enumerate(file, start=2):
            line = _text(raw)
            try:
                invoice, customer, time, quantity, amount = parse(line)
            except Rejected as reason:
                rejects.add(number, str(reason), line)
            else:
                accepted.line.append(number)
                accepted.invoice.append(invoice)
                accepted.customer.append(customer)
                accepted.time.append(time)
                accepted.quantity.append(quantity)
                accepted.amount.append(amount)
            if number % 20_000 == 0:
                now = position.tell()
                advance(now - reported)
                reported = now
        advance(position.tell() - reported)
    if not accepted.line:
        counted = ", ".join(f"{reason}: {n}" for reason, n in rejects.by_reason.most_common()) or "no line at all"
        raise DataError(f"no acceptable line in the file ({counted})", value=str(path))
    return accepted


def check_header(path: Path) -> None:
    """Reads the header line only; raises as `read_invoice_lines` does for a file that is not one of invoice lines."""
    with _opened(path) as (file, _):
        _parser(file, path)


def _parser(file: BinaryIO, path: Path) -> _LineParser:
    header = file.readline()
    if not header.strip():
        raise DataError("the file is empty", value=str(path))
    return _LineParser(_text(header.removeprefix(b"\xef\xbb\xbf")), path)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, BinaryIO]]:
    """(decompressed bytes, the file itself for its position), with every way to be unreadable as one clear error."""
    if path.is_dir():
        raise UsageError("a directory, not a CSV file", value=str(path))
    try:
        with path.open("rb") as plain:
            magic = plain.read(2)
            plain.seek(0)
            if magic == GZIP_MAGIC:
                with gzip.open(plain) as unpacked:
                    # A buffer of our own: GzipFile.readline takes a detour through Python for every line.
                    yield io.BufferedReader(unpacked, 1 << 20), plain
            elif path.suffix == ".gz" and magic:
                raise DataError("named .gz, but not a gzip file", value=str(path))
            else:
                yield plain, plain
    except FileNotFoundError:
        raise NotFoundError("no such file", value=str(path)) from None
    except (EOFError, zlib.error, gzip.BadGzipFile) as e:
        raise DataError(f"damaged gzip file ({e})", value=str(path)) from e
    except OSError as e:
        raise DataError(f"the file cannot be read ({e.strerror or e})", value=str(path)) from e


def _text(raw: bytes) -> str:
    raw = raw.rstrip(b"\r\n")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("latin-1")


class _LineParser:
    """Turns the text of a line into (invoice, customer, time, quantity, amount in cents), or raises Rejected.

    Dates, prices, quantities and customers repeat a lot: each distinct text is parsed once.
    """

    def __init__(self, header: str, path: Path) -> None:
        try:
            names = ["".join(name.split()).lower() for name in _fields(header)]
        except Rejected as reason:
            raise DataError(f"the header has {reason}", value=str(path)) from None
        names = [ALIASES.get(name, name) for name in names]
        missing = [c for c in COLUMNS if c.lower() not in names]
        if missing:
            raise DataError(
                f"the header has no column {', '.join(missing)}",
                value=str(path),
                valid=COLUMNS,
                next_step="give a comma-separated copy of UCI Online Retail; other data: docs/how-to/add-a-data-source.md",
            )
        self.width = len(names)
        self.places = [names.index(c.lower()) for c in COLUMNS]
        self.quantities = _Memo(_quantity)
        self.times = _Memo(_time)
        self.prices = _Memo(_price)
        self.customers = _Memo(_customer)

    def __call__(self, line: str) -> tuple[str, str, int, int, int]:
        fields = line.split(",") if '"' not in line else _fields(line)
        if len(fields) != self.width:
            raise Rejected("blank line" if not line.strip() else "wrong number of columns")
        at_invoice, at_quantity, at_time, at_price, at_customer = self.places
        customer = self.customers[fields[at_customer]]
        quantity = self.quantities[fields[at_quantity]]
        cents = self.prices[fields[at_price]]
        time = self.times[fields[at_time]]
        invoice = fields[at_invoice].strip()
        if not invoice:
            raise Rejected("no invoice number")
        amount = quantity * cents if type(cents) is int else _rounded(EXACT.multiply(quantity, cents))
        if not -LIMIT < amount < LIMIT:
            raise Rejected("line total out of range")
        return invoice, customer, time, quantity, amount


class _Memo(dict):
    """text -> parsed value; a text that is refused is parsed again each time, which is rare."""

    def __init__(self, parse: Callable[[str], object]) -> None:
        super().__init__()
        self.parse = parse

    def __missing__(self, text: str) -> object:
        value = self[text] = self.parse(text)
        return value


def _fields(line: str) -> list[str]:
    try:
        return next(csv.reader([line], strict=True), [])
    except csv.Error:
        raise Rejected("unbalanced quotes") from None


def _customer(text: str) -> str:
    """`17850.0` (a number that once stood beside nulls) and `17850` are the same customer."""
    if not text.strip():
        raise Rejected("no customer")
    match = CUSTOMER.fullmatch(text.strip())
    if match is None:
        raise Rejected("bad customer number")
    return match[1]


def _number(text: str) -> Decimal | None:
    try:
        value = Decimal(text.strip())
    except InvalidOperation:
        return None
    return value if value.is_finite() and abs(value) < LIMIT else None


def _quantity(text: str) -> int:
    value = _number(text)
    if value is None or value != int(value):
        raise Rejected("bad quantity")
    return int(value)


def _price(text: str) -> int | Decimal:
    """Cents: an int where the price is whole cents (nearly always), else an exact decimal."""
    value = _number(text)
    if value is None:
        raise Rejected("bad unit price")
    cents = EXACT.multiply(value, 100)
    return int(cents) if cents == int(cents) else cents


def _rounded(cents: Decimal) -> int:
    """Half a cent is rounded away from zero, so that a cancellation takes back exactly what the purchase counted."""
    return int(cents.to_integral_value(rounding=ROUND_HALF_UP))


def _time(text: str) -> int:
    """Microseconds; ISO 8601, or the published M/D/YYYY H:MM. A time without a zone is UTC."""
    text = text.strip()
    published = PUBLISHED_DATE.fullmatch(text)
    try:
        if published:
            month, day, year, hour, minute, second = (int(part or 0) for part in published.groups())
            time = datetime(year, month, day, hour, minute, second, tzinfo=UTC)
        else:
            time = datetime.fromisoformat(text)
    except ValueError:
        raise Rejected("bad date") from None
    if not 1990 <= time.year < 2100:
        # A date this wrong would stretch the period, and with it the weekly statements, over centuries.
        raise Rejected("date out of range")
    return to_micros(time)
