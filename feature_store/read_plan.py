"""One compiled online read per feature service: which hashes to ask Redis for, and what the answers mean at time t."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.clock import from_micros
from feature_store.errors import UsageError
from feature_store.on_demand import OnDemandPlan, source_view, with_function
from feature_store.read_command import Hmget, Replies, Reply
from feature_store.redis_layout import KeyLayout, KeyPart, datetime_of
from feature_store.view_plan import OnDemandViewError, ViewPlan, ViewRow, python_value, resolve
from feature_store.windows.state import NEVER

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore, FeatureView, RepoConfig
    from feast.infra.registry.base_registry import BaseRegistry

Entity = Mapping[str, object]


@dataclass(slots=True)
class ViewRead:
    """The row of one view that was read. `created` None: unknown; `offsets` and `visible_at`: of a window state only.

    `watermark`: what windows were closed by, of a view that closes any.
    """

    event_timestamp: datetime | None
    created: datetime | None
    offsets: dict[int, int] | None
    visible_at: datetime | None
    watermark: datetime | None = None


@dataclass(slots=True)
class OnlineRow:
    """One entity row's answer, by result name (`views`: by view). Values are None unless the status is PRESENT."""

    entity: dict[str, object]
    values: dict[str, object]
    statuses: dict[str, str]
    event_timestamps: dict[str, datetime | None]
    views: dict[str, ViewRead]


@dataclass(slots=True)
class OnlineRows:
    """Rows in the order asked for, all read at one time `t` (UTC)."""

    t: datetime
    rows: list[OnlineRow]


def _is_on_demand(view: Any) -> bool:
    from feast import OnDemandFeatureView

    return isinstance(view, OnDemandFeatureView)


