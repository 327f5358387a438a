"""Redis' replies straight to the JSON of an answer and of the served log, by fragments compiled once per read plan.

The same documents as `OnlineService.features` builds from Python values (a test holds the two together), without a
Python object per value, status and time. What is not a plain scalar goes through the general decoder.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import orjson

from feature_store.clock import from_micros
from feature_store.redis_layout import datetime_of, decode_pair, decode_timestamp, decode_value
from feature_store.windows.state import NEVER
from serving.encoding import dumps, plain
from serving.served_log import Served, message_key

if TYPE_CHECKING:
    from feature_store.read_plan import ReadPlan, Reply
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
        made = self[data] = (ns, _time(ns))
        return made


def _time(ns: int | None) -> bytes:
    return b"null" if ns is None else orjson.dumps(datetime_of(ns), option=orjson.OPT_UTC_Z)


def _micros(us: int) -> bytes:
    return orjson.dumps(from_micros(us), option=orjson.OPT_UTC_Z)


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
    return orjson.Fragment(dumps(plain(value)))


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


class _View:
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
        time = _time(answer.event_ns)
        if statuses and statuses.count(statuses[0]) == len(statuses):
            return Part(values, statuses[0], None, time, None, None, answer)
        return Part(values, "", statuses, time, None, None, answer)


@dataclass(slots=True)
class Answered:
    """Rows that were read, as fragments: enough for the answer's body, the metrics and the served log."""

    plan: JsonPlan
    entities: Sequence[Mapping[str, Any]]
    t_us: int
    rows: Sequence[Sequence[Part]]

    def __len__(self) -> int:
        return len(self.rows)


