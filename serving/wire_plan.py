"""Redis' replies straight to the bytes of Feast's GetOnlineFeaturesResponse: stored `Value`s are spliced in by column,
by no more than a look at their lengths and first bytes. The same bytes as `grpc_wire.encode` makes of cells (a test holds
the two together), but that times are written once per distinct time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from feature_store.redis_layout import decode_timestamp
from serving.grpc_wire import (
    NEVER_NULL,
    NO_TIME,
    STATUS,
    VALUE_HEADS,
    Heads,
    request_vectors,
    time_field,
    varint,
    vector,
)
from serving.grpc_wire import view_vectors as general

if TYPE_CHECKING:
    from feature_store.read_command import Reply
    from feature_store.read_plan import ReadPlan
    from feature_store.view_plan import Cell, ViewPlan, ViewRow
    from serving.json_plan import Windowed

_PRESENT, _NULL, _NOT_FOUND = STATUS["PRESENT"], STATUS["NULL_VALUE"], STATUS["NOT_FOUND"]
_OUTSIDE = STATUS["OUTSIDE_MAX_AGE"]
_NAMES = {number: name for name, number in STATUS.items()}
_SAFE = bytes(NEVER_NULL)
_SAFE_OR_EMPTY = frozenset({b"", *(bytes([b]) for b in _SAFE)})
_KEPT = 65_536

Counts = list[tuple[str, str, int]]
"""(view, status, number of values)."""


class _Times(dict[bytes, tuple[int, bytes]]):
    """`Timestamp` proto -> (nanoseconds, field of a FeatureVector). Rows written together share their time."""

    def __missing__(self, data: bytes) -> tuple[int, bytes]:
        ns = decode_timestamp(data)
        if len(self) >= _KEPT:
            self.clear()
        made = self[data] = (ns, time_field(ns))
        return made


class _WireView:
    """A row view's vectors."""

    def __init__(self, plan: ViewPlan, group: int, start: int) -> None:
        self.plan = plan
        self.group = group
        self.start = start
        self.first = start + 2
        self.end = self.first + len(plan.features)
        self.nothing: tuple[None, ...] = (None,) * len(plan.features)

    def vectors(self, out: list[bytes], replies: Sequence[Reply], t_ns: int, times: _Times, counts: Counts) -> None:
        ttl_ns, start, first, end = self.plan.ttl_ns, self.start, self.first, self.end
        n = len(replies)
        stamps: list[bytes] = []
        statuses = bytearray()
        rows: list[Sequence[bytes | None]] = []
        for reply in replies:
            ts = reply[start]
            if ts is None:
                stamps.append(NO_TIME)
                statuses.append(_NOT_FOUND)
                rows.append(self.nothing)
                continue
            ns, stamp = times[ts]
            stamps.append(stamp)
            if ttl_ns is not None and t_ns - ns > ttl_ns:
                statuses.append(_OUTSIDE)
                rows.append(self.nothing)
            else:
                statuses.append(_PRESENT)
                rows.append(reply[first:end])
        after = b"".join(stamps)
        head = b"\x12" + varint(n)
        rest = head + bytes(statuses) + after
        nulls = 0
        for feature, column in zip(self.plan.features, zip(*rows)):
            cells: Sequence[bytes] = [v or b"" for v in column] if None in column else column
            values = spliced(cells)
            if values is None:
                made: list[Cell] = [_cell(v, s) for v, s in zip(cells, statuses)]
                nulls += general(out, [feature], [made], after)
            elif b"" in cells:
                own = bytes([_NULL if s == _PRESENT and not v else s for v, s in zip(cells, statuses)])
                nulls += own.count(_NULL)
                vector(out, values, head + own + after)
            else:
                vector(out, values, rest)
        name, width = self.plan.name, len(self.plan.features)
        for status in (_NOT_FOUND, _OUTSIDE, _PRESENT):
            found = statuses.count(status) * width - (nulls if status == _PRESENT else 0)
            if found:
                counts.append((name, _NAMES[status], found))
        if nulls:
            counts.append((name, "NULL_VALUE", nulls))


def _cell(value: bytes, status: int) -> Cell:
    if status == _PRESENT:
        return ("PRESENT", value) if value else ("NULL_VALUE", None)
    return ("NOT_FOUND" if status == _NOT_FOUND else "OUTSIDE_MAX_AGE"), None


def spliced(column: Sequence[bytes]) -> bytes | None:
    """Field `values` of stored scalars; no bytes stand for no value. None where one is large, or may be a null in disguise."""
    lengths = set(map(len, column))
    if len(lengths) == 1:
        (length,) = lengths
        if 0 < length < len(VALUE_HEADS):
            head = VALUE_HEADS[length]
            values = head + head.join(column)
            return None if values[len(head) :: len(head) + length].translate(None, _SAFE) else values
    if not {v[:1] for v in column} <= _SAFE_OR_EMPTY:
        return None
    try:
        return b"".join([VALUE_HEADS[len(v)] + v for v in column])
    except IndexError:
        return None


class WirePlan:
    """A read plan's answers as bytes; does not hold the plan. Immutable but for its cache of times, which may be shared."""

    def __init__(self, plan: ReadPlan, times: _Times | None = None) -> None:
        self._places = [(view.definition is not None, _WireView(view, g, start)) for view, g, start in plan.places()]
        self._windowed = any(windowed for windowed, _ in self._places)
        self._times = _Times() if times is None else times

    def answer(
        self,
        plan: ReadPlan,
        heads: Heads,
        replies: Sequence[Reply],
        t_us: int,
        entities: Mapping[str, Any],
        with_versions: bool,
    ) -> tuple[bytes, Counts, Windowed | None]:
        """The response to `plan`, this one's and without on-demand views: see `grpc_wire.encode`; what metrics count; and
        what its windowed views said, for whoever needs that too."""
        width = plan.width
        entities = {name: values for name, values in entities.items() if name in plan.key_types}
        answers: list[dict[int, ViewRow]] = []
        read: Windowed | None = None
        if self._windowed:
            read = t_us, answers = plan.windowed_at(replies, t_us)
        out = [heads.of(plan, tuple(entities), with_versions)]
        request_vectors(out, entities, len(replies) // width)
        counts: Counts = []
        for k, (windowed, view) in enumerate(self._places):
            if windowed:
                _windowed(out, view.plan, [row[k] for row in answers], counts)
            else:
                view.vectors(out, replies[view.group :: width], t_us * 1000, self._times, counts)
        return b"".join(out), counts, read


def _windowed(out: list[bytes], view: ViewPlan, answers: Sequence[ViewRow], counts: Counts) -> None:
    times = b"".join([NO_TIME if a.event_ns is None else time_field(a.event_ns) for a in answers])
    columns = list(zip(*[a.cells for a in answers]))
    nulls = general(out, view.features, columns, times)
    found: dict[str, int] = {}
    for column in columns:
        for status, _ in column:
            found[status] = found.get(status, 0) + 1
    known = found.pop("NULL_VALUE", 0)
    found["PRESENT"] = found.get("PRESENT", 0) - (nulls - known)
    found["NULL_VALUE"] = nulls
    counts += [(view.name, status, n) for status, n in found.items() if n]


class Wires:
    """The wire plan of each read plan, with one cache of times; forgets a plan when nobody else holds it."""

    def __init__(self) -> None:
        self._times = _Times()
        self._plans: WeakKeyDictionary[ReadPlan, WirePlan] = WeakKeyDictionary()

    def of(self, plan: ReadPlan) -> WirePlan:
        made = self._plans.get(plan)
        if made is None:
            made = self._plans[plan] = WirePlan(plan, self._times)
        return made
