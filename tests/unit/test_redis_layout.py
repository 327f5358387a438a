"""The bytes in Redis are stock Feast's, both ways, for every type; checked against Feast's own code."""

from __future__ import annotations

import contextlib
import uuid
from datetime import UTC, datetime
from decimal import Decimal

import pandas as pd
import pytest
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.helpers import _mmh3
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import feast_value_type_to_python_type, python_values_to_proto_values
from feast.value_type import ValueType
from google.protobuf.timestamp_pb2 import Timestamp
from hypothesis import given, settings
from hypothesis import strategies as st

from feature_store import redis_layout as layout
from feature_store.errors import DataError, DefinitionError, UsageError

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
NANOS = st.integers(-62_135_596_800 * 10**9, 253_402_300_799 * 10**9)
SECONDS = st.integers(-62_135_596_800, 253_402_300_799)
KEY_VALUES = {
    "STRING": (TEXT, "string_val"),
    "BYTES": (st.binary(max_size=40), "bytes_val"),
    "INT32": (INT32, "int32_val"),
    "INT64": (INT64, "int64_val"),
    "UNIX_TIMESTAMP": (SECONDS, "unix_timestamp_val"),
}


@given(NANOS)
def test_a_time_is_written_as_protobuf_writes_it_and_read_back_exactly(ns: int) -> None:
    proto = Timestamp(seconds=ns // 10**9, nanos=ns % 10**9).SerializeToString()
    assert layout.encode_timestamp(ns) == proto
    assert layout.decode_timestamp(proto) == ns


@given(NANOS, st.none() | NANOS)
def test_a_pair_is_read_back_exactly(event: int, created: int | None) -> None:
    assert layout.decode_pair(layout.encode_pair(event, created)) == (event, created)


def test_a_pandas_time_keeps_its_nanoseconds_and_nat_is_refused() -> None:
    assert layout.nanos_of(pd.Timestamp(1_700_000_000_123_456_789, tz="UTC")) == 1_700_000_000_123_456_789
    with pytest.raises(DataError, match="without an event timestamp"):
        layout.nanos_of(pd.NaT)


@given(TEXT, TEXT)
def test_a_feature_has_the_hash_field_that_feast_gives_it(view: str, feature: str) -> None:
    assert layout.feature_field(view, feature) == _mmh3(f"{view}:{feature}")


@st.composite
def keys(draw: st.DrawFn) -> tuple[list[layout.KeyPart], dict[str, object], EntityKey]:
    names = draw(st.lists(TEXT.filter(bool), min_size=1, max_size=4, unique=True))
    types = [draw(st.sampled_from(sorted(KEY_VALUES))) for _ in names]
    values = [draw(KEY_VALUES[t][0]) for t in types]
    parts = [layout.KeyPart(n, f"request {n}", t) for n, t in zip(names, types)]
    proto = EntityKey(join_keys=names, entity_values=[Value(**{KEY_VALUES[t][1]: v}) for t, v in zip(types, values)])
    return parts, {f"request {n}": v for n, v in zip(names, values)}, proto


@given(keys(), TEXT)
def test_an_entity_key_is_the_one_that_feast_makes(key: tuple, project: str) -> None:
    parts, entity, proto = key
    made = layout.KeyLayout(project, parts).encode(entity, 0)
    assert made == serialize_entity_key(proto, 3) + project.encode()
    assert layout.join_keys_of(made, project) == sorted(proto.join_keys)


def test_a_key_of_another_project_is_not_taken_for_ours() -> None:
    parts = [layout.KeyPart("id", "id", "STRING")]
    key = layout.KeyLayout("my_shop", parts).encode({"id": "x"}, 0)
    assert layout.join_keys_of(key, "my_shop") == ["id"]
    assert layout.join_keys_of(key, "shop") is None
    assert layout.join_keys_of(b"predictflow:shop:clock", "clock") is None
    assert layout.join_keys_of(b"", "") is None


def test_a_null_key_matches_nothing_that_can_be_written() -> None:
    parts = [layout.KeyPart("id", "id", "STRING")]
    null = layout.KeyLayout("p", parts).encode({"id": None}, 0)
    assert null != layout.KeyLayout("p", parts).encode({"id": ""}, 0)
    with pytest.raises(ValueError, match="not supported"):
        serialize_entity_key(EntityKey(join_keys=["id"], entity_values=[Value()]), 3)


@pytest.mark.parametrize(
    ("kind", "value"),
    [
        ("STRING", 5),
        ("STRING", b"x"),
        ("BYTES", "x"),
        ("INT64", "5"),
        ("INT64", True),
        ("INT64", 2**63),
        ("INT64", 1.0),
        ("INT32", 2**31),
        ("UNIX_TIMESTAMP", "2026-01-01"),
    ],
)
def test_a_key_value_of_the_wrong_type_is_refused_in_one_line(kind: layout.KeyType, value: object) -> None:
    keys = layout.KeyLayout("p", [layout.KeyPart("id", "id", kind)])
    with pytest.raises(UsageError) as e:
        keys.encode({"id": value}, 3)
    assert e.value.message.startswith(
        f"entity row 3: join key id must be {kind}, not {type(value).__name__}: {value!r}"
    )
    assert "\n" not in e.value.message


def test_a_join_key_type_that_feast_cannot_store_is_refused() -> None:
    with pytest.raises(DefinitionError, match="FLOAT"):
        layout.KeyLayout("p", [layout.KeyPart("id", "id", "FLOAT")])


FLOAT = st.floats(width=32, allow_nan=False)
DOUBLE = st.floats(allow_nan=False)
TIME = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC)).map(
    lambda t: t.replace(microsecond=0)
)
SCALARS: dict[ValueType, st.SearchStrategy] = {
    ValueType.BYTES: st.binary(max_size=300),
    ValueType.STRING: TEXT,
    ValueType.INT32: INT32,
    ValueType.INT64: INT64,
    ValueType.DOUBLE: DOUBLE,
    ValueType.FLOAT: FLOAT,
    ValueType.BOOL: st.booleans(),
    ValueType.UNIX_TIMESTAMP: TIME,
    ValueType.UUID: st.uuids(),
    ValueType.DECIMAL: st.decimals(allow_nan=False, allow_infinity=False).map(Decimal),
    ValueType.MAP: st.dictionaries(TEXT, INT64, min_size=1, max_size=3),
    ValueType.JSON: st.dictionaries(TEXT, INT32, min_size=1, max_size=3),
}
LISTS: dict[ValueType, st.SearchStrategy] = {
    kind: st.lists(SCALARS[element], min_size=1, max_size=5)
    for kind, element in {
        ValueType.BYTES_LIST: ValueType.BYTES,
        ValueType.STRING_LIST: ValueType.STRING,
        ValueType.INT32_LIST: ValueType.INT32,
        ValueType.INT64_LIST: ValueType.INT64,
        ValueType.DOUBLE_LIST: ValueType.DOUBLE,
        ValueType.FLOAT_LIST: ValueType.FLOAT,
        ValueType.BOOL_LIST: ValueType.BOOL,
        ValueType.UNIX_TIMESTAMP_LIST: ValueType.UNIX_TIMESTAMP,
        ValueType.UUID_LIST: ValueType.UUID,
    }.items()
}


