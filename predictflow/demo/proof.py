"""The demo's proof: recompute what was served by another path, and count the values that differ."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.clock import to_micros
from feature_store.errors import DataError, PredictFlowError

if TYPE_CHECKING:
    from feast import FeatureStore

    from predictflow.demo.live import Findings
    from predictflow.settings import Settings


@dataclass(frozen=True)
class Proof:
    """What the recomputation found. `checked` counts values: a feature, or the prediction, of one served row."""

    checked: int
    different: int
    stale: int
    not_checked: int
    examples: list[str]
    lost_events: int
    dead_lettered: int

    def failure(self, poison: int) -> PredictFlowError | None:
        """Why the proof does not hold, None when it does; `poison`: malformed messages that were sent.

        The demo waits for every event before it reads, so a stale value or one that cannot be checked is a fault too.
        """
        wrong = [self.different, self.stale, self.not_checked, self.lost_events]
        if self.checked and not any(wrong) and self.dead_lettered == poison:
            return None
        return PredictFlowError(
            f"the proof failed: {self.different} of {self.checked} values differ, {self.stale} stale, "
            f"{self.not_checked} not checked, {self.lost_events} events lost, "
            f"{self.dead_lettered} of {poison} malformed messages dead-lettered",
            value=self.examples[0] if self.examples else None,
            next_step="see .predictflow/logs, then `predictflow check`",
        )


def recompute(settings: Settings, store: FeatureStore, found: Findings) -> Proof:
    """Check every row that the demo's reads logged, and that the event log holds exactly the events that were sent.

    DataError when a read was not logged.
    """
    from feature_store.consistency import check, read_served
    from predictflow.predictions import check_predictions, mlflow_models
    from predictflow.wiring import model_tracker

    topic = settings.served_topic
    wanted = set(found.served)
    records = [r for r in read_served(settings.need("kafka_bootstrap_servers"), topic) if r["request_id"] in wanted]
    missing = wanted - {r["request_id"] for r in records}
    if missing:
        raise DataError(
            "reads that the served log lacks", value=sorted(missing)[0], next_step="see .predictflow/logs/serve.log"
        )
    views = store.list_feature_views()
    result = check(records, views, settings.need("offline_path"))
    check_predictions(records, views, mlflow_models(model_tracker(settings)), result)
    return Proof(
        checked=result.checked,
        different=result.different,
        stale=result.stale,
        not_checked=result.not_checked,
        examples=[str(d) for d in result.examples],
        lost_events=lost_events(Path(settings.need("offline_path")), found),
        dead_lettered=found.dead_lettered,
    )


def lost_events(offline: Path, found: Findings) -> int:
    """Events that were sent but are not counted as they were sent, and counted ones that were not sent."""
    import duckdb

    columns = ("event_id", "customer_id", "event_type", "quantity", "amount_cents")
    sent = Counter((*(e[c] for c in columns), to_micros(e["event_timestamp"])) for e in found.sent)
    with duckdb.connect() as con:
        con.execute("SET enable_progress_bar = false")  # it would be drawn on stdout
        # `_dropped` holds why an event does not count: none of these is a duplicate. Files that were merged into others
        # are still there for a while: a row of the log is known by its partition and offset.
        logged: Counter[tuple[Any, ...]] = Counter(
            con.execute(
                f"SELECT {', '.join(columns)}, t FROM (SELECT DISTINCT _partition, _offset, {', '.join(columns)}, "
                "epoch_us(event_timestamp) AS t FROM read_parquet(?) WHERE _dropped IS NULL)",
                [str(offline / "customer_events" / "stream" / "**" / "*.parquet")],
            ).fetchall()
        )
    return (sent - logged).total() + (logged - sent).total()
