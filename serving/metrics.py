"""Prometheus metrics of the server, of this process or merged over the workers that share PROMETHEUS_MULTIPROC_DIR."""

from __future__ import annotations

import time
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

LATENCY_BUCKETS = (0.0005, 0.001, 0.0025, 0.005, 0.0075, 0.01, 0.015, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0)

_DAY = 86_400.0
AGE_BUCKETS = (0.1, 0.5, 1.0, 5.0, 30.0, 60.0, 300.0, 1800.0, 3600.0, _DAY / 4, _DAY, 7 * _DAY, 30 * _DAY, 90 * _DAY)
AGE_EVERY_SECONDS = 0.1
"""Per service: ages change slowly, and a read should not pay for telling them."""


class Metrics:
    """Every metric of one server process, in a registry of its own (two servers in one process do not collide).

    `merge`: expose all workers' values. It is not told by the variable, since Feast sets that one for itself.
    """

    content_type = CONTENT_TYPE_LATEST

    def __init__(self, registry: CollectorRegistry | None = None, merge: bool = False) -> None:
        self._merge = merge
        self.registry = registry or CollectorRegistry()
        self.request_seconds = Histogram(
            "predictflow_request_seconds",
            "Time from the request's headers to its answer, by route template",
            ("method", "route", "status"),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "predictflow_requests_in_flight",
            "Requests being answered now",
            registry=self.registry,
            multiprocess_mode="livesum",
        )
        self.rows = Counter(
            "predictflow_served_rows", "Entity rows served, by feature service", ("service",), registry=self.registry
        )
        self.service_seconds = Histogram(
            "predictflow_service_seconds",
            "Time from a request's input to its values, predictions included, by route and feature service",
            ("route", "service"),
            buckets=LATENCY_BUCKETS,
            registry=self.registry,
        )
        self.age_seconds = Histogram(
            "predictflow_feature_age_seconds",
            "Freshness: t less the event time of the row that was served, by view; the first row of some requests",
            ("view",),
            buckets=AGE_BUCKETS,
            registry=self.registry,
        )
        self.statuses = Counter(
            "predictflow_feature_status",
            "Feature values served, by view and status (hit: PRESENT; missing: NOT_FOUND; stale: OUTSIDE_MAX_AGE)",
            ("view", "status"),
            registry=self.registry,
        )
        self.log_records = Counter(
            "predictflow_served_log_records", "Served-log records acknowledged by Kafka", registry=self.registry
        )
        self.log_dropped = Counter(
            "predictflow_served_log_dropped", "Served-log records lost, by reason", ("reason",), registry=self.registry
        )
        self.model_loaded = Gauge(
            "predictflow_model_loaded",
            "1 for the model version that is served",
            ("model", "version"),
            registry=self.registry,
            multiprocess_mode="livemax",
        )
        self.refresh_failures = Counter(
            "predictflow_refresh_failures",
            "Failed background refreshes (registry, plan, model, lineage)",
            ("what",),
            registry=self.registry,
        )

        self._status: dict[tuple[str, str], Counter] = {}
        self._rows: dict[str, Counter] = {}
        self._service_seconds: dict[tuple[str, str], Histogram] = {}
        self._ages: dict[str, Histogram] = {}
        self._age_due: dict[str, float] = {}
        self._seconds: dict[tuple[str, str, int | str], Histogram] = {}

    # Looking a child up by its labels costs more than counting in it, so each is looked up once.

    def add_status(self, view: str, status: str, n: int) -> None:
        """Counts n values of one view with one status."""
        child = self._status.get((view, status))
        if child is None:
            child = self._status[view, status] = self.statuses.labels(view, status)
        child.inc(n)

    def add_read(self, route: str, service: str, n: int, seconds: float) -> None:
        """Counts n entity rows of one request; `service` is empty for a list of features."""
        child = self._rows.get(service)
        if child is None:
            child = self._rows[service] = self.rows.labels(service)
        child.inc(n)
        self.observe_service(route, service, seconds)

    def observe_service(self, route: str, service: str, seconds: float) -> None:
        """One read of a service by a route, the one `observe` hears of; `service` as in `add_read`."""
        child = self._service_seconds.get((route, service))
        if child is None:
            child = self._service_seconds[route, service] = self.service_seconds.labels(route, service)
        child.observe(seconds)

    def wants_age(self, service: str) -> bool:
        """Whether `add_age` should hear of the request in hand; true ten times a second."""
        now = time.monotonic()
        if now < self._age_due.get(service, 0.0):
            return False
        self._age_due[service] = now + AGE_EVERY_SECONDS
        return True

    def add_age(self, view: str, seconds: float) -> None:
        """The age of a row that was served."""
        child = self._ages.get(view)
        if child is None:
            child = self._ages[view] = self.age_seconds.labels(view)
        child.observe(seconds)

    def observe(self, method: str, route: str, status: int | str, seconds: float) -> None:
        """One answered request."""
        child = self._seconds.get((method, route, status))
        if child is None:
            child = self._seconds[method, route, status] = self.request_seconds.labels(method, route, str(status))
        child.observe(seconds)

    def count_statuses(self, counts: Iterable[tuple[tuple[str, str], int]]) -> None:
        """Adds ((view, status), n) pairs."""
        for (view, status), n in counts:
            self.add_status(view, status, n)

    def expose(self) -> bytes:
        """The text exposition: of this process, or of all workers when they share a directory."""
        if not self._merge:
            return generate_latest(self.registry)
        from prometheus_client.multiprocess import MultiProcessCollector

        merged = CollectorRegistry()
        MultiProcessCollector(merged)
        return generate_latest(merged)
