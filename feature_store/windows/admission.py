"""Which events of a batch count: replays, late ones and duplicates are found here, against what the states remember."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from feature_store.windows.rows import NEVER, Array, Groups, Rows, order_of, packed

if TYPE_CHECKING:
    from feature_store.windows.state import Events

APPLIED, REPLAYED, DUPLICATE, LATE = 0, 1, 2, 3


def is_replayed(partitions: Rows, events: Events) -> Array:
    """Events of the log whose offset the entity's state holds already. Rows of history are never."""
    places = partitions.find(events.entity, events.partition)
    there = partitions.holds(places, events.entity, events.partition)
    there &= events.partition >= 0
    if there.any():
        there[there] = events.offset[there] <= partitions.data[places[there], 1]
    return there


def is_late(events: Events, retention: int) -> Array:
    """Events older than the watermark before them by more than the retention."""
    return (events.watermark != NEVER) & (events.time < _oldest(events, retention))


def _oldest(events: Events, retention: int) -> Array:
    return np.where(events.watermark == NEVER, NEVER, events.watermark - retention)


def is_duplicate(ids: Rows, events: Events, rows: Array, retention: int) -> Array:
    """Of the events `rows` (ascending), those whose id has counted before with a time within the retention of theirs."""
    entity, key, time = events.entity[rows], events.id[rows], events.time[rows]
    oldest = _oldest(events, retention)[rows]
    places = ids.find(entity, key)
    known = ids.holds(places, entity, key)
    held = np.full(len(rows), NEVER)
    held[known] = ids.data[places[known], 1]
    order = order_of(ids.entities, entity, key)
    groups = Groups.of(packed(ids.entities, entity[order], key[order]))
    leads = order[groups.starts]
    # Against what the state knew, or against the first of the batch: nearly always that decides.
    first = np.zeros(len(rows), bool)
    first[leads] = True
    first &= ~known
    base = np.empty(len(rows), np.int64)
    base[order] = groups.spread(np.where(known[leads], held[leads], time[leads]))
    out = ~first & (base >= oldest)
    unsure = np.add.reduceat((~first & (base < oldest))[order], groups.starts) if len(rows) else groups.starts
    for g in np.flatnonzero((unsure > 0) & (groups.sizes > 1)).tolist():
        members = order[groups.starts[g] : groups.starts[g] + groups.sizes[g]].tolist()
        newest = int(held[members[0]]) if known[members[0]] else None
        for i in members:  # an id that comes back after it was forgotten: in the order of arrival
            out[i] = newest is not None and newest >= oldest[i]
            if not out[i]:
                newest = int(time[i]) if newest is None else max(newest, int(time[i]))
    return out


def remembered(ids: Rows, entity: Array, key: Array, time: Array) -> Rows:
    """With the ids of events that count, each with the greatest time."""
    order = order_of(ids.entities, entity, key)
    groups = Groups.of(packed(ids.entities, entity[order], key[order]))
    lead = order[groups.starts]
    newest = np.maximum.reduceat(time[order], groups.starts)
    entity, key = entity[lead], key[lead]
    places = ids.find(entity, key)
    there = ids.holds(places, entity, key)
    newest[there] = np.maximum(newest[there], ids.data[places[there], 1])
    return ids.put(places, there, entity, np.stack([key, newest], axis=1))


def newest_ids(ids: Rows, oldest: Array, cap: int) -> tuple[Rows, int]:
    """The ids that an event may still repeat, of each entity the newest `cap` by event time; and how many went for the cap."""
    ids = ids.keep(ids.data[:, 1] >= oldest[ids.entity])
    over = ids.counts > cap
    if not over.any():
        return ids, 0
    order = np.lexsort((ids.data[:, 0], ids.data[:, 1], ids.entity))
    rank = np.empty(len(ids), np.int64)
    rank[order] = np.arange(len(ids))
    kept = rank >= (ids.starts[1:] - cap)[ids.entity]
    return ids.keep(kept), int(np.count_nonzero(~kept))


def read_to(partitions: Rows, entity: Array, partition: Array, offset: Array, watermark: Array) -> Rows:
    """With the offsets and the watermarks after log rows that were applied."""
    order = order_of(partitions.entities, entity, partition)
    groups = Groups.of(packed(partitions.entities, entity[order], partition[order]))
    lead = order[groups.starts]
    offset = np.maximum.reduceat(offset[order], groups.starts)
    watermark = np.maximum.reduceat(watermark[order], groups.starts)
    entity, partition = entity[lead], partition[lead]
    places = partitions.find(entity, partition)
    there = partitions.holds(places, entity, partition)
    old = partitions.data[places[there]]
    offset[there] = np.maximum(offset[there], old[:, 1])
    watermark[there] = np.maximum(watermark[there], old[:, 2])
    return partitions.put(places, there, entity, np.stack([partition, offset, watermark], axis=1))
