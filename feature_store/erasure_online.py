"""Erases one entity from the online store: its rows of every view and its windowed state, one hash per entity key."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from feature_store.errors import UsageError
from feature_store.redis_connection import answering
from feature_store.redis_delete import keys_of
from feature_store.without_functions import stored_views

if TYPE_CHECKING:
    from feast import Entity, FeatureStore
    from feast.protos.feast.types.Value_pb2 import Value


def erase_online(store: FeatureStore, entity: Entity, value: str, dry_run: bool) -> int:
    """Removes every Redis key of the entity, alone or in a composite key; how many there were. Safe to repeat.

    UsageError where the online store is not ours, or the value is not of the entity's type; UnavailableError: no Redis.
    """
    from feature_store.online_store import PredictFlowOnlineStore

    online = store._get_provider().online_store
    if not isinstance(online, PredictFlowOnlineStore):
        raise UsageError("only PredictFlow's online store can be erased from", value=type(online).__name__)
    client = online._get_client(store.config.online_store)
    with answering(client):
        found = list(_keys(store, client, entity, value))
        if dry_run:
            return int(sum(client.exists(key) for key in found))
        return int(sum(client.unlink(key) for key in found))


def _keys(store: FeatureStore, client: Any, entity: Entity, value: str) -> Iterator[bytes]:
    from feast.infra.key_encoding_utils import deserialize_entity_key, serialize_entity_key
    from feast.protos.feast.types.EntityKey_pb2 import EntityKey

    project = store.config.project
    views = stored_views(store.registry, project)
    for join_keys in sorted({tuple(sorted(v.join_keys)) for v in views}):
        if join_keys == (entity.join_key,):
            proto = EntityKey(join_keys=[entity.join_key], entity_values=[_value(entity, value)])
            yield serialize_entity_key(proto, 3) + project.encode()
        elif entity.join_key in join_keys:
            for key in keys_of(client, project, join_keys):
                parsed = deserialize_entity_key(key[: -len(project.encode())], 3)
                part = parsed.entity_values[list(parsed.join_keys).index(entity.join_key)]
                if _spelled(getattr(part, part.WhichOneof("val")), value):
                    yield key


def _spelled(held: object, value: str) -> bool:
    """Whether `value` is this key: `01` is 1 where keys are whole numbers, and itself where they are text."""
    if not isinstance(held, int):
        return str(held) == value
    try:
        return held == int(value)
    except ValueError:
        return False


def _value(entity: Entity, value: str) -> Value:
    from feast.protos.feast.types.Value_pb2 import Value

    name = entity.value_type.name
    try:
        if name == "STRING":
            return Value(string_val=value)
        if name == "INT32":
            return Value(int32_val=int(value))
        if name == "INT64":
            return Value(int64_val=int(value))
    except ValueError as e:
        raise UsageError(f"entity {entity.name} has whole numbers as keys", value=value) from e
    raise UsageError(f"entity {entity.name}: keys of this type cannot be erased online yet", value=name)
