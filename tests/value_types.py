"""Every Feast value type that can be written, with values to draw and the Arrow type that carries them."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any

import pyarrow as pa
from feast import ValueType
from hypothesis import strategies as st

INT32 = st.integers(-(2**31), 2**31 - 1)
INT64 = st.integers(-(2**63), 2**63 - 1)
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)
TIME = st.datetimes(datetime(1970, 1, 2), datetime(2200, 1, 1), timezones=st.just(UTC)).map(
    lambda t: t.replace(microsecond=0)
)
_UTC = pa.timestamp("us", "UTC")
# A column of nothing but empty bytes is null to Feast, beside any other value it is not; to us it never is.
_BYTES = st.binary(min_size=1, max_size=300)
SCALARS: dict[ValueType, tuple[st.SearchStrategy[Any], pa.DataType]] = {
    ValueType.BYTES: (_BYTES, pa.binary()),
    ValueType.PDF_BYTES: (_BYTES, pa.binary()),
    ValueType.IMAGE_BYTES: (_BYTES, pa.binary()),
    ValueType.STRING: (TEXT, pa.string()),
    ValueType.INT32: (INT32, pa.int32()),
    ValueType.INT64: (INT64, pa.int64()),
    ValueType.DOUBLE: (st.floats(allow_nan=False), pa.float64()),
    ValueType.FLOAT: (st.floats(width=32, allow_nan=False), pa.float32()),
    ValueType.BOOL: (st.booleans(), pa.bool_()),
    ValueType.UNIX_TIMESTAMP: (TIME, _UTC),
    ValueType.ZONED_TIMESTAMP: (TIME, _UTC),
    ValueType.UUID: (st.uuids().map(str), pa.string()),
    ValueType.TIME_UUID: (st.uuids().map(str), pa.string()),
    ValueType.DECIMAL: (st.decimals(-(10**9), 10**9, places=4, allow_nan=False), pa.decimal128(20, 4)),
    ValueType.JSON: (st.dictionaries(TEXT, INT32, max_size=3).map(json.dumps), pa.string()),
    ValueType.STRUCT: (st.fixed_dictionaries({"a": INT64, "b": TEXT}), pa.struct({"a": pa.int64(), "b": pa.string()})),
    ValueType.MAP: (st.fixed_dictionaries({"a": INT64, "b": TEXT}), pa.struct({"a": pa.int64(), "b": pa.string()})),
}
_ELEMENTS = {
    "BYTES": (st.binary(max_size=40), pa.binary()),
    "STRING": (TEXT, pa.string()),
    "INT32": (INT32, pa.int32()),
    "INT64": (INT64, pa.int64()),
    "DOUBLE": (st.floats(allow_nan=False), pa.float64()),
    "FLOAT": (st.floats(width=32, allow_nan=False), pa.float32()),
    "BOOL": (st.booleans(), pa.bool_()),
    "UNIX_TIMESTAMP": (TIME, _UTC),
    "UUID": (st.uuids().map(str), pa.string()),
    "DECIMAL": (st.decimals(-(10**9), 10**9, places=4, allow_nan=False).map(Decimal), pa.decimal128(20, 4)),
}
LISTS = {
    ValueType[f"{name}_LIST"]: (st.lists(strategy, max_size=5), pa.list_(arrow))
    for name, (strategy, arrow) in _ELEMENTS.items()
}
LISTS[ValueType.MAP_LIST] = (
    st.lists(st.fixed_dictionaries({"a": INT64}), max_size=3),
    pa.list_(pa.struct({"a": pa.int64()})),
)
SETS = {
    ValueType[f"{name}_SET"]: (st.lists(strategy, max_size=1), pa.list_(arrow))  # the order of more is Python's own
    for name, (strategy, arrow) in _ELEMENTS.items()
}
COLUMNS = {**SCALARS, **LISTS, **SETS}