class ReadPlan:
    """Immutable; no I/O after `compile`, which reads the registry (cached).

    `feature_names`: the result names, in the order asked for; `join_keys`: what every entity row must hold;
    `references`: result name -> (view, feature), where view is the key of `OnlineRow.views`;
    `views`: that key -> name of the feature view (they differ where a service gave the view an alias or a version);
    `width`: how many HMGETs read one entity row.
    """

    def __init__(self, project: str, views: Sequence[ViewPlan | OnDemandPlan]) -> None:
        self.project = project
        # To readers of answers an on-demand view is a view like any other; its inputs are read, and not shown.
        self.view_plans: list[ViewPlan] = list(views)  # type: ignore[arg-type]  # see OnDemandPlan
        self.on_demand = [v for v in views if not isinstance(v, ViewPlan)]
        read = [v for v in views if isinstance(v, ViewPlan)] + [i for v in self.on_demand for i in v.inputs]
        self.feature_names = [f.result for v in views for f in v.features]
        self.references = {f.result: (v.name, f.name) for v in views for f in v.features}
        self.views = {v.name: v.view for v in views}
        groups: dict[tuple[KeyPart, ...], list[ViewPlan]] = {}
        for view in read:
            groups.setdefault(view.key_parts, []).append(view)
        # Views of one key share one hash, so one HMGET reads them all.
        self._groups = [(KeyLayout(project, parts), members) for parts, members in groups.items()]
        self._fields = [[f for v in members for f in v.fields] for _, members in self._groups]
        self._commands = [Hmget(layout, fields) for (layout, _), fields in zip(self._groups, self._fields)]
        self.width = len(self._groups)
        self.windowed = any(v.definition is not None for v in read)
        self.closing = list(dict.fromkeys(v.stored for v in read if v.closes_windows))
        """Stored names of the views that need the watermarks of partitions too."""
        names = (p.requested for layout, _ in self._groups for p in layout.parts if p.requested is not None)
        extra = (name for v in self.on_demand for name in v.request_keys)
        self.key_types = {p.requested: p.type for layout, _ in self._groups for p in layout.parts if p.requested}
        self.join_keys: list[str] = list(dict.fromkeys([*names, *extra]))
        self._join_keys = frozenset(self.join_keys)

    @classmethod
    def compile(
        cls, store: FeatureStore, features: FeatureService | Sequence[str], full_feature_names: bool = False
    ) -> ReadPlan:
        """The plan of a feature service, or of `view:feature` references. NotFoundError or UsageError for wrong ones."""
        return cls.of_registry(store.config, store.registry, store.project, features, full_feature_names)

    @classmethod
    def of_registry(
        cls,
        config: RepoConfig,
        registry: BaseRegistry,
        project: str,
        features: FeatureService | Sequence[str],
        full_feature_names: bool = False,
    ) -> ReadPlan:
        """As `compile`, from the parts of a FeatureStore."""
        wanted = resolve(registry, project, features, full_feature_names)
        if not any(_is_on_demand(view) for view, _ in wanted):
            return cls.of_views(config, project, wanted, full_feature_names)
        plans: list[ViewPlan | OnDemandPlan] = []
        for view, names in wanted:
            if _is_on_demand(view):
                made = with_function(config, registry, project, view)  # type: ignore[arg-type]  # it is on demand
                projections = made.source_feature_view_projections.values()
                sources = [(source_view(registry, project, p.name), p) for p in projections]
                plans.append(OnDemandPlan(made, names, sources, config, full_feature_names))
            else:
                plans += cls.of_views(config, project, [(view, names)], full_feature_names).view_plans
        return cls(project, plans)

    @classmethod
    def of_views(
        cls,
        config: RepoConfig,
        project: str,
        wanted: Sequence[tuple[FeatureView, Sequence[str]]],
        full_feature_names: bool = False,
    ) -> ReadPlan:
        """The plan of views that are already resolved, each with the names of the features to read."""
        if config.entity_key_serialization_version != 3:
            raise UsageError(
                "entity_key_serialization_version is not supported",
                value=config.entity_key_serialization_version,
                valid=[3],
                next_step="set it in feature_store.yaml",
            )
        return cls(project, [ViewPlan(view, names, config, full_feature_names) for view, names in wanted])

    def requests(self, entities: Sequence[Entity]) -> list[tuple[bytes, list[bytes]]]:
        """(key, fields) of each HMGET: per entity row, one for each set of join keys among the views.

        UsageError for a missing or unknown join key and for a value of the wrong type. A null value finds nothing.
        """
        out = []
        for i, entity in enumerate(entities):
            if entity.keys() != self._join_keys:
                self._refuse(i, entity)
            for (layout, _), fields in zip(self._groups, self._fields):
                out.append((layout.encode(entity, i), fields))
        return out

    def payload(self, entities: Sequence[Entity]) -> bytes:
        """`requests` as the bytes to send: `len(entities) * width` HMGET commands. Errors as there."""
        out: list[bytes] = []
        wanted = self._join_keys
        commands = self._commands
        for i, entity in enumerate(entities):
            if entity.keys() != wanted:
                self._refuse(i, entity)
            for made in commands:
                value = entity[made.name] if made.name is not None else None
                if type(value) is str:
                    data = value.encode()
                    size = len(data)
                    out += (made.head, b"%d\r\n" % (made.bare + size), made.prefix, size.to_bytes(4, "little"))
                    out += (data, made.suffix)
                else:
                    key = made.layout.encode(entity, i)
                    out += (made.head, b"%d\r\n" % len(key), key, made.tail)
        return b"".join(out)

    def places(self) -> list[tuple[ViewPlan, int, int]]:
        """Each view of `view_plans` with the number of its HMGET (of `width` per row) and its first field there."""
        found = {}
        for g, (_, members) in enumerate(self._groups):
            at = 0
            for view in members:
                found[id(view)] = (view, g, at)
                at += len(view.fields)
        return [found[id(view)] for view in self.view_plans]

    def windowed_at(self, replies: Sequence[Reply], t_us: int) -> tuple[int, list[dict[int, ViewRow]]]:
        """As `at` for the windowed views alone: per entity row, position in `view_plans` to answer."""
        t_us, found = self._windowed_at(replies, t_us)
        places = [(k, found[id(view)]) for k, view in enumerate(self.view_plans) if id(view) in found]
        return t_us, [{k: rows[i] for k, rows in places} for i in range(len(replies) // (self.width or 1))]

    def _windowed_at(self, replies: Sequence[Reply], t_us: int) -> tuple[int, dict[int, list[ViewRow]]]:
        """t, and the answers of each windowed view by its id. All are finalised together, at one time."""
        read = []
        marks = replies.watermarks if isinstance(replies, Replies) else {}
        for g, (_, members) in enumerate(self._groups):
            at = 0
            for view in members:
                if view.definition is not None:
                    held = [view.parse(reply[at : at + len(view.fields)]) for reply in replies[g :: self.width]]
                    windows = view.windows(held)
                    partitions, known = marks[view.stored] if view.closes_windows else ({}, None)
                    t_us = max(t_us, windows.visible_at, NEVER if known is None else known)
                    read.append((view, held, windows, partitions))
                at += len(view.fields)
        return t_us, {id(v): v.windowed_at(held, windows, t_us, marks) for v, held, windows, marks in read}

    def _refuse(self, i: int, entity: Entity) -> None:
        for name in self.join_keys:
            if name not in entity:
                raise UsageError(
                    f"entity row {i}: join key {name} is missing", value=sorted(map(str, entity)), valid=self.join_keys
                )
        unknown = next(name for name in entity if name not in self._join_keys)
        raise UsageError(f"entity row {i}: unknown join key", value=unknown, valid=self.join_keys)

    def at(
        self, replies: Sequence[Reply], t_us: int, entities: Sequence[Entity] | None = None
    ) -> tuple[int, list[list[ViewRow]]]:
        """t, then per entity row the answer of each view in `view_plans`. On-demand views need the `entities` too.

        t is `t_us`, or the newest `visible_at` of the states read where that is later: a state cannot tell what was
        known before its last event.
        """
        width = len(self._groups)
        if self.on_demand and entities is None:
            raise OnDemandViewError(
                "on-demand feature views are computed from the entities too", value=self.feature_names
            )
        windowed: dict[int, list[ViewRow]] = {}
        if self.windowed:
            t_us, windowed = self._windowed_at(replies, t_us)
        answers: list[dict[int, ViewRow]] = [] if width else [{} for _ in entities or ()]
        for n, start in enumerate(range(0, len(replies), width or 1)):
            row = {}
            for (_, members), reply in zip(self._groups, replies[start : start + width]):
                i = 0
                for view in members:
                    of_view = windowed.get(id(view))
                    if of_view is not None:
                        row[id(view)] = of_view[n]
                    else:
                        row[id(view)] = view.at(view.parse(reply[i : i + len(view.fields)]), t_us)
                    i += len(view.fields)
            answers.append(row)
        for computed in self.on_demand:
            made = computed.at(entities or (), answers)
            for row_answers, answer in zip(answers, made):
                row_answers[id(computed)] = answer
        return t_us, [[row[id(view)] for view in self.view_plans] for row in answers]

    def decode(self, entities: Sequence[Entity], replies: Sequence[Reply], t_us: int) -> OnlineRows:
        """What `replies` to `requests(entities)` say at `t_us` (microseconds since the epoch), or later: see `at`."""
        return self.rows(entities, *self.at(replies, t_us, entities))

    def rows(self, entities: Sequence[Entity], t_us: int, answers: Sequence[list[ViewRow]]) -> OnlineRows:
        """What `at` answered, as Python values by name."""
        return OnlineRows(from_micros(t_us), [self._row(e, views) for e, views in zip(entities, answers)])

    def _row(self, entity: Entity, answers: list[ViewRow]) -> OnlineRow:
        row = OnlineRow(dict(entity), {}, {}, {}, {})
        for view, answer in zip(self.view_plans, answers):
            time = None if answer.event_ns is None else datetime_of(answer.event_ns)
            state = answer.state
            row.views[view.name] = ViewRead(
                time,
                None if answer.created_ns is None else datetime_of(answer.created_ns),
                None if state is None else dict(state.offsets),
                None if state is None or state.visible_at == NEVER else from_micros(state.visible_at),
                None if state is None or state.watermark is None else from_micros(state.watermark),
            )
            for feature, cell in zip(view.features, answer.cells):
                row.statuses[feature.result], row.values[feature.result] = python_value(feature, cell)
                row.event_timestamps[feature.result] = time
        return row
