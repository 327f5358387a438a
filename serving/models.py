"""The champion models of MLflow's registry: loaded once, replaced atomically when another version is promoted.

`get` never waits for MLflow once a model is loaded; `refresh` runs in the background. A champion that cannot be
loaded, that its feature service cannot feed, or that cannot predict, leaves the old one in place.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from feature_store.clock import EPOCH
from feature_store.errors import DataError, NotFoundError, PredictFlowError, UnavailableError
from serving.model_runs import ModelInput

if TYPE_CHECKING:
    import pandas as pd

    from serving.metrics import Metrics
    from serving.plans import Column

log = logging.getLogger(__name__)

ALIAS = "champion"
SERVICE_TAG = "feature_service"


@dataclass(frozen=True)
class Model:
    """One loaded model version: a scikit-learn pipeline with `predict_proba`, fed by one feature service."""

    name: str
    version: str
    feature_service: str
    pipeline: Any
    positive: int
    features: tuple[str, ...] | None
    """The features it was trained on, in order; None when the pipeline does not say."""

    def check(self, columns: Sequence[Column]) -> None:
        """DataError when the feature service lacks a feature that the model was trained on."""
        names = [c.name for c in columns]
        missing = [f for f in self.features or () if f not in names]
        if missing:
            raise DataError(
                f"model {self.name} version {self.version} needs a feature that service {self.feature_service} lacks",
                value=missing[0],
                valid=names,
                next_step="predictflow train, or apply the feature service again",
            )

    def input(self, columns: Sequence[Column]) -> ModelInput:
        """How rows of these columns become the frames it takes; DataError as `check`."""
        self.check(columns)
        return ModelInput(self.features if self.features is not None else [c.name for c in columns], columns)

    def run(self, frame: pd.DataFrame) -> list[float]:
        """The probability of the positive class for each row of a frame of its features."""
        return [float(p) for p in self.pipeline.predict_proba(frame)[:, self.positive]]

    def predict(self, columns: Sequence[Column], rows: Sequence[dict[str, Any]]) -> list[float]:
        """As `run`, for rows of values by feature name; None is missing: NaN for a number."""
        return self.run(self.input(columns).frame([[row[c.name] for c in columns] for row in rows]))


class Models(Protocol):
    """Where served models come from."""

    def cached(self, name: str) -> Model | None: ...

    def get(self, name: str) -> Model: ...

    def refresh(self) -> None: ...

    def check(self) -> tuple[bool, str]: ...


class NoModels:
    """A server of features only."""

    def cached(self, name: str) -> Model | None:
        return None

    def get(self, name: str) -> Model:
        raise NotFoundError("this server has no model registry", value=name, next_step="set MLFLOW_TRACKING_URI")

    def refresh(self) -> None:
        pass

    def check(self) -> tuple[bool, str]:
        return True, "none required"


class MLflowModels:
    """Champions of an MLflow model registry. Thread-safe.

    `required` are the models without which the server is not ready; others are loaded when first asked for.
    `columns_of` gives the columns of a feature service; `recorder` is told of each version that is served.
    """

    def __init__(
        self,
        tracking_uri: str,
        required: Sequence[str],
        metrics: Metrics,
        columns_of: Callable[[str], Sequence[Column]],
        recorder: Callable[[Model], None],
    ) -> None:
        self._uri = tracking_uri
        self._required = tuple(required)
        self._metrics = metrics
        self._columns_of = columns_of
        self._recorder = recorder
        self._models: dict[str, Model] = {}
        self._faults: dict[str, str] = dict.fromkeys(required, "not loaded yet")
        self._unproved: dict[str, str] = {}
        self._unrecorded: dict[str, Model] = {}
        self._lock = threading.Lock()
        self._client: Any = None

    def cached(self, name: str) -> Model | None:
        """The served version of a model, if one is loaded; no I/O."""
        return self._models.get(name)

    def get(self, name: str) -> Model:
        """The served version, loading it on first use.

        Raises NotFoundError when no version of that name has the alias, UnavailableError when MLflow does not answer.
        """
        model = self._models.get(name)
        if model is not None:
            return model
        with self._lock:
            if name not in self._models:
                self._update(name)
            return self._models[name]

    def refresh(self) -> None:
        """Looks every known model's alias up and swaps in what was promoted; a failure keeps what is served."""
        for name in dict.fromkeys((*self._required, *self._models)):
            with self._lock:
                try:
                    self._update(name)
                except PredictFlowError as e:
                    if self._faults.get(name) != e.what:
                        log.warning("model %s: %s", name, e.format_message())
                    self._faults[name] = e.what
                    self._metrics.refresh_failures.labels("model").inc()
                else:
                    self._faults.pop(name, None)
        self._record()

    def check(self) -> tuple[bool, str]:
        """Whether every required model is loaded, and could predict when it was; no I/O."""
        parts, ok = [], True
        for name in self._required:
            model, faults = self._models.get(name), (self._unproved.get(name), self._faults.get(name))
            ok = ok and model is not None and name not in self._unproved
            parts.append(f"{name}: " + "; ".join(p for p in (model and f"version {model.version}", *faults) if p))
        return ok, ", ".join(parts) or "none required"

    def _update(self, name: str) -> None:
        version = self._champion(name)
        old = self._models.get(name)
        service = version.tags.get(SERVICE_TAG)
        if old is not None and (old.version, old.feature_service) == (str(version.version), service):
            return
        if not service:
            raise DataError(
                f"model {name} version {version.version} has no tag {SERVICE_TAG!r}",
                next_step="tag the version with its feature service, or run predictflow train",
            )
        model = self._load(name, str(version.version), service)
        fault = self._prove(model)
        if fault is not None:
            if old is not None and name not in self._unproved:
                raise fault
            log.error("model %s: %s", name, fault.format_message())  # with none before, it may be better than none
            self._metrics.refresh_failures.labels("model").inc()
            self._unproved[name] = fault.what
        else:
            self._unproved.pop(name, None)
        self._models = {**self._models, name: model}
        self._unrecorded[name] = model
        if old is not None:
            self._metrics.model_loaded.labels(name, old.version).set(0)
        self._metrics.model_loaded.labels(name, model.version).set(1)
        log.info("model %s: version %s is served (before: %s)", name, model.version, old.version if old else "none")

    def _champion(self, name: str) -> Any:
        import mlflow
        from mlflow.exceptions import MlflowException
        from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, RESOURCE_DOES_NOT_EXIST, ErrorCode

        absent = {ErrorCode.Name(RESOURCE_DOES_NOT_EXIST), ErrorCode.Name(INVALID_PARAMETER_VALUE)}
        try:
            if self._client is None:
                mlflow.set_tracking_uri(self._uri)
                mlflow.set_registry_uri(self._uri)
                self._client = mlflow.MlflowClient(self._uri, self._uri)
            return self._client.get_model_version_by_alias(name, ALIAS)
        except MlflowException as e:
            if e.error_code not in absent:
                raise _mlflow_unavailable(e) from e
            if name in self._models:  # the alias was taken away: the operator withdrew the model
                log.warning("model %s: alias %s is gone; no longer served", name, ALIAS)
                self._metrics.model_loaded.labels(name, self._models[name].version).set(0)
                self._models = {k: v for k, v in self._models.items() if k != name}
                self._unproved.pop(name, None)
            raise NotFoundError(
                f"no model version with alias {ALIAS!r}", value=name, next_step="predictflow train"
            ) from e
        except Exception as e:  # the tracking store's own driver decides what it raises
            raise _mlflow_unavailable(e) from e

    def _load(self, name: str, version: str, service: str) -> Model:
        import mlflow.sklearn

        try:
            pipeline = mlflow.sklearn.load_model(f"models:/{name}/{version}")
        except Exception as e:  # whatever unpickling or the artifact store raises: this version cannot be served
            log.exception("model %s: version %s cannot be loaded", name, version)
            raise UnavailableError(
                f"model {name} version {version} cannot be loaded ({type(e).__name__})",
                next_step="see the server's log; promote another version",
            ) from e
        classes = [int(c) for c in getattr(pipeline, "classes_", [])]
        if not hasattr(pipeline, "predict_proba") or sorted(classes) != [0, 1]:
            raise DataError(
                f"model {name} version {version} is not a binary classifier with predict_proba", value=classes or None
            )
        names = getattr(pipeline, "feature_names_in_", None)
        features = None if names is None else tuple(str(n) for n in names)
        return Model(name, version, service, pipeline, classes.index(1), features)

    def _prove(self, model: Model) -> DataError | None:
        """Refuses a model that its feature service cannot feed, and runs it once: the first run imports and compiles.

        What it cannot: to predict for an entity without features, nor for one of zeros and empty values. None: it can.
        """
        columns = self._columns_of(model.feature_service)
        model.check(columns)
        try:
            model.predict(columns, [{c.name: None for c in columns}])
            return None
        except Exception as first:  # noqa: BLE001 - told below; it may still predict for entities that have features
            reason = first
        try:
            model.predict(columns, [{c.name: _empty(c) for c in columns}])
        except Exception:  # noqa: BLE001 - told by the error below, with the reason of the first row
            return DataError(
                f"model {model.name} version {model.version} cannot predict ({type(reason).__name__}: {reason})",
                next_step="see which scikit-learn it was trained with, and promote another version",
            )
        log.error(
            "model %s: version %s cannot predict for an entity without features",
            model.name,
            model.version,
            exc_info=reason,
        )
        return None

    def _record(self) -> None:
        for name, model in list(self._unrecorded.items()):
            try:
                self._recorder(model)
            except Exception:  # lineage is tried again at the next refresh; predictions do not wait for it
                self._metrics.refresh_failures.labels("lineage").inc()
                log.exception("lineage of model %s version %s not recorded yet", name, model.version)
            else:
                self._unrecorded.pop(name, None)


def _empty(column: Column) -> Any:
    """A value that a feature of this type may well have."""
    if column.numeric:
        return 0
    if column.kind.endswith("_LIST"):
        return []
    return {"STRING": "", "BYTES": b"", "UNIX_TIMESTAMP": EPOCH}.get(column.kind)


def _mlflow_unavailable(error: Exception) -> UnavailableError:
    return UnavailableError(
        f"MLflow does not answer ({type(error).__name__})",
        next_step="check MLFLOW_TRACKING_URI and `predictflow status`",
    )
