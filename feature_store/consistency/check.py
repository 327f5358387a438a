"""Recomputes every value of served records, view by view.

Windowed values come from the event log (history and stream Parquet) by (t, offsets, and the watermark served where windows
close), with the SQL of history, which shares no code with the stream's states. Row values come from the Parquet row with exactly
the served (event_timestamp, created); statuses from ttl and t. What was read must itself have been known by t: else it
is different, though both sides agree. Where a newer row or more events were known by t, but not yet written, the value
is `stale`, not different.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.consistency.result import CHECKED_STATUSES, Consistency
from feature_store.consistency.served_log import Served, values_of
from feature_store.erasure_list import ErasureList, digest_of
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    from feast import FeatureView


def check(records: Iterable[Mapping[str, Any]], views: Iterable[FeatureView], offline_path: str | Path) -> Consistency:
    """Recomputes every feature of every record of the served log (docs/reference/rest.md has its fields).

    `views`: the registry's feature views; `offline_path`: the offline store. Changes nothing. DataError for a record
    that is not one of the served log, and, naming the file, for Parquet that cannot be read; NotFoundError for a view
    without any data.
    """
    from feature_store.consistency.rows import check_rows
    from feature_store.consistency.windowed import check_windowed

    by_name = {v.name: v for v in views}
    is_erased = _erased(offline_path)
    groups: dict[str, dict[str, list[Served]]] = defaultdict(lambda: defaultdict(list))
    result = Consistency()
    for number, record in enumerate(records):
        for of_view, served in values_of(number, record):
            if of_view not in by_name:
                result.skip(f"no view {of_view}")
            elif is_erased(served.entity):
                result.skip("an entity erased since")
            elif served.status not in CHECKED_STATUSES:
                result.skip(f"status {served.status}")
            else:
                groups[of_view][served.feature].append(served)
    for name, features in groups.items():
        view = by_name[name]
        definition = definition_of(view)
        if definition is not None:
            check_windowed(view, definition, features, str(offline_path), result)
        else:
            check_rows(view, features, str(offline_path), result)
    return result


def _erased(offline_path: str | Path) -> Callable[[Mapping[str, Any]], bool]:
    """Whether an entity is on the erasure list: what it was served from is gone on purpose."""
    listed = {(e.join_key, e.sha256) for e in ErasureList(offline_path).entries()}
    return lambda entity: bool(listed) and any((k, digest_of(k, v)) in listed for k, v in entity.items())
