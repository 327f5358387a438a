"""Read plans by feature service, compiled once and replaced in the background when the registry changes.

A request does a dictionary look-up here, and no registry work. A list of features without a service is compiled on
first use and kept among the most recently used.
"""

from __future__ import annotations

import hashlib
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, Protocol

from feature_store.errors import NotFoundError, UnavailableError
from serving.columns import python_values

if TYPE_CHECKING:
    from feast import FeatureService, FeatureStore

    from feature_store.read_plan import OnlineRows, ReadPlan
    from serving.json_plan import JsonPlan
    from serving.json_view import Caches
    from serving.metrics import Metrics

log = logging.getLogger(__name__)

OTHER_PLANS = 256
"""How many plans are kept of those that are not a feature service's own."""
Asked = str | tuple[str, ...]
"""What a plan is for: the name of a feature service, or references `view:feature`."""
NUMERIC = ("INT32", "INT64", "FLOAT", "DOUBLE", "BOOL")

TEXTS = ("BYTES", "UNIX_TIMESTAMP")
"""Types of join keys that come as texts in JSON."""


class Reader(Protocol):
    """Reads one plan's features (feature_store.read_plan.OnlineReader)."""

    plan: ReadPlan

    async def aread(self, entities: Sequence[Mapping[str, object]], at: datetime | None = None) -> OnlineRows: ...

    async def afetch(
        self, entities: Sequence[Mapping[str, object]], at: datetime | None = None
    ) -> tuple[list[Sequence[bytes | None]], int]: ...


@dataclass(frozen=True)
class Column:
    """One feature of a plan: its name in answers, where it comes from, and whether a model sees it as a number.

    `kind`: name of the declared Feast value type.
    """

    name: str
    view: str
    feature: str
    numeric: bool
    kind: str = "STRING"


@dataclass(frozen=True)
class ServicePlan:
    """A compiled plan: `name` is the feature service's, None for a list of features.

    `json`: how replies become JSON without Python values; None where they must be computed with first. `computes`: a
    read runs functions of on-demand views, which may take their time. `inputs`: those of the `join_keys` that are none,
    but values that on-demand views take from the request. `texts`: those of which JSON has no values of their own, with
    their types; a plan that has some has no `json`.
    """

    name: str | None
    columns: tuple[Column, ...]
    join_keys: tuple[str, ...]
    reader: Reader
    json: JsonPlan | None = None
    computes: bool = False
    inputs: frozenset[str] = frozenset()
    texts: Mapping[str, str] = field(default_factory=dict)

    def keyed(self, rows: list[dict[str, object]]) -> list[dict[str, object]]:
        """The entity rows, with base64 and ISO 8601 texts decoded by the types of their join keys: in place. ColumnError for
        what is no such text; what is of its type stays."""
        for name, kind in self.texts.items():
            if name in rows[0]:  # all have the same; the reader tells what is missing
                for row, value in zip(rows, python_values(name, [row[name] for row in rows], kind)):
                    row[name] = value
        return rows


