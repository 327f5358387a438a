"""What a windowed view logs: where its log is, the columns, and the rows of a batch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import UsageError
from feature_store.event_decode import ARROW, UTC_MICROS
from feature_store.event_log import LOG_FIELDS, STREAM
from feature_store.events import CREATED
from feature_store.logged import NEVER
from feature_store.stream_batch import Placed
from feature_store.windows.definition import WindowedView
from feature_store.windows.state import DUPLICATE, LATE

if TYPE_CHECKING:
    from feast import FeatureView

_REASONS = {LATE: "late", DUPLICATE: "duplicate"}


def log_directory(offline_path: str, view: FeatureView, part: str = STREAM) -> Path:
    """Where the log of a view is: `stream/` or `history/` below its source's path."""
    source = getattr(view.batch_source, "path", None) or view.name
    if "://" in offline_path or "://" in source:
        raise UsageError(
            "the event log needs a local directory",
            value=source if "://" in source else offline_path,
            next_step="set PREDICTFLOW_OFFLINE to a directory that sync, training and check share",
        )
    return Path(offline_path) / source / part


def log_schema(definition: WindowedView) -> pa.Schema:
    """The columns of a view's event log."""
    s = definition.source
    fields = [] if s.event_id is None else [pa.field(s.event_id, pa.string())]
    fields += [pa.field(k, ARROW[t]) for k, t in zip(definition.entity_key, definition.key_types, strict=True)]
    fields += [pa.field(s.timestamp, UTC_MICROS), pa.field(CREATED, UTC_MICROS)]
    fields += [pa.field(name, ARROW[kind]) for name, kind in s.columns.items()]
    return pa.schema(fields + LOG_FIELDS)


def log_rows(schema: pa.Schema, topic_id: str, placed: Placed) -> pa.Table:
    """Those of a batch's events that are not in the log yet; `created` is when an event became visible, where unknown."""
    events, visible, before, outcome = placed.events, placed.visible, placed.before, placed.outcome
    if placed.logged.any():
        new = ~placed.logged
        events, visible, before, outcome = events.where(new), visible[new], before[new], outcome[new]
    seen = pa.array(visible).cast(UTC_MICROS)
    columns = {name: events.rows[name] for name in events.rows.column_names}
    columns[CREATED] = pc.coalesce(events.rows[CREATED], seen)
    columns["_topic_id"] = pa.repeat(pa.scalar(topic_id), len(visible))
    columns["_partition"] = pa.array(events.partition.astype(np.int32))
    columns["_offset"] = pa.array(events.offset)
    columns["_visible_at"] = seen
    columns["_watermark"] = pa.array(before, mask=before == NEVER).cast(UTC_MICROS)
    columns["_dropped"] = _dropped(outcome)
    return pa.table(columns, schema=schema)


def _dropped(outcome: np.ndarray[Any, Any]) -> pa.Array:
    counted = ~np.isin(outcome, list(_REASONS))
    if counted.all():
        return pa.nulls(len(outcome), pa.string())
    return pa.array([_REASONS.get(o) for o in outcome.tolist()], pa.string())
