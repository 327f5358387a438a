"""Redis settings that make an online store slow or forgetful: looked at when a server or a consumer starts, said once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from feature_store.redis_connection import answering
from feature_store.without_functions import message

if TYPE_CHECKING:
    from feast import FeatureStore

log = logging.getLogger(__name__)

WIDE = 64
"""Fields of one hash from which on a linear scan of them is what a read or a write costs."""
LISTPACK = ("hash-max-listpack-entries", "hash-max-ziplist-entries")
"""The name since Redis 7, and before."""


def warn_of_settings(store: FeatureStore) -> str | None:
    """Logs one warning with all that should be set, and returns it; None where all is well.

    A server that hides its settings (CONFIG is often forbidden to applications) is left alone. UnavailableError: no Redis.
    """
    from redis.exceptions import ResponseError

    online: Any = store._get_provider().online_store  # Feast has no public way
    client = online._get_client(store.config.online_store)
    settings: dict[str, str] = {}
    try:
        with answering(client):
            for pattern in ("hash-max-*-entries", "maxmemory*"):
                settings |= {_text(k): _text(v) for k, v in client.config_get(pattern).items()}
    except ResponseError as e:
        log.debug("Redis does not show its settings (%s)", e)
        return None
    advice = advice_on(settings, widest_hash(store))
    if not advice:
        return None
    said = "Redis settings: " + "; ".join(advice)
    log.warning(said)
    return said


def advice_on(settings: Mapping[str, str], widest: int) -> list[str]:
    """What to set, and why. `widest`: fields of the widest hash. Pure."""
    advice = []
    for name in LISTPACK:
        limit = int(settings.get(name, 0))
        if WIDE <= widest <= limit:
            advice.append(
                f"an entity has {widest} fields, which Redis scans one by one: `CONFIG SET {name} 16` makes wide reads and "
                "writes several times as fast, for about 4 times the memory of those entities"
            )
            break
    policy = settings.get("maxmemory-policy", "noeviction")
    if int(settings.get("maxmemory", 0)) and policy.startswith("allkeys"):
        advice.append(
            f"maxmemory-policy {policy} drops features and window states without a word when memory is full: "
            "`CONFIG SET maxmemory-policy noeviction`, and give it memory (`predictflow online sweep` frees what is expired)"
        )
    return advice


def widest_hash(store: FeatureStore) -> int:
    """Fields of the widest entity: all views of one set of join keys share a hash."""
    stored = message(store.registry, store.project)  # Feast's list of views would restore their functions
    widths: dict[tuple[str, ...], int] = {}
    for view in [*stored.feature_views, *stored.stream_feature_views, *stored.label_views]:
        if view.spec.project == store.project:
            keys = tuple(sorted(c.name for c in view.spec.entity_columns))
            widths[keys] = widths.get(keys, 0) + len(view.spec.features) + 2
    return max(widths.values(), default=0)


def _text(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)