class JsonPlan:
    """A read plan as JSON; `name` is the feature service's, None for a list of features. Immutable but for its caches,
    which it shares with the other plans of one event loop.
    """

    def __init__(self, plan: ReadPlan, name: str | None, caches: Caches | None = None) -> None:
        self.plan = plan
        self.name = name
        self._views = [_View(view, group, start) for view, group, start in plan.places()]
        self._width = plan.width
        self._windowed = any(v.windowed for v in self._views)
        caches = caches or Caches()
        self._times = caches.times
        self._values = caches.values
        self._names = [f.result for v in plan.view_plans for f in v.features]
        self._head = b',"feature_service":%b,"feature_names":%b,"rows":[' % (
            orjson.dumps(name),
            orjson.dumps(self._names),
        )
        self._bare = [v for v in self._views if v.n]

    def answered(self, entities: Sequence[Mapping[str, Any]], replies: Sequence[Reply], t_us: int) -> Answered:
        """What `ReadPlan.at` says, as fragments."""
        width = self._width
        times = self._times
        answers: list[dict[int, ViewRow]] = []
        if self._windowed:
            t_us, answers = self.plan.windowed_at(replies, t_us)
        t_ns = t_us * 1000
        columns = []
        for k, view in enumerate(self._views):
            if view.windowed:
                columns.append([view.of(row[k]) for row in answers])
            else:
                columns.append(view.at(replies[view.group :: width], t_ns, times, self._values))
        return Answered(self, entities, t_us, list(zip(*columns)))

    def of_cells(self, entities: Sequence[Mapping[str, Any]], t_us: int, answers: Sequence[list[ViewRow]]) -> Answered:
        """The same from what `ReadPlan.at` said."""
        rows = [[view.of(answer) for view, answer in zip(self._views, row)] for row in answers]
        return Answered(self, entities, t_us, rows)

    def body(self, read: Answered) -> bytes:
        """The body of an OnlineResponse."""
        out = [b'{"t":', _micros(read.t_us), self._head]
        views = self._bare
        one = len(self._views) == 1 == len(views)
        first = True
        for entity, parts in zip(read.entities, read.rows):
            if one:
                view, part = views[0], parts[0]
                values = orjson.dumps(dict(zip(self._names, part.values)))
                statuses = view.statuses(part)
                times = part.time.join(view.times)
            else:
                merged: list[Any] = []
                for part in parts:
                    merged += part.values
                values = orjson.dumps(dict(zip(self._names, merged)))
                pairs = [(v, p) for v, p in zip(self._views, parts) if v.n]
                statuses = b",".join([v.statuses(p) for v, p in pairs])
                times = b",".join([p.time.join(v.times) for v, p in pairs])
            offsets = b",".join(self._offsets(parts)) if self._windowed else b""
            out.append(
                b'%b{"entity":%b,"values":%b,"statuses":{%b},"offsets":{%b},"event_timestamps":{%b}}'
                % (b"" if first else b",", orjson.dumps(entity), values, statuses, offsets, times)
            )
            first = False
        out.append(b"]}")
        return b"".join(out)

    def _offsets(self, parts: Sequence[Part]) -> Iterator[bytes]:
        for view, part in zip(self._views, parts):
            if part.answer is not None and part.answer.state is not None:
                yield view.log_name + _offsets(part.answer.state.offsets)

    def count(self, read: Answered, add: Callable[[str, str, int], None]) -> None:
        """Tells `add` (view, status, number of values)."""
        counts: dict[tuple[str, str], int] = {}
        for parts in read.rows:
            for view, part in zip(self._views, parts):
                if part.statuses is None:
                    key = (view.name, part.status)
                    counts[key] = counts.get(key, 0) + view.n
                else:
                    for status in part.statuses:
                        key = (view.name, status)
                        counts[key] = counts.get(key, 0) + 1
        for (name, status), n in counts.items():
            if n:
                add(name, status, n)

    def records(self, served: Served, read: Answered) -> Iterator[tuple[bytes, bytes]]:
        """(key, record) of each row for the served log: the JSON of `served_log.records`."""
        head = b'{"request_id":%b,"served_at":%b,"t":%b,"project":%b,"feature_service":%b,"entity":' % (
            orjson.dumps(served.request_id),
            orjson.dumps(served.served_at, option=orjson.OPT_UTC_Z),
            _micros(read.t_us),
            orjson.dumps(served.project),
            orjson.dumps(self.name),
        )
        for entity, parts in zip(read.entities, read.rows):
            features, views = [], []
            for view, part in zip(self._views, parts):
                if view.n:
                    features.append(_log_features(view, part))
                views.append(view.log_name + _log_view(part))
            yield (
                message_key(entity),
                b'%b%b,"features":{%b},"views":{%b},"model":null,"version":null,"probability":null}'
                % (head, orjson.dumps(entity), b",".join(features), b",".join(views)),
            )


def _log_features(view: _View, part: Part) -> bytes:
    values = map(orjson.dumps, part.values)
    if part.statuses is None:
        after = b',"status":"%b","event_timestamp":' % part.status.encode()
        chunks = [head + value + after for head, value in zip(view.log_heads, values)]
    else:
        chunks = [
            b'%b%b,"status":"%b","event_timestamp":' % (head, value, status.encode())
            for head, value, status in zip(view.log_heads, values, part.statuses)
        ]
    chunks.append(b"}")
    return part.time.join(chunks)


def _log_view(part: Part) -> bytes:
    answer = part.answer
    if answer is None:
        created = b"null"
        if part.pair:
            event, known = decode_pair(part.pair)
            if event == part.ns:  # else a stock writer was there since
                created = _time(known)
        return b'{"event_timestamp":%b,"created":%b,"offsets":null,"visible_at":null,"watermark":null}' % (
            part.time,
            created,
        )
    state = answer.state
    return b'{"event_timestamp":%b,"created":%b,"offsets":%b,"visible_at":%b,"watermark":%b}' % (
        part.time,
        _time(answer.created_ns),
        b"null" if state is None else _offsets(state.offsets),
        b"null" if state is None or state.visible_at == NEVER else _micros(state.visible_at),
        b"null" if state is None or state.watermark is None else _micros(state.watermark),
    )


def _offsets(offsets: Mapping[int, int]) -> bytes:
    return b"{%b}" % b",".join([b'"%d":%d' % item for item in offsets.items()])
