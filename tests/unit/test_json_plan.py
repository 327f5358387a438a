"""Answers and served-log records made of fragments are those made of Python values, whatever Redis holds."""

from __future__ import annotations

import gc
import json
import math
import os
import weakref
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import pytest
from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
from feast.feature_server_utils import _timestamp_to_str, convert_response_to_dict
from feast.protos.feast.types.Value_pb2 import DoubleList, RepeatedValue, Value
from feast.types import Array, Bool, Bytes, Float32, Float64, Int64, String, UnixTimestamp
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store.clock import to_micros
from feature_store.online_response import CellResponse
from feature_store.read_plan import ReadPlan
from feature_store.redis_layout import decode_value, encode_pair, encode_timestamp, nanos_of
from feature_store.windows.declare import event_source, windowed_feature_view
from feature_store.windows.definition import definition_of
from serving import feast_answer as feast_answer_module
from serving.encoding import dumps
from serving.feast_answer import feast_answer
from serving.grpc_wire import Heads, encode
from serving.json_plan import JsonPlan
from serving.json_view import Caches, _value
from serving.log_keys import message_key
from serving.online import _row
from serving.plans import Column, ServicePlan
from serving.served_log import Served, records
from serving.wire_plan import WirePlan, Wires, spliced
from tests.window_states import states_of

T = datetime(2026, 1, 10, 12, 0, 0, 250_000, tzinfo=UTC)
DAY = timedelta(days=1)
customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)


def _source(name: str) -> FileSource:
    return FileSource(name=name, path=f"{name}.parquet", timestamp_field="event_timestamp")


TYPES = [Float64, Float64, Float32, Int64, String, Bool, Bytes, UnixTimestamp, Array(Float64), Float64]
mixed = FeatureView(
    name="mixed",
    entities=[customer],
    ttl=2 * DAY,
    schema=[Field(name=f"f{i}", dtype=t) for i, t in enumerate(TYPES)],
    source=_source("m"),
)
doubles = FeatureView(
    name="doubles",
    entities=[customer],
    ttl=timedelta(0),
    schema=[Field(name=f"d{i}", dtype=Float64) for i in range(4)],
    source=_source("d"),
)
behavior = windowed_feature_view(
    name="behavior",
    entity=customer,
    source=event_source(topic="events", columns={"amount": "int64"}),
    path="events",
    ttl=30 * DAY,
    sql="""SELECT COUNT(*) OVER w AS n, SUM(amount) OVER w AS total FROM events WINDOW w AS (
        PARTITION BY customer_id ORDER BY event_timestamp RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW)""",
)


@pytest.fixture(scope="module")
def plan_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], ReadPlan]:
    home: Path = tmp_path_factory.mktemp("repo")
    store = FeatureStore(
        config=RepoConfig(
            project="unit",
            provider="local",
            registry=str(home / "registry.db"),
            online_store={
                "type": "feature_store.online_store.PredictFlowOnlineStore",
                "connection_string": "redis://127.0.0.1:1/0",
            },
            entity_key_serialization_version=3,
        )
    )
    store.apply([customer, mixed, doubles, behavior])
    names = [f"mixed:f{i}" for i in range(len(TYPES))] + [f"doubles:d{i}" for i in range(4)]
    return lambda: ReadPlan.compile(store, [*names, "behavior:n", "behavior:total"])


@pytest.fixture(scope="module")
def plan(plan_of: Callable[[], ReadPlan]) -> ReadPlan:
    return plan_of()


