"""One feature view's part of an online read: which hash fields it needs, and what they say at time t."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal

from feature_store.errors import NotFoundError, UsageError
from feature_store.redis_layout import (
    KeyPart,
    decode_pair,
    decode_timestamp,
    decode_value,
    feature_field,
    pair_field,
    timestamp_field,
)
from feature_store.windows.definition import STATE_FIELD, WindowedView, definition_of
from feature_store.windows.state import NEVER, EntityState, WindowStateError

if TYPE_CHECKING:
    from feast import FeatureService, FeatureView, RepoConfig
    from feast.infra.registry.base_registry import BaseRegistry

Status = Literal["PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE", "INVALID"]
"""INVALID: a window state from which no right value can be given (see `WindowStateError`); it is logged."""
Cell = tuple[Status, bytes | int | None]
"""Status and value: `Value` proto bytes, or the int of a windowed feature; None unless PRESENT."""

log = logging.getLogger(__name__)
_MICROSECOND = timedelta(microseconds=1)


class OnDemandViewError(UsageError):
    """An on-demand view that cannot be computed here: no definition to run, or a kind that is not supported."""

    code = "on_demand_view"


class UnsupportedOnDemandError(OnDemandViewError):
    """A kind of on-demand view that only Feast itself computes."""


@dataclass(frozen=True, slots=True)
class Feature:
    """`name` in the view, `result` in the answer, `hint`: Feast's ValueType where the stored bytes do not say it all.

    `type`: name of the declared ValueType.
    """

    name: str
    result: str
    field: bytes
    hint: Any = None
    type: str = ""


@dataclass(slots=True)
class Held:
    """What Redis holds of one view for one entity; `event_ns` None: never written."""

    event_ns: int | None
    created_ns: int | None
    state: EntityState | None
    values: Sequence[bytes | None]
    error: WindowStateError | None = None


@dataclass(slots=True)
class ViewRow:
    """One view's part of one row, at t. `event_ns` None: NOT_FOUND."""

    event_ns: int | None
    created_ns: int | None
    state: EntityState | None
    cells: list[Cell]


class ViewPlan:
    """Built from a view and the names of its features to read; immutable, no I/O."""

    def __init__(self, view: FeatureView, names: Sequence[str], config: RepoConfig, full_feature_names: bool) -> None:
        from feast.infra.online_stores.helpers import compute_versioned_name

        self.name: str = view.projection.name_to_use()
        self.view: str = view.name
        self.stored: str = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
        self.version: int = getattr(view, "current_version_number", 0) or 0
        self.definition: WindowedView | None = definition_of(view)
        ttl = getattr(view, "ttl", None)
        keep = getattr(config.online_store, "expired_values", "null") == "keep"
        self.ttl_ns: int | None = None if keep or not ttl else ttl // _MICROSECOND * 1000
        types = {f.name: f.dtype.to_value_type() for f in view.features}
        self.features = [
            Feature(
                name,
                f"{self.name}__{name}" if full_feature_names else name,
                feature_field(self.stored, name),
                _hint(types[name]) if name in types else None,
                types[name].name if name in types else "",
            )
            for name in names
        ]
        self.fields: list[bytes] = [timestamp_field(self.stored), pair_field(self.stored)]
        self.fields += [f.field for f in self.features]
        if self.definition is not None:
            self.fields.append(feature_field(self.stored, STATE_FIELD))
        self._aggregates = {a.name for a in self.definition.aggregates} if self.definition else set()
        self.key_parts = _key_parts(view)

    def parse(self, reply: Sequence[bytes | None]) -> Held:
        """Reads times and state of `reply`, the values of `self.fields`; DefinitionError for another definition's state."""
        ts = reply[0]
        if ts is None:
            return Held(None, None, None, reply)
        event = _timestamp(ts)
        created = None
        if reply[1]:
            held_event, held_created = decode_pair(reply[1])
            created = held_created if held_event == event else None  # else a stock writer was there since
        held = Held(event, created, None, reply[2 : 2 + len(self.features)])
        if self.definition is not None and reply[-1]:
            state = decode_value(reply[-1])
            try:
                held.state = EntityState.decode(self.definition, state if isinstance(state, bytes) else b"")
            except WindowStateError as e:
                held.error = e
        return held

    def at(self, held: Held, t_us: int) -> ViewRow:
        """The view's cells at t. A row dated after t counts as it stands: newest wins, whatever the reader's clock."""
        if self.definition is not None:
            return self._windowed_at(self.definition, held, t_us)
        if held.event_ns is None:
            return self._without_value("NOT_FOUND", held, None)
        if self.ttl_ns is not None and t_us * 1000 - held.event_ns > self.ttl_ns:
            return self._without_value("OUTSIDE_MAX_AGE", held, held.event_ns)
        return ViewRow(held.event_ns, held.created_ns, None, [("PRESENT", v) if v else _NULL for v in held.values])

    def _windowed_at(self, definition: WindowedView, held: Held, t_us: int) -> ViewRow:
        state = held.state
        if held.error is not None:
            log.warning("%s: %s", self.name, held.error.message)
            return self._without_value("INVALID", held, held.event_ns)
        if state is None or state.visible_at == NEVER:
            # Values without a state are as of some other time: nothing that could be said about t was ever written.
            return self._without_value("NOT_FOUND", held, None)
        seen = state.last_seen_at(t_us)
        if seen is None:
            return self._without_value("NOT_FOUND", held, None)
        event_ns = seen * 1000
        if self.ttl_ns is not None and t_us * 1000 - event_ns > self.ttl_ns:
            return self._without_value("OUTSIDE_MAX_AGE", held, event_ns)
        try:
            finals = state.finalise(definition, t_us)
        except WindowStateError as e:
            log.warning("%s: %s", self.name, e.message)
            return self._without_value("INVALID", held, event_ns)
        cells: list[Cell] = []
        for feature, stored in zip(self.features, held.values):
            if feature.name in self._aggregates:
                value = finals[feature.name]
                cells.append(("NULL_VALUE", None) if value is None else ("PRESENT", value))
            else:
                cells.append(_cell(stored))
        return ViewRow(event_ns, held.created_ns, state, cells)

    def _without_value(self, status: Status, held: Held, event_ns: int | None) -> ViewRow:
        cells: list[Cell] = [(status, None)] * len(self.features)
        if self.definition is not None and held.event_ns is not None:  # the state itself never expires
            for i, feature in enumerate(self.features):
                if feature.name == STATE_FIELD:
                    cells[i] = _cell(held.values[i])
        return ViewRow(event_ns, held.created_ns if event_ns is not None else None, held.state, cells)


