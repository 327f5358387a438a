"""The rows of a windowed view's event log: where they are, their columns, and how events and idle advances become rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.errors import UsageError
from feature_store.event_decode import ARROW, UTC_MICROS
from feature_store.event_log import IDLE, LOG_FIELDS, STREAM
from feature_store.events import CREATED
from feature_store.logged import NEVER, Ints
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


def event_rows(
    schema: pa.Schema,
    topic_id: str,
    rows: pa.Table,
    partition: Ints,
    offset: Ints,
    visible: Ints,
    watermark: Ints,
    outcome: np.ndarray[Any, Any],
) -> pa.Table:
    """Log rows of decoded events, in their order. `watermark`: before each, NEVER: none; `outcome` as of `States.apply`."""
    seen = pa.array(visible).cast(UTC_MICROS)
    columns = {name: rows[name] for name in rows.column_names}
    columns[CREATED] = pc.coalesce(rows[CREATED], seen)
    columns["_topic_id"] = pa.repeat(pa.scalar(topic_id), len(visible))
    columns["_partition"] = pa.array(partition.astype(np.int32))
    columns["_offset"] = pa.array(offset)
    columns["_visible_at"] = seen
    columns["_watermark"] = pa.array(watermark, mask=watermark == NEVER).cast(UTC_MICROS)
    columns["_dropped"] = _dropped(outcome)
    return pa.table(columns, schema=schema)


def idle_rows(
    schema: pa.Schema, topic_id: str, read_to: Mapping[int, int], watermark_us: int, visible_us: int
) -> pa.Table:
    """Log rows that say: partitions, read up to before these offsets, have this watermark from `visible_us` on."""
    n = len(read_to)
    columns = {f.name: pa.nulls(n, f.type) for f in schema}
    columns["_topic_id"] = pa.array([topic_id] * n, pa.string())
    columns["_partition"] = pa.array(list(read_to), pa.int32())
    columns["_offset"] = pa.array([o - 1 for o in read_to.values()], pa.int64())
    columns["_visible_at"] = pa.array([visible_us] * n, UTC_MICROS)
    columns["_watermark"] = pa.array([watermark_us] * n, UTC_MICROS)
    columns["_dropped"] = pa.array([IDLE] * n, pa.string())
    return pa.table(columns, schema=schema)


def _dropped(outcome: np.ndarray[Any, Any]) -> pa.Array:
    counted = ~np.isin(outcome, list(_REASONS))
    if counted.all():
        return pa.nulls(len(outcome), pa.string())
    return pa.array([_REASONS.get(o) for o in outcome.tolist()], pa.string())
