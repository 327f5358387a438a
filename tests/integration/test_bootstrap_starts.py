"""Where streaming starts after a bootstrap: each view from the end of its own history, the group from what is not done."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from stream_support import (
    DAY,
    T0,
    event,
    message,
    produce,
    wait_until,
    write_history,
)

from feature_store.errors import DataError
from feature_store.event_log import EventLog, log_files
from feature_store.topic import client_config, commit_group, committed_offsets
from feature_store.topic_record import read_record
from feature_store.windows.declare import event_source, windowed_feature_view

HOUR = timedelta(hours=1)


def add_counting_view(project) -> None:
    """A second view of the topic, which cannot recognise an event by its id."""
    view = windowed_feature_view(
        name="counts",
        entity=project.store.get_entity("customer"),
        source=event_source(topic=project.topic, columns={"quantity": "int64"}, retention=timedelta(days=100)),
        path="counts",
        sql="""SELECT customer_id, COUNT(*) AS n FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(event_timestamp),
               INTERVAL '365' DAYS)) GROUP BY customer_id, window_start, window_end""",
        ttl=timedelta(days=400),
    )
    project.store.apply([view])
    project.store.refresh_registry()


def history_of(project, path: str, events: list[dict]) -> None:
    """What backfill leaves below another view's path."""
    own = project.offline / "customer_events" / "history" / "2024-02.parquet"
    held = own.read_bytes() if own.exists() else None
    write_history(project.offline, events)
    other = project.offline / path / "history" / own.name
    other.parent.mkdir(parents=True, exist_ok=True)
    other.write_bytes(own.read_bytes())
    own.unlink() if held is None else own.write_bytes(held)


def logged(project, path: str) -> list[int]:
    files = [f for f in log_files(project.offline / path) if Path(f).parent.name == "stream"]
    return sorted(o for f in files for o in pq.read_table(f)["_offset"].to_pylist())


def test_a_view_with_more_history_does_not_count_it_again_when_the_topic_brings_it(project):
    add_counting_view(project)
    events = [event(n, "C1", T0 - (6 - n) * HOUR) for n in range(5)]
    write_history(project.offline, events[:2])
    history_of(project, "counts", events[:4])
    produce(project.kafka, project.topic, [message(e) for e in events])
    assert sorted(b.starts[0] for b in project.bootstrap()) == [2, 4]
    assert committed_offsets(client_config(project.kafka), project.group, project.topic, [0]) == {0: 2}
    with project.syncing():
        wait_until(lambda: logged(project, "customer_events") == [2, 3, 4])
        wait_until(lambda: logged(project, "counts") == [4])
    read = project.store.get_online_features(["counts:n"], [{"customer_id": "C1"}]).to_dict()
    assert read["n"] == [5]


def test_what_the_group_has_not_finished_is_read_again(project):
    write_history(project.offline, [event(0, "C1", T0 - 3 * HOUR)])
    produce(project.kafka, project.topic, [message(event(n, "C1", T0 - HOUR + n * HOUR / 60)) for n in range(1, 5)])
    project.bootstrap()
    with project.syncing():
        wait_until(lambda: logged(project, "customer_events") == [0, 1, 2, 3])
    config = client_config(project.kafka)
    commit_group(config, project.group, project.topic, {0: 2})  # as after a kill between the log and the commit
    (done,) = project.bootstrap(T0 + HOUR)
    assert done.starts == {0: 4}
    assert committed_offsets(config, project.group, project.topic, [0]) == {0: 2}
    log = EventLog(project.offline / "customer_events" / "stream", project.topic)
    record = read_record(log)
    assert record is not None
    assert record.starts == {0: 4}
    with project.syncing():
        produce(project.kafka, project.topic, [message(event(9, "C1", T0 + 2 * HOUR))])
        wait_until(lambda: logged(project, "customer_events") == [0, 1, 2, 3, 4])


def test_a_bootstrap_without_a_broker_keeps_where_watermarks_start(project):
    from feature_store.bootstrap import bootstrap

    write_history(project.offline, [event(0, "C1", T0 - 3 * HOUR)])
    bootstrap(project.store, str(project.offline), T0, clock="replay")
    record = read_record(EventLog(project.offline / "customer_events" / "stream", project.topic))
    assert record is not None
    assert record.history_watermark_us == int((T0 - 3 * HOUR).timestamp() * 1_000_000)
    with project.syncing():
        produce(project.kafka, project.topic, [message(event(1, "C1", T0 + HOUR))])
        wait_until(lambda: logged(project, "customer_events") == [0])


def test_states_that_redis_lost_before_the_first_event_are_missed(project):
    from feature_store.redis_connection import connect
    from feature_store.window_store import StateLostError

    write_history(project.offline, [event(0, "C1", T0 - 3 * HOUR)])
    project.bootstrap()
    connect(project.environ["REDIS_URL"]).flushdb()
    with pytest.raises(StateLostError, match="--from-log"), project.syncing():
        pytest.fail("it started")


def test_a_new_view_of_a_topic_in_use_is_bootstrapped_first(project):
    """Else its windows would lack what came before, and nobody would know."""
    produce(project.kafka, project.topic, [message(event(n, "C1", T0 + n * HOUR)) for n in range(5)])
    write_history(project.offline, [event(9, "C1", T0 - HOUR)])
    project.bootstrap()
    with project.syncing():
        wait_until(lambda: logged(project, "customer_events") == [0, 1, 2, 3, 4])
    add_counting_view(project)
    refused = r"counts: .*middle.*partition 0 at offset 5.*windows bootstrap counts"
    with pytest.raises(DataError, match=refused), project.syncing():
        pytest.fail("it started")
    starts = {b.view: b.starts for b in project.bootstrap(T0 + DAY, views=["counts"])}
    assert starts == {"customer_behavior": {0: 5}, "counts": {0: 0}}
    with project.syncing():
        produce(project.kafka, project.topic, [message(event(10, "C1", T0 + 2 * DAY))])
        wait_until(lambda: logged(project, "counts") == [0, 1, 2, 3, 4, 5])
        wait_until(lambda: logged(project, "customer_events") == [0, 1, 2, 3, 4, 5])
    wanted = ["counts:n", "customer_behavior:events_7d"]
    read = project.store.get_online_features(wanted, [{"customer_id": "C1"}]).to_dict()
    assert (read["n"], read["events_7d"]) == ([6], [7])
