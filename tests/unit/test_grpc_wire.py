"""The bytes of `grpc_wire` are a GetOnlineFeaturesResponse that says what the cells say, for values of every kind."""

from __future__ import annotations

import gc
import random
from types import SimpleNamespace
from typing import Any

from feast.protos.feast.serving.ServingService_pb2 import FieldStatus, GetOnlineFeaturesResponse
from feast.protos.feast.types.Value_pb2 import DoubleList, Map, Null, RepeatedValue, Value

from feature_store.online_response import fill
from feature_store.view_plan import Feature, ViewRow
from serving.grpc_wire import STATUS, Heads, encode

KINDS = [
    Value(int64_val=0),
    Value(int64_val=-1),
    Value(double_val=float("nan")),
    Value(string_val=""),
    Value(string_val="é" * 900),
    Value(bytes_val=b"\0" * 70_000),
    Value(bool_val=False),
    Value(unix_timestamp_val=-(2**63)),
    Value(unix_timestamp_val=5),
    Value(null_val=Null.NULL),
    Value(double_list_val=DoubleList(val=[])),
    Value(map_val=Map(val={"a": Value(int32_val=3)})),
    Value(json_val="{}"),
]


class Plan:
    def __init__(self, views: list[Any]) -> None:
        self.view_plans = views
        self.feature_names = [f.result for v in views for f in v.features]
        self.key_types = {"k": "STRING"}


def test_the_status_numbers_are_feasts() -> None:
    assert dict(FieldStatus.items()) == STATUS


def test_the_answer_is_the_one_that_protobuf_writes() -> None:
    rng = random.Random(1)
    for rows in (1, 2, 130):
        features = [Feature(f"f{i}", f"f{i}", b"") for i in range(len(KINDS))]
        view = SimpleNamespace(view="v", name="v", version=3, features=features)
        plan = Plan([view])
        answers = []
        for _ in range(rows):
            event = rng.choice([None, 0, 1, 1_700_000_000_123_456_789, -5])
            cells: list[Any] = [("PRESENT", v.SerializeToString()) for v in KINDS]
            cells[0] = rng.choice([("NOT_FOUND", None), ("PRESENT", -(2**63)), ("PRESENT", 7), ("INVALID", None)])
            answers.append([ViewRow(event, None, None, cells)])
        entities = {"k": RepeatedValue(val=[Value(string_val=f"k{i}") for i in range(rows)])}
        entities["factor"] = RepeatedValue(val=[Value(double_val=1.5)] * rows)  # an on-demand view's input: not told
        read = SimpleNamespace(plan=SimpleNamespace(reader=SimpleNamespace(plan=plan)), rows=answers)
        got = GetOnlineFeaturesResponse.FromString(encode(read, Heads(), entities, True))  # type: ignore[arg-type]  # a plan by hand
        want = GetOnlineFeaturesResponse()
        fill(want, plan, answers, True)  # type: ignore[arg-type]  # a plan by hand
        assert got.results[0].values == entities["k"].val
        assert list(got.results[0].statuses) == [1] * rows
        assert list(got.metadata.feature_names.val) == ["k", *want.metadata.feature_names.val]
        assert [(m.name, m.version) for m in got.metadata.feature_view_metadata] == [("v", 3)]
        assert [r.SerializeToString() for r in got.results[1:]] == [r.SerializeToString() for r in want.results]


def test_heads_forget_plans_that_nobody_holds() -> None:
    heads = Heads()
    plan = Plan([])
    heads.of(plan, ("k",), False)  # type: ignore[arg-type]  # a plan by hand
    del plan
    gc.collect()
    assert len(heads._heads) == 0
