"""Feast's face of the online store: `online_store: {type: feature_store.online_store.PredictFlowOnlineStore}`.

Stock Feast's Redis layout, both ways, with what stock lacks: the newest (event time, created) wins atomically, reads
carry true statuses and honour each view's ttl, and windowed views are finalised at read time. See docs/adr/002-redis.md.
"""

from __future__ import annotations

import logging
from asyncio import AbstractEventLoop, get_running_loop
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Literal

from feast.feature_view import DUMMY_ENTITY_ID, DUMMY_ENTITY_VAL
from feast.infra.key_encoding_utils import serialize_entity_key
from feast.infra.online_stores.redis import RedisOnlineStore, RedisOnlineStoreConfig, RedisType
from feast.online_response import OnlineResponse
from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse
from feast.protos.feast.types.EntityKey_pb2 import EntityKey
from feast.protos.feast.types.Value_pb2 import Value
from pydantic import field_validator, model_validator

from feature_store import online_response
from feature_store.apply_hook import guard_apply, record_apply_of_store
from feature_store.clock import CLOCK_MODES, WallClock, replay_clock_key
from feature_store.config_check import require_expanded, with_defaults
from feature_store.erased_entities import ErasedEntities
from feature_store.errors import DataError, UsageError
from feature_store.online_reader import OnlineReader
from feature_store.online_write import OnlineWriter
from feature_store.read_plan import ReadPlan
from feature_store.redis_connection import answering, connect, connect_async, connection_options
from feature_store.redis_delete import DROP_VIEW, Command, keys_of, run_script, scan
from feature_store.redis_layout import feature_field, pair_field, timestamp_field
from feature_store.redis_socket import RedisSocket
from feature_store.redis_stream import RedisStream
from feature_store.redis_wire import Address, address_from
from feature_store.stored_names import stored_name, stored_names
from feature_store.view_plan import UnsupportedOnDemandError
from feature_store.window_write import state_key, watermarks_key
from feature_store.windows.definition import STATE_FIELD
from feature_store.write_layout import shape_of

if TYPE_CHECKING:
    from feast import Entity, FeatureService, FeatureView, RepoConfig
    from feast.infra.registry.base_registry import BaseRegistry

log = logging.getLogger(__name__)

_TYPE = "feature_store.online_store.PredictFlowOnlineStore"
Row = tuple[EntityKey, dict[str, Value], datetime, datetime | None]
_NO_ENTITY = EntityKey(join_keys=[DUMMY_ENTITY_ID], entity_values=[Value(string_val=DUMMY_ENTITY_VAL)])
ReadRow = tuple[datetime | None, dict[str, Value] | None]


