"""Redis' replies straight to the JSON of an answer and of the served log, by fragments compiled once per read plan.

The same documents as `OnlineService` builds from Python values (a test holds the two together), without a Python object
per value, status and time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import TYPE_CHECKING, Any

import orjson

from feature_store.clock import from_micros
from feature_store.redis_layout import decode_pair
from feature_store.windows.state import NEVER
from serving.encoding import dumps
from serving.json_view import Caches, JsonView, Part, time_json
from serving.log_keys import message_key
from serving.served_log import Served

if TYPE_CHECKING:
    from feature_store.read_command import Reply
    from feature_store.read_plan import ReadPlan
    from feature_store.view_plan import ViewRow


Windowed = tuple[int, "list[dict[int, ViewRow]]"]
"""What `ReadPlan.windowed_at` says: t, and the answers of windowed views."""


def _micros(us: int) -> bytes:
    return orjson.dumps(from_micros(us), option=orjson.OPT_UTC_Z)


def _number(value: float) -> bytes:
    return orjson.dumps(value) if isfinite(value) else dumps(value)  # orjson has null for what is not finite


@dataclass(slots=True)
class Answered:
    """Rows that were read, as fragments: enough for the answer's body, the metrics and the served log."""

    plan: JsonPlan
    entities: Sequence[Mapping[str, Any]]
    t_us: int
    rows: Iterable[Sequence[Part]]
    probabilities: Sequence[float] | None = None
    """One per row where a model was run on them."""

    def __len__(self) -> int:
        return len(self.entities)

    def first(self) -> Sequence[Part]:
        """The first row, without decoding the others; there is one."""
        return next(iter(self.rows.head() if isinstance(self.rows, _Later) else self.rows))


class _Later:
    """The rows of a read, decoded when they are asked for."""

    def __init__(self, plan: JsonPlan, replies: Sequence[Reply], t_us: int) -> None:
        self._made = plan, replies, t_us

    def __iter__(self) -> Iterator[Sequence[Part]]:
        plan, replies, t_us = self._made
        return iter(plan.answered((), replies, t_us).rows)

    def head(self) -> Iterable[Sequence[Part]]:
        """The first row."""
        plan, replies, t_us = self._made
        return plan.answered((), replies[: plan.width], t_us).rows


