"""Names our online store to Feast's own test-suite, which imports this module as FULL_REPO_CONFIGS_MODULE.

It goes by the name that the tests ask for: `redis`, or `sqlite` for those of value types. Each environment gets a private Redis.
"""

from __future__ import annotations

import atexit
import os
import tempfile
from pathlib import Path
from typing import Any

from tests.universal.feature_repos.universal.data_sources.file import FileDataSourceCreator
from tests.universal.feature_repos.universal.online_store_creator import OnlineStoreCreator

from predictflow.local import redis
from predictflow.local.ports import HOST, free_port
from predictflow.local.watched import Watched


class PredictFlowOnlineStoreCreator(OnlineStoreCreator):
    """Our store on a Redis of its own.

    `expired_values: keep`: some tests write rows older than their view's ttl and expect them back, as stock Feast does.
    `pickled_functions: run`: the suite applies on-demand views that no feature repository defines.
    """

    def create_online_store(self) -> dict[str, Any]:
        # Several tests pass without looking when this says that no server is to be had; here is one. Not at import: it
        # would have the suite load the drivers of clouds.
        os.environ["FEAST_IS_LOCAL_TEST"] = "False"
        self._watched = Watched()
        atexit.register(self._watched.close)
        home = Path(tempfile.mkdtemp(prefix="redis-", dir=os.environ["PREDICTFLOW_UNIVERSAL_HOME"]))
        port = free_port()
        redis.start(self._watched, home, port, home / "redis.log", durable=False)
        return {
            "type": "feature_store.online_store.PredictFlowOnlineStore",
            "connection_string": f"redis://{HOST}:{port}/0",
            "expired_values": "keep",
            "pickled_functions": "run",
        }

    def teardown(self) -> None:
        self._watched.close()


AVAILABLE_OFFLINE_STORES = [("local", FileDataSourceCreator)]
AVAILABLE_ONLINE_STORES = {
    os.environ["PREDICTFLOW_UNIVERSAL_NAME"]: (
        {"type": "feature_store.online_store.PredictFlowOnlineStore"},
        PredictFlowOnlineStoreCreator,
    )
}
