"""What a consumer counts, for Prometheus and for its log line. One instance per process; nothing is global."""

from __future__ import annotations

from collections import Counter as Counts
from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, start_http_server

from feature_store.batch_result import BatchResult
from feature_store.logged import NEVER

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.15, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
_OUTCOMES = {
    "applied": "applied",
    "duplicates": "duplicate",
    "replayed": "replayed",
    "dropped": "dropped",
    "erased": "erased",
}


class StreamMetrics:
    """Counters of a consumer; docs/reference/stream.md says what each means."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.events = Counter(
            "predictflow_sync_events", "Messages by outcome", ["view", "partition", "outcome"], registry=r
        )
        self.late = Counter(
            "predictflow_sync_late_events",
            "Events older than the newest of their partition",
            ["view", "partition"],
            registry=r,
        )
        self.without_value = Counter(
            "predictflow_sync_without_value",
            "Entities written without some of their values (cap or overflow)",
            ["view"],
            registry=r,
        )
        self.fenced = Counter(
            "predictflow_sync_fenced", "Entities not written, a newer owner having been there", ["view"], registry=r
        )
        self.ids_forgotten = Counter(
            "predictflow_sync_ids_forgotten",
            "Event ids forgotten early, one entity having more than max_events_per_entity",
            ["view"],
            registry=r,
        )
        self.damaged = Counter(
            "predictflow_sync_damaged",
            "Entities not written in a batch, their state being damaged",
            ["view"],
            registry=r,
        )
        self.moved = Counter(
            "predictflow_sync_moved_entities",
            "Entities with events in one more partition than before",
            ["view"],
            registry=r,
        )
        self.retries = Counter("predictflow_sync_retries", "Batches tried again, a server being away", registry=r)
        self.lag = Gauge("predictflow_sync_lag", "Messages not yet applied", ["partition"], registry=r)
        self.watermark_delay = Gauge(
            "predictflow_sync_watermark_delay_seconds",
            "The clock less the watermark",
            ["view", "partition"],
            registry=r,
        )
        self.batch_seconds = Histogram(
            "predictflow_sync_batch_seconds", "Time to apply a batch", buckets=_SECONDS, registry=r
        )
        self.freshness_seconds = Histogram(
            "predictflow_sync_freshness_seconds",
            "From the Kafka timestamp to readable, of the oldest message of a batch and partition",
            ["partition"],
            buckets=_SECONDS,
            registry=r,
        )

    def serve(self, port: int, host: str = "127.0.0.1") -> None:
        """Answers GET /metrics on host:port from a thread. OSError: it cannot listen there."""
        start_http_server(port, addr=host, registry=self.registry)

    def count(self, view: str, result: BatchResult, now_us: int) -> None:
        """Adds a batch's result for one view; `now_us`: the features' clock."""
        refused = Counts(raw.partition for raw, _ in result.refused)
        for p, found in result.partitions.items():
            for name, outcome in _OUTCOMES.items():
                self.events.labels(view, str(p), outcome).inc(getattr(found, name))
            self.events.labels(view, str(p), "dead_lettered").inc(refused[p])
            self.late.labels(view, str(p)).inc(found.late)
            if found.watermark_us != NEVER:
                delay = (max(now_us, result.clock_us) - found.watermark_us) / 1e6
                self.watermark_delay.labels(view, str(p)).set(delay)
        self.without_value.labels(view).inc(result.without_value)
        self.fenced.labels(view).inc(result.fenced)
        self.ids_forgotten.labels(view).inc(result.ids_forgotten)
        self.damaged.labels(view).inc(result.damaged)
        self.moved.labels(view).inc(result.moved)

    def stands(self, partition: int, lag: int | None, watermarks: Mapping[str, int], now_us: int) -> None:
        """Where a partition stands now, whether batches get done or not. `watermarks`: of each view, NEVER: none."""
        if lag is not None:
            self.lag.labels(str(partition)).set(lag)
        for view, watermark_us in watermarks.items():
            if watermark_us != NEVER:
                self.watermark_delay.labels(view, str(partition)).set((now_us - watermark_us) / 1e6)

    def gave_up(self, partition: int, views: list[str]) -> None:
        """The partition is another consumer's now."""
        self.lag.labels(str(partition)).set(0)
        for view in views:
            if (view, str(partition)) in self.watermark_delay._metrics:
                self.watermark_delay.remove(view, str(partition))

    def line(self) -> str:
        """The counts so far, for the log."""
        counts: dict[str, float] = {}
        for metric in (self.events, self.late):
            for family in metric.collect():
                for s in family.samples:
                    if s.name.endswith("_total"):
                        name = s.labels.get("outcome", "late")
                        counts[name] = counts.get(name, 0) + s.value
        for name, counter in (
            ("ids forgotten", self.ids_forgotten),
            ("damaged states", self.damaged),
            ("moved entities", self.moved),
        ):
            total = sum(s.value for f in counter.collect() for s in f.samples if s.name.endswith("_total"))
            if total:
                counts[name] = total
        lag = {s.labels["partition"]: s.value for f in self.lag.collect() for s in f.samples}
        shown = [*(f"{int(n)} {name}" for name, n in sorted(counts.items())), f"lag {int(sum(lag.values()))}"]
        if len(lag) > 1 and any(lag.values()):
            shown[-1] += " (" + ", ".join(f"{p}: {int(n)}" for p, n in sorted(lag.items()) if n) + ")"
        delays = [s.value for f in self.watermark_delay.collect() for s in f.samples]
        if delays:
            shown.append(f"watermark {max(delays):.1f} s behind")
        return ", ".join(shown)
