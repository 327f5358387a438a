"""Lengths of windows as SQL writes them, in microseconds."""

from __future__ import annotations

import re
from dataclasses import dataclass

from feature_store.windows.sql_tokens import At, SqlError, Token

_UNITS_US = {
    "MILLISECOND": 1_000,
    "SECOND": 1_000_000,
    "MINUTE": 60_000_000,
    "HOUR": 3_600_000_000,
    "DAY": 86_400_000_000,
    "WEEK": 7 * 86_400_000_000,
}
_MAX_US = 36_525 * _UNITS_US["DAY"]
_IN_DAYS = {"MONTH": 30, "QUARTER": 91, "YEAR": 365}


@dataclass(frozen=True)
class Interval:
    """A fixed, positive length in microseconds."""

    at: At
    us: int
    depth: int = 1


def interval(at: At, count: Token, unit: Token | None) -> Interval:
    """`INTERVAL '7' DAYS`, `INTERVAL 7 DAYS`, `INTERVAL '7 days'` (then `unit` is None). SqlError for every other length."""
    number, name, name_at = count.text.strip(), "", count.at
    if unit is not None and unit.kind == "name":
        name, name_at = unit.upper, unit.at
    elif count.kind == "string" and (both := re.fullmatch(r"(\S+)\s+([A-Za-z]+)", number)):
        number, name = both[1], both[2].upper()
    singular = name.removesuffix("S")
    if singular in _IN_DAYS:
        days = int(number) * _IN_DAYS[singular] if re.fullmatch("[0-9]{1,4}", number) else _IN_DAYS[singular]
        raise SqlError(name_at, f"a {singular} has no fixed length", value=name, nearest=f"INTERVAL '{days}' DAYS")
    if singular not in _UNITS_US:
        units = [f"{u}S" for u in _UNITS_US]
        raise SqlError(
            name_at, "not a unit of time", value=name or count.text, valid=units, nearest="INTERVAL '7' DAYS"
        )
    if count.kind not in ("number", "string") or not re.fullmatch("[+-]?[0-9]{1,15}", number):
        raise SqlError(
            count.at, "not a whole number", value=number[:40], nearest="a smaller unit, like INTERVAL '90' MINUTES"
        )
    us = int(number) * _UNITS_US[singular]
    if us <= 0:
        raise SqlError(count.at, "a window's length must be positive", value=number, nearest=f"INTERVAL '1' {singular}")
    if us > _MAX_US:
        raise SqlError(count.at, "longer than 100 years", value=f"{number} {name}", nearest="INTERVAL '365' DAYS")
    return Interval(at, us)


def interval_sql(us: int) -> str:
    """A length as SQL, in the greatest unit that fits: `INTERVAL '7' DAY`."""
    for name in ("DAY", "HOUR", "MINUTE", "SECOND"):
        if us % _UNITS_US[name] == 0:
            return f"INTERVAL '{us // _UNITS_US[name]}' {name}"
    return f"INTERVAL '{us / 1_000_000:.6f}' SECOND"


def length_in_words(us: int) -> str:
    """A length for people: `7 days`."""
    if us == 0:
        return "0 seconds"
    for name in ("DAY", "HOUR", "MINUTE", "SECOND", "MILLISECOND"):
        if us % _UNITS_US[name] == 0:
            count = us // _UNITS_US[name]
            return f"{count:,} {name.lower()}{'' if count == 1 else 's'}"
    return f"{us:,} microseconds"
