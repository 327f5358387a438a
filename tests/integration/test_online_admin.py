"""Writing, sweeping and connecting, on real Redis servers: tables, the clock's limit, orphans, Cluster, Sentinel, restarts."""

from __future__ import annotations

import asyncio
import subprocess
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import redis
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.errors import FeatureViewNotFoundException
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Json, Map, String, UnixTimestamp
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from feature_store.clock import WallClock, replay_clock_key, to_micros
from feature_store.errors import DataError, DefinitionError, NotFoundError, UnavailableError, UsageError
from feature_store.online_sweep import clock_of, orphans, sweep
from feature_store.online_write import OnlineWriter, Written, online_write, online_write_async
from feature_store.redis_connection import connect
from feature_store.redis_settings import advice_on, warn_of_settings
from feature_store.windows.declare import event_source, windowed_feature_view
from tests.value_types import COLUMNS

OURS = "feature_store.online_store.PredictFlowOnlineStore"
DAY = timedelta(days=1)
T = datetime(2026, 1, 1, 12, tzinfo=UTC)
UTC_US = pa.timestamp("us", "UTC")
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)


def _view(home: Path, name: str, ttl: timedelta, **fields: Any) -> FeatureView:
    source = FileSource(
        name=name,
        path=str(home / f"{name}.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    schema = [Field(name=n, dtype=t) for n, t in (fields or {"n": Int64}).items()]
    return FeatureView(name=name, entities=[customer], ttl=ttl, schema=schema, source=source)


def _store(home: Path, connection: str, kind: str = OURS, registry: Any = None, **online: Any) -> FeatureStore:
    return FeatureStore(
        config=RepoConfig(
            project="shop",
            provider="local",
            registry=registry or str(home / "registry.db"),
            online_store={"type": kind, "connection_string": connection, **online},
            entity_key_serialization_version=3,
        )
    )


def _table(n: list[int | None], event: list[datetime], ids: list[str] | None = None) -> pa.Table:
    return pa.table(
        {
            "customer_id": ids or [f"C{i}" for i in range(len(n))],
            "n": pa.array(n, pa.int64()),
            "event_timestamp": pa.array(event, UTC_US),
            "created": pa.array(event, UTC_US),
        }
    )


def _write(store: FeatureStore, view: str, table: pa.Table, wall: Any = None) -> Written:
    online: Any = store._get_provider().online_store
    return online_write(online, store.config, store.get_feature_view(view), table, wall=wall)


def _read(store: FeatureStore, view: str, ids: list[str]) -> list[Any]:
    answer = store.get_online_features([f"{view}:n"], {"customer_id": ids}).to_dict()
    return list(answer["n"])


@pytest.fixture
def shop(tmp_path: Path, redis_url: str) -> FeatureStore:
    store = _store(tmp_path, redis_url, expired_values="keep")
    store.apply([customer, _view(tmp_path, "day", DAY), _view(tmp_path, "ever", timedelta(0))])
    return store


# --- tables -----------------------------------------------------------------------------------------------------------


def test_a_table_is_written_newest_wins_in_chunks_and_by_single_rows(shop: FeatureStore) -> None:
    n = 2_500
    ids = [f"C{i}" for i in range(n)]
    seen: list[int] = []
    writer = OnlineWriter(shop._get_provider().online_store, shop.config, shop.get_feature_view("day"))  # type: ignore[arg-type]
    table = _table(list(range(n)), [T] * n)
    assert writer.write(table, wall=None, progress=seen.append) == Written(n, n)
    assert seen == [1000, 1000, 500]
    assert writer.write(_table([-1], [T - DAY]), wall=None) == Written(1, 0)
    assert writer.write(_table([-2, -3], [T + DAY, T - DAY], ["C1", "C2"]), wall=None) == Written(2, 1)
    twice = _table([7, 8, 9, 10, 11], [T + DAY * d for d in (3, 5, 4, 5, 2)], ["C3"] * 5)
    assert writer.write(twice, wall=None) == Written(5, 1)
    assert _read(shop, "day", ids) == [0, -2, 2, 10, *range(4, n)]


def test_the_asynchronous_form_writes_the_same(shop: FeatureStore) -> None:
    online: Any = shop._get_provider().online_store
    view = shop.get_feature_view("day")

    async def run() -> Written:
        return await online_write_async(online, shop.config, view, _table(list(range(1200)), [T] * 1200), wall=None)

    assert asyncio.run(run()) == Written(1200, 1200)
    assert _read(shop, "day", ["C0", "C1199", "C1200"]) == [0, 1199, None]


def test_bad_tables_are_refused_before_anything_is_written(shop: FeatureStore, redis_url: str) -> None:
    good = _table(list(range(3000)), [T] * 3000)
    bad = {
        "lack a column: 'n'": good.drop_columns(["n"]),
        "row 2999 has no join key customer_id": good.set_column(0, "customer_id", pa.array([*["x"] * 2999, None])),
        r"row 2999 \(customer_id='C2999'\) has no event_timestamp": good.set_column(
            2, "event_timestamp", pa.array([*[T] * 2999, None], UTC_US)
        ),
        "feature n must be INT64": good.set_column(1, "n", pa.array([*[1.0] * 2999, 0.5])),
        "column event_timestamp holds no times": good.set_column(2, "event_timestamp", pa.array(["x"] * 3000)),
    }
    for message, table in bad.items():
        with pytest.raises(DataError, match=message):
            _write(shop, "day", table)
    with redis.Redis.from_url(redis_url) as client:
        assert client.dbsize() == 0


# --- the clock --------------------------------------------------------------------------------------------------------


class FixedClock:
    mode = "wall"

    def now(self) -> datetime:
        return T


def test_a_row_dated_after_the_clock_is_refused_by_name_and_nothing_is_written(shop: FeatureStore) -> None:
    edge = T + timedelta(seconds=5)
    assert _write(shop, "day", _table([1], [edge]), FixedClock()) == Written(1, 1)
    late = _table([1, 2, 3, 4], [T, T, T, edge + timedelta(microseconds=1)], list("abcd"))
    for table in (late, late.slice(3)):
        with pytest.raises(DataError, match=r"day: row \d \(customer_id='d'\) is dated 2026-01-01T12:00:05.000001"):
            _write(shop, "day", table, FixedClock())
    assert _read(shop, "day", list("abcd")) == [None] * 4


def test_feasts_own_write_and_materialize_follow_the_same_limit(tmp_path: Path, shop: FeatureStore) -> None:
    future = WallClock().now() + DAY
    with pytest.raises(DataError, match=r"row 1 \(customer_id: C1\) is dated .* after the clock"):
        shop.write_to_online_store("day", _table([1, 2], [T, future]).to_pandas())
    assert _read(shop, "day", ["C0"]) == [None]
    source = tmp_path / "day.parquet"
    _table([1, 2], [T, T]).to_pandas().to_parquet(source)
    engine = {"type": "feature_store.materialise.PredictFlowEngine"}
    offline = {"type": "feature_store.offline_store.PredictFlowOfflineStore", "path": str(tmp_path)}
    config = shop.config.model_dump(by_alias=True, exclude_unset=True) | {
        "batch_engine": engine,
        "offline_store": offline,
    }
    ours = FeatureStore(config=RepoConfig(**config))
    ours.materialize(T - DAY, future + DAY, feature_views=["day"])  # an end in the future alone hurts nobody
    assert _read(ours, "day", ["C0", "C1"]) == [1, 2]
    _table([3, 4], [T + DAY, future]).to_pandas().to_parquet(source)
    with pytest.raises(DataError, match=r"1 keys have rows dated after the clock, the first \(customer_id='C1'\)"):
        ours.materialize(T - DAY, future + DAY, feature_views=["day"])
    assert _read(ours, "day", ["C0", "C1"]) == [1, 2]


def test_under_replay_the_clock_is_the_key_and_unset_means_no_limit(tmp_path: Path, redis_url: str) -> None:
    store = _store(tmp_path, redis_url, clock="replay")
    store.apply([customer, _view(tmp_path, "day", DAY)])
    far = datetime(2100, 1, 1, tzinfo=UTC)
    assert _write(store, "day", _table([1], [far]), FixedClock()).written == 1
    with redis.Redis.from_url(redis_url) as client:
        client.set(replay_clock_key("shop"), to_micros(T))
    with pytest.raises(DataError, match="after the replay clock"):
        _write(store, "day", _table([1], [far]))


# --- contract with stock Feast, every type ----------------------------------------------------------------------------

WIDE = {
    "i32": (Int32, ValueType.INT32),
    "i64": (Int64, ValueType.INT64),
    "f32": (Float32, ValueType.FLOAT),
    "f64": (Float64, ValueType.DOUBLE),
    "s": (String, ValueType.STRING),
    "by": (Bytes, ValueType.BYTES),
    "bo": (Bool, ValueType.BOOL),
    "ts": (UnixTimestamp, ValueType.UNIX_TIMESTAMP),
    "js": (Json, ValueType.JSON),
    "m": (Map, ValueType.MAP),
    "li": (Array(Int64), ValueType.INT64_LIST),
    "ls": (Array(String), ValueType.STRING_LIST),
    "ld": (Array(Float64), ValueType.DOUBLE_LIST),
    "lf": (Array(Float32), ValueType.FLOAT_LIST),
    "lb": (Array(Bool), ValueType.BOOL_LIST),
    "lt": (Array(UnixTimestamp), ValueType.UNIX_TIMESTAMP_LIST),
}
ROW = st.fixed_dictionaries({name: st.none() | COLUMNS[kind][0] for name, (_, kind) in WIDE.items()})


def test_stock_reads_what_a_table_wrote_and_ours_what_stock_wrote_for_every_type(
    tmp_path: Path, redis_url: str
) -> None:
    ours = _store(tmp_path, redis_url, expired_values="keep")
    ours.apply([customer, _view(tmp_path, "wide", timedelta(0), **{n: t for n, (t, _) in WIDE.items()})])
    stock = _store(tmp_path, redis_url.removeprefix("redis://").replace("/", ",db="), "redis")
    refs = [f"wide:{n}" for n in WIDE]
    client = redis.Redis.from_url(redis_url)
    view = ours.get_feature_view("wide")

    def read(store: FeatureStore, ids: list[str]) -> Any:
        return store.get_online_features(refs, {"customer_id": ids}).to_dict()

    @settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
    @given(st.lists(ROW, min_size=1, max_size=6))
    def check(rows: list[dict[str, Any]]) -> None:
        ids = [f"C{i}" for i in range(len(rows))]
        columns = {n: pa.array([r[n] for r in rows], COLUMNS[kind][1]) for n, (_, kind) in WIDE.items()}
        times = pa.array([T] * len(rows), UTC_US)
        table = pa.table({"customer_id": ids, **columns, "event_timestamp": times, "created": times})
        client.flushdb()
        assert _write(ours, "wide", table).written == len(rows)
        held = {k: client.hgetall(k) for k in client.scan_iter()}
        assert read(ours, ids) == read(stock, ids)
        client.flushdb()
        protos = _rows_of(table, view)
        stock._get_provider().online_write_batch(stock.config, view, protos, None)
        written = {k: client.hgetall(k) for k in client.scan_iter()}
        for hash_ in held.values():
            assert len(hash_.pop(b"_pf:wide")) == 24
        assert held == written
        assert read(ours, ids) == read(stock, ids)

    check()
    client.close()


def _rows_of(table: pa.Table, view: FeatureView) -> list[Any]:
    """Feast's own rows, with values by Feast's own converter."""
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey
    from feast.protos.feast.types.Value_pb2 import Value
    from feast.type_map import python_values_to_proto_values

    columns = {
        f.name: python_values_to_proto_values(table.column(f.name).to_pylist(), f.dtype.to_value_type())
        for f in view.features
    }
    ids = table.column("customer_id").to_pylist()
    return [
        (
            EntityKey(join_keys=["customer_id"], entity_values=[Value(string_val=key)]),
            {name: column[i] for name, column in columns.items()},
            T,
            T,
        )
        for i, key in enumerate(ids)
    ]


# --- apply ------------------------------------------------------------------------------------------------------------


def test_colliding_fields_leave_nothing_in_a_sql_registry(tmp_path: Path, redis_url: str, postgres_url: str) -> None:
    import mmh3

    seen: dict[int, str] = {}
    names: list[str] = []
    for i in range(10**7):
        other = seen.setdefault(mmh3.hash(f"collide:f{i}", signed=False), f"f{i}")
        if other != f"f{i}":
            names = [other, f"f{i}"]
            break
    store = _store(tmp_path, redis_url, registry={"registry_type": "sql", "path": postgres_url})
    view = _view(tmp_path, "collide", DAY, **dict.fromkeys(names, Int64))
    with pytest.raises(DefinitionError, match="the same Redis field"):
        store.apply([customer, view])
    with pytest.raises(FeatureViewNotFoundException):
        store.registry.get_feature_view("collide", "shop")


# --- what leaves Redis ------------------------------------------------------------------------------------------------


def _pause(_: float) -> None:
    """Tests need not wait."""


def test_a_sweep_removes_what_is_expired_and_nothing_else(shop: FeatureStore, tmp_path: Path, redis_url: str) -> None:
    windowed = windowed_feature_view(
        name="behavior",
        entity=customer,
        source=event_source(topic="events", columns={"amount": "int64"}, retention=timedelta(0)),
        path=str(tmp_path / "behavior"),
        sql="""SELECT customer_id, COUNT(*) OVER (PARTITION BY customer_id ORDER BY event_timestamp
               RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW) AS events_7d FROM events""",
        ttl=DAY,
    )
    shop.apply([windowed])
    _write(shop, "day", _table([1, 2, 3], [T, T - DAY, T - DAY - timedelta(microseconds=1)]))
    _write(shop, "ever", _table([1, 2, 3], [T - 900 * DAY] * 3))
    at = T
    client = redis.Redis.from_url(redis_url)
    key = next(k for k in client.scan_iter() if b"C2" in k)
    client.hset(key, mapping={b"_ts:behavior": b"\x08\x80\x01"})  # the state of 1970: long past
    other = next(k for k in client.scan_iter() if b"C1" in k)
    recent = at - 7 * DAY
    from feature_store.redis_layout import encode_timestamp

    client.hset(other, mapping={b"_ts:behavior": encode_timestamp(to_micros(recent) * 1000)})
    before = client.hgetall(key)
    (day, ever, state) = sorted(sweep(shop, at, dry_run=True, pause=_pause), key=lambda s: s.view != "day")[:3]
    results = {s.view: (s.looked_at, s.expired, s.removed) for s in (day, ever, state)}
    assert results == {"day": (3, 1, 0), "ever": (0, 0, 0), "behavior": (2, 1, 0)}
    assert client.hgetall(key) == before
    assert {s.view: s.removed for s in sweep(shop, at, views=["day"], pause=_pause)} == {"day": 1}
    left = client.hgetall(key)
    assert b"_ts:ever" in left
    assert b"_ts:behavior" in left
    assert not {b"_ts:day", b"_pf:day"} & left.keys()
    assert {s.view: s.removed for s in sweep(shop, at, pause=_pause)} == {"day": 0, "ever": 0, "behavior": 1}
    assert b"_ts:behavior" in client.hgetall(other)  # its window has passed, but not the retention of late events
    sweep(shop, T + 900 * DAY, pause=_pause)
    assert _read(shop, "ever", ["C0", "C1", "C2"]) == [1, 2, 3]
    assert _read(shop, "day", ["C0"]) == [None]
    with pytest.raises(NotFoundError, match="no such feature view: 'nope'"):
        sweep(shop, at, views=["nope"])
    client.close()


def test_a_row_written_while_the_sweep_looks_stays(shop: FeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    from feature_store import online_sweep

    _write(shop, "day", _table([1], [T - 9 * DAY]))
    read = online_sweep._read

    def slow(*args: Any) -> Any:
        judged = read(*args)
        _write(shop, "day", _table([2], [T]))
        return judged

    monkeypatch.setattr(online_sweep, "_read", slow)
    (result,) = sweep(shop, T, views=["day"], pause=_pause)
    assert (result.expired, result.removed) == (1, 0)
    assert _read(shop, "day", ["C0"]) == [2]


def test_rows_of_views_that_are_gone_are_found_and_removed(shop: FeatureStore, tmp_path: Path, redis_url: str) -> None:
    shop.apply([_view(tmp_path, "gone", DAY)])
    _write(shop, "gone", _table([1, 2], [T, T]))
    _write(shop, "ever", _table([5], [T]))
    shop.registry.delete_feature_view("gone", "shop")  # as after an apply while Redis was away
    assert [(o.view, o.rows, o.removed) for o in orphans(shop, pause=_pause)] == [("gone", 2, 0)]
    assert [(o.view, o.rows, o.removed) for o in orphans(shop, delete=True, pause=_pause)] == [("gone", 2, 2)]
    assert orphans(shop, pause=_pause) == []
    with redis.Redis.from_url(redis_url) as client:
        (key,) = client.scan_iter()
        assert len(client.hgetall(key)) == 3  # of `ever`: its feature and two times
    assert _read(shop, "ever", ["C0"]) == [5]


def test_the_clock_of_a_sweep_is_the_stores(tmp_path: Path, redis_url: str, shop: FeatureStore) -> None:
    assert clock_of(shop, T) == T
    replay = _store(tmp_path, redis_url, clock="replay")
    assert clock_of(replay, T) is None
    with redis.Redis.from_url(redis_url) as client:
        client.set(replay_clock_key("shop"), to_micros(T - DAY))
    assert clock_of(replay, T) == T - DAY


# --- settings ---------------------------------------------------------------------------------------------------------


def test_settings_are_judged_by_what_is_stored() -> None:
    assert (
        advice_on({"hash-max-listpack-entries": "512", "maxmemory": "0", "maxmemory-policy": "allkeys-lru"}, 30) == []
    )
    (wide,) = advice_on({"hash-max-ziplist-entries": "512"}, 80)
    assert "CONFIG SET hash-max-ziplist-entries 16" in wide
    assert advice_on({"hash-max-ziplist-entries": "16"}, 80) == []
    (policy,) = advice_on({"maxmemory": "1000", "maxmemory-policy": "allkeys-lru"}, 3)
    assert "CONFIG SET maxmemory-policy noeviction" in policy
    assert advice_on({"maxmemory": "1000", "maxmemory-policy": "volatile-lru"}, 3) == []


# --- servers that come and go, Cluster, Sentinel ----------------------------------------------------------------------


class Server:
    """A redis-server of the test's own."""

    def __init__(self, home: Path, *options: str) -> None:
        from predictflow.local.ports import free_port

        self.home, self.options, self.port = home, options, free_port()
        home.mkdir(exist_ok=True)

    def start(self) -> Server:
        from predictflow.local.redis import binary

        self.log = (self.home / "log").open("ab")
        self.process = subprocess.Popen(
            [
                str(binary()),
                *self.options,
                "--port",
                str(self.port),
                "--bind",
                "127.0.0.1",
                "--dir",
                str(self.home),
            ],
            stdout=self.log,
            stderr=self.log,
        )
        with redis.Redis(port=self.port) as client:
            for _ in range(200):
                try:
                    client.ping()
                    return self
                except redis.ConnectionError:
                    assert self.process.poll() is None, (self.home / "log").read_text()[-2000:]
                    time.sleep(0.05)
        raise AssertionError("redis-server did not answer")

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        self.log.close()


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Server]]:
    started: list[Server] = []
    yield started
    for server in started:
        server.stop()


def test_a_write_waits_for_a_redis_that_restarts_and_fails_clearly_for_one_that_does_not(
    tmp_path: Path, servers: list[Server]
) -> None:
    server = Server(tmp_path / "one", "--save", "").start()
    servers.append(server)
    store = _store(tmp_path, f"redis://127.0.0.1:{server.port}/0", expired_values="keep")
    store.apply([customer, _view(tmp_path, "day", DAY)])
    assert _write(store, "day", _table([1], [T])).written == 1
    server.stop()
    again = threading.Timer(1.0, server.start)
    again.start()
    online: Any = store._get_provider().online_store
    writer = OnlineWriter(online, store.config, store.get_feature_view("day"))
    assert writer.write(_table(list(range(1500)), [T] * 1500), wall=None, budget_seconds=30).written == 1500
    again.join()
    server.stop()
    with pytest.raises(
        UnavailableError, match=r"Redis at 127\.0\.0\.1:\d+ \(REDIS_URL\) does not answer .* tried for 0.3 s"
    ):
        writer.write(_table([1], [T]), wall=None, budget_seconds=0.3)
    with pytest.raises(UnavailableError, match="does not answer"):
        asyncio.run(writer.awrite(_table([1], [T]), wall=None, budget_seconds=0.3))


def test_a_redis_that_is_full_is_said_to_be_full(tmp_path: Path, servers: list[Server]) -> None:
    servers.append(Server(tmp_path / "full", "--save", "").start())
    store = _store(tmp_path, f"redis://127.0.0.1:{servers[0].port}/0")
    store.apply([customer, _view(tmp_path, "day", DAY)])
    with redis.Redis(port=servers[0].port) as client:
        client.config_set("maxmemory", "1mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        assert "noeviction" in (warn_of_settings(store) or "")
        client.config_set("maxmemory-policy", "noeviction")
        client.config_set("maxmemory", "1")
    assert warn_of_settings(store) is None
    for count in (1, 10):
        with pytest.raises(UnavailableError, match=r"refuses writes .*OOM"):
            _write(store, "day", _table([1] * count, [T] * count))


READS = "+hmget +get"
WRITES = "+evalsha +script|load +hget +hset +get"


def test_a_user_needs_the_commands_of_the_docs_and_is_told_of_others(tmp_path: Path, servers: list[Server]) -> None:
    documented = (Path(__file__).parents[2] / "docs/reference/online-store.md").read_text()
    assert f"`{READS}`" in documented
    assert f"`{WRITES}`" in documented
    servers.append(Server(tmp_path / "acl", "--save", "").start())
    port = servers[0].port
    _store(tmp_path, f"redis://127.0.0.1:{port}/0").apply([customer, _view(tmp_path, "day", DAY)])
    users = {
        "reader": READS,
        "writer": WRITES,
        "no_script": "+hget +hset +get",
        "no_hset": "+evalsha +script|load +hget",
    }
    with redis.Redis(port=port) as client:
        for name, commands in users.items():
            client.execute_command("ACL", "SETUSER", name, "on", ">pw", "~*", *commands.split())
    stores = {name: _store(tmp_path, f"redis://{name}:pw@127.0.0.1:{port}/0", expired_values="keep") for name in users}
    assert _write(stores["writer"], "day", _table(list(range(100)), [T] * 100)).written == 100
    assert _read(stores["reader"], "day", ["C0", "C99"]) == [0, 99]
    for name, said in (("reader", "evalsha"), ("no_script", "evalsha"), ("no_hset", "script")):
        with pytest.raises(UnavailableError, match=rf"the user of REDIS_URL at .*{port} may not do this .*{said}"):
            _write(stores[name], "day", _table([1], [T]))
    online: Any = stores["reader"]._get_provider().online_store
    view = stores["reader"].get_feature_view("day")
    with pytest.raises(UnavailableError, match="may not do this"):
        asyncio.run(online_write_async(online, stores["reader"].config, view, _table([1], [T]), wall=None))
    with pytest.raises(UnavailableError, match="may not do this"):
        online.delete_table(stores["reader"].config, view)


def _cluster_of_one(home: Path) -> Server:
    node = Server(home, "--save", "", "--cluster-enabled", "yes", "--cluster-config-file", "nodes.conf").start()
    with redis.Redis(port=node.port) as client:
        client.execute_command("CLUSTER", "ADDSLOTS", *range(16384))
        _wait_for_slots(client)
    return node


def _wait_for_slots(client: redis.Redis) -> None:
    for _ in range(200):
        if (
            b"cluster_state:ok" in client.execute_command("CLUSTER", "INFO")
            or client.cluster("info").get("cluster_state") == "ok"
        ):
            break
        time.sleep(0.05)


def test_an_asynchronous_write_waits_for_a_cluster_that_restarts(tmp_path: Path, servers: list[Server]) -> None:
    node = _cluster_of_one(tmp_path / "node")
    servers.append(node)
    store = _store(tmp_path, f"127.0.0.1:{node.port}", redis_type="redis_cluster", expired_values="keep")
    store.apply([customer, _view(tmp_path, "day", DAY)])
    online: Any = store._get_provider().online_store
    writer = OnlineWriter(online, store.config, store.get_feature_view("day"))
    again = threading.Timer(3.0, node.start)

    async def run() -> None:
        assert await writer.awrite(_table([1] * 200, [T] * 200), wall=None) == Written(200, 200)
        node.stop()
        again.start()
        table = _table([2] * 200, [T + DAY] * 200)
        assert await writer.awrite(table, wall=None, budget_seconds=60) == Written(200, 200)
        again.join()
        node.stop()
        with pytest.raises(UnavailableError, match=r"tried for 0\.3 s"):
            await writer.awrite(table, wall=None, budget_seconds=0.3)
        assert asyncio.all_tasks() == {asyncio.current_task()}

    asyncio.run(run())


def test_a_cluster_is_written_read_swept_and_deleted_from(tmp_path: Path, servers: list[Server]) -> None:
    node = _cluster_of_one(tmp_path / "node")
    servers.append(node)
    store = _store(tmp_path, f"127.0.0.1:{node.port}", redis_type="redis_cluster", expired_values="keep")
    store.apply([customer, _view(tmp_path, "day", DAY), _view(tmp_path, "ever", timedelta(0))])
    ids = [f"C{i}" for i in range(300)]
    assert _write(store, "day", _table(list(range(300)), [T] * 300)) == Written(300, 300)
    assert _write(store, "day", _table([-1] * 300, [T - DAY] * 300)) == Written(300, 0)
    assert _read(store, "day", ids) == list(range(300))
    online: Any = store._get_provider().online_store

    async def run() -> Written:
        table = _table([n + 1 for n in range(300)], [T + DAY] * 300)
        return await online_write_async(online, store.config, store.get_feature_view("day"), table, wall=None)

    assert asyncio.run(run()) == Written(300, 300)
    frame = pd.DataFrame({"customer_id": ["C0"], "n": [7], "event_timestamp": [T + 2 * DAY], "created": [T]})
    store.write_to_online_store("day", frame)
    assert _read(store, "day", ids) == [7, *range(2, 301)]
    assert [s.removed for s in sweep(store, T + 2 * DAY + timedelta(seconds=1), views=["day"], pause=_pause)] == [299]
    store.apply([], objects_to_delete=[store.get_feature_view("day")], partial=False)
    with redis.Redis(port=node.port) as client:
        assert client.dbsize() == 0


def test_a_sentinels_master_is_found_and_followed(tmp_path: Path, servers: list[Server]) -> None:
    master = Server(tmp_path / "master", "--save", "")
    servers.append(master.start())
    conf = tmp_path / "sentinel.conf"
    conf.write_text(f"sentinel monitor shop-master 127.0.0.1 {master.port} 1\n")
    sentinel = Server(tmp_path / "sentinel")
    sentinel.options = (str(conf), "--sentinel")
    servers.append(sentinel.start())
    online = {"redis_type": "redis_sentinel", "sentinel_master": "shop-master", "expired_values": "keep"}
    store = _store(tmp_path, f"127.0.0.1:{sentinel.port},db=3", **online)
    store.apply([customer, _view(tmp_path, "day", DAY)])
    assert _write(store, "day", _table(list(range(50)), [T] * 50)).written == 50
    assert _read(store, "day", ["C0", "C49"]) == [0, 49]
    with redis.Redis(port=master.port, db=3) as client:
        assert client.dbsize() == 50
    wrong = _store(tmp_path, f"127.0.0.1:{sentinel.port}", redis_type="redis_sentinel", sentinel_master="nobody")
    with pytest.raises(UnavailableError, match="does not answer"):
        _read(wrong, "day", ["C0"])


def test_addresses_of_clusters_and_sentinels_are_checked() -> None:
    with pytest.raises(UsageError, match="a Redis Cluster has no databases"):
        connect("127.0.0.1:1,db=2", "redis_cluster")
    with pytest.raises(UsageError, match="REDIS_URL"):
        connect("db=2", "redis_sentinel")
    with pytest.raises(UnavailableError, match=r"no node of the Redis Cluster at 127\.0\.0\.1:1 \(REDIS_URL\) answers"):
        connect("127.0.0.1:1,password=hunter2", "redis_cluster")
