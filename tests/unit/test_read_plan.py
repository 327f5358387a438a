"""What a read plan asks Redis for, and what the replies mean at time t: statuses, ttl, windows, names. No server."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.on_demand_feature_view import on_demand_feature_view
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.types import Float64, Int64, String

from feature_store.clock import from_micros, to_micros
from feature_store.errors import DefinitionError, NotFoundError, UsageError
from feature_store.read_plan import OnlineRow, ReadPlan
from feature_store.redis_layout import (
    encode_pair,
    encode_timestamp,
    feature_field,
    nanos_of,
    pair_field,
    timestamp_field,
)
from feature_store.view_plan import OnDemandViewError
from feature_store.windows.declare import event_source, windowed_feature_view
from feature_store.windows.definition import STATE_FIELD, definition_of
from tests.window_states import states_of

T = datetime(2026, 1, 10, 12, 0, 0, 123_456, tzinfo=UTC)
US = timedelta(microseconds=1)
DAY = timedelta(days=1)

SEVEN_DAYS = (
    "WINDOW w AS (PARTITION BY customer_id ORDER BY event_timestamp "
    "RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW)"
)

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
shop = Entity(name="shop", join_keys=["shop_id"], value_type=ValueType.INT64)


def _source(name: str) -> FileSource:
    return FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp")


account = FeatureView(
    name="account",
    entities=[customer],
    ttl=DAY,
    schema=[Field(name="charges", dtype=Float64), Field(name="plan", dtype=String), Field(name="n", dtype=Int64)],
    source=_source("account_source"),
)
visits = FeatureView(
    name="visits",
    entities=[shop, customer],
    ttl=timedelta(0),
    schema=[Field(name="count", dtype=Int64)],
    source=_source("visits_source"),
)
world = FeatureView(
    name="world",
    entities=[],
    ttl=timedelta(0),
    schema=[Field(name="rate", dtype=Float64)],
    source=_source("world_source"),
)
behavior = windowed_feature_view(
    name="behavior",
    entity=customer,
    source=event_source(topic="events", columns={"amount": "int64"}),
    path="events",
    ttl=30 * DAY,
    sql=f"SELECT COUNT(*) OVER w AS events_7d, SUM(amount) OVER w AS amount_7d FROM events {SEVEN_DAYS}",
)


@on_demand_feature_view(sources=[account], schema=[Field(name="double", dtype=Float64)])
def doubled(inputs: pd.DataFrame) -> pd.DataFrame:
    return pd.DataFrame({"double": inputs["charges"] * 2})


everything = FeatureService(name="everything", features=[account[["plan", "charges"]], behavior, world, visits])
aliased = FeatureService(
    name="aliased",
    features=[
        account[["plan"]].with_name("sender").with_join_key_map({"customer_id": "sender_id"}),
        account[["plan"]].with_name("receiver").with_join_key_map({"customer_id": "receiver_id"}),
    ],
)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FeatureStore:
    return _store(tmp_path_factory.mktemp("repo"))


def _store(home: Path, **online: Any) -> FeatureStore:
    store = FeatureStore(
        config=RepoConfig(
            project="unit",
            provider="local",
            registry=str(home / "registry.db"),
            online_store={
                "type": "feature_store.online_store.PredictFlowOnlineStore",
                "connection_string": "redis://127.0.0.1:1/0",
                **online,
            },
            entity_key_serialization_version=3,
        )
    )
    store.apply([customer, shop, account, visits, world, behavior, doubled, everything, aliased])
    return store


class Hashes(dict[bytes, dict[bytes, bytes]]):
    """What Redis would hold, written by our encoder under the keys that a plan asks for."""

    def put(
        self,
        key: bytes,
        view: str,
        event: datetime,
        created: datetime | None = None,
        **values: Value,
    ) -> None:
        held = self.setdefault(key, {})
        held[timestamp_field(view)] = encode_timestamp(nanos_of(event))
        held[pair_field(view)] = encode_pair(nanos_of(event), None if created is None else nanos_of(created))
        held.update({feature_field(view, n): v.SerializeToString() for n, v in values.items()})

    def read(self, plan: ReadPlan, entity: Mapping[str, object], t: datetime) -> OnlineRow:
        replies = [[self.get(key, {}).get(f) for f in fields] for key, fields in plan.requests([entity])]
        (row,) = plan.decode([entity], replies, to_micros(t)).rows
        return row


def _key(plan: ReadPlan, **entity: object) -> bytes:
    return plan.requests([entity])[0][0]


def _text(value: str) -> Value:
    return Value(string_val=value)


def test_features_come_in_the_order_of_the_service_and_by_their_names(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, everything)
    assert plan.feature_names == ["plan", "charges", "events_7d", "amount_7d", STATE_FIELD, "rate", "count"]
    assert sorted(plan.join_keys) == ["customer_id", "shop_id"]
    assert plan.references["rate"] == ("world", "rate")
    full = ReadPlan.compile(store, ["visits:count", "account:plan"], full_feature_names=True)
    assert full.feature_names == ["visits__count", "account__plan"]


def test_views_of_one_entity_are_read_by_one_command(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["account:plan", "behavior:events_7d"])
    assert len(plan.requests([{"customer_id": "A"}, {"customer_id": "B"}, {"customer_id": "A"}])) == 3


def test_a_view_never_written_is_not_found_and_a_missing_or_empty_field_null(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["account:charges", "account:plan", "account:n"])
    hashes = Hashes()
    entity = {"customer_id": "A"}
    row = hashes.read(plan, entity, T)
    assert row.statuses == dict.fromkeys(["charges", "plan", "n"], "NOT_FOUND")
    assert row.views["account"].event_timestamp is None

    hashes.put(_key(plan, **entity), "account", T, charges=Value(double_val=0.0), plan=Value())
    row = hashes.read(plan, entity, T)
    assert row.values == {"charges": 0.0, "plan": None, "n": None}
    assert row.statuses == {"charges": "PRESENT", "plan": "NULL_VALUE", "n": "NULL_VALUE"}
    assert row.event_timestamps == dict.fromkeys(["charges", "plan", "n"], T)


def test_the_ttl_is_inclusive_per_view_and_empties_the_value(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["account:plan"])
    hashes = Hashes()
    hashes.put(_key(plan, customer_id="A"), "account", T, plan=_text("gold"))
    fresh = hashes.read(plan, {"customer_id": "A"}, T + DAY)
    assert (fresh.statuses["plan"], fresh.values["plan"]) == ("PRESENT", "gold")
    old = hashes.read(plan, {"customer_id": "A"}, T + DAY + US)
    assert (old.statuses["plan"], old.values["plan"]) == ("OUTSIDE_MAX_AGE", None)
    assert old.event_timestamps["plan"] == T


def test_a_view_without_ttl_never_expires(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["visits:count"])
    hashes = Hashes()
    entity = {"customer_id": "A", "shop_id": 7}
    hashes.put(_key(plan, **entity), "visits", T, count=Value(int64_val=3))
    assert hashes.read(plan, entity, T + 10_000 * DAY).values == {"count": 3}


def test_expired_values_keep_serves_them_as_stock_feast_does(tmp_path: Path) -> None:
    plan = ReadPlan.compile(_store(tmp_path, expired_values="keep"), ["account:plan"])
    hashes = Hashes()
    hashes.put(_key(plan, customer_id="A"), "account", T, plan=_text("gold"))
    row = hashes.read(plan, {"customer_id": "A"}, T + 9 * DAY)
    assert (row.statuses["plan"], row.values["plan"]) == ("PRESENT", "gold")


def test_created_is_unknown_once_a_stock_writer_was_there(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["account:plan"])
    hashes = Hashes()
    key = _key(plan, customer_id="A")
    hashes.put(key, "account", T, created=T + DAY, plan=_text("gold"))
    assert hashes.read(plan, {"customer_id": "A"}, T).views["account"].created == T + DAY
    pair = hashes[key][b"_pf:account"]
    hashes.put(key, "account", T + US, plan=_text("tin"))
    hashes[key][b"_pf:account"] = pair  # a stock writer leaves our field as it was
    view = hashes.read(plan, {"customer_id": "A"}, T).views["account"]
    assert (view.event_timestamp, view.created) == (T + US, None)


def test_a_composite_key_is_feasts_whatever_the_order_of_the_entities(store: FeatureStore) -> None:
    from feast.infra.key_encoding_utils import serialize_entity_key

    plan = ReadPlan.compile(store, ["visits:count"])
    proto = EntityKey(join_keys=["shop_id", "customer_id"], entity_values=[Value(int64_val=7), _text("A")])
    assert _key(plan, shop_id=7, customer_id="A") == serialize_entity_key(proto, 3) + b"unit"


def test_an_entity_less_view_has_one_row_for_all(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["world:rate"])
    assert plan.join_keys == []
    hashes = Hashes()
    hashes.put(_key(plan), "world", T, rate=Value(double_val=1.5))
    assert hashes.read(plan, {}, T).values == {"rate": 1.5}


def test_one_view_under_two_names_is_read_for_two_entities(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, aliased, full_feature_names=True)
    assert plan.join_keys == ["sender_id", "receiver_id"]
    assert plan.views == {"sender": "account", "receiver": "account"}
    hashes = Hashes()
    own = ReadPlan.compile(store, ["account:plan"])
    for name in ("gold", "tin"):
        hashes.put(_key(own, customer_id=name), "account", T, plan=_text(name))
    row = hashes.read(plan, {"sender_id": "tin", "receiver_id": "gold"}, T)
    assert row.values == {"sender__plan": "tin", "receiver__plan": "gold"}


def test_a_null_join_key_finds_nothing(store: FeatureStore) -> None:
    plan = ReadPlan.compile(store, ["account:plan"])
    hashes = Hashes()
    hashes.put(_key(plan, customer_id=""), "account", T, plan=_text("gold"))
    assert hashes.read(plan, {"customer_id": None}, T).statuses == {"plan": "NOT_FOUND"}


@pytest.mark.parametrize(
    ("entity", "message"),
    [
        ({}, "entity row 1: join key customer_id is missing"),
        ({"customer": "A"}, "entity row 1: join key customer_id is missing"),
        ({"customer_id": "A", "shop_id": 1}, "entity row 1: unknown join key: 'shop_id'; valid: customer_id"),
        ({"customer_id": 7}, "entity row 1: join key customer_id must be STRING, not int: 7"),
    ],
)
def test_wrong_entity_rows_are_refused(store: FeatureStore, entity: dict[str, object], message: str) -> None:
    plan = ReadPlan.compile(store, ["account:plan"])
    with pytest.raises(UsageError) as e:
        plan.requests([{"customer_id": "A"}, entity])
    assert e.value.message.startswith(message)


@pytest.mark.parametrize(
    ("features", "error", "message"),
    [
        (["acount:plan"], NotFoundError, "did you mean 'account'?"),
        (["account:plam"], NotFoundError, "did you mean 'plan'?"),
        (["account"], UsageError, "next: write view:feature"),
        ([], UsageError, "no features asked for"),
        (["account:plan", "account:plan"], UsageError, "two features of one name"),
        (["doubled:double"], OnDemandViewError, "not in the checkout"),
        (FeatureService(name="everythin", features=[account]), NotFoundError, "did you mean 'everything'?"),
    ],
)
def test_wrong_features_are_refused_with_the_valid_ones(
    store: FeatureStore, features: Any, error: type[UsageError], message: str
) -> None:
    with pytest.raises(error) as e:
        ReadPlan.compile(store, features)
    assert message in e.value.message


def _state(*events: tuple[datetime, int], visible_at: datetime) -> Value:
    definition = definition_of(behavior)
    assert definition is not None
    states = states_of(definition, [(t, {"amount": n}) for t, n in events], visible_at)
    return Value(bytes_val=states.encode()[0])


@pytest.fixture
def windowed(store: FeatureStore) -> tuple[ReadPlan, Hashes, bytes]:
    plan = ReadPlan.compile(store, ["behavior:events_7d", "behavior:amount_7d"])
    return plan, Hashes(), _key(plan, customer_id="A")


A = {"customer_id": "A"}


def test_a_windowed_value_is_finalised_at_t_and_not_as_it_was_written(windowed: tuple[ReadPlan, Hashes, bytes]) -> None:
    plan, hashes, key = windowed
    state = _state((T - DAY, 5), (T, 7), visible_at=T)
    hashes.put(key, "behavior", T, T, events_7d=Value(int64_val=99), amount_7d=Value(int64_val=99), window_state=state)
    row = hashes.read(plan, A, T)
    assert row.values == {"events_7d": 2, "amount_7d": 12}
    assert row.views["behavior"].offsets == {0: 1}
    assert row.views["behavior"].visible_at == T
    assert hashes.read(plan, A, T + 6 * DAY).values == {"events_7d": 2, "amount_7d": 12}
    assert hashes.read(plan, A, T + 6 * DAY + US).values == {"events_7d": 1, "amount_7d": 7}
    gone = hashes.read(plan, A, T + 7 * DAY + US)
    assert gone.values == {"events_7d": 0, "amount_7d": None}
    assert gone.statuses == {"events_7d": "PRESENT", "amount_7d": "NULL_VALUE"}
    assert gone.event_timestamps["events_7d"] == T


def test_the_ttl_of_a_windowed_view_counts_from_the_last_seen_event(windowed: tuple[ReadPlan, Hashes, bytes]) -> None:
    plan, hashes, key = windowed
    hashes.put(key, "behavior", T, T, window_state=_state((T, 7), visible_at=T))
    assert hashes.read(plan, A, T + 30 * DAY).statuses["events_7d"] == "PRESENT"
    row = hashes.read(plan, A, T + 30 * DAY + US)
    assert row.statuses == dict.fromkeys(["events_7d", "amount_7d"], "OUTSIDE_MAX_AGE")
    assert row.values == dict.fromkeys(["events_7d", "amount_7d"])


def test_a_read_is_never_before_what_the_state_already_knows(windowed: tuple[ReadPlan, Hashes, bytes]) -> None:
    plan, hashes, key = windowed
    hashes.put(key, "behavior", T, T + DAY, window_state=_state((T, 7), visible_at=T + DAY))
    replies = [[hashes[key].get(f) for f in fields] for _, fields in plan.requests([A])]
    assert plan.decode([A], replies, to_micros(T)).t == T + DAY
    assert plan.decode([A], replies, to_micros(T + 2 * DAY)).t == T + 2 * DAY


def test_an_entity_whose_only_event_lies_ahead_was_never_seen(windowed: tuple[ReadPlan, Hashes, bytes]) -> None:
    plan, hashes, key = windowed
    ahead = T + timedelta(seconds=3)
    hashes.put(key, "behavior", ahead, T, window_state=_state((ahead, 7), visible_at=T))
    assert hashes.read(plan, A, T).statuses["events_7d"] == "NOT_FOUND"
    assert hashes.read(plan, A, ahead).values["events_7d"] == 1


def test_values_without_a_window_state_are_not_found(windowed: tuple[ReadPlan, Hashes, bytes]) -> None:
    plan, hashes, key = windowed
    hashes.put(key, "behavior", T, T, events_7d=Value(int64_val=99), window_state=Value())
    row = hashes.read(plan, A, T)
    assert row.statuses["events_7d"] == "NOT_FOUND"
    assert row.values["events_7d"] is None


def test_a_damaged_state_is_an_error_status_and_never_a_value(
    windowed: tuple[ReadPlan, Hashes, bytes], caplog: pytest.LogCaptureFixture
) -> None:
    plan, hashes, key = windowed
    state = _state((T, 7), visible_at=T).bytes_val
    hashes.put(key, "behavior", T, T, events_7d=Value(int64_val=1), window_state=Value(bytes_val=state[:-1]))
    row = hashes.read(plan, A, T)
    assert (row.statuses["events_7d"], row.values["events_7d"]) == ("INVALID", None)
    assert "predictflow windows bootstrap" in caplog.text


def test_a_state_of_another_definition_is_refused(windowed: tuple[ReadPlan, Hashes, bytes]) -> None:
    plan, hashes, key = windowed
    state = bytearray(_state((T, 7), visible_at=T).bytes_val)
    state[8] ^= 1  # within the definition's hash
    hashes.put(key, "behavior", T, T, window_state=Value(bytes_val=bytes(state)))
    with pytest.raises(DefinitionError, match="another definition"):
        hashes.read(plan, A, T)


def test_times_are_exact_to_the_microsecond() -> None:
    assert from_micros(to_micros(T)) == T
