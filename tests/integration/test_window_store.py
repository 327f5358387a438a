"""States in a real Redis: what was written is read back and served, an old owner changes nothing, lost data is noticed."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.types import Bool, Bytes, Float64, Int64, String, UnixTimestamp

from feature_store.clock import from_micros
from feature_store.errors import DefinitionError
from feature_store.online_reader import OnlineReader
from feature_store.read_plan import ReadPlan
from feature_store.window_store import StateLostError, StateMovedError, WindowStore
from feature_store.window_write import state_key, watermarks_key
from feature_store.windows import definition as definitions
from feature_store.windows.definition import STATE_FIELD, WINDOW_TAG, EventSource, WindowedView
from feature_store.windows.ir import Aggregate, AggregateRef, Call, Column, Constant, Output, Statement, Window
from feature_store.windows.plan import plan_of
from feature_store.windows.state import NEVER, Events, States

MINUTE = 60_000_000
HOUR = 60 * MINUTE
T = 1_700_000_000_000_000 // HOUR * HOUR
PROJECT = "windows"
N, X, B, AT = (Column(*c) for c in (("n", "int64"), ("x", "float64"), ("b", "bool"), ("at", "timestamp")))
ENTITIES = [
    Entity(name="customer_id", join_keys=["customer_id"], value_type=ValueType.STRING),
    Entity(name="shop_id", join_keys=["shop_id"], value_type=ValueType.INT64),
]
TYPES = {"int64": Int64, "float64": Float64, "bool": Bool, "string": String, "timestamp": UnixTimestamp}


def statement(window: Window, **aggregates: Aggregate) -> Statement:
    outputs = tuple(Output(name, AggregateRef(i, a.type), a.type) for i, (name, a) in enumerate(aggregates.items()))
    return Statement(window, tuple(aggregates.values()), outputs)


COUNTED = AggregateRef(0, "int64")
LEVEL = Call(
    "case",
    (
        Call("=", (COUNTED, Constant(1, "int64")), "bool"),
        Constant("one", "string"),
        Call("=", (COUNTED, Constant(2, "int64")), "bool"),
        Constant("", "string"),
        Constant(None, "string"),
    ),
    "string",
)
STATEMENTS = (
    Statement(
        Window("tumble", HOUR, HOUR),
        (Aggregate("count", None, None, "int64"),),
        (Output("level", LEVEL, "string"),),
    ),
    statement(
        Window("tumble", HOUR, HOUR),
        events=Aggregate("count", None, None, "int64"),
        total=Aggregate("sum", N, None, "int64"),
        mean=Aggregate("avg", X, None, "float64"),
        any_b=Aggregate("max", B, None, "bool"),
        newest_at=Aggregate("max", AT, None, "timestamp"),
    ),
    statement(
        Window("tumble", 10 * MINUTE, 10 * MINUTE, on_close=True), closed=Aggregate("count", None, None, "int64")
    ),
    statement(Window("over", HOUR), recent=Aggregate("count", None, None, "int64")),
)
DEFINITION = WindowedView(
    "behavior",
    ("customer_id", "shop_id"),
    ("string", "int64"),
    EventSource("events", {"n": "int64", "x": "float64", "b": "bool", "at": "timestamp"}, 24 * HOUR),
    "SELECT 1",
    timedelta(days=30),
    max_events_per_entity=5,
)


def known(definition: WindowedView) -> WindowedView:
    """The definition as the tags give it back; what its SQL says is set here, since the store does not depend on it."""
    read = definitions._from_json(definition.to_json())
    read.__dict__["statements"] = STATEMENTS
    return read


def view_of(definition: WindowedView, home: Path) -> FeatureView:
    known(definition)
    tags = {WINDOW_TAG: definition.to_json()}
    return FeatureView(
        name="behavior",
        entities=ENTITIES,
        ttl=definition.ttl,
        schema=[
            *(Field(name=o.name, dtype=TYPES[o.type]) for s in STATEMENTS for o in s.outputs),
            Field(name=STATE_FIELD, dtype=Bytes),
        ],
        source=FileSource(name="s", path=str(home / "s.parquet"), timestamp_field="event_timestamp", tags=tags),
        tags=tags,
    )


@dataclass
class Repo:
    store: FeatureStore
    stock: FeatureStore
    redis: redis.Redis
    view: FeatureView
    home: Path

    def reader(self) -> OnlineReader:
        names = [f"behavior:{o.name}" for s in STATEMENTS for o in s.outputs]
        return OnlineReader(ReadPlan.compile(self.store, names), self.redis, PROJECT, "replay")


@pytest.fixture
def repo(redis_url: str, tmp_path: Path) -> Iterator[Repo]:
    client = redis.Redis.from_url(redis_url)
    address = redis_url.removeprefix("redis://")
    host, _, db = address.partition("/")
    # Feast looks into the file to learn the types of the join keys.
    columns = {"customer_id": ["A"], "shop_id": [1], "event_timestamp": [from_micros(T)]}
    pq.write_table(pa.table(columns), tmp_path / "s.parquet")
    view = view_of(DEFINITION, tmp_path)

    def store(kind: str, connection: str) -> FeatureStore:
        online = {"type": kind, "connection_string": connection}
        online |= {} if kind == "redis" else {"clock": "replay"}
        return FeatureStore(
            config=RepoConfig(
                project=PROJECT,
                provider="local",
                registry=str(tmp_path / "registry.db"),
                online_store=online,
                offline_store={"type": "file"},
                entity_key_serialization_version=3,
            )
        )

    ours = store("feature_store.online_store.PredictFlowOnlineStore", redis_url)
    ours.apply([*ENTITIES, view])
    stock = store("redis", f"{host},db={db}")
    yield Repo(ours, stock, client, ours.get_feature_view("behavior"), tmp_path)
    client.close()


def events(states: States, *rows: dict[str, Any]) -> Events:
    """One event per row: entity, time, offset, visible_at, watermark; n is 7, x 0.5, b true, at the event's time."""
    plan = plan_of(known(DEFINITION))
    base = {"entity": 0, "partition": 0, "visible_at": None, "watermark": NEVER}
    full = [base | r for r in rows]
    for r in full:
        r["visible_at"] = r["visible_at"] or r["time"]

    def column(name: str) -> np.ndarray:
        return np.array([r[name] for r in full], np.int64)

    cells = {"n": 7, "x": 0.5, "b": 1}
    values = [
        column("time") if v.argument is AT else np.full(len(full), cells[v.argument.name], float if v.is_float else int)
        for v in plan.values
    ]
    names = ("entity", "time", "partition", "offset", "visible_at", "watermark")
    return Events(
        *map(column, names), np.full(len(full), 2 ** len(plan.conditions) - 1), np.zeros(len(full), int), values
    )