class PredictFlowOnlineStoreConfig(RedisOnlineStoreConfig):
    """Section `online_store` of feature_store.yaml.

    `connection_string`: `redis[s]://...`, or Feast's `host:port,db=0,password=...`; `redis_type`: redis (default),
    redis_cluster, or redis_sentinel with `sentinel_master`; these take `host:port,host:port,...`; `clock`: wall (default) or replay;
    `expired_values`: null (default: a value older than its view's ttl is not served), or keep (stock Feast's behaviour);
    `pickled_functions`: refuse (default: on-demand views run the function of the checkout), or run those of the registry.
    """

    type: Literal[_TYPE] = _TYPE  # type: ignore[valid-type]  # Feast wants each store to narrow it
    clock: Literal["wall", "replay"] = "wall"
    expired_values: Literal["null", "keep"] = "null"
    pickled_functions: Literal["refuse", "run"] = "refuse"

    @model_validator(mode="before")
    @classmethod
    def _check(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        require_expanded(values, "online_store")
        values = with_defaults(values)
        if values.get("clock", "wall") not in CLOCK_MODES:
            raise UsageError("online_store.clock is not a clock", value=values["clock"], valid=CLOCK_MODES)
        for option, reason in _REFUSED.items():
            if values.get(option):
                raise UsageError(f"online_store.{option} cannot be used: {reason}", next_step="remove it")
        if values.get("client", "redis") != "redis":
            raise UsageError("online_store.client is not supported", value=values["client"], valid=["redis"])
        guard_apply()
        return values

    @field_validator("expired_values", mode="before")
    @classmethod
    def _unquoted_null(cls, value: Any) -> Any:
        return "null" if value is None else value  # YAML reads an unquoted null as nothing


_REFUSED = {
    "skip_dedup": "an older row could overwrite a newer one",
    "key_ttl_seconds": "it expires all views of an entity at once; a view's own ttl is honoured at read",
}


class PredictFlowOnlineStore(RedisOnlineStore):
    """See the module. Feast makes one per FeatureStore; nothing connects before the first read or write."""

    def __init__(self) -> None:
        self._client_loop: AbstractEventLoop | None = None
        self._plans: dict[Any, tuple[Any, ReadPlan]] = {}
        self._writers: dict[str, tuple[RepoConfig, object, OnlineWriter]] = {}
        self._erased: tuple[RepoConfig, ErasedEntities] | None = None
        self._sockets: dict[str, RedisSocket | None] = {}
        self._streams: dict[str, RedisStream | None] = {}

    # --- connections --------------------------------------------------------------------------------------------------

    def _get_client(self, online_store_config: RedisOnlineStoreConfig) -> Any:
        if self._client is None:
            c = online_store_config
            self._client = connect(c.connection_string, c.redis_type.value, c.sentinel_master)
        return self._client

    async def _get_client_async(self, online_store_config: RedisOnlineStoreConfig) -> Any:
        loop = get_running_loop()
        if self._client_loop is not loop:  # an asyncio client is bound to the loop that first used it
            self._client_async, self._client_loop = None, loop
        if self._client_async is None:
            c = online_store_config
            self._client_async = connect_async(c.connection_string, c.redis_type.value, c.sentinel_master)
        return self._client_async

    # --- writes -------------------------------------------------------------------------------------------------------

    def writer(self, config: RepoConfig, view: FeatureView) -> OnlineWriter:
        """A writer of `view`, kept for as long as its definition stands: Feast makes the view anew for every call."""
        shape = shape_of(view)
        kept = self._writers.get(view.name)
        if kept is None or kept[0] is not config or kept[1] != shape:
            kept = self._writers[view.name] = config, shape, OnlineWriter(self, config, view)
        return kept[2]

    def online_write_batch(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        """Writes rows; of each key the greatest (event time, created) stays, whatever the order of rows and writers.

        A row without `created` counts as known at its event time; of equal pairs the last write stays. Rows of a
        windowed view without a window state are left out and logged, and rows of erased entities. Safe to repeat.
        DataError, before anything is written, for a null join key and for a row dated after the clock; UnavailableError
        when Redis does not answer (rows of earlier batches are then written).
        """
        kept = self.erased(config).without_rows(data)
        # Feast passes no time: a direct write happens now.
        self.writer(config, table).write_rows(kept, wall=WallClock(), progress=progress)

    async def online_write_batch_async(
        self, config: RepoConfig, table: FeatureView, data: list[Row], progress: Callable[[int], Any] | None
    ) -> None:
        """As `online_write_batch`."""
        kept = self.erased(config).without_rows(data)
        await self.writer(config, table).awrite_rows(kept, wall=WallClock(), progress=progress)

    def erased(self, config: RepoConfig) -> ErasedEntities:
        """The erasure list of the project's offline store."""
        if self._erased is None or self._erased[0] is not config:
            self._erased = config, ErasedEntities(config)
        return self._erased[1]

    # --- reads --------------------------------------------------------------------------------------------------------

    def get_online_features(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: list[dict[str, Any]] | Mapping[str, Any],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """Feast's read, with true statuses, ttl and windowed values at the clock; every status but PRESENT has no value."""
        try:
            plan = self._plan(config, registry, project, features, full_feature_names)
        except UnsupportedOnDemandError:
            if config.online_store.pickled_functions != "run":
                raise
            # Feast computes these, from inputs that _read_features_per_fv below reads.
            return super().get_online_features(
                config,
                features,
                entity_rows,
                registry,
                project,
                full_feature_names,
                include_feature_view_version_metadata,
            )
        columns, entities = online_response.entities_of(plan, entity_rows)
        replies, t_us = self._reader(config, plan).fetch(entities)
        return online_response.CellResponse(
            plan, columns, plan.at(replies, t_us, entities)[1], include_feature_view_version_metadata
        )

    async def get_online_features_async(
        self,
        config: RepoConfig,
        features: list[str] | FeatureService,
        entity_rows: list[dict[str, Any]] | Mapping[str, Any],
        registry: BaseRegistry,
        project: str,
        full_feature_names: bool = False,
        include_feature_view_version_metadata: bool = False,
    ) -> OnlineResponse:
        """As `get_online_features`."""
        try:
            plan = self._plan(config, registry, project, features, full_feature_names)
        except UnsupportedOnDemandError:
            if config.online_store.pickled_functions != "run":
                raise
            # Feast computes these, from inputs that _read_features_per_fv below reads.
            return await super().get_online_features_async(
                config,
                features,
                entity_rows,
                registry,
                project,
                full_feature_names,
                include_feature_view_version_metadata,
            )
        columns, entities = online_response.entities_of(plan, entity_rows)
        replies, t_us = await (await self._areader(config, plan)).afetch(entities)
        return online_response.CellResponse(
            plan, columns, plan.at(replies, t_us, entities)[1], include_feature_view_version_metadata
        )

    def _read_features_per_fv(
        self,
        config: RepoConfig,
        grouped_refs: Sequence[tuple[FeatureView, list[str]]],
        join_key_values: dict[str, list[Value]],
        entity_name_to_join_key_map: dict[str, str],  # Feast's signature
        online_features_response: GetOnlineFeaturesResponse,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        plan = ReadPlan.of_views(config, config.project, grouped_refs, full_feature_names)
        _, entities = online_response.entities_of(plan, join_key_values)
        replies, t_us = self._reader(config, plan).fetch(entities)
        online_response.fill(
            online_features_response, plan, plan.at(replies, t_us, entities)[1], include_feature_view_version_metadata
        )

    async def _read_features_per_fv_async(
        self,
        config: RepoConfig,
        grouped_refs: Sequence[tuple[FeatureView, list[str]]],
        join_key_values: dict[str, list[Value]],
        entity_name_to_join_key_map: dict[str, str],  # Feast's signature
        online_features_response: GetOnlineFeaturesResponse,
        full_feature_names: bool,
        include_feature_view_version_metadata: bool,
    ) -> None:
        plan = ReadPlan.of_views(config, config.project, grouped_refs, full_feature_names)
        _, entities = online_response.entities_of(plan, join_key_values)
        replies, t_us = await (await self._areader(config, plan)).afetch(entities)
        online_response.fill(
            online_features_response, plan, plan.at(replies, t_us, entities)[1], include_feature_view_version_metadata
        )

    def online_read(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[ReadRow]:
        """Feast's read of one view: (event time, values); (None, None) where nothing was ever written.

        Values as `get_online_features` gives them; an expired one is empty, `window_state` comes as stored.
        """
        plan, requests = _plan_of_keys(config, table, entity_keys, requested_features)
        replies, t_us = self._reader(config, plan).fetch_keys(requests)
        return online_response.read_rows(plan, plan.at(replies, t_us)[1])

    async def online_read_async(
        self,
        config: RepoConfig,
        table: FeatureView,
        entity_keys: list[EntityKey],
        requested_features: list[str] | None = None,
    ) -> list[ReadRow]:
        """As `online_read`."""
        plan, requests = _plan_of_keys(config, table, entity_keys, requested_features)
        replies, t_us = await (await self._areader(config, plan)).afetch_keys(requests)
        return online_response.read_rows(plan, plan.at(replies, t_us)[1])

    def _reader(self, config: RepoConfig, plan: ReadPlan) -> OnlineReader:
        redis: Any = self._direct(config.online_store, self._sockets, RedisSocket)
        if redis is None:
            redis = self._get_client(config.online_store)
        return OnlineReader(plan, redis, plan.project, config.online_store.clock)

    async def _areader(self, config: RepoConfig, plan: ReadPlan) -> OnlineReader:
        redis: Any = self._direct(config.online_store, self._streams, RedisStream)
        if redis is None:
            redis = await self._get_client_async(config.online_store)
        return OnlineReader(plan, redis, plan.project, config.online_store.clock)

    @staticmethod
    def _direct(config: RedisOnlineStoreConfig, made: dict[str, Any], kind: Callable[[Address], Any]) -> Any:
        """Our own client of a single server; None for a cluster, a sentinel or an option it does not know."""
        if config.redis_type != RedisType.redis:
            return None
        text = config.connection_string
        if text not in made:
            address = address_from(connection_options(text))
            made[text] = None if address is None else kind(address)
        return made[text]

    def _plan(
        self,
        config: RepoConfig,
        registry: BaseRegistry,
        project: str,
        features: list[str] | FeatureService,
        full_feature_names: bool,
    ) -> ReadPlan:
        """The compiled plan, kept until the registry's cache is refreshed."""
        # A service is told from a list of one reference by its second element.
        asked = tuple(features) if isinstance(features, list) else (features.name, None)
        version = getattr(registry, "cached_registry_proto_created", None)
        key = (asked, project, full_feature_names)
        fresh = version is not None and registry.is_cache_valid()
        kept = self._plans.get(key)
        if fresh and kept is not None and kept[0] == version:
            return kept[1]
        plan = ReadPlan.of_registry(config, registry, project, features, full_feature_names)
        if fresh:
            if len(self._plans) >= 256:
                self._plans.clear()
            self._plans[key] = (version, plan)
        return plan

    # --- what `feast apply` and `feast teardown` change ---------------------------------------------------------------

    def update(
        self,
        config: RepoConfig,
        tables_to_delete: Sequence[FeatureView],
        tables_to_keep: Sequence[FeatureView],
        entities_to_delete: Sequence[Entity],
        entities_to_keep: Sequence[Entity],
        partial: bool,
    ) -> None:
        """The top of `feast apply`: removes dropped views from Redis, registers features and lineage in the catalogue.

        DefinitionError for features that would share a hash field, before anything changes. Safe to repeat.
        """
        # Feast passes no time; an apply happens when a person runs it, whatever clock the data follows.
        record_apply_of_store(config, tables_to_keep, WallClock().now(), deleted_views=tables_to_delete)
        super().update(config, tables_to_delete, tables_to_keep, entities_to_delete, entities_to_keep, partial)

    def teardown(self, config: RepoConfig, tables: Sequence[FeatureView], entities: Sequence[Entity]) -> None:
        """Removes all of this project from Redis: every entity of `tables`, what windowed views keep beside them, and the
        replay clock. Safe to repeat."""
        names = [name for t in tables for name in stored_names(config, t)]
        client = self._get_client(config.online_store)
        with answering(client):
            for name in names:
                client.delete(state_key(config.project, name))  # first, as in `delete_table`
        super().teardown(config, tables, entities)
        with answering(client):
            for name in names:
                client.delete(watermarks_key(config.project, name))
            client.delete(replay_clock_key(config.project))

    def delete_table(self, config: RepoConfig, table: FeatureView) -> None:
        """Removes one view, all its versions, from every entity of this project, and what a windowed view keeps beside them.
        Safe to repeat and beside writers of other views. Of a version with other features its times go, not each value."""
        self._delete(config, table, stored_names(config, table))

    def delete_version(self, config: RepoConfig, table: FeatureView) -> None:
        """As `delete_table`, of the version at hand alone."""
        self._delete(config, table, [stored_name(config, table)])

    def _delete(self, config: RepoConfig, table: FeatureView, versions: Sequence[str]) -> None:
        names = dict.fromkeys([*(f.name for f in table.features), STATE_FIELD])
        fields = [
            f for v in versions for f in (timestamp_field(v), pair_field(v), *(feature_field(v, n) for n in names))
        ]
        client = self._get_client(config.online_store)
        with answering(client):
            # First: whoever reads or writes half of it must notice, and so must a sync of the view once it is applied again.
            for version in versions:
                client.delete(state_key(config.project, version))
        keys = keys_of(client, config.project, table.join_keys or [DUMMY_ENTITY_ID])
        for _ in run_script(client, DROP_VIEW, (Command(key, fields) for key in keys)):
            pass
        with answering(client):
            for version in versions:
                client.delete(watermarks_key(config.project, version))

    def delete_entity_values(self, config: RepoConfig, join_keys: list[str]) -> None:
        """Removes every view of every entity with these join keys, of this project only. Safe to repeat."""
        client = self._get_client(config.online_store)
        with answering(client):
            for key in keys_of(client, config.project, join_keys or [DUMMY_ENTITY_ID]):
                client.unlink(key)

    def scan(self, client: Any, project: str) -> Iterator[bytes]:
        """Every key whose bytes end in `project`, on all primaries of a Cluster too; a key may come twice."""
        return scan(client, project)


def _key(config: RepoConfig, table: FeatureView, entity_key: EntityKey) -> bytes:
    """The Redis key. Feast's write API leaves out the constant key of an entity-less view under which Feast reads it."""
    try:
        return serialize_entity_key(entity_key if entity_key.join_keys else _NO_ENTITY, 3) + config.project.encode()
    except ValueError as e:
        parts = zip(entity_key.join_keys, entity_key.entity_values)
        shown = ", ".join(f"{name}: {value.WhichOneof('val') or 'null'}" for name, value in parts)
        raise DataError(f"{table.name}: this entity key cannot be kept online", value=shown) from e


def _plan_of_keys(
    config: RepoConfig, table: FeatureView, entity_keys: list[EntityKey], names: list[str] | None
) -> tuple[ReadPlan, list[tuple[bytes, list[bytes]]]]:
    plan = ReadPlan.of_views(config, config.project, [(table, names or [f.name for f in table.features])])
    (view,) = plan.view_plans
    return plan, [(_key(config, table, key), view.fields) for key in entity_keys]
