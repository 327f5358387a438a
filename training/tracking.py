"""What we ask of MLflow: runs with their parameters and metrics, registered model versions, and who is champion."""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Mapping, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from feature_store.errors import UnavailableError, UsageError
from feature_store.masking import masked

if TYPE_CHECKING:
    from collections.abc import Iterator

    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from sklearn.pipeline import Pipeline

EXPERIMENT = "churn-prediction"
MODEL_NAME = "churn-predictor"
CHAMPION = "champion"
FINGERPRINT = "fingerprint"
CONNECT_SECONDS = 3.0
REQUIREMENTS = ("scikit-learn", "skops", "numpy", "scipy", "pandas")


class Tracker:
    """Runs and models of one experiment. `artifacts`: where a database-backed MLflow keeps files; a server decides itself.

    Connects on first use; UnavailableError, at once, when nothing listens at the tracking URI.
    """

    def __init__(
        self, tracking_uri: str, artifacts: Path, experiment: str = EXPERIMENT, model: str = MODEL_NAME
    ) -> None:
        self.uri, self.artifacts, self.experiment, self.model = tracking_uri, Path(artifacts), experiment, model
        self._client: MlflowClient | None = None

    @property
    def client(self) -> MlflowClient:
        """MLflow's own client, for what is not wrapped here."""
        if self._client is None:
            check_reachable(self.uri)
            os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")  # read when mlflow is imported
            import mlflow

            logging.getLogger("mlflow").setLevel(logging.WARNING)
            try:
                mlflow.set_tracking_uri(self.uri)  # log_model knows no client
                mlflow.set_registry_uri(self.uri)  # else one set earlier in this process would hold
                self._client = mlflow.MlflowClient(self.uri, self.uri)
            except mlflow.MlflowException as e:
                why = str(e).replace(self.uri, masked(self.uri)).strip().splitlines()[0]
                raise UnavailableError(f"MLflow cannot use its tracking store ({why})", value=masked(self.uri)) from e
        return self._client

    def experiment_id(self) -> str:
        """The experiment's id; creates it where it does not exist."""
        found = self.client.get_experiment_by_name(self.experiment)
        if found is not None:
            return str(found.experiment_id)
        location = self.artifacts.absolute().as_uri() if is_database(self.uri) else None
        return str(self.client.create_experiment(self.experiment, artifact_location=location))

    @contextmanager
    def run(self, name: str, params: Mapping[str, object], tags: Mapping[str, str]) -> Iterator[str]:
        """A run around what the block does; yields its id. It ends FINISHED, or FAILED when the block raises."""
        from mlflow.entities import Param

        run = self.client.create_run(self.experiment_id(), run_name=name, tags=dict(tags))
        run_id = str(run.info.run_id)
        try:
            self.client.log_batch(run_id, params=[Param(k, str(v)) for k, v in params.items()])
            yield run_id
        except BaseException:
            self.client.set_terminated(run_id, "FAILED")
            raise
        self.client.set_terminated(run_id, "FINISHED")

    def log_metrics(self, run_id: str, metrics: Mapping[str, float | None]) -> None:
        """Log the metrics that have a value."""
        for name, value in metrics.items():
            if value is not None:
                self.client.log_metric(run_id, name, value)

    def find_version(self, fingerprint: str) -> str | None:
        """The newest version of our model with this fingerprint whose files still exist, or None."""
        versions = self.client.search_model_versions(f"name = '{self.model}'")
        same = [v for v in versions if v.tags.get(FINGERPRINT) == fingerprint and self._has_files(v)]
        return max((str(v.version) for v in same), key=int, default=None)

    def register(
        self, run_id: str, model: Pipeline, numeric: Sequence[str], order: Sequence[str], tags: Mapping[str, str]
    ) -> str:
        """Log the fitted model to the run and register it as a new version; the version's number."""
        import mlflow.sklearn
        from mlflow.exceptions import MlflowException
        from mlflow.models import ModelSignature
        from mlflow.types import ColSpec, Schema

        inputs = Schema([ColSpec("double" if n in numeric else "string", n, required=False) for n in order])
        with mlflow.start_run(run_id=run_id):
            logged = mlflow.sklearn.log_model(
                model,
                name="model",
                signature=ModelSignature(inputs=inputs),
                pyfunc_predict_fn="predict_proba",
                # Given, because MLflow would otherwise start a second Python to find them out.
                pip_requirements=[f"{name}=={version(name)}" for name in REQUIREMENTS],
                skops_trusted_types=_trusted_types(model),
            )
        try:
            self.client.create_registered_model(self.model)
        except MlflowException as e:
            if e.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        made = self.client.create_model_version(
            self.model, source=logged.model_uri, run_id=run_id, tags=dict(tags), model_id=logged.model_id
        )
        return str(made.version)

    def champion(self) -> ModelVersion | None:
        """The model version that carries the alias, or None."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version_by_alias(self.model, CHAMPION)
        except MlflowException as e:
            if e.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def champion_version(self) -> str | None:
        """The champion's version as text (MLflow gives a number or a text, depending on the kind of store), or None."""
        champion = self.champion()
        return None if champion is None else str(champion.version)

    def set_champion(self, model_version: str) -> None:
        """Move the alias to this version. Safe to run twice."""
        self.client.set_registered_model_alias(self.model, CHAMPION, model_version)

    def _has_files(self, model_version: ModelVersion) -> bool:
        """A tracking database may outlive the directory of its artifacts."""
        import mlflow.artifacts

        source = self.client.get_model_version_download_uri(self.model, model_version.version)
        return bool(mlflow.artifacts.list_artifacts(artifact_uri=source))


def is_database(uri: str) -> bool:
    """Whether the URI names a database that MLflow's client opens itself, rather than a tracking server."""
    return urlsplit(uri).scheme.partition("+")[0] in ("postgresql", "sqlite", "mysql", "mssql")


def check_reachable(uri: str) -> None:
    """UnavailableError unless the tracking store answers now: MLflow itself would retry for an hour."""
    try:
        if is_database(uri):
            import sqlalchemy

            if "@" in (sqlalchemy.make_url(uri).host or ""):
                # The driver would name the end of the password as an unknown host.
                raise UsageError("MLFLOW_TRACKING_URI has an @ in its user or password", next_step="write it as %40")
            engine = sqlalchemy.create_engine(uri)
            try:
                engine.connect().close()
            finally:
                engine.dispose()
        elif urlsplit(uri).scheme in ("http", "https"):
            parts = urlsplit(uri)
            address = (parts.hostname or "", parts.port or {"http": 80, "https": 443}[parts.scheme])
            socket.create_connection(address, timeout=CONNECT_SECONDS).close()
    except (OSError, ValueError, _database_errors()) as e:
        why = str(getattr(e, "orig", e)).splitlines()[0]  # the database's own words, without SQLAlchemy's around them
        raise UnavailableError(
            f"MLflow's tracking store does not answer at MLFLOW_TRACKING_URI ({why})",
            value=masked(uri),
            next_step="predictflow up",
        ) from e


def _database_errors() -> type[Exception]:
    from sqlalchemy.exc import SQLAlchemyError

    return SQLAlchemyError


def _trusted_types(model: Pipeline) -> list[str]:
    """The types that skops must be told to trust: numpy's and scipy's inside of scikit-learn's own classes."""
    import skops.io

    found = skops.io.get_untrusted_types(data=skops.io.dumps(model))
    return [t for t in found if t.partition(".")[0] in ("numpy", "scipy", "sklearn")]
