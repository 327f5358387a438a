"""The erasure list of a project's offline store, for rows that somebody writes: those of an erased entity go nowhere."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from feature_store.erasure_list import ErasureList, digest_of

if TYPE_CHECKING:
    import pyarrow as pa
    from feast import RepoConfig
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    from feature_store.few_proto_rows import Row


class ErasedEntities:
    """The list, read again when it changed; nothing where the project has no such list. DataError: one that cannot be read."""

    def __init__(self, config: RepoConfig) -> None:
        from feature_store.point_in_time.source import is_uri, resolve

        place = resolve(config, "")
        ours = config.offline_store.type.endswith("PredictFlowOfflineStore")
        self._list = ErasureList(place) if ours and not is_uri(place) else None
        self._seen: tuple[tuple[int, ...] | None, dict[str, set[str]]] = (None, {})

    def without(self, join_keys: Iterable[str], table: pa.Table) -> pa.Table:
        """`table` without the rows of erased entities; a join key that it lacks is looked for in vain."""
        import pyarrow as pa

        digests = self._digests()
        listed_keys = digests.keys() & set(join_keys) & set(table.column_names) if digests else ()
        columns = [(key, digests[key], table.column(key).to_pylist()) for key in listed_keys]
        if not columns:
            return table
        kept = [
            all(digest_of(key, values[i]) not in listed for key, listed, values in columns)
            for i in range(table.num_rows)
        ]
        return table.filter(pa.array(kept, pa.bool_()))

    def without_rows(self, rows: Sequence[Row]) -> Sequence[Row]:
        """The same of rows as Feast's provider hands them over. Without a list it costs a look at the file."""
        digests = self._digests()
        return [row for row in rows if not _is_listed(row[0], digests)] if digests else rows

    def _digests(self) -> dict[str, set[str]]:
        if self._list is None:
            return {}
        changed = self._list.changed()  # before the entries: a list that changes now is read again next time
        seen, digests = self._seen
        if changed != seen:
            digests = {}
            for entry in self._list.entries():
                digests.setdefault(entry.join_key, set()).add(entry.sha256)
            self._seen = (changed, digests)
        return digests


def _is_listed(key: EntityKey, digests: dict[str, set[str]]) -> bool:
    return any(
        digest_of(name, getattr(value, value.WhichOneof("val") or "", None)) in digests[name]
        for name, value in zip(key.join_keys, key.entity_values, strict=False)
        if name in digests
    )
