"""What leaves Redis in the end: rows older than their view's ttl, and rows of views that no longer exist.

Redis (before 7.4) cannot expire a field, so a sweeper walks the keys with SCAN, pausing between pages, and removes a view's
fields in one atomic script that looks again: a row written in the meantime stays. ttl 0 means never.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.clock import MICROSECOND, from_micros, to_micros
from feature_store.errors import NotFoundError
from feature_store.redis_connection import answering
from feature_store.redis_delete import DROP_VIEW, Command, run_script
from feature_store.redis_layout import decode_timestamp, feature_field, join_keys_of, pair_field, timestamp_field
from feature_store.stored_names import stored_name, stored_names, versioned
from feature_store.windows.definition import STATE_FIELD, definition_of
from feature_store.without_functions import stored_views, view_version

if TYPE_CHECKING:
    from feast import FeatureStore, RepoConfig

    from feature_store.online_store import PredictFlowOnlineStore

log = logging.getLogger(__name__)

PAGE = 500
PAUSE_SECONDS = 0.01
"""Between pages of PAGE keys: a sweep may take long, a reader may not."""

# Removes a view's fields if its event time is still the one that was judged; the hash goes when no view is left in it.
# ARGV: the _ts field, its judged value, then all fields of the view.
_DROP_IF_UNCHANGED = """
if redis.call('HGET', KEYS[1], ARGV[1]) ~= ARGV[2] then return 0 end
for i = 3, #ARGV, 2000 do
  redis.call('HDEL', KEYS[1], unpack(ARGV, i, math.min(i + 1999, #ARGV)))
end
for _, name in ipairs(redis.call('HKEYS', KEYS[1])) do
  if name:sub(1, 4) == '_ts:' then return 1 end
end
redis.call('DEL', KEYS[1])
return 1
"""


@dataclass
class Swept:
    """One view: rows looked at, rows expired, rows removed (0 in a dry run; fewer where a row was written meanwhile)."""

    view: str
    looked_at: int = 0
    expired: int = 0
    removed: int = 0


@dataclass
class Orphans:
    """A stored view that the registry does not know: rows, and how many of them were removed."""

    view: str
    rows: int = 0
    removed: int = 0


@dataclass
class _View:
    """What the sweeper needs of one view. `keep_us`: how long after its event time a row may be needed."""

    ts: bytes
    fields: list[bytes]
    keep_us: int
    result: Swept = field(repr=False)


def sweep(
    store: FeatureStore,
    at: datetime,
    *,
    views: Sequence[str] = (),
    dry_run: bool = False,
    advance: Callable[[int], Any] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> list[Swept]:
    """Removes the rows of `views` (default: all) that no read at `at` or later can return. `at`: the store's clock.

    A row goes when `event_timestamp + ttl < at`; a windowed one only when its windows and the retention of late events
    have passed too, counted from its last seen event. Views with ttl 0 are left alone. `advance` gets the number of keys
    looked at. Safe to repeat, to interrupt, and beside readers and writers. NotFoundError for an unknown view;
    UnavailableError: no Redis, what was removed before stays removed.
    """
    online = _online(store)
    known = {v.name: v for v in _stored_views(store)}
    for name in views:
        if name not in known:
            raise NotFoundError("no such feature view", value=name, valid=known, next_step="feast apply")
    wanted = {n: _versions(store, known[n]) for n in (views or known)}
    judged = [v for versions in wanted.values() for v in versions if v.keep_us]
    if judged:
        client = online._get_client(store.config.online_store)
        limit = to_micros(at)
        for keys in _pages(client, online, store.project, pause):
            held = _read(client, keys, [v.ts for v in judged])
            commands: list[tuple[_View, Command]] = []
            for key, row in zip(keys, held, strict=True):
                for view, ts in zip(judged, row, strict=True):
                    if ts is None:
                        continue
                    view.result.looked_at += 1
                    if decode_timestamp(ts) // 1000 + view.keep_us < limit:
                        view.result.expired += 1
                        commands.append((view, Command(key, [view.ts, ts, *view.fields])))
            if not dry_run:
                _drop(client, commands)
            if advance:
                advance(len(keys))
    return [versions[0].result for versions in wanted.values()]


def orphans(
    store: FeatureStore,
    *,
    delete: bool = False,
    advance: Callable[[int], Any] | None = None,
    pause: Callable[[float], None] = time.sleep,
) -> list[Orphans]:
    """Views that have rows in Redis but are not in the registry (dropped while Redis was away, or by another tool).

    With `delete` their times go and, since the registry has forgotten the names of their features, every value in the same
    hash that belongs to no view of the registry (with versioned views, whose older schemas are not at hand, only the times
    go: that makes them NOT_FOUND to every reader). A hash without a view is removed. Only this project's keys. Safe to repeat.
    Run it when no apply is under way.
    """
    online = _online(store)
    client = online._get_client(store.config.online_store)
    store.refresh_registry()
    views = _stored_views(store)
    named = {timestamp_field(name) for v in views for name in stored_names(store.config, v)}
    values = {f for v in views for f in _view(store.config, v).fields if len(f) == _VALUE_FIELD}
    found: dict[bytes, Orphans] = {}
    for keys in _pages(client, online, store.project, pause):
        for key, names in zip(keys, _field_names(client, keys), strict=True):
            times = [n for n in names if n.startswith(b"_ts:")]
            gone = [n for n in times if n not in named]
            for name in gone:
                found.setdefault(name, Orphans(name[4:].decode("utf-8", "backslashreplace"))).rows += 1
            if not (delete and gone):
                continue
            fields = [f for n in gone for f in (n, b"_pf:" + n[4:])]
            if not versioned(store.config):
                fields += [n for n in names if len(n) == _VALUE_FIELD and n not in values]
            with answering(client):
                client.eval(DROP_VIEW, 1, key, *fields)
            for name in gone:
                found[name].removed += 1
        if advance:
            advance(len(keys))
    return [found[name] for name in sorted(found)]


_VALUE_FIELD = 4
"""Bytes of a value's field: its hash. Those of times are longer."""


def clock_of(store: FeatureStore, wall: datetime) -> datetime | None:
    """What time it is for the online store: `wall`, or the replay clock; None where that was never set."""
    from feature_store.clock import replay_clock_key

    settings: Any = store.config.online_store
    if settings.clock == "wall":
        return wall
    client = _online(store)._get_client(settings)
    with answering(client):
        value = client.get(replay_clock_key(store.project))
    return None if value is None else from_micros(int(value))


def _drop(client: Any, commands: Sequence[tuple[_View, Command]]) -> None:
    done = 0
    for replies in run_script(client, _DROP_IF_UNCHANGED, (c for _, c in commands)):
        for reply in replies:
            commands[done][0].result.removed += reply
            done += 1


def _versions(store: FeatureStore, view: Any) -> list[_View]:
    """The view at hand, and each of its older versions that the registry still knows: each by its own ttl."""
    found = [_view(store.config, view)]
    if versioned(store.config):
        for number in range(getattr(view, "current_version_number", 0) or 0):
            try:
                older = view_version(store.registry, store.project, view.name, number)
            except NotFoundError:
                continue  # nobody can read it, and how long its rows were to be kept is forgotten
            found.append(_view(store.config, older, found[0].result))
    return found


def _view(config: RepoConfig, view: Any, result: Swept | None = None) -> _View:
    stored = stored_name(config, view)
    names = dict.fromkeys([*(f.name for f in view.features), STATE_FIELD])
    fields = [timestamp_field(stored), pair_field(stored), *(feature_field(stored, n) for n in names)]
    keep = getattr(view, "ttl", None)
    definition = definition_of(view)
    if keep and definition is not None:
        # As long as a late event may still count, so is what it would be counted with.
        keep = max(keep, definition.longest_window_us * MICROSECOND) + definition.source.retention_us * MICROSECOND
    microseconds = 0 if not keep else int(keep.total_seconds() * 1_000_000)
    return _View(timestamp_field(stored), fields, microseconds, result or Swept(view.name))


def _stored_views(store: FeatureStore) -> list[Any]:
    return stored_views(store.registry, store.project)


def _online(store: FeatureStore) -> PredictFlowOnlineStore:
    from feature_store.errors import UsageError
    from feature_store.online_store import PredictFlowOnlineStore

    online = store._get_provider().online_store
    if not isinstance(online, PredictFlowOnlineStore):
        raise UsageError("only PredictFlow's online store can be swept", value=type(online).__name__)
    return online


def _pages(
    client: Any, online: PredictFlowOnlineStore, project: str, pause: Callable[[float], None]
) -> Iterator[list[bytes]]:
    """The project's entity keys, page by page; a key may come twice, as SCAN gives it."""
    page: list[bytes] = []
    with answering(client):
        for key in online.scan(client, project):
            if join_keys_of(key, project) is not None:
                page.append(key)
            if len(page) >= PAGE:
                yield page
                page = []
                pause(PAUSE_SECONDS)
    if page:
        yield page


def _read(client: Any, keys: Sequence[bytes], fields: list[bytes]) -> list[list[bytes | None]]:
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.hmget(key, fields)
    with answering(client):
        return list(pipe.execute())


def _field_names(client: Any, keys: Sequence[bytes]) -> list[list[bytes]]:
    pipe = client.pipeline(transaction=False)
    for key in keys:
        pipe.hkeys(key)
    with answering(client):
        return list(pipe.execute())
