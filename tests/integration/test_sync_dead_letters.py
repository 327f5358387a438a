"""Messages that cannot be taken, and those that are sent again."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from datetime import timedelta

import pyarrow as pa
import pytest
from stream_support import (
    EVENT_SCHEMA,
    SQL,
    T0,
    event,
    message,
    produce,
    wait_until,
)
from sync_support import (
    command,
    handled,
    in_partitions,
    outcomes,
    values,
)

from feature_store.dead_letters import read_dead_letters
from feature_store.topic import client_config, end_offsets, ensure_topic
from feature_store.windows.definition import definition_of

pytestmark = pytest.mark.kafka


def test_bad_messages_become_dead_letters_and_never_stop_the_stream(project):
    key, good = message(event(1, "C1", T0))
    row = json.loads(good)
    bad = [
        (key, b"{not json"),
        (key, None),
        (key, b"\xff\xfe\x00"),
        (key, b"[1, 2]"),
        (b"C2", good),
        (None, good),
        (key, json.dumps({k: v for k, v in row.items() if k != "quantity"}).encode()),
        (key, json.dumps({**row, "quantity": True}).encode()),
        (key, json.dumps({**row, "quantity": 2**63}).encode()),
        (key, json.dumps({**row, "customer_id": 17}).encode()),
        (key, json.dumps({**row, "event_timestamp": "yesterday"}).encode()),
        (key, json.dumps({**row, "event_timestamp": "2024-03-01T00:00:05.000001Z"}).encode()),  # 5 s ahead are allowed
        (key, b"x" * 900_000),
    ]
    pending = json.dumps({**row, "event_id": "p", "event_timestamp": "2024-03-01T00:00:05Z"}).encode()
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [*bad, (key, good), (key, pending)])
        wait_until(lambda: handled(consumer) >= len(bad) + 2)
    assert outcomes(consumer) == {
        "applied": 2,
        "duplicate": 0,
        "replayed": 0,
        "dropped": 0,
        "dead_lettered": len(bad),
        "erased": 0,
    }
    letters = list(read_dead_letters(client_config(project.kafka), project.topic))
    assert [(x.key, x.value) for x in letters] == bad
    assert [x.offset for x in letters] == list(range(len(bad)))
    assert {x.topic for x in letters} == {project.topic}
    assert "quantity" in letters[6].reason
    assert "ahead of the clock" in letters[11].reason
    assert values(project, ["C1"])[0]["events_7d"] == 1  # the pending one does not count yet
    assert project.served(["C1"], T0 + timedelta(seconds=5))[0]["features"]["events_7d"]["value"] == 2
    shown = command("dlq", "list")
    assert f"{len(bad)} dead letter(s)" in shown.output
    (first, *_) = command("dlq", "list", "--json").output.splitlines()
    assert json.loads(first)["value"] == "{not json"


def test_a_value_that_cannot_be_computed_is_its_message_s_fault_alone(project, monkeypatch):
    """An overflow within a row's expression: found by halving the batch."""
    from feature_store.event_numbers import EventNumbers

    sql = SQL.replace("SUM(quantity) OVER w7", "SUM(quantity * 9000000000000000) OVER w7")
    definition = replace(definition_of(project.view), sql=sql)
    numbers = EventNumbers(definition)
    rows = [event(i, "C1", T0) | {"quantity": 5000 if i in (3, 8) else 1} for i in range(10)]
    found, refused = numbers.of(pa.Table.from_pylist(rows, EVENT_SCHEMA))
    assert [i for i, _ in refused] == [3, 8]
    assert "cannot be computed" in refused[0][1]
    assert found["_v0"].tolist() == [0 if i in (3, 8) else 9_000_000_000_000_000 for i in range(10)]


def test_a_dead_letter_is_sent_again_once(project):
    key, good = message(event(1, "C1", T0))
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [(key, b"{not json"), (b"C2", good), (key, good)])
        wait_until(lambda: handled(consumer) == 3)
        assert "would be sent" in command("dlq", "replay", "--dry-run").output
        assert handled(consumer) == 3
        command("dlq", "replay", exit_code=2)
        assert "1 message(s) sent again" in command("dlq", "replay", "--yes", "--key", "C2").output
        wait_until(lambda: handled(consumer) == 4)  # refused again, and so a new letter
        assert "0 message(s) sent again, 1 were before" in command("dlq", "replay", "--yes", "--offset", "1").output
        assert (
            "2 message(s) sent again"
            in command("dlq", "replay", "--yes", "--again", "--offset", "0", "--offset", "1").output
        )
        wait_until(lambda: handled(consumer) == 6)
        # What was refused again is the same message: without a filter nothing goes a second time.
        assert "0 message(s) sent again, 2 were before" in command("dlq", "replay", "--yes").output
        assert handled(consumer) == 6
    letters = read_dead_letters(client_config(project.kafka), project.topic)
    assert len(letters) == 5
    assert len({x.identity for x in letters}) == 2
    assert [(x.offset, x.replayed) for x in letters[:2]] == [(0, True), (1, True)]
    assert all(x.value in (b"{not json", good) for x in letters)
    assert "(replayed)" in command("dlq", "list", "--reason", "not JSON").output
    assert "\\x00" in command("dlq", "list").output or "{not json" in command("dlq", "list").output
    assert "0 dead letter(s)" in command("dlq", "list", "--view", "nonsense").output


def test_a_dead_letter_is_sent_again_to_the_partition_it_came_in(project):
    """Whatever our client would choose for its key: else its entity's events would stand in two partitions."""
    ensure_topic(client_config(project.kafka), project.topic, 3)
    with project.syncing() as consumer:
        in_partitions(project, *((p, (b"C1", b"{not json")) for p in range(3)))
        wait_until(lambda: handled(consumer) == 3)
        assert "3 message(s) sent again" in command("dlq", "replay", "--yes").output
        wait_until(lambda: handled(consumer) == 6)
    assert end_offsets(client_config(project.kafka), project.topic) == {0: 3, 1: 3, 2: 3}  # a transaction's mark counts
    letters = read_dead_letters(client_config(project.kafka), project.topic)
    assert Counter(x.partition for x in letters) == {0: 2, 1: 2, 2: 2}