def python_value(feature: Feature, cell: Cell) -> tuple[Status, object]:
    """Status and Python value of a cell; a stored null in any disguise is NULL_VALUE."""
    status, value = cell
    if not isinstance(value, bytes):
        return status, value
    decoded = decode_value(value, feature.hint)
    return ("NULL_VALUE", None) if decoded is None else (status, decoded)


def resolve(
    registry: BaseRegistry, project: str, features: FeatureService | Sequence[str], full_feature_names: bool
) -> list[tuple[FeatureView, list[str]]]:
    """The views of a service or of `view:feature` references, with the names to read of each, in the order asked for.

    Views come without their functions (see `on_demand.py`). NotFoundError for an unknown service, view or
    feature; UsageError for two features of one name.
    """
    from feast import utils
    from feast.errors import FeatureNameCollisionError, FeatureServiceNotFoundException

    wanted: list[tuple[FeatureView, list[str]]] = []
    if isinstance(features, str):
        raise UsageError("features is a list of view:feature, or a feature service", value=features)
    if not isinstance(features, Sequence):
        try:
            service = registry.get_feature_service(features.name, project, allow_cache=True)
        except FeatureServiceNotFoundException as e:
            names = [s.name for s in registry.list_feature_services(project, allow_cache=True)]
            raise NotFoundError(
                "no such feature service", value=features.name, valid=names, next_step="feast apply"
            ) from e
        for projection in service.feature_view_projections:
            view = _view(registry, project, projection.name, projection.version_tag)
            wanted.append((view.with_projection(projection), [f.name for f in projection.features]))
    else:
        by_view: dict[tuple[str, int | None], list[str]] = {}
        for ref in features:
            try:
                name, version, feature = utils._parse_feature_ref(ref)
            except ValueError as e:
                raise UsageError("not a feature reference", value=ref, next_step="write view:feature") from e
            by_view.setdefault((name, version), []).append(feature)
        wanted = [(_view(registry, project, *key), names) for key, names in by_view.items()]
    if not wanted:
        raise UsageError("no features asked for", next_step="name a feature service, or view:feature references")
    for view, names in wanted:
        valid = [f.name for f in view.projection.features]
        for name in names:
            if name not in valid:
                raise NotFoundError(f"no such feature in {view.name}", value=name, valid=valid)
    refs = [f"{view.projection.name_to_use()}:{name}" for view, names in wanted for name in names]
    try:
        utils._validate_feature_refs(refs, full_feature_names)
    except FeatureNameCollisionError as e:
        raise UsageError(
            "two features of one name",
            value=", ".join(sorted(refs)),
            next_step="use full_feature_names, or one of them",
        ) from e
    return wanted


def _view(registry: BaseRegistry, project: str, name: str, version: int | None) -> Any:
    from feast.errors import FeatureViewNotFoundException

    from feature_store.without_functions import view_named, view_names, view_version

    try:
        if version is None:
            view = view_named(registry, project, name)
            if view is None:  # a label view, which has no functions, or nothing
                view = registry.get_any_feature_view(name, project, allow_cache=True)
        elif not getattr(registry, "enable_online_versioning", False):
            raise UsageError(
                "versioned reads are off",
                value=f"{name}@v{version}",
                next_step="set enable_online_feature_view_versioning: true under registry: in feature_store.yaml",
            )
        else:
            view = view_version(registry, project, name, version)
            view.projection.version_tag = version
    except FeatureViewNotFoundException as e:
        valid = view_names(registry, project)
        raise NotFoundError("no such feature view", value=name, valid=valid, next_step="feast apply") from e
    if not getattr(view, "enabled", True):
        raise UsageError("feature view is disabled", value=name, next_step=f"feast feature-views enable {name}")
    return view


def _key_parts(view: FeatureView) -> tuple[KeyPart, ...]:
    from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_NAME

    if not view.entities or view.entities[0] == DUMMY_ENTITY_NAME:
        return (KeyPart(DUMMY_ENTITY_ID, None, "STRING"),)
    aliases = view.projection.join_key_map
    return tuple(
        KeyPart(c.name, aliases.get(c.name, c.name), c.dtype.to_value_type().name)  # type: ignore[arg-type]  # KeyLayout checks
        for c in view.entity_columns
    )


def _hint(value_type: Any) -> Any:
    """Only identifiers were ever stored as strings (by older Feasts); for all else the bytes say what they are."""
    return value_type if "UUID" in value_type.name else None


_NULL: Cell = ("NULL_VALUE", None)
_timestamp = lru_cache(maxsize=65_536)(decode_timestamp)  # rows written together share their time


def _cell(data: bytes | None) -> Cell:
    return ("PRESENT", data) if data else ("NULL_VALUE", None)
