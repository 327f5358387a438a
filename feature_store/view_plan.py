"""One feature view's part of an online read: which hash fields it needs, and what they say at time t."""

from __future__ import annotations

import logging
import struct
from collections.abc import Mapping, Sequence
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
from feature_store.row_bytes import varint
from feature_store.windows.definition import STATE_FIELD, WindowedView, definition_of
from feature_store.windows.intact import decode_intact
from feature_store.windows.ir import Type
from feature_store.windows.state import NEVER, States, WindowStateError

if TYPE_CHECKING:
    from feast import FeatureService, FeatureView, RepoConfig
    from feast.infra.registry.base_registry import BaseRegistry

Status = Literal["PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE", "INVALID"]
"""INVALID: a window state from which no right value can be given (see `WindowStateError`); it is logged."""
Cell = tuple[Status, bytes | int | None]
"""Status and value: `Value` proto bytes, or the int of a windowed feature that is one; None unless PRESENT."""

log = logging.getLogger(__name__)
_MICROSECOND = timedelta(microseconds=1)
_DOUBLE = struct.Struct("<Bd")


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
    """What Redis holds of one view for one entity; `event_ns` None: never written. `state`: a window state's bytes."""

    event_ns: int | None
    created_ns: int | None
    state: bytes | None
    values: Sequence[bytes | None]


@dataclass(slots=True)
class ReadState:
    """What a window state had seen: last offset per partition, `visible_at`; `watermark`: what windows were closed by."""

    offsets: dict[int, int]
    visible_at: int
    watermark: int | None = None


@dataclass(slots=True)
class ViewRow:
    """One view's part of one row, at t. `event_ns` None: NOT_FOUND."""

    event_ns: int | None
    created_ns: int | None
    state: ReadState | None
    cells: list[Cell]


@dataclass(slots=True)
class Windows:
    """The window states of a request's rows: `place` says which of `states` is a row's (-1: it has none)."""

    states: States
    place: list[int]
    errors: dict[int, WindowStateError]

    @property
    def visible_at(self) -> int:
        """The newest event in any of them; NEVER without one."""
        return int(self.states.visible_at.max()) if len(self.states) else NEVER


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
        self.closes_windows = self.definition is not None and self.definition.closes_windows
        self._outputs: dict[str, Type] = {o.name: o.type for o in self.definition.outputs} if self.definition else {}
        self._asked = self._outputs.keys() & set(names)
        self.key_parts = _key_parts(view)

    def parse(self, reply: Sequence[bytes | None]) -> Held:
        """Times, values and the state of `reply`, the values of `self.fields`."""
        ts = reply[0]
        if ts is None:
            return Held(None, None, None, reply)
        event = _timestamp(ts)
        created = None
        if reply[1]:
            held_event, held_created = decode_pair(reply[1])
            created = held_created if held_event == event else None  # else a stock writer was there since
        held = Held(event, created, None, reply[2 : 2 + len(self.features)])
        if self.definition is not None:
            held.state = blob_of(reply[-1])
        return held

    def at(self, held: Held, t_us: int) -> ViewRow:
        """The cells of a view without windows at t. A row dated after t counts as it stands: newest wins, whatever the
        reader's clock."""
        if held.event_ns is None:
            return self._without_value("NOT_FOUND", held, None)
        if self.ttl_ns is not None and t_us * 1000 - held.event_ns > self.ttl_ns:
            return self._without_value("OUTSIDE_MAX_AGE", held, held.event_ns)
        return ViewRow(held.event_ns, held.created_ns, None, [("PRESENT", v) if v else _NULL for v in held.values])

    def windows(self, held: Sequence[Held]) -> Windows:
        """The states of a windowed view's rows. DefinitionError for another definition's; a damaged one is its row's error."""
        definition = self.definition
        assert definition is not None
        rows = [i for i, h in enumerate(held) if h.state]
        place = [-1] * len(held)
        states, damaged = decode_intact(definition, [held[i].state for i in rows])
        for k, i in enumerate(rows):
            place[i] = k
        return Windows(states, place, {rows[k]: e for k, e in damaged.items()})

    def windowed_at(
        self, held: Sequence[Held], windows: Windows, t_us: int, watermarks: Mapping[int, int] | None
    ) -> list[ViewRow]:
        """The cells of a windowed view's rows at t, not before `windows.visible_at`. `watermarks`: of the partitions."""
        states = windows.states
        finals = states.values(t_us, watermarks, self._asked)
        marks = finals.watermark.tolist()
        visible = states.visible_at.tolist()
        columns: list[list[Any] | None] = []
        for feature in self.features:
            kind = self._outputs.get(feature.name)
            columns.append(None if kind is None else _cells(finals.columns[feature.name], kind))
        out = []
        for i, h in enumerate(held):
            if i in windows.errors:
                log.warning("%s: %s", self.name, windows.errors[i].message)
                out.append(self._without_value("INVALID", h, h.event_ns))
                continue
            k = windows.place[i]
            if k < 0 or visible[k] == NEVER:
                # Values without a state are as of some other time: nothing that could be said about t was ever written.
                out.append(self._without_value("NOT_FOUND", h, None))
                continue
            mark = marks[k] if self.closes_windows and marks[k] != NEVER else None
            state = ReadState(states.offsets_of(k), visible[k], mark)
            seen = finals.seen[k]
            event_ns = None if seen is None else seen * 1000
            if event_ns is None:
                out.append(self._without_value("NOT_FOUND", h, None, state))
            elif self.ttl_ns is not None and t_us * 1000 - event_ns > self.ttl_ns:
                out.append(self._without_value("OUTSIDE_MAX_AGE", h, event_ns, state))
            else:
                cells = [_cell(v) if c is None else c[k] for c, v in zip(columns, h.values)]
                if k in finals.errors:
                    self._invalidate(cells, finals.errors[k])
                out.append(ViewRow(event_ns, h.created_ns, state, cells))
        return out

    def _invalidate(self, cells: list[Cell], errors: Mapping[str, WindowStateError]) -> None:
        """Puts INVALID in the place of the outputs that have no value; the other cells stay."""
        told = set()
        for i, feature in enumerate(self.features):
            if feature.name in errors:
                cells[i] = ("INVALID", None)
                told.add(errors[feature.name].message)
        for message in sorted(told):
            log.warning("%s: %s", self.name, message)

    def _without_value(
        self, status: Status, held: Held, event_ns: int | None, state: ReadState | None = None
    ) -> ViewRow:
        cells: list[Cell] = [(status, None)] * len(self.features)
        if self.definition is not None and held.event_ns is not None:  # the state itself never expires
            for i, feature in enumerate(self.features):
                if feature.name == STATE_FIELD:
                    cells[i] = _cell(held.values[i])
        return ViewRow(event_ns, held.created_ns if event_ns is not None else None, state, cells)


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


