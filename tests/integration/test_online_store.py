"""The online store on a real Redis, through Feast's own SDK: byte-compatible, newest wins, true statuses, scoped deletes."""

from __future__ import annotations

import asyncio
import itertools
import logging
import multiprocessing
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import redis
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.data_source import PushSource
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.serving.ServingService_pb2 import FieldStatus
from feast.types import Array, Bool, Bytes, Float32, Float64, Int32, Int64, Map, String, UnixTimestamp

from feature_store.clock import replay_clock_key, to_micros
from feature_store.errors import DataError, DefinitionError, UnavailableError, UsageError
from feature_store.online_reader import AtTooEarlyError, ClockNotSetError, OnlineReader
from feature_store.read_plan import ReadPlan
from feature_store.redis_batch import Batch
from feature_store.redis_connection import connect, connect_async, connection_options
from feature_store.redis_layout import KeyLayout, KeyPart, encode_pair, encode_timestamp, feature_field
from feature_store.redis_writer import write
from feature_store.row_bytes import RowPacker
from feature_store.windows.declare import event_source, windowed_feature_view
from feature_store.windows.definition import STATE_FIELD, definition_of
from feature_store.windows.state import States
from tests.window_states import states_of

OURS = "feature_store.online_store.PredictFlowOnlineStore"
PROJECT = "shop"
US = timedelta(microseconds=1)
DAY = timedelta(days=1)

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
branch = Entity(name="branch", join_keys=["branch_id"], value_type=ValueType.INT64)


