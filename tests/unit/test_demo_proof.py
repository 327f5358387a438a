"""When the demo's proof holds: nothing different, stale, unchecked or lost, and every malformed message set aside."""

from __future__ import annotations

import dataclasses
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pyarrow as pa
import pytest

from feature_store.event_log import LOG_FIELDS, UTC_MICROS, EventLog
from predictflow.demo.live import Findings
from predictflow.demo.proof import Proof, lost_events

GOOD = Proof(checked=10, different=0, stale=0, not_checked=0, examples=[], lost_events=0, dead_lettered=2)

SCHEMA = pa.schema(
    [
        *((n, pa.string()) for n in ("event_id", "customer_id", "event_type")),
        *((n, pa.int64()) for n in ("quantity", "amount_cents")),
        ("event_timestamp", UTC_MICROS),
        *LOG_FIELDS,
    ]
)


def test_a_proof_with_nothing_wrong_holds() -> None:
    assert GOOD.failure(2) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"checked": 0},
        {"different": 1, "examples": ["C1 charges"]},
        {"stale": 3},
        {"not_checked": 1},
        {"lost_events": 1},
        {"dead_lettered": 1},
    ],
)
def test_anything_wrong_fails_it_and_is_said(wrong: dict[str, object]) -> None:
    failure = dataclasses.replace(GOOD, **wrong).failure(2)
    assert failure is not None
    for name, value in wrong.items():
        if name != "checked":
            shown = str(value[0]) if isinstance(value, list) else str(value)
            assert shown in failure.format_message()


def sent(number: int) -> dict[str, object]:
    at = datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=number)
    facts = {"event_id": f"E{number}", "customer_id": "C1", "event_type": "sale", "quantity": number, "amount_cents": 5}
    return {**facts, "event_timestamp": at}


def test_an_event_is_lost_that_the_log_lacks_or_counts_twice_but_not_for_standing_in_two_files(tmp_path: Path) -> None:
    log = EventLog(tmp_path / "customer_events" / "stream", "t")

    def append(offset: int, number: int, dropped: str | None = None) -> None:
        added = {"_topic_id": "x", "_partition": 0, "_offset": offset, "_visible_at": sent(number)["event_timestamp"]}
        log.append(pa.Table.from_pylist([{**sent(number), **added, "_watermark": None, "_dropped": dropped}], SCHEMA))

    for i in range(3):
        append(i, i)
    found = Findings(sent=[sent(i) for i in range(3)])
    assert lost_events(tmp_path, found) == 0
    log.compact(0, 0, at_least=2)
    assert len(list(log.directory.glob("*.parquet"))) == 4
    assert lost_events(tmp_path, found) == 0
    append(3, 0, "duplicate")
    assert lost_events(tmp_path, found) == 0
    append(4, 0)
    assert lost_events(tmp_path, found) == 1
    found.sent += [sent(0), sent(7)]
    assert lost_events(tmp_path, found) == 1