floats = st.floats(allow_nan=True, allow_infinity=True)
VALUES = {
    "DOUBLE": floats.map(lambda v: Value(double_val=v)),
    "FLOAT": st.floats(width=32).map(lambda v: Value(float_val=v)),
    "INT64": st.integers(-(2**63), 2**63 - 1).map(lambda v: Value(int64_val=v)),
    "STRING": st.text(max_size=200).map(lambda v: Value(string_val=v)),
    "BOOL": st.booleans().map(lambda v: Value(bool_val=v)),
    "BYTES": st.binary(max_size=9).map(lambda v: Value(bytes_val=v)),
    "UNIX_TIMESTAMP": st.integers(0, 2**33).map(lambda v: Value(unix_timestamp_val=v)),
    "DOUBLE_LIST": st.lists(floats, max_size=3).map(lambda v: Value(double_list_val=DoubleList(val=v))),
}
times = st.sampled_from([T, T - DAY, T - 2 * DAY, T - 3 * DAY, T.replace(microsecond=0), T + timedelta(microseconds=1)])


@st.composite
def replies(draw: st.DrawFn) -> Any:
    """What the one HMGET of a row may answer."""

    def cells(types: list[str]) -> list[bytes | None]:
        kinds = [st.one_of(VALUES[t].map(Value.SerializeToString), st.none(), st.just(b"")) for t in types]
        return [draw(k) for k in kinds]

    def head() -> list[bytes | None]:
        event = draw(st.none() | times)
        if event is None:
            return [None, None]
        other = draw(st.sampled_from([event, event, T - 9 * DAY]))
        pair = draw(st.none() | st.just(encode_pair(nanos_of(other), draw(st.none() | times.map(nanos_of)))))
        return [encode_timestamp(nanos_of(event)), pair]

    ages = draw(st.lists(st.integers(0, 40), max_size=4))
    definition = definition_of(behavior)
    assert definition is not None
    state_bytes = states_of(definition, [(T - a * DAY, {"amount": a}) for a in ages], T).encode()[0]
    blob = Value(bytes_val=state_bytes).SerializeToString()
    damaged = Value(bytes_val=state_bytes[:-1]).SerializeToString()
    return [
        *head(),
        *cells([t.to_value_type().name for t in TYPES]),
        *head(),
        *cells(["DOUBLE"] * 4),
        *head(),
        None,
        None,
        draw(st.sampled_from([None, blob, blob, damaged])),
    ]


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(replies(), min_size=1, max_size=6))
def test_fragments_make_the_documents_of_python_values(plan: ReadPlan, rows: list[Any]) -> None:
    entities = [{"customer_id": f'"C{i}'} for i in range(len(rows))]
    made = JsonPlan(plan, "s")
    kinds = [t.to_value_type().name for t in TYPES] + ["DOUBLE"] * 4 + ["INT64"] * 2
    slow = plan.decode(entities, rows, to_micros(T))
    fast = made.answered(entities, rows, to_micros(T))
    expected = {
        "t": slow.t,
        "feature_service": "s",
        "feature_names": plan.feature_names,
        "feature_types": kinds,
        "rows": [{**_row(row), "event_timestamps": row.event_timestamps} for row in slow.rows],
    }
    assert json.loads(made.body(fast)) == json.loads(dumps(expected))

    columns = tuple(Column(f.result, v.name, f.name, False) for v in plan.view_plans for f in v.features)
    service = ServicePlan("s", columns, ("customer_id",), None)  # type: ignore[arg-type]  # nothing is read
    served = Served("r", T, "p")
    wanted = [(message_key(r["entity"]), json.loads(dumps(r))) for r in records(served, service, slow, None)]
    assert [(key, json.loads(record)) for key, record in made.records(served, fast)] == wanted

    probabilities = [i / 7 for i in range(len(rows))]
    fast.probabilities = probabilities
    predicted = Served("r", T, "p", "m", "3")
    wanted = [
        (message_key(r["entity"]), json.loads(dumps(r))) for r in records(predicted, service, slow, probabilities)
    ]
    assert [(key, json.loads(record)) for key, record in made.records(predicted, fast)] == wanted
    prediction = {
        "model": "m",
        "version": "3",
        "feature_service": "s",
        "feature_types": dict(zip(plan.feature_names, kinds, strict=True)),
        "t": slow.t,
        "predictions": [{**_row(row), "probability": p} for row, p in zip(slow.rows, probabilities)],
    }
    assert json.loads(made.predictions(fast, probabilities, "m", "3")) == json.loads(dumps(prediction))
    inputs = made.inputs(fast)
    if inputs is not None:
        assert inputs == [[row.values[name] for name in plan.feature_names] for row in slow.rows]

    counts: dict[tuple[str, str], int] = {}
    made.count(fast, lambda view, status, n: counts.update({(view, status): counts.get((view, status), 0) + n}))
    assert sum(counts.values()) == len(columns) * len(rows)
    for column in columns:
        for row in slow.rows:
            counts[column.view, row.statuses[column.name]] -= 1
    assert not any(counts.values())