KEYS = [("A", 1), ("B", 2)]


def test_what_was_written_is_loaded_served_and_there_for_stock_readers(repo: Repo) -> None:
    windows = WindowStore(repo.store, repo.view)
    states = windows.load([*KEYS, ("none", 3)])
    states.apply(
        events(
            states,
            {"entity": 0, "time": T, "offset": 0},
            {"entity": 1, "time": T + 1, "offset": 1},
            {"entity": 0, "time": T + 11 * MINUTE, "offset": 2, "watermark": T},
        )
    )
    result = windows.write([*KEYS, ("none", 3)], states, {0: (T + 11 * MINUTE, T + 12 * MINUTE)})
    assert (result.without_values, result.fenced) == (0, 0)
    again = windows.load([("B", 2), ("A", 1)])
    assert again.encode() == [states.encode()[1], states.encode()[0]]
    assert again.offsets_of(1) == {0: 2}

    windows.clock.set(T + 11 * MINUTE)
    entities = [{"customer_id": k, "shop_id": s} for k, s in [*KEYS, ("unknown", 1)]]
    answer = repo.reader().read(entities)
    assert answer.t == from_micros(T + 12 * MINUTE)  # the watermarks were known only then
    of_a, of_b, unknown = answer.rows
    assert of_a.values == {
        "level": "",
        "events": 2,
        "total": 14,
        "mean": 0.5,
        "any_b": True,
        "newest_at": from_micros(T + 11 * MINUTE),
        "closed": 1,
        "recent": 2,
    }
    assert of_b.values["level"] == "one"
    assert of_b.values["closed"] == 1  # closed by A's event, as the watermark of the partition says
    assert of_b.views["behavior"].watermark == from_micros(T + 11 * MINUTE)
    assert set(unknown.statuses.values()) == {"NOT_FOUND"}
    names = ["behavior:events", "behavior:mean", "behavior:level"]
    stock = repo.stock.get_online_features(names, entities[:2]).to_dict()
    assert (stock["events"], stock["mean"], stock["level"]) == ([2, 1], [0.5, 0.5], ["", "one"])


