"""Where real adapters are made from settings: the Feast store, the registry, MLflow. Nothing else connects."""

from __future__ import annotations

import logging
import os
from typing import TYPE_CHECKING

from feature_store.errors import NotFoundError
from predictflow.settings import Settings

if TYPE_CHECKING:
    from feast import FeatureStore

    from feature_store.registry import FeatureRegistry
    from training.tracking import Tracker

log = logging.getLogger(__name__)


def feast_store(settings: Settings) -> FeatureStore:
    """The Feast store of `settings.repo`; NotFoundError where there is no feature_store.yaml."""
    for name in ("postgres_url", "redis_url", "offline_path"):
        settings.need(name)
    os.environ["PREDICTFLOW_CLOCK"] = settings.clock  # feature_store.yaml has no defaults of its own
    if not (settings.repo / "feature_store.yaml").is_file():
        raise NotFoundError(
            "no feature_store.yaml in this directory",
            value=str(settings.repo),
            next_step="cd to the checkout, or `predictflow init DIR` for a project of your own",
        )
    from feast import FeatureStore

    return FeatureStore(repo_path=str(settings.repo))


def feature_registry(settings: Settings) -> FeatureRegistry:
    """The FeatureRegistry of the project in `settings.repo`, on POSTGRES_URL; it connects on first use."""
    from feature_store.registry import FeatureRegistry
    from predictflow.project import project_name

    return FeatureRegistry(settings.need("postgres_url"), project_name(settings.repo))


def model_tracker(settings: Settings) -> Tracker:
    """MLflow at MLFLOW_TRACKING_URI; it connects on first use, after `up` has finished with its database."""
    from predictflow.local import mlflow_database, processes
    from training.tracking import Tracker

    uri = settings.need("mlflow_tracking_uri")
    if processes.find(mlflow_database.NAME, settings.home) is not None:  # `up` still prepares the database
        mlflow_database.wait_for_mlflow(settings.home, uri)
    return Tracker(uri, settings.home / "mlartifacts")


def run_id(kind: str, content: str) -> str:
    """A name for one run of a step that is the same when the step is repeated on the same input."""
    import hashlib

    return f"{kind}-{hashlib.sha256(content.encode()).hexdigest()[:12]}"
