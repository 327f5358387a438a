"""A topic that is not the one of before: made again, with more partitions, or without the messages that are wanted."""

from __future__ import annotations

import pytest
from stream_support import (
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
    some_events,
    values,
)

from feature_store.errors import DataError
from feature_store.sync import Sync, SyncOptions
from feature_store.topic import client_config, commit_group, end_offsets, ensure_topic, partitions_of

pytestmark = pytest.mark.kafka


def make_again(project) -> None:
    from confluent_kafka.admin import AdminClient

    admin = AdminClient(client_config(project.kafka))
    admin.delete_topics([project.topic])[project.topic].result(30)
    wait_until(lambda: not partitions_of(client_config(project.kafka), project.topic))


def test_offsets_that_the_topic_no_longer_holds_stop_the_stream(project):
    config = client_config(project.kafka)
    ensure_topic(config, project.topic)
    assert end_offsets(config, project.topic) == {0: 0}
    commit_group(config, project.group, project.topic, {0: 1000})
    with pytest.raises(DataError, match="no longer holds"):
        Sync(project.store, SyncOptions(project.kafka, str(project.offline), "replay")).run()


def test_a_topic_that_was_made_again_stops_the_stream_until_it_is_started_over(project):
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(1, "C1", T0))])
        wait_until(lambda: handled(consumer) == 1)
    make_again(project)
    with pytest.raises(DataError, match="deleted and made again"), project.syncing():
        pass
    write_history(project.offline, [event(1, "C1", T0)])  # what the old topic held comes by backfill
    with pytest.raises(DataError, match="deleted and made again"):
        project.bootstrap()
    shown = command("windows", "bootstrap", "--known-by", T0.isoformat(), "--rewind", "--dry-run").output
    assert "1 log rows in 1 files" in shown
    assert "1 of them are no longer in the topic" in shown
    project.bootstrap(rewind=True)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(event(2, "C1", T0 + HOUR))])
        wait_until(lambda: handled(consumer) == 1)
    assert values(project, ["C1"])[0]["events_7d"] == 2


def test_a_topic_made_again_is_noticed_also_where_nothing_was_logged(project):
    """The states came from history, and the group's offsets are of the old topic."""
    write_history(project.offline, [event(1, "C1", T0)])
    project.bootstrap()
    make_again(project)
    with pytest.raises(DataError, match="deleted and made again"), project.syncing():
        pass


def test_a_topic_that_is_made_again_while_it_is_read_stops_the_stream(project):
    """Also where its offsets reach beyond what was read, so that reading on looks like more of the same."""
    write_history(project.offline, [event(0, "C1", T0 - HOUR)])
    project.bootstrap()

    def read_both() -> None:
        with project.syncing() as consumer:
            produce(project.kafka, project.topic, [message(event(n, "C1", T0 + HOUR)) for n in range(1, 4)])
            wait_until(lambda: handled(consumer) == 3)
            make_again(project)
            ensure_topic(client_config(project.kafka), project.topic)
            produce(project.kafka, project.topic, [message(event(10 + n, "C1", T0 + 2 * HOUR)) for n in range(20)])
            wait_until(consumer.finished.is_set)

    with pytest.raises(DataError, match="deleted and made again"):
        read_both()
    project.bootstrap(rewind=True)  # with what was read of the new topic before that was noticed
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 20)
    assert log_of(project).read()["_offset"].to_pylist() == list(range(20))
    assert values(project, ["C1"])[0]["events_7d"] == 21


def test_a_topic_that_got_partitions_stops_the_stream_until_states_are_rebuilt(project):
    """Keys move to other partitions: two consumers could write one entity's state at once."""
    from confluent_kafka.admin import AdminClient, NewPartitions

    write_history(project.offline, [event(i, c, T0 - HOUR) for i, c in enumerate(CUSTOMERS)])
    project.bootstrap()
    events = some_events(30, seed=6)
    with project.syncing() as consumer:
        produce(project.kafka, project.topic, [message(e) for e in events[:15]])
        wait_until(lambda: handled(consumer) == 15)
    admin = AdminClient(client_config(project.kafka))
    admin.create_partitions([NewPartitions(project.topic, 3)])[project.topic].result(30)
    wait_until(lambda: len(partitions_of(client_config(project.kafka), project.topic)) == 3)
    produce(project.kafka, project.topic, [message(e) for e in events[15:]])
    with pytest.raises(DataError, match="another number of partitions") as e, project.syncing():
        pass
    assert "predictflow windows bootstrap customer_behavior" in e.value.message
    assert log_of(project).read().num_rows == 15

    project.bootstrap(clock_of(project))
    with project.syncing() as consumer:
        wait_until(lambda: handled(consumer) == 15)
    assert values(project) == project.history(CUSTOMERS, clock_of(project))
    assert project.check(project.served(CUSTOMERS)).different == 0
    assert sum(v["events_7d"] for v in values(project)) > 0
