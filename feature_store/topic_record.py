"""Which topic a view's states and log were made from: its id and its number of partitions, beside the log.

Offsets mean something only within one topic, and the events of one entity are in order only as long as its key stays in
one partition. So sync refuses a topic that was made again or got partitions, and bootstrap writes the record anew.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field

from feature_store.durable import write_whole
from feature_store.errors import DataError
from feature_store.event_log import EventLog

FILE = "_topic.json"


@dataclass(frozen=True)
class TopicRecord:
    """A topic as it was: `topic_id` is '' where the broker has none.

    `history_watermark_us`: where the watermark of every partition starts, by the history that the states were made from
    (its greatest event time less the allowed lateness); None: no history. `starts`: partition -> the first offset that
    those states lack; a consumer of several views may start before it. `partitions` 0: not known yet.
    """

    topic: str
    topic_id: str
    partitions: int
    history_watermark_us: int | None = None
    starts: Mapping[int, int] = field(default_factory=dict)


def read_record(event_log: EventLog) -> TopicRecord | None:
    """The record of a log, None where there is none or it is of another topic. DataError for a damaged file."""
    path = event_log.directory / FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        watermark = stored.get("history_watermark_us")
        found = TopicRecord(
            str(stored["topic"]),
            str(stored["topic_id"]),
            int(stored["partitions"]),
            None if watermark is None else int(watermark),
            {int(p): int(o) for p, o in stored.get("starts", {}).items()},
        )
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise DataError(
            "cannot be read", value=str(path), next_step="remove it and run `predictflow windows bootstrap`"
        ) from e
    return found if found.topic == event_log.topic else None


def write_record(event_log: EventLog, record: TopicRecord) -> None:
    """Replaces the record of a log, atomically."""
    path = event_log.directory / FILE
    write_whole(path, json.dumps(asdict(record)).encode())


def refuse_other_topic(view: str, event_log: EventLog, now: str) -> None:
    """DataError when the log or its record is of a topic that was deleted and made again; `now`: its id, '' unknown."""
    record = read_record(event_log)
    before = event_log.topic_id() or (record.topic_id if record else "")
    refuse_other_id(view, event_log.topic, before, now)


def refuse_other_id(view: str, topic: str, before: str, now: str) -> None:
    """DataError when both ids of a topic are known, and differ."""
    if before and now and before != now:
        raise DataError(
            f"{view}: topic {topic} was deleted and made again since its events were logged",
            value=f"id {now}, before {before}",
            next_step=f"`predictflow windows bootstrap {view} --rewind --dry-run` shows what starting over forgets, --yes does it",
        )


def refuse_other_partitions(view: str, record: TopicRecord, partitions: int) -> None:
    """DataError when the topic has another number of partitions: keys moved, and with them the order of their events."""
    if record.partitions != partitions:
        raise DataError(
            f"{view}: topic {record.topic} has another number of partitions than when the states were made",
            value=f"{partitions}, before {record.partitions}",
            next_step="stop every sync of the group, `predictflow windows bootstrap "
            f"{view}` at the present clock, then run one sync alone until its lag is 0",
        )