@settings(max_examples=60, deadline=None)
@given(rows=st.lists(replies(), max_size=5), versions=st.booleans())
def test_feasts_document_is_the_one_that_feast_makes_of_its_message(
    plan: ReadPlan, rows: list[Any], versions: bool
) -> None:
    entities = [{"customer_id": f"C{i}"} for i in range(len(rows))]
    columns = {"customer_id": [e["customer_id"] for e in entities]}
    answers = plan.at(rows, to_micros(T), entities)[1] if rows else []
    theirs = convert_response_to_dict(CellResponse(plan, columns, answers, versions).proto)
    ours = feast_answer(plan, columns, answers, versions)
    assert json.loads(dumps(ours)) == json.loads(dumps(theirs))
    assert list(ours) == list(theirs)


@pytest.mark.parametrize(
    "ns", [0, -1, -1_500_000_000, 10**9, 10**9 + 10**6, 10**9 + 10**3, 10**9 + 1, 10**18 + 120_000_000]
)
def test_feasts_times_have_the_digits_that_feast_gives_them(ns: int) -> None:
    assert feast_answer_module._time(ns) == _timestamp_to_str(Timestamp.FromString(encode_timestamp(ns)))


@settings(max_examples=15, deadline=None)
@given(rows=st.lists(replies(), min_size=1, max_size=5))
def test_undecoded_cells_make_the_same_document(plan: ReadPlan, rows: list[Any]) -> None:
    entities = [{"customer_id": f"C{i}"} for i in range(len(rows))]
    made = JsonPlan(plan, None)
    direct = made.body(made.answered(entities, rows, to_micros(T)))
    t_us, answers = plan.at(rows, to_micros(T))
    assert json.loads(made.body(made.of_cells(entities, t_us, answers))) == json.loads(direct)


def test_doubles_keep_every_bit_and_what_json_cannot_hold_is_text(plan: ReadPlan) -> None:
    values = [0.1 + 0.2, 5e-324, 1.7976931348623157e308, -0.0]
    odd = [math.nan, math.inf, -math.inf, 1.0]
    stamp = encode_timestamp(nanos_of(T))
    rows = [
        [None] * 12 + [stamp, None, *(Value(double_val=v).SerializeToString() for v in row)] + [None] * 5
        for row in (values, odd)
    ]
    made = JsonPlan(plan, None)
    entities = [{"customer_id": "a"}, {"customer_id": "b"}]
    got = json.loads(made.body(made.answered(entities, rows, to_micros(T))))["rows"]
    assert [got[0]["values"][f"d{i}"].hex() for i in range(4)] == [v.hex() for v in values]
    assert [got[1]["values"][f"d{i}"] for i in range(4)] == ["NaN", "Infinity", "-Infinity", 1.0]


@pytest.mark.parametrize("null", [None, b""])
def test_a_null_of_a_type_that_is_told_apart_by_its_declaration_is_null(null: bytes | None) -> None:
    assert _value(null, ValueType.UUID) is None  # Feast stores a null as empty bytes, which JSON cannot hold


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, 0.1])
def test_a_probability_is_the_same_text_on_both_ways(plan: ReadPlan, value: float) -> None:
    made = JsonPlan(plan, "s")
    read = made.answered([{"customer_id": "a"}], [[None] * 22], to_micros(T))
    read.probabilities = [value]
    wanted = b'"probability":' + dumps(value)
    assert wanted in made.predictions(read, [value], "m", "1")
    ((_, record),) = made.records(Served("r", T, "p", "m", "1"), read)
    assert record.endswith(wanted + b"}")


