"""The events that OVER windows read, kept one by one up to the cap. Pure."""

from __future__ import annotations

import numpy as np

from feature_store.windows.layout import Layout
from feature_store.windows.partials import Numbers
from feature_store.windows.rows import NEVER, Array, Rows, stacked


def event_rows(layout: Layout, entity: Array, numbers: Numbers) -> tuple[Array, Array]:
    """Whose they are, and the rows of those events that an OVER statement reads."""
    assert numbers.mask is not None
    if not layout.over_every:
        some = np.flatnonzero(numbers.mask & layout.over_bits)
        if len(some) < len(entity):
            entity, numbers = entity[some], numbers.take(some)
    assert numbers.mask is not None
    columns = [numbers.time]
    if layout.over_order:
        assert numbers.order is not None
        columns.append(numbers.order)
    if layout.over_bits:
        columns.append(numbers.mask & layout.over_bits)
    columns += [numbers.value(v) for v in layout.over_values]
    return entity, stacked(columns, len(entity))


def events_of(layout: Layout, data: Array) -> Numbers:
    """Kept rows as events."""
    columns = np.ascontiguousarray(data.T)
    at = 1 + layout.over_order
    mask = columns[at] if layout.over_bits else None
    at += bool(layout.over_bits)
    values: list[Array | None] = [None] * len(layout.plan.values)
    for i, v in enumerate(layout.over_values):
        values[v] = columns[at + i].view(np.float64) if layout.plan.values[v].is_float else columns[at + i]
    return Numbers(columns[0], columns[1] if layout.over_order else None, mask, values)


def events_kept(layout: Layout, rows: Rows, visible_at: Array, lost: Array) -> tuple[Rows, Array]:
    """The rows that a window read at `visible_at` or later holds, of each entity the newest up to the cap.

    With them the greatest event time that the cap removed within such a window (NEVER: none).
    """
    oldest = np.where(visible_at == NEVER, NEVER, visible_at - layout.over_size)
    lost = np.where(lost < oldest, NEVER, lost)
    every = np.arange(rows.entities)
    low = rows.find(every, oldest)
    over = rows.starts[1:] - low > layout.cap
    if over.any():
        cut = rows.starts[1:][over] - layout.cap
        lost = lost.copy()
        lost[over] = np.maximum(lost[over], rows.data[cut - 1, 0])
        low = low.copy()
        low[over] = cut
    if (low == rows.starts[:-1]).all():
        return rows, lost
    kept = np.arange(len(rows)) >= np.repeat(low, rows.counts)
    return rows.keep(kept), lost