def _cells(values: list[Any], kind: Type) -> list[Cell]:
    """Values of an output: ints as they are, others as the `Value` that a row feature would be stored as."""
    match kind:
        case "float64":
            return [_NULL if v is None else ("PRESENT", _DOUBLE.pack(0x29, v)) for v in values]
        case "bool":
            return [_NULL if v is None else ("PRESENT", b"\x38\x01" if v else b"\x38\x00") for v in values]
        case "timestamp":
            return [_NULL if v is None else ("PRESENT", b"\x40" + varint(v // 1_000_000 % 2**64)) for v in values]
        case "string":  # of few constants: made once each
            stored = {v: _NULL if v is None else ("PRESENT", _string(v)) for v in set(values)}
            return [stored[v] for v in values]
        case _:
            return [_NULL if v is None else ("PRESENT", v) for v in values]


def _string(text: str) -> bytes:
    data = text.encode()
    return b"\x12" + varint(len(data)) + data


def blob_of(cell: bytes | None) -> bytes | None:
    """The bytes in a `Value` proto; None for none."""
    if not cell:
        return None
    if cell[0] == 0x0A:
        size = len(cell) - 3
        if 128 <= size < 16384 and cell[1] == (size & 127 | 128) and cell[2] == size >> 7:  # nearly every state
            return cell[3:]
        length = shift = 0
        for at in range(1, min(len(cell), 6)):
            length |= (cell[at] & 127) << shift
            shift += 7
            if cell[at] < 128:
                if at + 1 + length == len(cell):
                    return cell[at + 1 :]
                break
    held = decode_value(cell)
    return held if isinstance(held, bytes) else b"?"  # never a state: decoding says so


def _cell(data: bytes | None) -> Cell:
    return ("PRESENT", data) if data else ("NULL_VALUE", None)
