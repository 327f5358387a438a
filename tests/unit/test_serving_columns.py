"""JSON columns in declared types, and Arrow streams from strangers."""

from __future__ import annotations

import math
import struct
from datetime import UTC, datetime, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pyarrow as pa
import pytest

from feature_store.errors import UsageError
from serving.arrow_input import ArrowError, read_stream
from serving.columns import ColumnError, rows_of, times, typed
from serving.errors import TooManyError


@pytest.mark.parametrize(
    ("kind", "given", "kept"),
    [
        ("STRING", "é", "é"),
        ("BYTES", "AP8=", b"\x00\xff"),
        ("INT32", -(2**31), -(2**31)),
        ("INT64", 2**63 - 1, 2**63 - 1),
        ("DOUBLE", 1, 1.0),
        ("DOUBLE", 0.1 + 0.2, 0.1 + 0.2),
        ("DOUBLE", "-Infinity", -math.inf),
        ("FLOAT", 0.5, 0.5),
        ("BOOL", False, False),
        ("UNIX_TIMESTAMP", 5, datetime(1970, 1, 1, 0, 0, 5, tzinfo=UTC)),
        ("UNIX_TIMESTAMP", "2026-01-01T02:00:00.000001+02:00", datetime(2026, 1, 1, 0, 0, 0, 1, tzinfo=UTC)),
        ("STRING_LIST", ["a", ""], ["a", ""]),
        ("INT64_SET", [1, 2], [1, 2]),
        ("UUID", "12345678-1234-5678-1234-567812345678", "12345678-1234-5678-1234-567812345678"),
        ("DECIMAL", "1.10", "1.10"),
        ("MAP", {"a": 1}, '{"a": 1}'),
        ("STRUCT", '{"a": 1}', '{"a": 1}'),
        ("JSON", [1], "[1]"),
        ("JSON_LIST", ["{}", 1], ["{}", "1"]),
        ("INT64", None, None),
        # What gRPC has types for.
        ("BYTES", b"\x00\xff", b"\x00\xff"),
        (
            "UNIX_TIMESTAMP",
            datetime(2026, 1, 1, 2, tzinfo=timezone(timedelta(hours=2))),
            datetime(2026, 1, 1, tzinfo=UTC),
        ),
        ("UNIX_TIMESTAMP", datetime(2026, 1, 1), datetime(2026, 1, 1, tzinfo=UTC)),
        ("UUID", UUID("12345678-1234-5678-1234-567812345678"), "12345678-1234-5678-1234-567812345678"),
        ("DECIMAL", Decimal("1.10"), "1.10"),
        ("INT64_SET", {1}, [1]),
    ],
)
def test_values_keep_their_meaning(kind: str, given: Any, kept: Any) -> None:
    assert typed("c", [given], kind).to_pylist() == [kept]


@pytest.mark.parametrize(
    ("kind", "given"),
    [
        ("STRING", 1),
        ("STRING", "\ud800"),
        ("BYTES", "not base64!"),
        ("INT32", 2**31),
        ("INT64", 2**63),
        ("INT64", True),
        ("INT64", 1.0),
        ("INT64", "1"),
        ("DOUBLE", "1.5"),
        ("DOUBLE", 10**400),
        ("FLOAT", 1e39),
        ("BOOL", 1),
        ("UNIX_TIMESTAMP", "yesterday"),
        ("UNIX_TIMESTAMP", 10**18),
        ("UNIX_TIMESTAMP", True),
        ("STRING_LIST", "ab"),
        ("STRING_LIST", ["a", None]),
        ("UUID", "x"),
        ("DECIMAL", "NaN"),
        ("MAP", [1]),
        ("MAP", "{"),
        ("JSON", "{"),
    ],
)
def test_what_does_not_fit_is_named_by_column_and_row(kind: str, given: Any) -> None:
    with pytest.raises(ColumnError, match="column c, row 1"):
        typed("c", [None, given], kind)


def test_a_type_that_json_cannot_carry_is_refused() -> None:
    with pytest.raises(UsageError, match="SCALAR_MAP"):
        typed("c", [{}], "SCALAR_MAP")


@pytest.mark.parametrize("columns", [{"a": [1], "b": []}, {"a": []}])
def test_columns_of_different_lengths_and_no_rows_are_refused(columns: dict[str, list[int]]) -> None:
    with pytest.raises(UsageError, match="equally many"):
        rows_of(columns)


def stream(table: pa.Table, rows: int = 2, **options: Any) -> bytes:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema, options=pa.ipc.IpcWriteOptions(**options)) as writer:
        for batch in table.to_batches(max_chunksize=rows):
            writer.write_batch(batch)
    return sink.getvalue().to_pybytes()


TABLE = pa.table({"id": ["a", "b", "c"], "t": times("t", [1, 2, None]), "n": pa.array([1, None, 3], pa.int32())})


def test_a_stream_of_plain_columns_is_read_whole() -> None:
    assert read_stream(stream(TABLE), 3).equals(TABLE)
    with pytest.raises(TooManyError):
        read_stream(stream(TABLE), 2)


@pytest.mark.parametrize(
    "table",
    [
        pa.table({"x": [[1], [2]]}),
        pa.table({"x": pa.array(["a", "a"]).dictionary_encode()}),
        pa.table({"x": pa.nulls(1000)}),
        pa.table({"x": [{"a": 1}]}),
    ],
    ids=["list", "dictionary", "null", "struct"],
)
def test_columns_that_could_grow_are_refused(table: pa.Table) -> None:
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    with pytest.raises(ArrowError):
        read_stream(sink.getvalue().to_pybytes(), 10**9)


@pytest.mark.parametrize("compression", ["zstd", "lz4"])
def test_a_compressed_stream_is_refused_before_it_is_unpacked(compression: str) -> None:
    bomb = pa.table({"x": pa.repeat(0, 2_000_000)})
    body = stream(bomb, 2_000_000, compression=compression)
    before = pa.total_allocated_bytes()
    with pytest.raises(ArrowError, match="compressed"):
        read_stream(body, 10**9)
    assert pa.total_allocated_bytes() - before < 1_000_000


@pytest.mark.parametrize("text", [b"a name", b"Europe/Paris"])
def test_a_name_or_time_zone_that_is_no_text_is_refused(text: bytes) -> None:
    body = stream(pa.table({"a name": pa.array([0], pa.timestamp("us", "Europe/Paris"))}))
    assert read_stream(body, 10).num_rows == 1
    with pytest.raises(ArrowError):
        read_stream(body.replace(text, b"\xff" + text[1:]), 10)


def test_no_damage_to_a_stream_is_more_than_an_error() -> None:
    whole = stream(TABLE)
    for at in range(0, len(whole), 7):
        for damaged in (
            whole[:at],
            whole[:at] + b"\xff" + whole[at + 1 :],
            whole[:at] + struct.pack("<i", -1) + whole[at:],
        ):
            try:
                table = read_stream(damaged, 1000)
            except UsageError:
                continue
            table.validate(full=True)
