"""The demo's proof: recompute what was served by another path, and count the values that differ."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError

if TYPE_CHECKING:
    from feast import FeatureStore

    from predictflow.demo.live import Findings
    from predictflow.settings import Settings


@dataclass(frozen=True)
class Proof:
    """What the recomputation found. `checked` counts values: one feature of one served row."""

    checked: int
    different: int
    stale: int
    examples: list[str]
    lost_events: int
    dead_lettered: int


def recompute(settings: Settings, store: FeatureStore, found: Findings) -> Proof:
    """Check every row that the demo's reads logged, and that the event log holds exactly the events that were sent.

    DataError when a read was not logged.
    """
    from feature_store.consistency import check, read_served

    topic = settings.served_topic
    wanted = set(found.served)
    records = [r for r in read_served(settings.need("kafka_bootstrap_servers"), topic) if r["request_id"] in wanted]
    missing = wanted - {r["request_id"] for r in records}
    if missing:
        raise DataError(
            "reads that the served log lacks", value=sorted(missing)[0], next_step="see .predictflow/logs/serve.log"
        )
    result = check(records, store.list_feature_views(), settings.need("offline_path"))
    return Proof(
        checked=result.checked,
        different=result.different,
        stale=result.stale,
        examples=[str(d) for d in result.examples],
        lost_events=lost_events(Path(settings.need("offline_path")), found),
        dead_lettered=found.dead_lettered,
    )


def lost_events(offline: Path, found: Findings) -> int:
    """Events that were sent but do not stand in the event log as they were sent."""
    import duckdb

    sent = [
        (e["event_id"], e["customer_id"], e["event_timestamp"], e["quantity"], e["amount_cents"]) for e in found.sent
    ]
    with duckdb.connect() as con:
        con.execute("SET TimeZone = 'UTC'")
        logged: list[tuple[Any, ...]] = con.execute(
            "SELECT event_id, customer_id, epoch_us(event_timestamp), quantity, amount_cents FROM read_parquet(?)",
            [str(offline / "customer_events" / "stream" / "**" / "*.parquet")],
        ).fetchall()
    return len({(i, c, _us(t), q, a) for i, c, t, q, a in sent} - set(logged))


def _us(t: datetime) -> int:
    from feature_store.clock import to_micros

    return to_micros(t)
