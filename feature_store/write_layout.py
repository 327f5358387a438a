"""How the rows of one view are laid out in Redis: its keys, its hash fields, its time columns. No I/O."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from feature_store.clock import MAX_SKEW, MICROSECOND
from feature_store.errors import DataError
from feature_store.key_bytes import KeyColumns
from feature_store.redis_layout import datetime_of, feature_field
from feature_store.row_bytes import RowPacker, Times
from feature_store.value_bytes import ColumnEncoder
from feature_store.view_plan import _key_parts
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureView, RepoConfig

log = logging.getLogger(__name__)

CREATED = "created"
CHUNK_ROWS = 1_000
CHUNK_BYTES = 2_000_000
"""Rows of a batch."""
FEW_ROWS = 150
"""Up to so many rows, Python per cell is cheaper than numpy per column."""
SKEW_NS = MAX_SKEW // MICROSECOND * 1000
Head = tuple[bytes, bytes, bytes, bytes]
_SECOND = 1_000_000_000


class Limit(NamedTuple):
    """The newest event time that may be written, in nanoseconds, and the clock that says so."""

    ns: int
    clock: str


def shape_of(view: FeatureView) -> object:
    """Equal for two objects of one view whose `WriteLayout` is the same."""
    source = getattr(view, "batch_source", None)
    return (
        getattr(view, "current_version_number", None),
        view.projection.version_tag,
        view.entities,
        [(f.name, f.dtype) for f in view.features],
        [(c.name, c.dtype) for c in view.entity_columns],
        getattr(source, "timestamp_field", None),
        getattr(source, "created_timestamp_column", None),
        getattr(source, "field_mapping", None),
        definition_of(view) is not None,
    )


@dataclass(frozen=True)
class Fields:
    """Some features of a view, in their order in a row."""

    packer: RowPacker
    encoders: list[ColumnEncoder]
    head: Head

    @property
    def count(self) -> int:
        """Hash fields of a row."""
        return len(self.encoders) + 2


class WriteLayout:
    """Made from a view of the registry; under versioned views its version is the one written. Thread-safe."""

    def __init__(self, config: RepoConfig, view: FeatureView) -> None:
        from feast.infra.online_stores.helpers import compute_versioned_name

        self.view: str = view.name
        self.windowed = definition_of(view) is not None
        self.keys = KeyColumns(config.project, view.name, _key_parts(view))
        self.types = {f.name: f.dtype.to_value_type() for f in view.features}
        self._stored: str = compute_versioned_name(view, config.registry.enable_online_feature_view_versioning)
        self._fields: dict[tuple[str, ...], Fields] = {}
        source = getattr(view, "batch_source", None)
        mapping = getattr(source, "field_mapping", None) or {}
        event = getattr(source, "timestamp_field", "") or "event_timestamp"
        created = getattr(source, "created_timestamp_column", "") or CREATED
        self.event_column: str = mapping.get(event, event)
        self.created_column: str = mapping.get(created, created)

    def fields(self, names: tuple[str, ...]) -> Fields:
        """The fields of these features; one that the view does not have is of unknown type."""
        made = self._fields.get(names)
        if made is None:
            from feast import ValueType

            packer = RowPacker(self._stored, [feature_field(self._stored, n) for n in names])
            encoders = [
                ColumnEncoder(n, self.types.get(n, ValueType.UNKNOWN), prefix)
                for n, prefix in zip(names, packer.prefixes, strict=True)
            ]
            head = packer.ts_field, packer.pf_field, b"%d" % packer.pair_at, b"%d" % packer.parts
            made = self._fields[names] = Fields(packer, encoders, head)
        return made

    def refuse_future(self, row: str, event_ns: int, limit: Limit) -> DataError:
        """The error for a row dated after the limit."""
        clock = datetime_of(limit.ns - SKEW_NS).isoformat()
        return DataError(
            f"{self.view}: {row} is dated {datetime_of(event_ns).isoformat()}, more than "
            f"{MAX_SKEW.total_seconds():g} s after the {limit.clock} ({clock}); nothing was written",
            next_step="mend the row's time, or write it when its time has come",
        )

    def warn_stateless(self, left_out: int, rows: int) -> None:
        """Logs that rows of a windowed view came without a window state."""
        if left_out:
            log.warning(
                "%s: %d of %d rows have no window state and are not written; to fill it from history: "
                "predictflow windows bootstrap %s",
                self.view,
                left_out,
                rows,
                self.view,
            )


def first_after(times: Times, limit: Limit | None) -> int | None:
    """The first row dated after the limit (None: no limit)."""
    if limit is None:
        return None
    seconds, nanos = divmod(limit.ns, _SECOND)
    late = (times.seconds > seconds) | ((times.seconds == seconds) & (times.nanos > nanos))
    return int(np.argmax(late)) if late.any() else None