class JsonPlan:
    """A read plan as JSON; `name` is the feature service's, None for a list of features. Immutable but for its caches,
    which it shares with the other plans of one event loop.
    """

    def __init__(self, plan: ReadPlan, name: str | None, caches: Caches | None = None) -> None:
        self.plan = plan
        self.name = name
        self._views = [JsonView(view, group, start) for view, group, start in plan.places()]
        self.width = plan.width
        self._windowed = any(v.windowed for v in self._views)
        caches = caches or Caches()
        self._times = caches.times
        self._values = caches.values
        self._names = [f.result for v in plan.view_plans for f in v.features]
        types = [f.type for v in plan.view_plans for f in v.features]
        self._head = b',"feature_service":%b,"feature_names":%b,"feature_types":%b,"rows":[' % (
            orjson.dumps(name),
            orjson.dumps(self._names),
            orjson.dumps(types),
        )
        self._predicted = b'"feature_service":%b,"feature_types":%b' % (
            orjson.dumps(name),
            orjson.dumps(dict(zip(self._names, types))),
        )
        self._bare = [v for v in self._views if v.n]

    def answered(
        self,
        entities: Sequence[Mapping[str, Any]],
        replies: Sequence[Reply],
        t_us: int,
        windowed: Windowed | None = None,
    ) -> Answered:
        """What `ReadPlan.at` says, as fragments. `windowed`: what its windowed views said of these replies, where known."""
        width = self.width
        times = self._times
        answers: list[dict[int, ViewRow]] = []
        if self._windowed:
            t_us, answers = windowed or self.plan.windowed_at(replies, t_us)
        t_ns = t_us * 1000
        columns = []
        for k, view in enumerate(self._views):
            if view.windowed:
                columns.append([view.of(row[k]) for row in answers])
            else:
                columns.append(view.at(replies[view.group :: width], t_ns, times, self._values))
        return Answered(self, entities, t_us, list(zip(*columns)))

    def later(
        self,
        entities: Sequence[Mapping[str, Any]],
        replies: Sequence[Reply],
        t_us: int,
        windowed: Windowed | None = None,
    ) -> Answered:
        """As `answered`, decoded when, and as often as, its rows are asked for: by a log, after the answer."""
        if self._windowed:  # their states may move t
            return self.answered(entities, replies, t_us, windowed)
        return Answered(self, entities, t_us, _Later(self, replies, t_us))

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

    def inputs(self, read: Answered) -> list[list[Any]] | None:
        """The values of each row in the order of the plan's features, as Python's own; None where one of them is of a
        type that only the general decoder gives."""
        rows = []
        for parts in read.rows:
            values: list[Any] = []
            for part in parts:
                values += part.values
            if any(type(v) is orjson.Fragment for v in values):
                return None
            rows.append(values)
        return rows

    def predictions(self, read: Answered, probabilities: Sequence[float], model: str, version: str) -> bytes:
        """The body of a PredictResponse."""
        out = [
            b'{"model":%b,"version":%b,%b,"t":%b,"predictions":['
            % (orjson.dumps(model), orjson.dumps(version), self._predicted, _micros(read.t_us))
        ]
        for i, (entity, parts) in enumerate(zip(read.entities, read.rows)):
            values: list[Any] = []
            for part in parts:
                values += part.values
            pairs = [(v, p) for v, p in zip(self._views, parts) if v.n]
            statuses = b",".join([v.statuses(p) for v, p in pairs])
            times = b",".join([p.time.join(v.times) for v, p in pairs])
            offsets = b",".join(self._offsets(parts)) if self._windowed else b""
            out.append(
                b'%b{"entity":%b,"values":%b,"statuses":{%b},"offsets":{%b},"event_timestamps":{%b},"probability":%b}'
                % (
                    b"," if i else b"",
                    orjson.dumps(entity),
                    orjson.dumps(dict(zip(self._names, values))),
                    statuses,
                    offsets,
                    times,
                    _number(probabilities[i]),
                )
            )
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

    def ages(self, read: Answered, add: Callable[[str, float], None]) -> None:
        """Tells `add` (view, age in seconds) of the first row's views that have a row."""
        for view, part in zip(self._views, read.first()):
            ns = part.ns if part.answer is None else part.answer.event_ns
            if ns is not None:
                add(view.name, (read.t_us * 1000 - ns) / 1e9)

    def records(self, served: Served, read: Answered) -> Iterator[tuple[bytes, bytes]]:
        """(key, record) of each row for the served log: the JSON of `served_log.records`."""
        head = b'{"request_id":%b,"served_at":%b,"t":%b,"project":%b,"feature_service":%b,"entity":' % (
            orjson.dumps(served.request_id),
            orjson.dumps(served.served_at, option=orjson.OPT_UTC_Z),
            _micros(read.t_us),
            orjson.dumps(served.project),
            orjson.dumps(self.name),
        )
        model = b',"model":%b,"version":%b,"probability":' % (orjson.dumps(served.model), orjson.dumps(served.version))
        for i, (entity, parts) in enumerate(zip(read.entities, read.rows)):
            features, views = [], []
            for view, part in zip(self._views, parts):
                if view.n:
                    features.append(_log_features(view, part))
                views.append(view.log_name + _log_view(part))
            yield (
                message_key(entity),
                b'%b%b,"features":{%b},"views":{%b}%b%b}'
                % (
                    head,
                    orjson.dumps(entity),
                    b",".join(features),
                    b",".join(views),
                    model,
                    b"null" if read.probabilities is None else _number(read.probabilities[i]),
                ),
            )


def _log_features(view: JsonView, part: Part) -> bytes:
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
                created = time_json(known)
        return b'{"event_timestamp":%b,"created":%b,"offsets":null,"visible_at":null,"watermark":null}' % (
            part.time,
            created,
        )
    state = answer.state
    return b'{"event_timestamp":%b,"created":%b,"offsets":%b,"visible_at":%b,"watermark":%b}' % (
        part.time,
        time_json(answer.created_ns),
        b"null" if state is None else _offsets(state.offsets),
        b"null" if state is None or state.visible_at == NEVER else _micros(state.visible_at),
        b"null" if state is None or state.watermark is None else _micros(state.watermark),
    )


def _offsets(offsets: Mapping[int, int]) -> bytes:
    return b"{%b}" % b",".join([b'"%d":%d' % item for item in offsets.items()])
