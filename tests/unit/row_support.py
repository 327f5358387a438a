"""A view `rows` with a feature of each plain type, and what the batches of its rows hold."""

from __future__ import annotations

from pathlib import Path

from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig
from feast.types import Bool, Bytes, Float32, Float64, Int32, Int64, String, UnixTimestamp
from feast.value_type import ValueType

from feature_store.redis_batch import Batch
from feature_store.redis_layout import pair_field
from feature_store.write_layout import WriteLayout

TYPES = [Int32, Int64, Float32, Float64, String, Bytes, Bool, UnixTimestamp]
NAMES = [f"f{i}" for i in range(len(TYPES))]


def layout_of_rows(home: Path) -> WriteLayout:
    """Join key `customer_id`, times `at` and `known`."""
    store = FeatureStore(
        config=RepoConfig(
            project="proj",
            provider="local",
            registry=str(home / "registry.db"),
            online_store={"type": "feature_store.online_store.PredictFlowOnlineStore"},
            entity_key_serialization_version=3,
        )
    )
    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = FileSource(name="rows", path="rows.parquet", timestamp_field="at", created_timestamp_column="known")
    schema = [Field(name=n, dtype=kind) for n, kind in zip(NAMES, TYPES, strict=True)]
    view = FeatureView(name="rows", entities=[customer], schema=schema, source=source)
    store.apply([customer, view])
    return WriteLayout(store.config, store.get_feature_view("rows"))


def rows_of(batch: Batch) -> list[tuple[bytes, dict[bytes, bytes]]]:
    """Of each row its key and its hash fields."""
    listed, found = batch.listed(), []
    for key, *parts in zip(listed.keys, *listed.rows, strict=True):
        cells = strings(b"".join(parts))
        assert cells[0] == pair_field("rows")  # the script reads it there
        found.append((key, dict(zip(cells[::2], cells[1::2], strict=True))))
    return found


def strings(data: bytes) -> list[bytes]:
    """The MessagePack strings of a packed row."""
    found, i = [], 0
    while i < len(data):
        size = {0xD9: 1, 0xDA: 2, 0xDB: 4}.get(data[i], 0)
        length = int.from_bytes(data[i + 1 : i + 1 + size], "big") if size else data[i] - 0xA0
        i += 1 + size + length
        found.append(data[i - length : i])
    return found
