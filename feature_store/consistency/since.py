"""Which served records can still be recomputed: those served since what they were read from was last rewound."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.clock import to_micros
from feature_store.consistency.served_log import micros, not_served
from feature_store.log_rows import log_directory
from feature_store.rewound import rewound_at
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureView


def served_since(
    records: Iterable[Mapping[str, Any]],
    views: Iterable[FeatureView],
    offline_path: str,
    since: datetime | None = None,
) -> tuple[list[Mapping[str, Any]], int]:
    """The records to check, and the number of older ones that are left out.

    Kept are those with `served_at` at or after `since`; without it, those served after the last rewind of any windowed
    view: rows that are not windowed are usually replaced with it. DataError for a record without `served_at`.
    """
    if since is None:
        windowed = [v for v in views if definition_of(v) is not None]
        rewinds = [rewound_at(log_directory(offline_path, v).parent) for v in windowed]
        since = max((at for at in rewinds if at is not None), default=None)
    start = None if since is None else to_micros(since)
    kept, left_out = [], 0
    for record in records:
        try:
            if start is not None and micros(record["served_at"]) < start:
                left_out += 1
            else:
                kept.append(record)
        except (KeyError, TypeError, ValueError) as e:
            raise not_served(record, e) from e
    return kept, left_out