def _source(home: Path, name: str) -> FileSource:
    return FileSource(
        name=name,
        path=str(home / f"{name}.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )


class Repo:
    """One registry, seen by our store and by the stock one, on the same Redis."""

    def __init__(self, home: Path, redis_url: str) -> None:
        self.home, self.redis_url = home, redis_url
        self.redis = redis.Redis.from_url(redis_url)
        self.account = FeatureView(
            name="account",
            entities=[customer],
            ttl=DAY,
            schema=[Field(name="charges", dtype=Float64), Field(name="plan", dtype=String)],
            source=PushSource(name="account_push", batch_source=_source(home, "account")),
        )
        self.visits = FeatureView(
            name="visits",
            entities=[customer, branch],
            ttl=timedelta(0),
            schema=[Field(name="visits", dtype=Int64)],
            source=_source(home, "visits"),
        )
        self.behavior = windowed_feature_view(
            name="behavior",
            entity=customer,
            source=event_source(topic="events", columns={"amount": "int64"}),
            path=str(home / "behavior"),
            ttl=30 * DAY,
            sql="""SELECT COUNT(*) OVER (PARTITION BY customer_id ORDER BY event_timestamp
                RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW) AS events_7d FROM events""",
        )
        self.service = FeatureService(name="both", features=[self.account, self.visits])
        self.ours = self.store(OURS)
        self.ours.apply([customer, branch, self.account, self.visits, self.behavior, self.service])
        self.stock = self.store("redis", connection_string=redis_url.removeprefix("redis://").replace("/", ",db="))

    def store(self, kind: str, project: str = PROJECT, **online: Any) -> FeatureStore:
        return FeatureStore(
            config=RepoConfig(
                project=project,
                provider="local",
                registry=str(self.home / f"{project}.db"),
                online_store={"type": kind, "connection_string": self.redis_url, **online},
                entity_key_serialization_version=3,
            )
        )

    def write(self, store: FeatureStore, view: str, **columns: list[Any]) -> None:
        columns.setdefault("created", columns["event_timestamp"])
        store.write_to_online_store(view, pd.DataFrame(columns))

    def write_account(
        self, store: FeatureStore, plan: str, event: datetime, created: datetime | None = None, of: str = "A"
    ) -> None:
        self.write(
            store,
            "account",
            customer_id=[of],
            event_timestamp=[event],
            created=[created or event],
            charges=[1.5],
            plan=[plan],
        )

    def plan_of(self, store: FeatureStore, of: str = "A") -> object:
        return store.get_online_features(["account:plan"], [{"customer_id": of}]).to_dict()["plan"][0]

    def key(self, of: str, project: str = PROJECT) -> bytes:
        return KeyLayout(project, [KeyPart("customer_id", "customer_id", "STRING")]).encode({"customer_id": of}, 0)


@pytest.fixture
def repo(tmp_path: Path, redis_url: str) -> Iterator[Repo]:
    made = Repo(tmp_path, redis_url)
    yield made
    made.redis.close()


def now() -> datetime:
    return datetime.now(UTC)


def _statuses(response: Any) -> dict[str, list[str]]:
    return {
        name: [FieldStatus.Name(s) for s in vector.statuses]
        for name, vector in zip(response.metadata.feature_names.val, response.results)
    }


# --- the contract with stock Feast --------------------------------------------------------------------------------------


def _wide_rows() -> dict[str, list[Any]]:
    t = now().replace(microsecond=0)
    return {
        "i32": [1, None],
        "i64": [2**40, None],
        "f32": [0.1, None],
        "f64": [0.1, None],
        "s": ["ü", None],
        "by": [b"\0x", None],
        "bo": [False, None],
        "ts": [t, None],
        "li": [[1, 2], None],
        "ls": [["a", ""], None],
        "lf": [[0.5], None],
        "m": [{"k": "v"}, None],
    }


@pytest.fixture
def wide(repo: Repo) -> FeatureView:
    types = [Int32, Int64, Float32, Float64, String, Bytes, Bool, UnixTimestamp]
    types += [Array(Int64), Array(String), Array(Float64), Map]
    view = FeatureView(
        name="wide",
        entities=[customer, branch],
        ttl=timedelta(0),
        schema=[Field(name=n, dtype=t) for n, t in zip(_wide_rows(), types)],
        source=_source(repo.home, "wide"),
    )
    repo.ours.apply([view])
    repo.stock.refresh_registry()
    return view


@pytest.mark.parametrize("writer", ["ours", "stock"])
def test_each_store_reads_what_the_other_wrote_for_every_type(repo: Repo, wide: FeatureView, writer: str) -> None:
    stores = {"ours": repo.ours, "stock": repo.stock}
    keys = {"customer_id": ["A", "B"], "branch_id": [7, -7]}
    repo.write(stores[writer], "wide", **keys, event_timestamp=[now()] * 2, **_wide_rows())
    refs = [f"wide:{f.name}" for f in wide.features]
    ours = repo.ours.get_online_features(refs, keys)
    assert ours.to_dict() == repo.stock.get_online_features(refs, keys).to_dict()
    statuses = _statuses(ours.proto)
    assert all(statuses[f.name] == ["PRESENT", "NULL_VALUE"] for f in wide.features)


def test_the_hash_is_byte_for_byte_stocks_but_for_our_pair(repo: Repo, wide: FeatureView) -> None:
    row = {"customer_id": ["A", "B"], "branch_id": [7, -7], "event_timestamp": [now()] * 2, **_wide_rows()}
    held = []
    for store in (repo.stock, repo.ours):
        repo.redis.flushdb()
        repo.write(store, "wide", **row)
        held.append({k: repo.redis.hgetall(k) for k in repo.redis.scan_iter()})
    stock, ours = held
    for hash_ in ours.values():
        assert len(hash_.pop(b"_pf:wide")) == 24
    assert ours == stock


def test_stock_reads_an_entity_less_view_that_we_wrote(repo: Repo) -> None:
    view = FeatureView(
        name="world",
        entities=[],
        ttl=timedelta(0),
        schema=[Field(name="rate", dtype=Float64)],
        source=_source(repo.home, "world"),
    )
    repo.ours.apply([view])
    repo.stock.refresh_registry()
    repo.write(repo.ours, "world", event_timestamp=[now()], rate=[2.5])
    for store in (repo.ours, repo.stock):
        assert store.get_online_features(["world:rate"], {"any": [1, 2]}).to_dict() == {"rate": [2.5, 2.5]}


# --- newest wins --------------------------------------------------------------------------------------------------------


def test_a_correction_at_the_same_event_time_replaces_and_an_older_one_does_not(repo: Repo) -> None:
    t = now()
    repo.write_account(repo.ours, "first", t, t)
    repo.write_account(repo.ours, "corrected", t, t + 2 * US)
    repo.write_account(repo.ours, "outdated correction", t, t + US)
    repo.write_account(repo.ours, "earlier event, known later", t - US, t + DAY)
    assert repo.plan_of(repo.ours) == repo.plan_of(repo.stock) == "corrected"
    repo.write_account(repo.ours, "same pair, last write", t, t + 2 * US)
    assert repo.plan_of(repo.ours) == "same pair, last write"


def test_a_row_without_created_counts_as_known_at_its_event_time(repo: Repo) -> None:
    t = now()
    repo.write_account(repo.ours, "no created", t, pd.NaT)  # type: ignore[arg-type]
    repo.write_account(repo.ours, "with created", t, t + US)
    repo.write_account(repo.ours, "no created again", t, pd.NaT)  # type: ignore[arg-type]
    assert repo.plan_of(repo.ours) == "with created"


def test_our_pair_is_ignored_after_a_stock_writer_was_there(repo: Repo) -> None:
    t = now()
    repo.write_account(repo.ours, "ours", t, t + DAY)
    repo.write_account(repo.stock, "stock", t + US, t + US)
    repo.write_account(repo.ours, "older than stock's", t, t + 2 * DAY)
    assert repo.plan_of(repo.ours) == "stock"
    repo.write_account(repo.ours, "same event as stock's, known later", t + US, t + 2 * US)
    assert repo.plan_of(repo.ours) == "same event as stock's, known later"


@pytest.mark.parametrize("event", [datetime(1935, 1, 1, 0, 0, 0, 1, tzinfo=UTC), datetime(1970, 1, 1, tzinfo=UTC)])
def test_times_before_1970_are_ordered_too(repo: Repo, event: datetime) -> None:
    for plan, t in {"first": event, "earlier": event - US, "earliest": event - 400 * DAY}.items():
        repo.write_account(repo.ours, plan, t)
    assert repo.redis.hvals(repo.key("A"))
    store = repo.store(OURS, expired_values="keep")
    assert repo.plan_of(store) == "first"
    repo.write_account(repo.ours, "later", event + US)
    assert repo.plan_of(store) == "later"


def test_rows_of_one_key_in_one_batch_keep_the_newest(repo: Repo) -> None:
    t = now()
    order = [3, 0, 4, 1, 2]
    repo.write(
        repo.ours,
        "account",
        customer_id=["A"] * 5,
        event_timestamp=[t + n * US for n in order],
        charges=[1.0] * 5,
        plan=[str(n) for n in order],
    )
    assert repo.plan_of(repo.ours) == "4"


KEYS = [f"K{i}".encode() for i in range(8)]
VERSIONS = [(1_000 + e, 5_000 + c) for e, c in itertools.product(range(12), range(4))]


def _batch(rows: list[tuple[bytes, tuple[int, int | None], dict[str, bytes]]]) -> Batch:
    """(key, (event, created) in ns, values) of a view `v`."""
    names = list(rows[0][2])
    packer = RowPacker("v", [feature_field("v", n) for n in names])
    packed = [
        packer.pack_one(encode_pair(*t), encode_timestamp(t[0]), [values[n] for n in names]) for _, t, values in rows
    ]
    head = (packer.ts_field, packer.pf_field, b"%d" % packer.pair_at, b"%d" % packer.parts)
    return Batch([key for key, _, _ in rows], [list(part) for part in zip(*packed)], head, len(names) + 2)


def _write_shuffled(url: str, seed: int) -> None:
    """Writes every version of every key, in an order of its own."""
    writes = [(key, pair) for key in KEYS for pair in VERSIONS]
    random.Random(seed).shuffle(writes)
    with connect(url) as client:
        batches = []
        for start in range(0, len(writes), 7):  # small batches, so that writers take turns
            rows = [
                (key, (pair[0] * 1000, pair[1] * 1000), {"a": b"%d/%d" % pair, "b": b"%d/%d" % pair})
                for key, pair in writes[start : start + 7]
            ]
            batches.append(_batch(rows))  # type: ignore[arg-type]  # tuples of int are tuples of int | None
        assert sum(n for n, _ in write(client, batches)) == len(writes)


@pytest.mark.parametrize("kind", ["processes", "threads"])
def test_the_newest_wins_whatever_the_order_of_concurrent_writers(redis_url: str, kind: str) -> None:
    if kind == "processes":
        context = multiprocessing.get_context("fork")
        writers = [context.Process(target=_write_shuffled, args=(redis_url, seed)) for seed in range(4)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [w.exitcode for w in writers] == [0] * 4
    else:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(_write_shuffled, [redis_url] * 4, range(4)))
    newest = b"%d/%d" % max(VERSIONS)
    with redis.Redis.from_url(redis_url) as client:
        for key in KEYS:
            fields = client.hgetall(key)
            values = {v for f, v in fields.items() if not f.startswith(b"_")}
            assert values == {newest}  # both features of one row: no mixture of versions


def test_a_write_survives_a_redis_that_lost_its_scripts(repo: Repo) -> None:
    t = now()
    repo.write_account(repo.ours, "before", t)
    repo.redis.script_flush()
    repo.write_account(repo.ours, "after", t + US)
    assert repo.plan_of(repo.ours) == "after"


def test_a_view_of_thousands_of_features_is_written_whole(redis_url: str) -> None:
    values = {f"f{i}": b"%d" % i for i in range(6_000)}
    with redis.Redis.from_url(redis_url) as client:
        assert list(write(client, [_batch([(b"K", (1, None), values)])])) == [(1, 1)]
        assert client.hlen(b"K") == len(values) + 2


def test_a_null_join_key_is_refused(repo: Repo) -> None:
    with pytest.raises(DataError, match="account: this entity key cannot be kept online: 'customer_id: null'"):
        repo.write_account(repo.ours, "x", now(), of=None)  # type: ignore[arg-type]


# --- reads --------------------------------------------------------------------------------------------------------------


def test_the_sdk_gives_values_and_statuses_of_each_row_in_order(repo: Repo) -> None:
    t = now()
    repo.write_account(repo.ours, "gold", t, of="A")
    repo.write_account(repo.ours, "old", t - DAY - timedelta(seconds=5), of="B")
    repo.write(repo.ours, "visits", customer_id=["A"], branch_id=[7], event_timestamp=[t - 99 * DAY], visits=[4])
    rows = [{"customer_id": c, "branch_id": 7} for c in ("B", "A", "nobody", "A")]
    service = repo.ours.get_feature_service("both")
    response = repo.ours.get_online_features(service, rows)
    answer = response.to_dict(include_event_timestamps=True)
    assert answer["plan"] == [None, "gold", None, "gold"]
    assert answer["visits"] == [None, 4, None, 4]
    assert answer["plan__ts"][1] == int(t.timestamp())
    statuses = _statuses(response.proto)
    assert statuses["plan"] == ["OUTSIDE_MAX_AGE", "PRESENT", "NOT_FOUND", "PRESENT"]
    assert statuses["visits"] == ["NOT_FOUND", "PRESENT", "NOT_FOUND", "PRESENT"]
    asynchronous = asyncio.run(repo.ours.get_online_features_async(service, rows))
    assert asynchronous.proto == response.proto
    again = asyncio.run(repo.ours.get_online_features_async(service, rows))  # in a new event loop
    assert again.proto == response.proto


def test_a_service_is_read_in_one_round_trip(repo: Repo) -> None:
    plan = ReadPlan.compile(repo.ours, repo.ours.get_feature_service("both"))
    repo.redis.set(replay_clock_key(PROJECT), 0)
    with connect(repo.redis_url) as client:
        reader = OnlineReader(plan, client, PROJECT, "replay")
        entities = [{"customer_id": str(i), "branch_id": i} for i in range(10)]
        sent = []
        connection = client.connection_pool.get_connection()
        original = connection.send_packed_command
        connection.send_packed_command = lambda *a, **k: (sent.append(a), original(*a, **k))  # type: ignore[assignment]
        client.connection_pool.release(connection)
        assert len(reader.read(entities).rows) == 10
    assert len(sent) == 1


def test_a_correction_is_read_with_the_times_of_its_row(repo: Repo) -> None:
    t = now()
    repo.write_account(repo.ours, "first", t, t)
    repo.write_account(repo.ours, "corrected", t, t + US)
    plan = ReadPlan.compile(repo.ours, ["account:plan"])
    with connect(repo.redis_url) as client:
        (row,) = OnlineReader(plan, client, PROJECT, "wall").read([{"customer_id": "A"}]).rows
    assert (row.views["account"].event_timestamp, row.views["account"].created) == (t, t + US)


def test_on_demand_views_are_computed_from_what_the_plan_reads(repo: Repo) -> None:
    @on_demand_feature_view(sources=[repo.account], schema=[Field(name="double", dtype=Float64)])
    def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({"double": inputs["charges"].astype(float) * 2})

    repo.ours.apply([doubled])
    repo.ours.config.online_store.pickled_functions = "run"  # no checkout defines it
    t = now()
    repo.write_account(repo.ours, "gold", t, of="A")
    repo.write_account(repo.ours, "old", t - 2 * DAY, of="B")
    rows = [{"customer_id": "A"}, {"customer_id": "B"}]
    refs = ["doubled:double", "account:plan"]
    for response in (
        repo.ours.get_online_features(refs, rows),
        asyncio.run(repo.ours.get_online_features_async(refs, rows)),
    ):
        answer = response.to_df()
        assert answer["double"][0] == 3.0
        assert pd.isna(answer["double"][1])  # computed from an expired value, which is not served
        assert _statuses(response.proto)["plan"] == ["PRESENT", "OUTSIDE_MAX_AGE"]


def test_the_plan_follows_the_registry(repo: Repo) -> None:
    repo.write_account(repo.ours, "gold", now())
    service = FeatureService(name="small", features=[repo.account[["plan"]]])
    repo.ours.apply([service])
    assert "charges" not in repo.ours.get_online_features(service, [{"customer_id": "A"}]).to_dict()
    wider = FeatureService(name="small", features=[repo.account])
    repo.ours.apply([wider])
    repo.ours.refresh_registry()
    assert repo.ours.get_online_features(wider, [{"customer_id": "A"}]).to_dict()["charges"] == [1.5]


def test_push_and_materialize_go_through_feast_unchanged(repo: Repo) -> None:
    t = now()
    columns = {"customer_id": ["A"], "event_timestamp": [t], "created": [t], "charges": [2.0]}
    pd.DataFrame({**columns, "plan": ["materialised"]}).to_parquet(repo.home / "account.parquet")
    repo.ours.materialize(t - DAY, t + DAY, feature_views=["account"])
    assert repo.plan_of(repo.ours) == "materialised"
    repo.ours.push("account_push", pd.DataFrame({**columns, "created": [t + US], "plan": ["pushed"]}))
    assert repo.plan_of(repo.ours) == "pushed"
    repo.ours.materialize(t - DAY, t + DAY, feature_views=["account"])
    assert repo.plan_of(repo.ours) == "pushed"


# --- windowed views and the replay clock ---------------------------------------------------------------------------------

T = datetime(2011, 5, 1, tzinfo=UTC)


def _write_state(repo: Repo, of: str, *events: datetime, visible_at: datetime) -> None:
    definition = definition_of(repo.behavior)
    assert definition is not None
    states = states_of(definition, [(t, {"amount": 1}) for t in events], visible_at)
    finals = states.values(to_micros(visible_at)).columns
    repo.write(
        repo.ours,
        "behavior",
        customer_id=[of],
        event_timestamp=[max(events)],
        created=[visible_at],
        **finals,
        window_state=states.encode(),
    )


def test_the_sdk_finalises_windowed_values_at_the_replay_clock(repo: Repo) -> None:
    store = repo.store(OURS, clock="replay")
    _write_state(repo, "A", T, T + DAY, visible_at=T + DAY)
    for clock, expected in {T + 7 * DAY: 2, T + 7 * DAY + US: 1, T + 8 * DAY + US: 0}.items():
        repo.redis.set(replay_clock_key(PROJECT), to_micros(clock))
        response = store.get_online_features(["behavior:events_7d"], [{"customer_id": "A"}])
        assert response.to_dict()["events_7d"] == [expected]
    assert repo.stock.get_online_features(["behavior:events_7d"], [{"customer_id": "A"}]).to_dict()["events_7d"] == [2]


def test_materialised_rows_never_destroy_a_window_state(repo: Repo, caplog: pytest.LogCaptureFixture) -> None:
    _write_state(repo, "A", T, visible_at=T)
    held = repo.redis.hgetall(repo.key("A"))
    with caplog.at_level(logging.WARNING, "feature_store.online_store"):
        repo.write(
            repo.ours,
            "behavior",
            customer_id=["A", "B"],
            event_timestamp=[T + DAY] * 2,
            events_7d=[9, 9],
            window_state=[None, None],
        )
    assert repo.redis.hgetall(repo.key("A")) == held
    assert not repo.redis.exists(repo.key("B"))
    assert "behavior: 2 of 2 rows have no window state" in caplog.text
    assert "predictflow windows bootstrap behavior" in caplog.text


def test_the_stored_state_of_an_expired_entity_can_still_be_read_back(repo: Repo) -> None:
    _write_state(repo, "A", T, visible_at=T)  # 2011, and the wall clock is far beyond the ttl
    response = repo.ours.get_online_features([f"behavior:{STATE_FIELD}", "behavior:events_7d"], [{"customer_id": "A"}])
    assert _statuses(response.proto)["events_7d"] == ["OUTSIDE_MAX_AGE"]
    definition = definition_of(repo.behavior)
    assert definition is not None
    states = States.decode(definition, response.to_dict()[STATE_FIELD])
    assert states.last_seen.tolist() == [to_micros(T)]


def test_at_is_for_replay_and_never_before_the_clock(repo: Repo) -> None:
    _write_state(repo, "A", T, visible_at=T)
    plan = ReadPlan.compile(repo.ours, ["behavior:events_7d"])
    entities = [{"customer_id": "A"}]
    with connect(repo.redis_url) as client:
        reader = OnlineReader(plan, client, PROJECT, "replay")
        with pytest.raises(ClockNotSetError, match="predictflow windows bootstrap"):
            reader.read(entities)
        client.set(replay_clock_key(PROJECT), to_micros(T + DAY))
        assert reader.read(entities).t == T + DAY
        assert reader.read(entities, at=T + 9 * DAY).rows[0].values == {"events_7d": 0}
        with pytest.raises(AtTooEarlyError) as e:
            reader.read(entities, at=T)
        assert e.value.code == "at_too_early"
        with pytest.raises(UsageError, match="needs the replay clock"):
            OnlineReader(plan, client, PROJECT, "wall").read(entities, at=T)

    async def read() -> Any:
        client = connect_async(repo.redis_url)
        rows = await OnlineReader(plan, client, PROJECT, "replay").aread(entities, at=T + 9 * DAY)
        await client.aclose()
        return rows

    assert asyncio.run(read()).rows[0].values == {"events_7d": 0}


# --- deletes --------------------------------------------------------------------------------------------------------------


def test_dropping_a_view_leaves_the_other_views_and_projects_alone(repo: Repo) -> None:
    other = repo.store(OURS, project=f"my_{PROJECT}")  # its keys end in our project's name too
    other.apply([customer, repo.account])
    t = now()
    _write_state(repo, "A", T, visible_at=T)
    for store in (repo.ours, other):
        repo.write_account(store, "gold", t, of="A")
        repo.write_account(store, "gold", t, of="only account")
    before = repo.redis.hgetall(repo.key("A"))
    repo.ours.apply([], objects_to_delete=[repo.account], partial=False)
    left = repo.redis.hgetall(repo.key("A"))
    assert {b"_ts:behavior", b"_pf:behavior"} < left.keys() < before.keys()
    assert not {b"_ts:account", b"_pf:account"} & left.keys()
    assert len(before) - len(left) == 4  # two features and two times
    assert not repo.redis.exists(repo.key("only account"))
    assert repo.plan_of(other) == "gold"


def test_teardown_removes_this_project_alone(repo: Repo) -> None:
    other = repo.store(OURS, project=f"my_{PROJECT}")
    other.apply([customer, repo.account])
    for store in (repo.ours, other):
        repo.write_account(store, "gold", now())
    repo.redis.set(replay_clock_key(PROJECT), 1)
    repo.ours.teardown()
    assert repo.redis.keys() == [repo.key("A", f"my_{PROJECT}")]


# --- settings and failure ---------------------------------------------------------------------------------------------------


def test_colliding_features_are_refused_before_anything_changes(repo: Repo) -> None:
    names = _collision("collide")
    view = FeatureView(
        name="collide",
        entities=[customer],
        schema=[Field(name=n, dtype=Int64) for n in names],
        source=_source(repo.home, "collide"),
    )
    with pytest.raises(DefinitionError, match="the same Redis field"):
        repo.ours.apply([view])


def _collision(view: str) -> list[str]:
    import mmh3

    seen: dict[int, str] = {}
    for i in itertools.count():
        name = f"f{i}"
        other = seen.setdefault(mmh3.hash(f"{view}:{name}", signed=False), name)
        if other != name:
            return [other, name]
    raise AssertionError


@pytest.mark.parametrize("form", ["redis://user:hunter2@127.0.0.1:1/0", "127.0.0.1:1,db=0,password=hunter2"])
def test_an_unreachable_redis_is_one_line_with_its_address_and_never_its_password(repo: Repo, form: str) -> None:
    store = repo.store(OURS, connection_string=form)
    attempts = [
        lambda: repo.plan_of(store),
        lambda: repo.write_account(store, "x", now()),
        lambda: asyncio.run(store.get_online_features_async(["account:plan"], [{"customer_id": "A"}])),
        lambda: store.teardown(),
    ]
    for attempt in attempts:
        with pytest.raises(UnavailableError, match=r"Redis at 127\.0\.0\.1:1 \(REDIS_URL\) does not answer") as e:
            attempt()
        assert "hunter2" not in e.value.message
        assert "\n" not in e.value.message


@pytest.mark.parametrize(
    ("online", "message"),
    [
        ({"connection_string": "${REDIS_URL_THAT_IS_NOT_SET}"}, "REDIS_URL_THAT_IS_NOT_SET"),
        ({"clock": "sundial"}, "valid: replay, wall"),
        ({"skip_dedup": True}, "an older row could overwrite"),
        ({"key_ttl_seconds": 60}, "expires all views"),
        ({"client": "glide"}, "valid: redis"),
    ],
)
def test_wrong_settings_are_refused_when_they_are_loaded(repo: Repo, online: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError) as e:
        repo.store(OURS, **online)
    assert message in e.value.message


def test_an_unquoted_null_in_yaml_means_null(repo: Repo) -> None:
    assert repo.store(OURS, expired_values=None).config.online_store.expired_values == "null"


def test_a_password_of_digits_stays_text() -> None:
    assert connection_options("h:1,db=2,password=0123")["password"] == "0123"
    assert connection_options("h:1,db=2,password=123")["password"] == "123"
    assert connection_options("rediss://u:p%40@h/2")["password"] == "p@"


@pytest.mark.parametrize(
    "text",
    ["http://127.0.0.1:6379", "redis://127.0.0.1:port/0", "a:1,b:2,db=0", "localhost:x", "redis://h:1/0?speed=9"],
)
def test_an_address_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="REDIS_URL"):
        connect(text)
