"""One feature view of a JSON answer: replies of Redis to values that orjson writes, statuses and times, without a
`datetime` or a status object per value. What is not a plain scalar goes through the general decoder.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from feature_store.redis_layout import datetime_of, decode_timestamp, decode_value
from serving.encoding import dumps, plain

if TYPE_CHECKING:
    from feature_store.read_command import Reply
    from feature_store.view_plan import ViewPlan, ViewRow

_DOUBLE = 0x29
_CELL = np.dtype([("tag", "u1"), ("value", "<f8")])
_unpack_double = struct.Struct("<d").unpack_from
_KEPT = 65_536
_LONGEST_KEPT = 64
_COLUMNS_FROM = 4
"""So many rows are decoded by column rather than by row."""


class _Times(dict[bytes, tuple[int, bytes]]):
    """`Timestamp` proto -> (nanoseconds, JSON text). Rows written together share their time: most look-ups hit."""

    def __missing__(self, data: bytes) -> tuple[int, bytes]:
        ns = decode_timestamp(data)
        if len(self) >= _KEPT:
            self.clear()
        made = self[data] = (ns, time_json(ns))
        return made


def time_json(ns: int | None) -> bytes:
    """A time in nanoseconds as answers write it."""
    return b"null" if ns is None else _copy(orjson.dumps(datetime_of(ns), option=orjson.OPT_UTC_Z))


def _copy(text: bytes) -> bytes:
    """For what is kept: what orjson returns holds on to 4 kB, however short it is."""
    return bytes(memoryview(text))


def _value(data: bytes | int | None, hint: Any) -> Any:
    """What orjson writes as the value of one cell; None for a null."""
    if isinstance(data, int):
        return data
    if not data:  # a null as Feast stores it is empty bytes
        return None
    value = decode_value(data, hint)
    if value is None or type(value) is int or type(value) is bool or type(value) is str:
        return value
    if type(value) is float and math.isfinite(value):
        return value
    return orjson.Fragment(_copy(dumps(plain(value))))


class _Values(dict[bytes | None, Any]):
    """Cell -> value, for types of which values repeat: numbers of things, flags, categories."""

    def __missing__(self, data: bytes | None) -> Any:
        made = _value(data, None) if data else None
        if data is None or len(data) <= _LONGEST_KEPT:
            if len(self) >= _KEPT:
                self.clear()
            self[data] = made
        return made


class Caches:
    """What was decoded lately, for all plans of a process together, so that their number costs no memory."""

    def __init__(self) -> None:
        self.times = _Times()
        self.values = _Values()


@dataclass(slots=True)
class Part:
    """One view of one row. `statuses` None: every feature has `status`."""

    values: Sequence[Any]
    status: str
    statuses: Sequence[str] | None
    time: bytes
    ns: int | None = None
    pair: bytes | None = None
    answer: ViewRow | None = None


class JsonView:
    """A `ViewPlan` with its JSON fragments."""

    def __init__(self, plan: ViewPlan, group: int, start: int) -> None:
        self.plan = plan
        self.name = plan.name
        self.group = group
        self.start = start
        self.first = start + 2
        self.end = self.first + len(plan.features)
        self.stop = start + len(plan.fields)
        self.n = len(plan.features)
        self.ttl_ns = plan.ttl_ns
        self.windowed = plan.definition is not None
        self.hints = [f.hint for f in plan.features]
        doubles = [f.type == "DOUBLE" for f in plan.features]
        self.doubles = doubles
        self.row = struct.Struct("<" + "xd" * self.n) if self.n and all(doubles) else None
        self.tags = bytes([_DOUBLE]) * self.n
        self.hinted = any(h is not None for h in self.hints)
        self.nulls: list[Any] = [None] * self.n
        self.names = [orjson.dumps(f.result) + b":" for f in plan.features]
        self.times = [(b"," if i else b"") + name for i, name in enumerate(self.names)] + [b""]
        self.uniform: dict[str, bytes] = {}
        name = orjson.dumps(plan.name)
        self.log_heads = [
            (b"}," if i else b"") + b'%b{"view":%b,"feature":%b,"value":' % (self.names[i], name, orjson.dumps(f.name))
            for i, f in enumerate(plan.features)
        ]
        self.log_name = name + b":"

    def statuses(self, part: Part) -> bytes:
        if part.statuses is not None:
            return b",".join([b'%b"%b"' % (n, s.encode()) for n, s in zip(self.names, part.statuses)])
        made = self.uniform.get(part.status)
        if made is None:
            status = part.status.encode()
            made = self.uniform[part.status] = b",".join([b'%b"%b"' % (n, status) for n in self.names])
        return made

    def at(self, replies: Sequence[Reply], t_ns: int, times: _Times, memo: _Values) -> list[Part]:
        """A row view's part of each row; `ViewPlan.parse` and `at` in one go."""
        parts: list[Part] = []
        live: list[Part] = []
        cells: list[Sequence[bytes | None]] = []
        start, first, end, ttl_ns = self.start, self.first, self.end, self.ttl_ns
        for reply in replies:
            ts = reply[start]
            if ts is None:
                parts.append(Part(self.nulls, "NOT_FOUND", None, b"null"))
                continue
            ns, time = times[ts]
            if ttl_ns is not None and t_ns - ns > ttl_ns:
                parts.append(Part(self.nulls, "OUTSIDE_MAX_AGE", None, time, ns, reply[start + 1]))
                continue
            part = Part(self.nulls, "PRESENT", None, time, ns, reply[start + 1])
            parts.append(part)
            live.append(part)
            cells.append(reply[first:end])
        decoded: Iterable[Sequence[Any]]
        if self.hinted:
            decoded = [[_value(d, h) for d, h in zip(row, self.hints)] for row in cells]
        elif len(cells) < _COLUMNS_FROM:
            decoded = [self._row(row, memo) for row in cells]
        else:
            columns = [self._column(c, double, memo) for c, double in zip(zip(*cells), self.doubles)]
            decoded = zip(*columns) if columns else cells
        for part, values in zip(live, decoded):
            part.values = values
            if None in values:
                part.statuses = ["NULL_VALUE" if v is None else "PRESENT" for v in values]
        return parts

    def _row(self, cells: Sequence[bytes | None], memo: _Values) -> Sequence[Any]:
        if self.row is not None and None not in cells:
            joined = b"".join(cells)  # type: ignore[arg-type]  # no None among them
            if len(joined) == self.row.size and joined[::9] == self.tags:
                numbers = self.row.unpack(joined)
                if math.isfinite(sum(numbers)):
                    return numbers
        return [
            _unpack_double(d, 1)[0] if d and d[0] == _DOUBLE and len(d) == 9 and d[8] & 127 != 127 else memo[d]
            for d in cells  # an exponent that high: huge, infinite or no number
        ]

    @staticmethod
    def _column(cells: Sequence[bytes | None], double: bool, memo: _Values) -> Sequence[Any]:
        if double and None not in cells:
            joined = b"".join(cells)  # type: ignore[arg-type]  # no None among them
            if len(joined) == 9 * len(cells):
                column = np.frombuffer(joined, _CELL)
                numbers = column["value"]
                if (column["tag"] == _DOUBLE).all() and np.isfinite(numbers).all():
                    return numbers.tolist()
        if double:
            return [
                _unpack_double(d, 1)[0] if d and d[0] == _DOUBLE and len(d) == 9 and d[8] & 127 != 127 else memo[d]
                for d in cells
            ]
        return [memo[d] for d in cells]

    def of(self, answer: ViewRow) -> Part:
        """The part of a view that was already read: a windowed one."""
        values, statuses = [], []
        for (status, cell), hint in zip(answer.cells, self.hints):
            value = _value(cell, hint)
            values.append(value)
            statuses.append("NULL_VALUE" if value is None and status == "PRESENT" else status)
        time = time_json(answer.event_ns)
        if statuses and statuses.count(statuses[0]) == len(statuses):
            return Part(values, statuses[0], None, time, None, None, answer)
        return Part(values, "", statuses, time, None, None, answer)
