"""States and finished values of one windowed view in the online store: loaded in one round trip, written as one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.clock import replay_clock_key
from feature_store.errors import DefinitionError, NotFoundError
from feature_store.online_write import OnlineWriter
from feature_store.read_plan import ReadPlan
from feature_store.redis_connection import answering
from feature_store.windows.definition import STATE_FIELD, WindowedView, definition_of
from feature_store.windows.state import EntityState, WindowStateError

if TYPE_CHECKING:
    from feast import FeatureStore, FeatureView

_TIME = pa.timestamp("us", "UTC")
Key = tuple[str | int, ...]
"""An entity: the values of the definition's `entity_key`, in its order."""

# The clock never goes back, whoever writes it last; numbers of 16 digits would lose precision as Lua numbers.
_ADVANCE_CLOCK = """
local held = redis.call('GET', KEYS[1])
if held and (#held > #ARGV[1] or (#held == #ARGV[1] and held >= ARGV[1])) then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""


def windowed_views(store: FeatureStore, names: Sequence[str] = ()) -> list[tuple[FeatureView, WindowedView]]:
    """The windowed views of the registry with their definitions, or those named. NotFoundError for an unknown name."""
    views = {v.name: (v, d) for v in store.list_feature_views() if (d := definition_of(v)) is not None}
    for name in names:
        if name not in views:
            raise NotFoundError("no such windowed feature view", value=name, valid=views, next_step="feast apply")
    if not views:
        raise NotFoundError("the registry holds no windowed feature view", next_step="feast apply")
    return [views[n] for n in names] if names else list(views.values())


class WindowStore:
    """One windowed view in Redis. `clock_us` and `advance_clock` are the project's replay clock."""

    def __init__(self, store: FeatureStore, view: FeatureView) -> None:
        definition = definition_of(view)
        if definition is None:
            raise DefinitionError("not a windowed feature view", value=view.name)
        self.definition = definition
        self.name = view.name
        store.refresh_registry()  # else a write may look up the view in a cache from before the latest apply
        self._store = store
        self._view = view
        self._plan = ReadPlan.of_views(store.config, store.project, [(view, [])])
        online: Any = store._get_provider().online_store  # Feast has no public way
        self._writer = OnlineWriter(online, store.config, view)
        self._redis: Any = online._get_client(store.config.online_store)
        self._clock_key = replay_clock_key(store.project)
        self._advance = self._redis.register_script(_ADVANCE_CLOCK)

    def load(self, keys: Sequence[Key]) -> dict[Key, EntityState]:
        """The states of entities; an empty one where there is none yet.

        UnavailableError: no Redis; DefinitionError: written under another definition; WindowStateError: damaged.
        """
        requests = self._plan.requests([dict(zip(self.definition.entity_key, k)) for k in keys])
        pipe = self._redis.pipeline(transaction=False)
        for redis_key, fields in requests:
            pipe.hmget(redis_key, fields)
        with answering(self._redis):
            replies = pipe.execute()
        states = {}
        for key, reply in zip(keys, replies):
            held = self._plan.view_plans[0].parse(reply)
            if held.error is not None:
                raise held.error
            states[key] = held.state or EntityState.empty(self.definition)
        return states

    def write(self, states: Mapping[Key, EntityState]) -> int:
        """Writes each state and its values as of `visible_at` in one atomic row; the number of entities without values.

        The row's event_timestamp is the greatest event time seen, created is `visible_at`, so that the newer state
        wins. An entity whose values cannot be finalised gets nulls: a reader without our store sees nothing wrong.
        """
        if not states:
            return 0
        definition = self.definition
        columns: dict[str, list[Any]] = {a.name: [] for a in definition.aggregates}
        without = 0
        for state in states.values():
            try:
                values = state.finalise(definition, state.visible_at)
            except WindowStateError:
                without += 1
                values = dict.fromkeys(columns)
            for name, column in columns.items():
                column.append(values[name])
        table = {k: pa.array([key[i] for key in states]) for i, k in enumerate(definition.entity_key)}
        table |= {name: pa.array(column, pa.int64()) for name, column in columns.items()}
        table[STATE_FIELD] = pa.array([s.encode(definition) for s in states.values()], pa.binary())
        table[self._writer.event_column] = pa.array([s.last_seen for s in states.values()], _TIME)
        table[self._writer.created_column] = pa.array([s.visible_at for s in states.values()], _TIME)
        self._writer.write(pa.table(table), wall=None)  # the stream has refused events ahead of the clock
        return without

    def delete(self) -> None:
        """Removes every row of the view from the online store: the next bootstrap starts from nothing."""
        online: Any = self._store._get_provider().online_store  # Feast has no public way
        with answering(self._redis):
            online.delete_table(self._store.config, self._view)

    def clock_us(self) -> int | None:
        """The replay clock, microseconds; None before it was set."""
        with answering(self._redis):
            value = self._redis.get(self._clock_key)
        return None if value is None else int(value)

    def advance_clock(self, us: int) -> None:
        """Moves the replay clock forward, never back."""
        with answering(self._redis):
            self._advance(keys=[self._clock_key], args=[str(us)])

    def set_clock(self, us: int) -> None:
        """Sets the replay clock, also back: for bootstrap only."""
        with answering(self._redis):
            self._redis.set(self._clock_key, str(us))