class Plans:
    """The plans of one project. Thread-safe; `refresh` runs in the background, look-ups never wait for it."""

    def __init__(
        self, store: FeatureStore, make_reader: Callable[[ReadPlan], Reader], metrics: Metrics | None = None
    ) -> None:
        """`metrics` counts services that do not compile."""
        self._store = store
        self._make_reader = make_reader
        self._metrics = metrics
        self._services: dict[str, ServicePlan] = {}
        self._others: OrderedDict[tuple[Asked, bool], ServicePlan] = OrderedDict()
        self._lock = threading.Lock()
        self._fingerprint = ""
        self._broken: tuple[str, ...] = ()
        self._lacking: frozenset[str] = frozenset()
        self._caches: Caches | None = None
        self._fault: str | None = "not read yet"

    @property
    def project(self) -> str:
        return str(self._store.project)

    def cached(self, asked: Asked, full_names: bool) -> ServicePlan | None:
        """The plan if it is compiled; no I/O."""
        if isinstance(asked, str) and not full_names:
            return self._services.get(asked)
        others = self._others  # a refresh replaces it
        plan = others.get((asked, full_names))
        if plan is not None:
            with suppress(KeyError):  # another thread may just have let go of it
                others.move_to_end((asked, full_names))
        return plan

    def get(self, asked: Asked, full_names: bool) -> ServicePlan:
        """The plan of a feature service or of references `view:feature`, compiled on first use; `full_names` names
        features `view__feature`.

        Raises NotFoundError for an unknown service, view or feature, UsageError for a malformed reference,
        UnavailableError when the registry is needed and does not answer.
        """
        with self._lock:
            plan = self.cached(asked, full_names)
            if plan is not None:
                return plan
            plan = self._compile(asked, full_names)
            if isinstance(asked, str) and not full_names:
                self._services[asked] = plan
            else:
                self._others[asked, full_names] = plan
                while len(self._others) > OTHER_PLANS:
                    self._others.popitem(last=False)
            return plan

    def refresh(self) -> bool:
        """Reads the registry; if it changed, compiles every service anew and swaps the plans in. True if it changed.

        A service that does not compile is logged, counted, and tried again at every refresh: what was wrong may have
        been outside the registry. It keeps its old plan, unless that runs a function that is not the applied one any
        more: its values would be wrong ones, so requests are told the fault. Raises UnavailableError when the registry
        does not answer; the plans at hand go on serving.
        """
        fingerprint = self._read_fingerprint()
        if fingerprint == self._fingerprint:
            if self._broken:
                self._mend()
            return False
        self._store.refresh_registry()
        services = {s.name: s for s in self._store.list_feature_services()}
        broken = []
        compiled: dict[str, ServicePlan] = {}
        for name, service in services.items():
            try:
                compiled[name] = self._compile(name, False, service)
            except Exception:  # one broken service must not take the others down
                old = self._services.get(name)
                kept = old is not None and self._as_applied(old)
                state = "its old plan stays" if kept else "it is not served"
                log.exception("feature service %s does not compile; %s", name, state)
                self._count_failure()
                broken.append(name)
                if old is not None and kept:
                    compiled[name] = old
        self._lacking = (self._lacking if self._fingerprint else frozenset(broken)) - compiled.keys()
        with self._lock:
            self._services = compiled
            self._others = OrderedDict()
            self._fingerprint = fingerprint
            self._broken = tuple(broken)
        log.info("read plans compiled: %s", ", ".join(sorted(compiled)) or "no feature service applied")
        return True

    def _mend(self) -> None:
        """Tries the services again that did not compile; their fault was logged when it was new."""
        left = []
        for name in self._broken:
            try:
                plan = self._compile(name, False)
            except Exception as e:  # noqa: BLE001 - as in `refresh`
                log.debug("feature service %s still does not compile: %s", name, e)
                self._count_failure()
                left.append(name)
                continue
            with self._lock:
                self._services[name] = plan
                self._others.pop((name, True), None)
            log.info("feature service %s compiles again", name)
        self._lacking &= frozenset(left)
        self._broken = tuple(left)

    def _as_applied(self, plan: ServicePlan) -> bool:
        """Whether the functions that a plan runs are the applied ones; by the registry's cache."""
        from feature_store.on_demand import still_applied

        if not plan.computes:
            return True
        views = [view.computing for view in plan.reader.plan.on_demand]
        return all(still_applied(self._store.registry, self.project, view) for view in views)

    def _count_failure(self) -> None:
        if self._metrics is not None:
            self._metrics.refresh_failures.labels("plan").inc()

    def check(self) -> tuple[bool, str]:
        """Whether requests can be answered from the plans at hand, and how the registry is. No I/O.

        Not while a service of the server's first look at the registry has never compiled. One that broke later is named
        only: it would take the others down, on all servers at once.
        """
        names = ", ".join(sorted(self._services)) or "none"
        left = sorted(self._broken)
        broken = f"; do not compile: {', '.join(left)}" if left else ""
        ok = self._lacking.isdisjoint(left)
        if self._fault is not None:
            served = f"feature services served: {names}{broken}"
            return ok and bool(self._services), f"registry: {self._fault}; {served}"
        return ok, f"feature services: {names}{broken}"

    def _read_fingerprint(self) -> str:
        try:
            proto: Any = self._store.registry.proto()
        except Exception as e:  # the registry's own driver decides what it raises
            self._fault = f"does not answer ({type(e).__name__})"
            raise UnavailableError(
                f"the feature registry does not answer ({type(e).__name__})",
                next_step="check POSTGRES_URL and `predictflow status`",
            ) from e
        self._fault = None
        digest = hashlib.sha256()
        kinds = (
            proto.entities,
            proto.feature_views,
            proto.stream_feature_views,
            proto.on_demand_feature_views,
            proto.label_views,
            proto.feature_services,
        )
        for objects in kinds:
            texts = sorted(_definition_of(o) for o in objects if self._own(o))
            digest.update(len(texts).to_bytes(8, "little"))
            for text in texts:
                digest.update(len(text).to_bytes(8, "little") + text)
        return digest.hexdigest()

    def _own(self, obj: Any) -> bool:
        return bool(obj.spec.project == self.project)

    def _compile(self, asked: Asked, full_names: bool, service: FeatureService | None = None) -> ServicePlan:
        from feature_store.read_plan import ReadPlan
        from serving.json_plan import JsonPlan
        from serving.json_view import Caches

        if self._caches is None:
            self._caches = Caches()
        features: FeatureService | Sequence[str]
        if isinstance(asked, str):
            features = service or self._feature_service(asked)
        else:
            features = list(asked)
        plan = ReadPlan.compile(self._store, features, full_feature_names=full_names)
        columns = [
            Column(f.result, v.name, f.name, f.type in NUMERIC, f.type) for v in plan.view_plans for f in v.features
        ]
        name = asked if isinstance(asked, str) else None
        texts = {key: kind for key, kind in plan.key_types.items() if kind in TEXTS}
        json = None if plan.on_demand or texts else JsonPlan(plan, name, self._caches)
        computes = bool(plan.on_demand)
        keys, inputs = tuple(plan.join_keys), frozenset(plan.join_keys) - plan.key_types.keys()
        return ServicePlan(name, tuple(columns), keys, self._make_reader(plan), json, computes, inputs, texts)

    def _feature_service(self, name: str) -> FeatureService:
        from feast.errors import FeatureServiceNotFoundException

        try:
            return self._store.get_feature_service(name, allow_cache=True)
        except FeatureServiceNotFoundException as e:
            valid = [s.name for s in self._store.registry.list_feature_services(self.project, allow_cache=True)]
            raise NotFoundError("unknown feature service", value=name, valid=valid, next_step="feast apply") from e


def _definition_of(stored: Any) -> bytes:
    """What a plan depends on of an object of the registry: its definition, and the version that names a view's rows."""
    version = int(getattr(stored.meta, "current_version_number", 0) or 0)
    return version.to_bytes(8, "little") + bytes(stored.spec.SerializeToString(deterministic=True))
