"""Columns of a request as an Arrow table in a feature view's declared types. Strict: nothing is guessed or rounded.

int64 and floats as JSON numbers (NaN and infinities as the strings of `serving.encoding`), bytes as base64, times as ISO
8601 or epoch seconds, maps, structs and nested lists as JSON or as a JSON text, lists and sets as arrays. What JSON has no
type for may also be given as what it is (bytes, aware or UTC datetimes, UUIDs, Decimals, sets): gRPC knows these.
"""

from __future__ import annotations

import base64
import binascii
import json
import math
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from feature_store.clock import EPOCH
from feature_store.errors import UsageError
from serving.schemas import At

if TYPE_CHECKING:
    import pyarrow as pa

JSON_TEXT = ("MAP", "MAP_LIST", "STRUCT", "STRUCT_LIST", "JSON", "VALUE_LIST", "VALUE_SET")
"""Feast types whose values are kept as JSON text in a string column."""
_TIME = TypeAdapter(At)
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_FLOAT_MAX = 3.4028235677973366e38
"""What is smaller rounds to a finite Float32."""


class ColumnError(UsageError):
    """A value that does not fit its column's declared type."""

    code = "column"


def rows_of(columns: Mapping[str, Sequence[object]]) -> int:
    """How many rows the columns have; UsageError when they differ or there is none."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) != 1 or not next(iter(lengths.values())):
        raise UsageError("columns must hold at least one row, and equally many each", value=lengths)
    return next(iter(lengths.values()))


def typed(name: str, values: Sequence[object], kind: str) -> pa.Array:
    """One column of Feast's value type `kind` (`INT64`, `STRING_LIST`, ...); null stays null. ColumnError for a value
    that is of another type or out of range, naming its row.
    """
    import pyarrow as pa

    convert, arrow = _converter(name, kind)
    return pa.array(_converted(name, values, kind, convert), arrow)


def python_values(name: str, values: Sequence[object], kind: str) -> list[Any]:
    """As `typed`, as Python's own values."""
    return _converted(name, values, kind, _converter(name, kind)[0])


def _converted(name: str, values: Sequence[object], kind: str, convert: Callable[[Any], Any]) -> list[Any]:
    out = []
    for i, value in enumerate(values):
        try:
            out.append(None if value is None else convert(value))
        except (TypeError, ValueError, InvalidOperation, OverflowError) as e:
            shown = value if len(str(value)) <= 80 else f"{str(value)[:80]}..."
            raise ColumnError(f"column {name}, row {i}: not a value of type {kind}", value=shown) from e
    return out


def times(name: str, values: Sequence[object]) -> pa.Array:
    """A column of times, timestamp[us, UTC]; null stays null."""
    return typed(name, values, "UNIX_TIMESTAMP")


def _converter(name: str, kind: str) -> tuple[Callable[[Any], Any], pa.DataType]:
    import pyarrow as pa

    if kind in JSON_TEXT:
        return _json_text(kind), pa.string()
    if kind == "JSON_LIST":
        text = _json_text("JSON")
        return lambda v: [text(x) for x in _list(v)], pa.list_(pa.string())
    scalar = kind.removesuffix("_LIST").removesuffix("_SET")
    found = _scalars().get(scalar)
    if found is None:
        raise UsageError(f"column {name}: values of this type cannot be sent as JSON", value=kind)
    convert, arrow = found
    if scalar == kind:
        return convert, arrow
    return lambda v: [convert(x) for x in _list(v)], pa.list_(arrow)


def _scalars() -> dict[str, tuple[Callable[[Any], Any], pa.DataType]]:
    import pyarrow as pa

    return {
        "STRING": (_string, pa.string()),
        "BYTES": (_bytes, pa.binary()),
        "PDF_BYTES": (_bytes, pa.binary()),
        "IMAGE_BYTES": (_bytes, pa.binary()),
        "INT32": (_integer(32), pa.int32()),
        "INT64": (_integer(64), pa.int64()),
        "FLOAT": (_float32, pa.float32()),
        "DOUBLE": (_float64, pa.float64()),
        "BOOL": (_bool, pa.bool_()),
        "UNIX_TIMESTAMP": (_time, pa.timestamp("us", "UTC")),
        "UUID": (_uuid, pa.string()),
        "TIME_UUID": (_uuid, pa.string()),
        "DECIMAL": (_decimal, pa.string()),
    }


def _string(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError
    value.encode()  # a lone surrogate is no text that could be stored
    return value


def _bytes(value: Any) -> bytes:
    if isinstance(value, bytes):
        return value
    try:
        return base64.b64decode(_string(value), validate=True)
    except binascii.Error as e:
        raise ValueError from e


def _integer(bits: int) -> Callable[[Any], int]:
    def convert(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or not -(2 ** (bits - 1)) <= value < 2 ** (bits - 1):
            raise TypeError
        return value

    return convert


def _float64(value: Any) -> float:
    if isinstance(value, str):
        if value not in _NOT_FINITE:
            raise ValueError
        return _NOT_FINITE[value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError
    return float(value)


def _float32(value: Any) -> float:
    number = _float64(value)
    if math.isfinite(number) and abs(number) >= _FLOAT_MAX:
        raise OverflowError
    return number


def _bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _time(value: Any) -> datetime:
    if isinstance(value, datetime):
        return (value if value.tzinfo else value.replace(tzinfo=UTC)).astimezone(UTC)
    if isinstance(value, int) and not isinstance(value, bool):
        return EPOCH + timedelta(seconds=value)
    try:
        return _TIME.validate_python(value).astimezone(UTC)
    except ValidationError as e:
        raise ValueError from e


def _uuid(value: Any) -> str:
    return str(value if isinstance(value, uuid.UUID) else uuid.UUID(_string(value)))


def _decimal(value: Any) -> str:
    number = value if isinstance(value, Decimal) else Decimal(_string(value))
    if not number.is_finite():
        raise ValueError
    return str(number)


def _json_text(kind: str) -> Callable[[Any], str]:
    shape = {"MAP": dict, "STRUCT": dict, "JSON": object}.get(kind, list)

    def convert(value: Any) -> str:
        parsed = json.loads(value) if isinstance(value, str) else value
        if not isinstance(parsed, shape):
            raise TypeError
        return value if isinstance(value, str) else json.dumps(value)

    return convert


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list | set) or any(v is None for v in value):
        raise TypeError
    return list(value)
