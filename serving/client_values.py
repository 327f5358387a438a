"""What a caller of the Python client may give as a column: values of Python, numpy, pandas and Arrow, as Python's own.

Nothing heavy is imported for it: what is numpy's or pandas' is seen by its attributes.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import NoneType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from feature_store.errors import UsageError

if TYPE_CHECKING:
    import pyarrow as pa

_SAME = frozenset((NoneType, str, int, float, bool, bytes, datetime))
_NO_FLOATS = frozenset((NoneType, str, int, bool, bytes, datetime))
_NUMBERS = frozenset((NoneType, int, float))
_TAKEN = "numbers, texts, booleans, bytes, datetimes or lists of them, and None where there is no value"


def python_columns(given: Mapping[str, Iterable[object]], *, keys: bool = False) -> dict[str, list[object]]:
    """`{name: values}` or a data frame as lists of Python values; NaT and pandas' NA are None.

    NaN is None in join keys (`keys`) and beside what is no number: there it is pandas' mark of a missing value. Among
    numbers it is a value. UsageError names the column and type of what cannot be sent.
    """
    if not hasattr(given, "items"):
        raise UsageError("not columns", value=_name(given), next_step="pass {name: [values]}, or a data frame")
    return {str(name): _column(str(name), values, keys) for name, values in given.items()}


def require_equal_lengths(columns: Mapping[str, Any]) -> None:
    """UsageError when the columns hold different numbers of rows."""
    lengths = {name: len(values) for name, values in columns.items()}
    if len(set(lengths.values())) > 1:
        raise UsageError("columns must hold equally many rows", value=lengths)


def arrow_stream(entities: Any) -> bytes:
    """An Arrow table, a data frame or columns as an Arrow stream of plain columns. UsageError for what cannot be one."""
    import pyarrow as pa

    if isinstance(entities, pa.Table):
        table = entities
    elif isinstance(entities, Mapping):
        arrays = {str(name): _array(str(name), values) for name, values in entities.items()}
        require_equal_lengths(arrays)
        table = pa.table(arrays)
    elif hasattr(entities, "columns") and hasattr(entities, "dtypes") and hasattr(entities, "iloc"):
        try:
            table = pa.Table.from_pandas(entities, preserve_index=False)
        except (pa.ArrowException, TypeError, ValueError) as e:
            raise UsageError(
                f"the data frame cannot be sent ({' '.join(map(str, e.args))})", next_step=f"pass {_TAKEN}"
            ) from e
    else:
        raise UsageError(
            "not entity rows", value=_name(entities), next_step="pass an Arrow table, a data frame or columns"
        )
    for i, column in enumerate(table.schema):
        if pa.types.is_dictionary(column.type):  # pandas' categories; the server takes plain columns only
            table = table.set_column(i, column.name, table.column(i).cast(column.type.value_type))
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return sink.getvalue()


def _column(name: str, values: Any, keys: bool) -> list[object]:
    given = _values(name, values)
    types = set(map(type, given))
    if types <= _NO_FLOATS or (types <= _NUMBERS and not keys):
        return given
    out = [_python(name, value) for value in given]
    if keys or not set(map(type, out)) <= _NUMBERS:
        out = [None if isinstance(value, float) and value != value else value for value in out]
    return out


def _values(name: str, values: Any) -> list[Any]:
    if hasattr(values, "to_pylist"):
        values = values.to_pylist()
    try:
        if not isinstance(values, str | bytes | bytearray | memoryview | Mapping | set | frozenset):
            return list(values)
    except TypeError:  # not iterable, as also an array without dimensions
        pass
    raise UsageError(
        f"column {name}: not a list of values", value=_name(values), next_step="pass a list, one value per row"
    )


def _array(name: str, values: Any) -> pa.Array | pa.ChunkedArray:
    """A column of historical rows. Times keep their nanoseconds where numpy or pandas hold them."""
    import pyarrow as pa

    if isinstance(values, pa.Array | pa.ChunkedArray):
        return values
    given = values if hasattr(values, "dtype") and getattr(values, "ndim", 0) == 1 else _values(name, values)
    try:
        return pa.array(given)
    except (pa.ArrowException, TypeError, ValueError):  # what pyarrow does not know, such as NA
        given = _column(name, values, False)
    try:
        return pa.array(given)
    except (pa.ArrowException, TypeError, ValueError) as e:
        types = sorted({_name(value) for value in given if value is not None})
        raise UsageError(
            f"column {name}: not values of one type", value=types, next_step="give the column one type"
        ) from e


def _python(name: str, value: Any) -> Any:
    kind = type(value)
    if kind in _SAME:
        return value
    if kind.__name__ in ("NAType", "NaTType") and kind.__module__.startswith("pandas"):
        return None
    if hasattr(value, "dtype"):
        return _numpy(name, value)
    if hasattr(value, "as_py"):
        return _python(name, value.as_py())
    if isinstance(value, str | int | float | bytes | datetime | UUID | Decimal):
        return value
    if isinstance(value, bytearray | memoryview):
        return bytes(value)
    if isinstance(value, Mapping):
        return {key: _python(name, held) for key, held in value.items()}
    if isinstance(value, list | tuple):
        return [_python(name, held) for held in value]
    if isinstance(value, set | frozenset):
        return {_python(name, held) for held in value}
    raise _refused(name, value)


def _numpy(name: str, value: Any) -> Any:
    """A numpy scalar as Python's; an array or a Series, here one value of a column, as a list."""
    if getattr(value, "ndim", 0):
        return [_python(name, held) for held in value]
    if value.dtype.kind == "M":
        if value != value:
            return None
        found = value.astype("datetime64[us]").item()  # towards the past, as the server cuts digits
        if not isinstance(found, datetime):
            raise _refused(name, value)
        return found.replace(tzinfo=UTC)
    found = value.item()
    if type(found) not in _SAME or value.dtype.kind == "m":
        raise _refused(name, value)
    return found


def _refused(name: str, value: object) -> UsageError:
    step = f"pass {_TAKEN}"
    if isinstance(value, date):
        step = "pass a datetime (UTC where it has no timezone)"
    elif isinstance(value, time | timedelta) or getattr(getattr(value, "dtype", None), "kind", "") == "m":
        step = "pass a number, for example of seconds"
    return UsageError(f"column {name}: a value of type {_name(value)} cannot be sent", value=value, next_step=step)


def _name(value: object) -> str:
    kind = type(value)
    return kind.__name__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__name__}"
