"""Columns become the bytes that Feast's own converter makes, for every type; keys and times too; single rows the same."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from feast import ValueType
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from feast.type_map import python_values_to_proto_values
from hypothesis import given, settings
from hypothesis import strategies as st
from redis.exceptions import TimeoutError as RedisTimeoutError

from feature_store.errors import DataError
from feature_store.key_bytes import KEY, KeyColumns
from feature_store.redis_batch import Batch
from feature_store.redis_cluster_writer import _on_node
from feature_store.redis_layout import KeyPart, encode_pair, encode_timestamp, pair_field, timestamp_field
from feature_store.row_bytes import RowPacker, Times, packed
from feature_store.table_rows import _chunks, _newest
from feature_store.value_bytes import ColumnEncoder, times_of
from tests.value_types import COLUMNS, INT64

FIELD = b"abcd"


def _strings(data: bytes) -> Iterator[bytes]:
    """The MessagePack strings of a packed row."""
    i = 0
    while i < len(data):
        head = data[i]
        size = {0xD9: 1, 0xDA: 2, 0xDB: 4}.get(head, 0)
        length = int.from_bytes(data[i + 1 : i + 1 + size], "big") if size else head - 0xA0
        i += 1 + size
        yield data[i : i + length]
        i += length


def _encoded(kind: ValueType, array: pa.Array) -> list[bytes]:
    """Values of a column, by way of packed rows."""
    encoder = ColumnEncoder("f", kind, packed(FIELD))
    column = encoder.checked(pa.chunked_array([array]))
    packer = RowPacker("v", [FIELD])
    event = Times(np.zeros(len(array), np.int64), np.zeros(len(array), np.int64))
    (rows,) = packer.pack(event, None, [encoder.column(column.combine_chunks())])
    found = []
    for row in rows.to_pylist():
        *_, field, value = _strings(row)
        assert field == FIELD
        found.append(value)
    return found


@pytest.mark.parametrize("kind", COLUMNS, ids=lambda k: k.name)
def test_a_column_has_the_bytes_that_feast_gives_it(kind: ValueType) -> None:
    strategy, arrow = COLUMNS[kind]

    @settings(max_examples=40, deadline=None)
    @given(st.lists(st.none() | strategy, min_size=1, max_size=20), st.integers(0, 3))
    def check(values: list[Any], skip: int) -> None:
        array = pa.array(values, arrow)
        theirs = [p.SerializeToString() for p in python_values_to_proto_values(array.to_pylist(), kind)]
        assert _encoded(kind, array) == theirs
        sliced = array.slice(min(skip, len(values) - 1))
        assert _encoded(kind, sliced) == theirs[len(values) - len(sliced) :]
        encoder = ColumnEncoder("f", kind, packed(FIELD))
        assert [encoder.one(v) for v in array.to_pylist()] == theirs

    check()


@pytest.mark.parametrize(
    ("kind", "array", "expected"),
    [
        (ValueType.INT64, pa.array([1.0, None, float("nan")]), [Value(int64_val=1), Value(), Value()]),
        (ValueType.INT32, pa.array([7, None], pa.int64()), [Value(int32_val=7), Value()]),
        (ValueType.DOUBLE, pa.array([2**53 + 1, None]), [Value(double_val=2**53), Value()]),
        (ValueType.DOUBLE, pa.array([float("nan"), 1.0]), [Value(), Value(double_val=1)]),
        (ValueType.FLOAT, pa.array([0.1, 1e300]), [Value(float_val=0.1), Value(float_val=float("inf"))]),
        (ValueType.STRING, pa.array(["a", None, "a"]).dictionary_encode(), [Value(string_val="a"), Value(), Value(string_val="a")]),
        (ValueType.STRING, pa.array(["ü" * 200], pa.large_string()), [Value(string_val="ü" * 200)]),
        (ValueType.STRING, pa.array(["x" * 70_000]), [Value(string_val="x" * 70_000)]),
        (ValueType.BYTES, pa.array([b"", None]), [Value(bytes_val=b""), Value()]),
        (ValueType.INT64, pa.nulls(2), [Value(), Value()]),
        (ValueType.STRING, pa.nulls(2), [Value(), Value()]),
        (ValueType.UNIX_TIMESTAMP, pa.array([-1, 7], pa.timestamp("ns")), [Value(unix_timestamp_val=-1), Value(unix_timestamp_val=0)]),
        (ValueType.UNIX_TIMESTAMP, pa.array([5, None]), [Value(unix_timestamp_val=5), Value()]),
    ],
)  # fmt: skip
def test_columns_of_a_related_arrow_type_are_taken(kind: ValueType, array: pa.Array, expected: list[Value]) -> None:
    assert _encoded(kind, array) == [v.SerializeToString() for v in expected]


@pytest.mark.parametrize(
    ("kind", "array", "message"),
    [
        (ValueType.INT64, pa.array([1.5]), "feature f must be INT64"),
        (ValueType.INT32, pa.array([2**31]), "feature f must be INT32"),
        (ValueType.INT64, pa.array(["x"]), "feature f must be INT64"),
        (ValueType.JSON, pa.array(["{no json"]), "feature f must be JSON"),
        (ValueType.DOUBLE_LIST, pa.array([["x"]]), "feature f must be DOUBLE_LIST"),
    ],
)
def test_a_value_of_another_type_is_one_line_naming_the_feature(kind: ValueType, array: pa.Array, message: str) -> None:
    encoder = ColumnEncoder("f", kind, packed(FIELD))
    with pytest.raises(DataError) as by_column:
        _encoded(kind, array)
    with pytest.raises(DataError) as single:
        encoder.one(array[0].as_py())
    for e in (by_column, single):
        assert e.value.message.startswith(message)
        assert "\n" not in e.value.message


NANOS = st.integers(-62_135_596_800 * 10**9, 253_402_300_799 * 10**9)


@settings(deadline=None)
@given(st.lists(st.tuples(NANOS, st.none() | NANOS), min_size=1, max_size=10))
def test_times_of_packed_rows_are_those_of_single_rows(times: list[tuple[int, int | None]]) -> None:
    packer = RowPacker("view", [])
    pairs = np.array([divmod(e, 10**9) for e, _ in times], np.int64)
    known = np.array([divmod(c or 0, 10**9) for _, c in times], np.int64)
    created = Times(known[:, 0], known[:, 1], np.array([c is not None for _, c in times]))
    (rows,) = packer.pack(Times(pairs[:, 0], pairs[:, 1]), created, [])
    for (event, made), row in zip(times, rows.to_pylist(), strict=True):
        expected = [pair_field("view"), encode_pair(event, made), timestamp_field("view"), encode_timestamp(event)]
        assert list(_strings(row)) == expected
        assert packer.pack_one(expected[1], expected[3], []) == [row]
        assert row[packer.pair_at - 1 :].startswith(expected[1])


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@given(st.lists(st.none() | st.integers(-(2**40), 2**40), min_size=1, max_size=5))
def test_a_time_of_any_unit_is_floored_to_seconds_exactly(unit: str, raw: list[int | None]) -> None:
    per = {"s": 1, "ms": 10**3, "us": 10**6, "ns": 10**9}[unit]
    times = times_of(pa.array(raw, pa.timestamp(unit, "UTC")))
    assert [times.nanoseconds(i) for i in range(len(raw))] == [None if r is None else r * (10**9 // per) for r in raw]


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(st.text(max_size=8), INT64, st.integers(-(2**31), 2**31 - 1), st.binary(max_size=8)),
        min_size=1,
        max_size=6,
    ),
    st.sampled_from(["INT64", "UNIX_TIMESTAMP"]),
)
def test_keys_of_columns_and_of_protos_are_feasts(rows: list[tuple[str, int, int, bytes]], number: Any) -> None:
    names = ["s", "a", "z", "b"]
    layout: list[tuple[str, Any, pa.DataType, str]] = [
        ("s", "STRING", pa.string(), "string_val"),
        ("a", number, pa.int64(), number.lower() + "_val"),
        ("z", "INT32", pa.int32(), "int32_val"),
        ("b", "BYTES", pa.binary(), "bytes_val"),
    ]
    keys = KeyColumns("proj", "v", [KeyPart(n, f"alias of {n}", kind) for n, kind, _, _ in layout])
    columns = {n: pa.chunked_array([pa.array([r[i] for r in rows], t)]) for i, (n, _, t, _) in enumerate(layout)}
    table = pa.table({KEY + n: keys.checked(n, c) for n, c in columns.items()})
    protos = [
        EntityKey(join_keys=names, entity_values=[Value(**{f: v}) for (*_, f), v in zip(layout, row, strict=True)])
        for row in rows
    ]
    theirs = [serialize_entity_key(p, 3) + b"proj" for p in protos]
    assert keys.encode(table).to_pylist() == theirs
    assert keys.few({n: table.column("k:" + n) for n in keys.names}, table.num_rows) == theirs
    assert [keys.of_proto(p) for p in protos] == theirs
    assert keys.of_protos(protos) == theirs
    other = EntityKey(join_keys=names, entity_values=[Value(), *protos[0].entity_values[1:]])
    assert keys.of_protos([*protos, other]) is None  # it is no text, not even an empty one
    assert keys.of_protos([*protos, EntityKey(join_keys=names[1:], entity_values=other.entity_values[1:])]) is None


def test_a_null_or_wrong_key_is_refused_by_row() -> None:
    keys = KeyColumns("proj", "v", [KeyPart("id", "id", "INT64")])
    with pytest.raises(DataError, match="v: row 1 has no join key id"):
        keys.checked("id", pa.chunked_array([[1], [None]]))
    with pytest.raises(DataError, match="v: join key id must be INT64: 'string'"):
        keys.checked("id", pa.chunked_array([["1"]]))
    assert keys.of_proto(EntityKey(join_keys=["id"], entity_values=[Value()])) is None


def test_of_a_repeated_key_the_newest_row_is_kept_and_of_equal_ones_the_last() -> None:
    t = datetime(2026, 1, 1, tzinfo=UTC)
    rows = [
        ("a", t, t),
        ("b", t, None),
        ("a", t, t + timedelta(1)),
        ("b", t, t),
        ("c", t, t),
        ("c", t - timedelta(1), t),
    ]
    event = times_of(pa.array([r[1] for r in rows]))
    created = times_of(pa.array([r[2] for r in rows]))
    keys = pa.array([r[0].encode() for r in rows], pa.binary())
    assert _newest(keys, event, created).tolist() == [2, 3, 4]
    assert _newest(keys.slice(0, 2), event, created) is None


def test_chunks_are_bounded_in_rows_and_bytes_and_lose_none() -> None:
    texts = ["x"] * 2_500 + ["y" * 1_500_000] * 5
    chunks = list(_chunks(pa.table({"t": texts})))
    assert [t for c in chunks for t in c.column("t").to_pylist()] == texts
    assert max(c.num_rows for c in chunks) == 1_000
    assert all(c.num_rows == 1 or c.nbytes <= 2_000_000 for c in chunks)


def test_a_batch_becomes_calls_of_bounded_size() -> None:
    head = (b"_ts:v", b"_pf:v", b"8", b"1")
    batch = Batch([b"k%d" % i for i in range(130)], [[b"r"] * 130], head, 12)
    payload, calls = batch.calls()
    assert calls == 3
    assert payload.count(b"EVALSHA") == 3
    assert Batch(batch.keys, batch.rows, head, 600).calls()[1] == 65
    assert batch.calls([3], per_call=1)[0].count(b"k3") == 1


def test_a_cluster_connection_with_unread_replies_is_not_used_again() -> None:
    class Connection:
        connected = True

        def send_packed_command(self, command: object) -> None:
            pass

        def read_response(self, **_: object) -> int:
            raise RedisTimeoutError("Timeout reading from socket")

        def disconnect(self) -> None:
            self.connected = False

    class Pool:
        connection = Connection()
        released = 0

        def get_connection(self) -> Connection:
            return self.connection

        def release(self, _: Connection) -> None:
            self.released += 1

    class Node:
        connection_pool = Pool()

    class Rows:
        def calls(self, rows: list[int], per_call: int) -> tuple[bytes, int]:
            return b"", len(rows)

    with pytest.raises(RedisTimeoutError):
        _on_node(Node(), Rows(), [0, 1])  # type: ignore[arg-type]  # all that it asks of a batch
    assert not Pool.connection.connected
    assert Node.connection_pool.released == 1
