"""Names our offline store to Feast's own test-suite, which imports this module as FULL_REPO_CONFIGS_MODULE."""

from __future__ import annotations

from tests.universal.feature_repos.universal.data_sources.file import FileDataSourceCreator

from feature_store.offline_store import PredictFlowOfflineStoreConfig


class PredictFlowDataSourceCreator(FileDataSourceCreator):
    """Feast's own Parquet files, read by our store."""

    def create_offline_store_config(self) -> PredictFlowOfflineStoreConfig:
        return PredictFlowOfflineStoreConfig(threads=2)


AVAILABLE_OFFLINE_STORES = [("local", PredictFlowDataSourceCreator)]
AVAILABLE_ONLINE_STORES = {"sqlite": ({"type": "sqlite"}, None)}
