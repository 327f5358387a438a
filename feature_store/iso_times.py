"""Many ISO 8601 times at once, to microseconds since the epoch, by numpy on the bytes of an Arrow string array.

Reads what `events.py` reads one by one, and nothing else: `YYYY-MM-DD`, `T` or a space, `HH:MM:SS`, at most six digits of
a fraction, then `Z`, `+HH:MM`, `-HH:MM` or nothing (UTC). What it is not sure of it says, for the slow parser to judge.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

_DIGITS = (0, 1, 2, 3, 5, 6, 8, 9, 11, 12, 14, 15, 17, 18)
_MARKS = ((4, b"-"), (7, b"-"), (13, b":"), (16, b":"))
_LONGEST = 32
_DAY_US, _MINUTE_US, _SECOND_US = 86_400_000_000, 60_000_000, 1_000_000

Ints = np.ndarray[Any, np.dtype[np.int64]]
Bools = np.ndarray[Any, np.dtype[np.bool_]]


def micros_of(times: pa.StringArray) -> tuple[Ints, Bools]:
    """Microseconds of each string, and whether it was read (False also for nulls, whose number is 0)."""
    n = len(times)
    out, known = np.zeros(n, np.int64), np.zeros(n, bool)
    if not n:
        return out, known
    _, offsets_buffer, data_buffer = times.buffers()
    offsets = np.frombuffer(offsets_buffer, np.int32)[times.offset : times.offset + n + 1].astype(np.int64)
    data = np.frombuffer(data_buffer or b"", np.uint8)
    lengths = np.diff(offsets)
    valid = np.asarray(times.is_valid()) if times.null_count else np.ones(n, bool)
    for length in np.unique(lengths[valid]):
        if not 19 <= length <= _LONGEST:
            continue
        rows = np.flatnonzero(valid & (lengths == length))
        if len(rows) == n:
            text = data[offsets[0] : offsets[-1]].reshape(n, length)
        else:
            text = data[offsets[rows][:, None] + np.arange(length)]
        zulu = text[:, -1] == ord("Z")
        offset = np.isin(text[:, -6], (ord("+"), ord("-"))) & ~zulu if length >= 25 else np.zeros(len(rows), bool)
        for zone, chosen in ((1, zulu), (6, offset), (0, ~zulu & ~offset)):
            if chosen.any():
                whole = bool(chosen.all())
                us, read = _same_shape(text if whole else text[chosen], zone)
                place = rows if whole else rows[chosen]
                out[place], known[place] = np.where(read, us, 0), read
    return out, known


def _same_shape(text: np.ndarray[Any, Any], zone: int) -> tuple[Ints, Bools]:
    """Times of one length and kind of zone (its length)."""
    n, length = text.shape
    digit = text - np.uint8(ord("0"))  # wraps beyond 9 for what is no digit
    read = (digit[:, _DIGITS] <= 9).all(axis=1)
    for at, mark in _MARKS:
        read &= text[:, at] == ord(mark)
    read &= (text[:, 10] == ord("T")) | (text[:, 10] == ord(" "))
    fraction = length - 19 - zone
    micros = np.zeros(n, np.int64)
    if fraction == 1 or not 0 <= fraction <= 7:
        return micros, np.zeros(n, bool)
    if fraction:
        read &= (text[:, 19] == ord(".")) & (digit[:, 20 : 19 + fraction] <= 9).all(axis=1)
        micros = _number(digit, 20, fraction - 1) * 10 ** (7 - fraction)
    year, month, day = _number(digit, 0, 4), _number(digit, 5, 2), _number(digit, 8, 2)
    hour, minute, second = _number(digit, 11, 2), _number(digit, 14, 2), _number(digit, 17, 2)
    read &= (year >= 1) & (month >= 1) & (month <= 12) & (day >= 1) & (hour <= 23) & (minute <= 59) & (second <= 59)
    first = np.where(read, (year - 1970) * 12 + month - 1, 0)
    start = first.astype("M8[M]").astype("M8[D]").astype(np.int64)
    end = (first + 1).astype("M8[M]").astype("M8[D]").astype(np.int64)
    read &= day <= end - start
    us = (start + day - 1) * _DAY_US + (hour * 60 + minute) * _MINUTE_US + second * _SECOND_US + micros
    if zone == 6:
        at = length - 6
        read &= (text[:, at + 3] == ord(":")) & (digit[:, (at + 1, at + 2, at + 4, at + 5)] <= 9).all(axis=1)
        hours, minutes = _number(digit, at + 1, 2), _number(digit, at + 4, 2)
        read &= (hours <= 23) & (minutes <= 59)
        shift = (hours * 60 + minutes) * _MINUTE_US
        us -= np.where(text[:, at] == ord("-"), -shift, shift)
    return us, read


def _number(digit: np.ndarray[Any, Any], start: int, length: int) -> Ints:
    value = digit[:, start].astype(np.int64)
    for i in range(start + 1, start + length):
        value = value * 10 + digit[:, i]
    return value
