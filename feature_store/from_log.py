"""Online states of windowed views from history and event log alone: after Redis lost them, in part or whole.

The log holds every event that was applied, so its states are those that were lost. The consumer group's offsets stay:
committed is only what is logged, and what the log has beyond them comes again, and is recognised.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.bootstrap import write_states
from feature_store.clock import ClockMode, from_micros
from feature_store.erasure_list import ErasureList
from feature_store.errors import NotFoundError
from feature_store.event_log import EventLog
from feature_store.log_rows import log_directory
from feature_store.stream_place import forget_notes
from feature_store.stream_topic import views_of_topic
from feature_store.window_store import WindowStore, windowed_views
from feature_store.windows.definition import definition_of
from feature_store.windows.state import NEVER

if TYPE_CHECKING:
    from feast import FeatureStore


@dataclass(frozen=True)
class Rebuilt:
    """What a rebuild wrote for one view. `known_by`: when its newest event became visible, None for an empty log;
    `fenced`: entities whose state in Redis was newer already, and stays."""

    view: str
    known_by: datetime | None
    entities: int
    events: int
    fenced: int


def rebuild_topic_from_log(
    store: FeatureStore,
    offline_path: str,
    *,
    clock: ClockMode,
    topic: str | None = None,
    advance: Callable[[int], None] | None = None,
) -> list[Rebuilt]:
    """`rebuild_from_log` of the windowed views that a topic (None: the only one) feeds. NotFoundError: none, or several
    topics."""
    name, views = views_of_topic(store, topic)
    windowed = [v.name for v in views if definition_of(v) is not None]
    if not windowed:
        raise NotFoundError("no windowed feature view reads this topic: there is no log to rebuild from", value=name)
    return rebuild_from_log(store, offline_path, clock=clock, views=windowed, advance=advance)


def rebuild_from_log(
    store: FeatureStore,
    offline_path: str,
    *,
    clock: ClockMode,
    views: Sequence[str] = (),
    advance: Callable[[int], None] | None = None,
) -> list[Rebuilt]:
    """Writes the state of every entity from all that history and the stream's log hold, for `views` (default: all), with
    its values, the watermarks and the marker that the states are there.

    The consumer group's offsets, the log and the topic's record stay as they are. Under `replay` the clock moves on to the
    newest `_visible_at`; under `wall` no clock is read. `advance` is told of entities written. Safe to repeat, after a kill
    and beside a running sync: a newer state is never replaced, and that sync ends, since its states were rebuilt. Raises
    NotFoundError: unknown view, or neither history nor log; DataError: files that cannot be read; DefinitionError: Redis
    holds states of another definition; UnavailableError: Redis.
    """
    erasures = ErasureList(offline_path)
    done = []
    for view, definition in windowed_views(store, views):
        event_log = EventLog(log_directory(offline_path, view), definition.topic)
        online = WindowStore(store, view)
        found, fenced = write_states(online, event_log, erasures, None, advance)
        known = found.visible_us != NEVER
        if clock == "replay" and known:
            online.clock.advance(found.visible_us)
        online_store: Any = store._get_provider().online_store  # Feast has no public way
        forget_notes(online_store._get_client(store.config.online_store), store.project, definition.topic)
        at = from_micros(found.visible_us) if known else None
        done.append(Rebuilt(view.name, at, found.entities, found.events, fenced))
    return done
