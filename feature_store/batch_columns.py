"""Columns of a batch as numpy arrays, and its entities by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from feature_store.logged import Bools, Ints

Key = tuple[str | int, ...]
"""An entity: the values of its join keys, in the definition's order."""


def entities_of(rows: pa.Table, names: Sequence[str]) -> tuple[list[Key], Ints]:
    """The distinct keys of rows, and the number of each row's key among them."""
    codes, values = coded(rows[names[0]])
    keys: list[Key] = [(v,) for v in values]
    for name in names[1:]:
        more, others = coded(rows[name])
        pairs, codes = np.unique(codes * max(len(others), 1) + more, return_inverse=True)
        keys = [(*keys[pair // len(others)], others[pair % len(others)]) for pair in pairs.tolist()]
    return keys, codes.astype(np.int64)


def coded(column: pa.ChunkedArray) -> tuple[Ints, list[Any]]:
    """The number of each row's value, and the values."""
    whole = pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    found = whole.dictionary_encode()
    return found.indices.to_numpy().astype(np.int64), found.dictionary.to_pylist()


def int64_of(column: pa.ChunkedArray) -> Ints:
    """Integers, or times in their own unit; 0 for null."""
    return np.asarray(pc.fill_null(column.cast(pa.int64()), 0).to_numpy())


def valid_of(column: pa.ChunkedArray) -> Bools:
    """Which rows are not null."""
    return np.asarray(column.is_valid().to_numpy())