def test_a_string_that_no_entity_has_is_null(repo: Repo) -> None:
    windows = WindowStore(repo.store, repo.view)
    states = windows.load(KEYS)
    states.apply(events(states, *({"entity": i, "time": T, "offset": 3 * i + j} for i in range(2) for j in range(3))))
    windows.write(KEYS, states)
    windows.clock.set(T)
    rows = repo.reader().read([{"customer_id": "A", "shop_id": 1}]).rows
    assert (rows[0].values["level"], rows[0].statuses["level"]) == (None, "NULL_VALUE")


def test_an_owner_of_before_cannot_move_a_state_back(repo: Repo) -> None:
    ours, zombie = WindowStore(repo.store, repo.view), WindowStore(repo.store, repo.view)
    behind, ahead = zombie.load(KEYS), ours.load(KEYS)
    behind.apply(events(behind, {"time": T, "offset": 3}, {"entity": 1, "time": T, "offset": 9}))
    ahead.apply(events(ahead, {"time": T, "offset": 3}, {"time": T, "offset": 300}))
    ours.write(KEYS[:1], ours_only := States.decode(ours.definition, ahead.encode()[:1]))
    assert zombie.write(KEYS, behind).fenced == 1
    held = ours.load(KEYS)
    assert held.encode() == [ours_only.encode()[0], behind.encode()[1]]
    assert ours.write(KEYS[:1], ours_only).fenced == 0  # a repeated write of the same state goes through


def holding(repo: Repo, keys: list[tuple[str, int]]) -> tuple[WindowStore, States]:
    """A store that holds what it has written of these entities: one event each, offsets 10, 11, ..."""
    windows = WindowStore(repo.store, repo.view, held_bytes=1_000_000)
    windows.attach(applied=False, run_id="r1")
    states = windows.load(keys)
    states.apply(events(states, *({"entity": i, "time": T, "offset": 10 + i} for i in range(len(keys)))))
    windows.write(keys, states)
    return windows, states


def later(windows: WindowStore, offset: int) -> States:
    """The held states with one more event of the first entity."""
    states = windows.load(KEYS)
    states.apply(events(states, {"time": T + 1, "offset": offset}))
    return states


def test_what_was_written_last_is_not_read_again(repo: Repo) -> None:
    windows, states = holding(repo, KEYS)
    before = repo.redis.info("commandstats").get("cmdstat_hget", {"calls": 0})["calls"]
    assert windows.load(KEYS).encode() == states.encode()
    assert repo.redis.info("commandstats").get("cmdstat_hget", {"calls": 0})["calls"] == before
    assert windows.load([("none", 3), *KEYS]).encode()[1:] == states.encode()
    windows.forget()
    assert windows.load(KEYS).encode() == states.encode()
    assert repo.redis.info("commandstats")["cmdstat_hget"]["calls"] == before + 3


def test_a_held_state_gives_way_to_a_newer_owner_s(repo: Repo) -> None:
    windows, _ = holding(repo, KEYS)
    other = WindowStore(repo.store, repo.view)
    newer = later(other, 20)
    other.write(KEYS, newer)
    assert windows.write(KEYS, later(windows, 15)).fenced == 1
    assert windows.load(KEYS).encode() == newer.encode()


def test_a_write_under_way_is_what_the_next_batch_begins_with(repo: Repo) -> None:
    windows, _ = holding(repo, KEYS)
    states = windows.load_held(KEYS)
    assert states is not None
    states.apply(events(states, {"time": T + 1, "offset": 15}))
    writing = windows.begin_write(KEYS, states)
    under_way = windows.load_held(KEYS)
    assert under_way is not None
    assert under_way.encode() == states.encode()
    assert windows.load_held([*KEYS, ("none", 3)]) is None
    assert writing.finish().fenced == 0
    windows.confirm()
    assert WindowStore(repo.store, repo.view).load(KEYS).encode() == states.encode()


def test_what_was_begun_beside_a_newer_owner_or_dropped_is_not_built_upon(repo: Repo) -> None:
    windows, _ = holding(repo, KEYS)
    other = WindowStore(repo.store, repo.view)
    other.write(KEYS, later(other, 20))
    writing = windows.begin_write(KEYS, later(windows, 15))
    assert writing.finish().fenced == 1
    assert windows.load_held(KEYS) is None
    dropped = windows.begin_write(KEYS, later(windows, 30))
    dropped.drop()
    assert windows.load_held(KEYS) is None
    assert windows.write(KEYS, later(windows, 31)).fenced == 0  # on a connection without the answers of the last one


