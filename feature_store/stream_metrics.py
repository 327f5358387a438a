"""What a consumer says about itself: Prometheus metrics, and the same figures as one plain log line."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

_SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 60)


class StreamMetrics:
    """Metrics of one process in a registry of its own, so that tests and several consumers do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        r = self.registry
        self.events = Counter(
            "predictflow_sync_events", "Messages by view and outcome", ["view", "outcome"], registry=r
        )
        self.late = Counter(
            "predictflow_sync_late_events", "Events older than the newest of their partition", ["view"], registry=r
        )
        self.without_value = Counter(
            "predictflow_sync_without_value",
            "Entities written without values (cap or sum overflow)",
            ["view"],
            registry=r,
        )
        self.retries = Counter("predictflow_sync_retries", "Batches tried again, a server being away", registry=r)
        self.lag = Gauge("predictflow_sync_lag", "Messages not yet applied", ["partition"], registry=r)
        self.batch_seconds = Histogram(
            "predictflow_sync_batch_seconds", "Time to apply a batch", buckets=_SECONDS, registry=r
        )
        self.freshness_seconds = Histogram(
            "predictflow_sync_freshness_seconds",
            "From the message's Kafka timestamp to readable",
            buckets=_SECONDS,
            registry=r,
        )

    def serve(self, port: int) -> None:
        """Answers GET /metrics on 127.0.0.1:port from a thread."""
        start_http_server(port, addr="127.0.0.1", registry=self.registry)

    def line(self) -> str:
        """The counts so far, for the log."""
        counts: dict[str, float] = {}
        for metric in (self.events, self.late):
            for family in metric.collect():
                for s in family.samples:
                    if s.name.endswith("_total"):
                        name = s.labels.get("outcome", "late")
                        counts[name] = counts.get(name, 0) + s.value
        lag = sum(s.value for f in self.lag.collect() for s in f.samples)
        return ", ".join([*(f"{int(n)} {name}" for name, n in sorted(counts.items())), f"lag {int(lag)}"])
