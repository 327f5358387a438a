"""Which served records can still be recomputed: those served since what they were read from was last rewound."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.clock import to_micros
from feature_store.consistency.served_log import micros, not_served
from feature_store.rewound import rewound_at
from feature_store.stream_view import log_directory
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

    Kept are those with `served_at` at or after `since`; without it, those served after the last rewind of every windowed
    view that they were read from. DataError for a record without the fields that decide.
    """
    windowed = {v.name: v for v in views if definition_of(v) is not None}

    @functools.cache
    def rewound(name: str) -> int | None:
        at = rewound_at(log_directory(offline_path, windowed[name]).parent) if name in windowed else None
        return None if at is None else to_micros(at)

    kept, left_out = [], 0
    for record in records:
        try:
            starts = [rewound(v) for v in record["views"]] if since is None else [to_micros(since)]
            served_at = micros(record["served_at"]) if any(s is not None for s in starts) else 0
            if any(s is not None and served_at < s for s in starts):
                left_out += 1
            else:
                kept.append(record)
        except (KeyError, TypeError, ValueError) as e:
            raise not_served(record, e) from e
    return kept, left_out