@pytest.mark.parametrize("kind", [*SCALARS, *LISTS], ids=lambda k: k.name)
def test_every_value_type_is_read_as_feast_reads_it(kind: ValueType) -> None:
    @settings(max_examples=30, deadline=None)
    @given({**SCALARS, **LISTS}[kind])
    def check(value: object) -> None:
        (proto,) = python_values_to_proto_values([value], kind)
        theirs = feast_value_type_to_python_type(proto, kind)
        hint = kind if "UUID" in kind.name else None
        ours = layout.decode_value(proto.SerializeToString(), hint)
        assert ours == theirs
        assert type(ours) is type(theirs)

    check()


@pytest.mark.parametrize(
    "data", [b"", Value(null_val=0).SerializeToString(), Value(unix_timestamp_val=-(2**63)).SerializeToString()]
)
def test_a_null_in_any_disguise_is_none(data: bytes) -> None:
    assert layout.decode_value(data) is None


def test_zero_false_and_empty_are_values_and_no_nulls() -> None:
    for value in (Value(int64_val=0), Value(double_val=0), Value(bool_val=False), Value(string_val="")):
        assert layout.decode_value(value.SerializeToString()) is not None


def test_an_identifier_stored_as_a_string_by_an_older_feast_is_read_as_one() -> None:
    one = uuid.UUID(int=7)
    assert layout.decode_value(Value(string_val=str(one)).SerializeToString(), ValueType.UUID) == one


@given(st.sampled_from([*SCALARS]), st.data())
@settings(max_examples=60, deadline=None)
def test_damaged_bytes_give_an_error_or_a_value_and_never_a_crash(kind: ValueType, data: st.DataObject) -> None:
    (proto,) = python_values_to_proto_values([data.draw(SCALARS[kind])], kind)
    whole = proto.SerializeToString()
    cut = whole[: data.draw(st.integers(0, len(whole)))]
    with contextlib.suppress(DataError):
        layout.decode_value(cut)
