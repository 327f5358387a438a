"""Which rows of a batch are of entities on the erasure list: those go nowhere, whatever the topic still holds of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from feature_store.batch_columns import coded
from feature_store.erasure_list import ErasureList, digest_of
from feature_store.logged import Bools


class ErasedRows:
    """The erasure list of an offline store, for rows with these join keys; read again when it has changed."""

    def __init__(self, offline_path: str, join_keys: Sequence[str]) -> None:
        self._list = ErasureList(offline_path)
        self._join_keys = join_keys
        self._read: tuple[int, ...] | None = None
        self._digests: list[tuple[str, frozenset[str]]] = []

    def of(self, rows: pa.Table) -> Bools:
        """Which rows are erased entities'. DataError: a list that cannot be read."""
        now = self._list.changed()
        if now != self._read:
            listed = [(k, self._list.digests_of(k)) for k in self._join_keys]
            self._digests = [of_key for of_key in listed if of_key[1]]
            self._read = now
        erased = np.zeros(rows.num_rows, bool)
        for join_key, digests in self._digests:
            codes, values = coded(rows[join_key])
            listed_values = np.array([digest_of(join_key, v) in digests for v in values], bool)
            if listed_values.any():
                erased |= listed_values[codes]
        return erased