def test_a_batch_of_kept_states_is_not_written_after_redis_lost_them(repo: Repo) -> None:
    windows, _ = holding(repo, KEYS)
    assert windows.load_held(KEYS) is not None
    repo.redis.flushdb()
    with pytest.raises(StateLostError):
        windows.confirm()


@pytest.mark.parametrize("held_bytes", [0, 1_000_000])
def test_an_erased_state_does_not_come_back(repo: Repo, held_bytes: int) -> None:
    """Erased between `load` and `write`, or since it was written last."""
    windows, _ = holding(repo, KEYS)
    if not held_bytes:
        windows = WindowStore(repo.store, repo.view)
        windows.attach(applied=True, run_id="r1")
    states = later(windows, 15)
    name = windows._redis_keys(KEYS)[0].as_py()
    repo.redis.delete(name)
    with pytest.raises(StateMovedError, match="erased"):
        windows.write(KEYS, states)
    assert not repo.redis.exists(name)
    again = later(windows, 15)
    assert again.offsets_of(0) == {0: 15}
    assert windows.write(KEYS, again).fenced == 0
    windows.clock.set(T + MINUTE)
    assert [r.values["events"] for r in repo.reader().read([{"customer_id": "A", "shop_id": 1}]).rows] == [1]


def test_a_held_state_does_not_hide_a_damaged_one(repo: Repo) -> None:
    windows, _ = holding(repo, KEYS)
    states = later(windows, 15)
    name = windows._redis_keys(KEYS)[0].as_py()
    cell = bytearray(repo.redis.hget(name, windows._field))
    cell[-len(states.encode()[0]) + 2] ^= 0x40
    repo.redis.hset(name, windows._field, bytes(cell))
    with pytest.raises((StateMovedError, DefinitionError)):
        windows.write(KEYS, states)
    windows.load(KEYS)
    assert windows.damaged.keys() == {KEYS[0]}
    assert repo.redis.hget(name, windows._field) == bytes(cell)


def test_watermarks_never_go_back(repo: Repo) -> None:
    windows = WindowStore(repo.store, repo.view)
    none = States.empty(windows.definition, 0)
    windows.write([], none, {0: (T, T + 5), 3: (T, T)})
    windows.write([], none, {0: (T - 1, T + 9), 3: (T + 1, T - 1)})
    assert repo.redis.hgetall(watermarks_key(PROJECT, "behavior")) == {
        b"0": f"{T},{T + 9}".encode(),
        b"3": f"{T + 1},{T}".encode(),
    }


def test_a_redis_that_lost_its_data_is_noticed(repo: Repo) -> None:
    windows = WindowStore(repo.store, repo.view)
    with pytest.raises(StateLostError, match="sync --from-log"):
        windows.attach(applied=True, run_id="r1")
    assert windows.attach(applied=False, run_id="r1") == "r1"
    assert WindowStore(repo.store, repo.view).attach(applied=True, run_id="r2") == "r1"
    windows.load(KEYS)
    repo.redis.flushdb()
    with pytest.raises(StateLostError, match="sync --from-log"):
        windows.load(KEYS)
    WindowStore(repo.store, repo.view).begin("r3")
    with pytest.raises(DefinitionError, match="rebuilt meanwhile"):
        windows.load(KEYS)
    windows.delete()
    with pytest.raises(StateLostError, match="sync --from-log"):
        windows.load(KEYS)


def test_a_view_that_was_dropped_and_applied_again_has_no_states(repo: Repo) -> None:
    windows, states = holding(repo, KEYS)
    windows.write(KEYS, states, {0: (T, T)})
    assert repo.redis.exists(state_key(PROJECT, "behavior"), watermarks_key(PROJECT, "behavior")) == 2
    repo.store.apply([], objects_to_delete=[repo.view], partial=False)
    assert repo.redis.keys() == []
    repo.store.apply([*ENTITIES, view_of(DEFINITION, repo.home)])
    with pytest.raises(StateLostError, match="sync --from-log"):
        WindowStore(repo.store, repo.store.get_feature_view("behavior")).attach(applied=True, run_id="r2")


