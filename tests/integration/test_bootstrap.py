"""Online state from history: what `predictflow windows bootstrap` refuses, and where the stream goes on."""

from __future__ import annotations

import pytest
from stream_support import (
    DAY,
    FEATURES,
    T0,
    event,
    message,
    produce,
    wait_until,
    write_history,
)
from sync_support import (
    CUSTOMERS,
    HOUR,
    clock_of,
    command,
    handled,
    log_of,
    outcomes,
    some_events,
    values,
)

from feature_store.errors import DataError, UnavailableError

pytestmark = pytest.mark.kafka


def test_bootstrap_refuses_to_forget_the_stream_unless_told_to_rewind(project):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    events = some_events(40, seed=4)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events])
        wait_until(lambda: handled(consumer) == len(events))
    after = values(project)
    with pytest.raises(DataError, match="known after known_by"):
        project.bootstrap()
    later = clock_of(project)
    (again,) = project.bootstrap(later)  # history and stream together give the state that the stream had
    assert again.starts == {0: len(events)}
    assert values(project) == after

    plan = ["windows", "bootstrap", "--known-by", T0.isoformat(), "--rewind"]
    assert "--dry-run" in command(*plan, exit_code=2).output
    shown = command(*plan, "--dry-run").output
    assert f"{len(events)} log rows in" in shown
    assert f"(offsets of partition 0: 0 to {len(events) - 1})" in shown
    assert values(project) == after
    assert log_of(project).read().num_rows == len(events)

    (rewound,) = project.bootstrap(rewind=True)
    assert (rewound.entities, rewound.forgotten, rewound.starts) == (3, len(events), {0: 0})
    assert clock_of(project) == T0
    assert log_of(project).read() is None
    assert [v["events_7d"] for v in values(project)] == [1, 1, 1, None, None, None]
    with project.syncing() as consumer:  # the topic still holds them
        wait_until(lambda: handled(consumer) == len(events))
    assert values(project) == after
    assert project.check(project.served(CUSTOMERS)).different == 0


def test_a_running_group_is_left_alone_before_anything_changes(project):
    write_history(project.offline, [event(i, CUSTOMERS[i], T0 - HOUR) for i in range(3)])
    project.bootstrap()
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(100, "C1", T0 + HOUR))])
        wait_until(lambda: handled(consumer) == 1)
        after = values(project)
        for options in ({"rewind": True}, {"known_by": T0 + DAY}):
            with pytest.raises(UnavailableError, match="stop `predictflow sync`"):
                project.bootstrap(**options)
        assert values(project) == after
        assert log_of(project).read().num_rows == 1
        assert clock_of(project) == T0 + HOUR


def test_bootstrap_starts_at_the_first_message_that_history_may_lack(project):
    """History and topic overlap, as they do when the producer ran before the first bootstrap."""
    produced = [
        event(0, "C0", T0 - 50 * DAY),
        event(1, "C1", T0 - 2 * DAY),
        event(2, "C2", T0 - 2 * HOUR),
        event(3, "C3", T0 - 3 * DAY, T0 - HOUR),  # the newest of history
        event(4, "C1", T0 - 3 * HOUR, T0 - HOUR / 2),  # late: the first that history lacks, though before known_by
        event(5, "C0", T0 - 40 * DAY),  # of history, but behind newer ones: recognised by its id, or too old to count
        event(6, "C2", T0 - 2 * DAY),
        event(7, "C2", T0 + HOUR),
    ]
    write_history(project.offline, [e for e in produced if e["created"] <= T0 - HOUR])
    bad = (b"C1", b"{not json")
    messages = [message(e) for e in produced]
    produce(project.kafka, project.topic, [messages[0], bad, *messages[1:4], bad, *messages[4:]])
    (done,) = project.bootstrap(start="known_by")
    assert done.starts == {0: 5}
    records = project.served(CUSTOMERS)
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 5)
    assert outcomes(consumer)["dead_lettered"] == 1
    assert [v["events_7d"] for v in values(project)] == [0, 2, 3, 1, None, None]
    for days in (0, 5, 8, 31):
        at = clock_of(project) + days * DAY
        served = project.served(CUSTOMERS, at)
        records += served
        assert [{f: r["features"][f]["value"] for f in FEATURES} for r in served] == project.history(CUSTOMERS, at)
    result = project.check(records)
    assert (result.checked, result.different) == (len(records) * len(FEATURES), 0), result.examples
    (again,) = project.bootstrap(clock_of(project))
    assert again.starts == {0: 10}
    assert values(project) == project.history(CUSTOMERS, clock_of(project))


def test_bootstrap_at_the_end_skips_what_the_topic_holds(project):
    write_history(project.offline, [event(0, "C0", T0 - HOUR)])
    produce(project.kafka, project.topic, [message(event(n, "C1", T0 + n * HOUR)) for n in range(1, 4)])
    assert project.bootstrap(start="end")[0].starts == {0: 3}
    assert project.bootstrap()[0].starts == {0: 0}


def test_bootstrap_before_the_end_of_history_is_refused(project):
    """Its later events would be in history and not in the states."""
    write_history(project.offline, [event(i, "C1", T0 - i * HOUR) for i in range(3)])
    with pytest.raises(DataError, match="history holds events known after known_by"):
        project.bootstrap(T0 - HOUR)


def test_bootstrap_without_history_says_how_to_get_it(project):
    with pytest.raises(DataError, match="predictflow backfill"):
        project.bootstrap()