def test_plans_share_what_they_decoded(plan: ReadPlan) -> None:
    caches = Caches()
    stamp = encode_timestamp(nanos_of(T))
    row = [stamp, None, *[None] * 3, Value(int64_val=7).SerializeToString(), *[None] * 16]
    for name in ("a", "b"):
        JsonPlan(plan, name, caches).answered([{"customer_id": "a"}], [row], to_micros(T))
    assert list(caches.times) == [stamp]
    assert caches.values[Value(int64_val=7).SerializeToString()] == 7


def test_what_is_kept_of_many_times_takes_little_memory() -> None:
    """orjson's bytes hold on to 4 kB each: 80 MB of these."""

    def resident() -> float:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6

    times = Caches().times
    protos = [encode_timestamp(1_790_000_000_000_000_000 + i * 1_000_003) for i in range(20_000)]
    times[protos[0]]  # imports
    before = resident()
    assert all(times[p][1].startswith(b'"2026-') for p in protos)
    assert resident() - before < 25


@settings(max_examples=40, deadline=None)
@given(rows=st.lists(replies(), min_size=1, max_size=6))
def test_the_wire_plan_writes_the_bytes_that_cells_make(plan: ReadPlan, rows: list[Any]) -> None:
    entities = [{"customer_id": f"C{i}"} for i in range(len(rows))]
    asked = {"customer_id": RepeatedValue(val=[Value(string_val=f"C{i}") for i in range(len(rows))])}
    t_us, answers = plan.at(rows, to_micros(T))
    read: Any = SimpleNamespace(plan=SimpleNamespace(reader=SimpleNamespace(plan=plan)), rows=answers)
    got, counts, windowed = WirePlan(plan).answer(plan, Heads(), rows, to_micros(T), asked, True)
    assert got == encode(read, Heads(), asked, True)

    made = JsonPlan(plan, "s")
    wanted: list[tuple[str, str, int]] = []
    made.count(made.of_cells(entities, t_us, answers), lambda *count: wanted.append(count))
    assert sorted(counts) == sorted(wanted)
    served = Served("r", T, "p")
    with patch.object(ReadPlan, "windowed_at", side_effect=AssertionError("twice")):
        later = made.later(entities, rows, to_micros(T), windowed)
    assert list(made.records(served, later)) == list(made.records(served, made.answered(entities, rows, to_micros(T))))
    ages: list[tuple[str, float]] = []
    made.ages(later, lambda *age: ages.append(age))
    found = [(v.name, a.event_ns) for v, a in zip(plan.view_plans, answers[0], strict=True) if a.event_ns is not None]
    assert ages == [(name, (t_us * 1000 - ns) / 1e9) for name, ns in found]


@settings(max_examples=200, deadline=None)
@given(column=st.lists(st.one_of(*VALUES.values()).map(Value.SerializeToString) | st.just(b""), min_size=1, max_size=9))
def test_a_column_is_spliced_only_where_nothing_in_it_can_be_null(column: list[bytes]) -> None:
    values = spliced(column)
    if values is not None:
        assert values == b"".join(RepeatedValue(val=[Value.FromString(v)]).SerializeToString() for v in column)
        assert all(not v or decode_value(v) is not None for v in column)


def test_a_plan_that_nobody_holds_is_forgotten_and_times_are_kept_once(
    plan: ReadPlan, plan_of: Callable[[], ReadPlan]
) -> None:
    wires = Wires()
    other = plan_of()
    assert wires.of(other)._times is wires.of(plan)._times
    assert wires.of(plan) is wires.of(plan)
    gone = weakref.ref(other)
    del other
    gc.collect()
    assert gone() is None
