"""Features in the client by their declared types: the JSON of a REST answer as the values that gRPC gives, and pandas' dtypes.

JSON has no floats but the finite ones, no times, bytes, UUIDs, decimals or sets: see `serving.encoding`.
"""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from uuid import UUID

if TYPE_CHECKING:
    import pandas as pd


def _same(value: Any) -> Any:
    return value


def _bytes(value: str) -> bytes:
    return base64.b64decode(value, validate=True)


_SCALARS: dict[str, Callable[[Any], Any]] = {
    "STRING": _same,
    "INT32": _same,
    "INT64": _same,
    "BOOL": _same,
    "FLOAT": float,
    "DOUBLE": float,
    "BYTES": _bytes,
    "PDF_BYTES": _bytes,
    "IMAGE_BYTES": _bytes,
    "UNIX_TIMESTAMP": datetime.fromisoformat,
    "ZONED_TIMESTAMP": datetime.fromisoformat,
    "UUID": UUID,
    "TIME_UUID": UUID,
    "DECIMAL": Decimal,
}
_DTYPES = {
    "FLOAT": ("float64", "float64"),
    "DOUBLE": ("float64", "float64"),
    "INT32": ("int64", "Int64"),
    "INT64": ("int64", "Int64"),
    "BOOL": ("bool", "boolean"),
    "UNIX_TIMESTAMP": ("datetime64[us, UTC]", "datetime64[us, UTC]"),
}
"""Of a column without nulls, and with some."""


def decode(rows: Sequence[dict[str, Any]], types: Iterable[tuple[str, str]]) -> None:
    """The values of (feature, Feast value type) in `rows`, in place. Null and what JSON has a type for stays, and so do
    maps, structs, JSON and nested lists. TypeError, ValueError or ArithmeticError for what is not of its type."""
    for name, kind in types:
        convert = _converter(kind)
        if convert is not _same:
            for values in rows:
                if values.get(name) is not None:
                    values[name] = convert(values[name])


def _converter(kind: str) -> Callable[[Any], Any]:
    if kind in _SCALARS:
        return _SCALARS[kind]
    item, _, many = kind.rpartition("_")
    one = _SCALARS.get(item, _same)
    if many == "SET" and item in _SCALARS:
        return lambda held: {None if value is None else one(value) for value in held}
    if many == "LIST" and one is not _same:
        return lambda held: [None if value is None else one(value) for value in held]
    return _same


def frame(rows: Sequence[Mapping[str, Any]], types: Iterable[tuple[str, str]]) -> pd.DataFrame:
    """`rows`, the columns of known types in dtypes for these; what the others hold is left to pandas."""
    import pandas as pd

    made = pd.DataFrame(rows, dtype=object)
    wanted = {}
    for name, kind in types:
        if kind in _DTYPES and name in made:
            whole, with_nulls = _DTYPES[kind]
            wanted[name] = with_nulls if made[name].isna().any() else whole
    return made.astype(wanted).infer_objects()