def test_teardown_leaves_nothing_of_a_windowed_view(repo: Repo) -> None:
    windows, states = holding(repo, KEYS)
    windows.write(KEYS, states, {0: (T, T)})
    repo.store.teardown()
    assert repo.redis.keys() == []


@pytest.mark.parametrize("at", [2, 16, -3], ids=["head", "fence", "rows"])
def test_a_damaged_state_stops_no_other_and_is_rebuilt_from_the_log(repo: Repo, at: int) -> None:
    windows = WindowStore(repo.store, repo.view)
    windows.attach(applied=False, run_id="r1")
    states = windows.load(KEYS)
    states.apply(events(states, {"time": T, "offset": 3}, {"entity": 1, "time": T, "offset": 4}))
    windows.write(KEYS, states)
    first = windows._redis_keys(KEYS)[0].as_py()
    cell = bytearray(repo.redis.hget(first, windows._field))
    cell[(len(cell) - len(states.encode()[0]) if at >= 0 else 0) + at] ^= 0x40
    repo.redis.hset(first, windows._field, bytes(cell))

    loaded = windows.load(KEYS)
    assert windows.damaged.keys() == {KEYS[0]}
    assert "damaged" in windows.damaged[KEYS[0]].message or "not a window state" in windows.damaged[KEYS[0]].message
    assert (loaded.offsets_of(0), loaded.offsets_of(1)) == ({}, {0: 4})
    loaded.apply(events(loaded, {"time": T, "offset": 5}, {"entity": 1, "time": T, "offset": 6}))
    assert windows.write(KEYS, loaded).fenced == 0
    assert repo.redis.hget(first, windows._field) == bytes(cell)  # as it was: a read of it is an error
    windows.clock.set(T + MINUTE)
    of_a, of_b = repo.reader().read([{"customer_id": k, "shop_id": s} for k, s in KEYS]).rows
    assert set(of_a.statuses.values()) == {"INVALID"}
    assert of_b.values["events"] == 2

    states.apply(events(states, {"time": T, "offset": 5}, {"entity": 1, "time": T, "offset": 6}))
    rebuilding = WindowStore(repo.store, repo.view)
    assert rebuilding.rewrite(KEYS, states).fenced == 0
    assert windows.load(KEYS).encode() == states.encode()
    assert not windows.damaged


def test_states_of_another_definition_are_refused_and_stay(repo: Repo, tmp_path: Path) -> None:
    windows = WindowStore(repo.store, repo.view)
    windows.attach(applied=False, run_id="r1")
    states = windows.load(KEYS)
    states.apply(events(states, {"time": T, "offset": 3}))
    windows.write(KEYS, states)
    changed = replace(DEFINITION, ttl=timedelta(days=31))
    repo.store.apply([*ENTITIES, view_of(changed, tmp_path)])
    other = WindowStore(repo.store, repo.store.get_feature_view("behavior"))
    with pytest.raises(DefinitionError, match="windows bootstrap"):
        other.attach(applied=True, run_id="r2")
    with pytest.raises(DefinitionError, match="another definition"):
        other.load(KEYS)
    with pytest.raises(DefinitionError, match="windows bootstrap"):
        other.write(KEYS[:1], States.empty(other.definition, 1))
    assert windows.load(KEYS).encode() == states.encode()


def test_what_is_above_the_cap_is_written_without_its_values_and_read_as_invalid(repo: Repo) -> None:
    windows = WindowStore(repo.store, repo.view)
    states = windows.load(KEYS)
    states.apply(
        events(states, *({"time": T + i, "offset": i} for i in range(6)), {"entity": 1, "time": T, "offset": 6})
    )
    assert windows.write(KEYS, states).without_values == 1
    windows.clock.set(T + MINUTE)
    of_a, of_b = repo.reader().read([{"customer_id": k, "shop_id": s} for k, s in KEYS]).rows
    # Only what its OVER window gives, other statements keep their values: for readers of Feast's own client, null.
    assert {n for n, status in of_a.statuses.items() if status == "INVALID"} == {"recent"}
    assert (of_a.values["recent"], of_a.values["events"]) == (None, 6)
    assert of_b.values["recent"] == 1
    windows.clock.set(T + HOUR + 6)
    assert repo.reader().read([{"customer_id": "A", "shop_id": 1}]).rows[0].values["recent"] == 0
