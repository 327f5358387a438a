"""The examples of Flink's "Windowing TVF" page give the documented results, closed window by closed window.

Their Bid table, with the documented watermark `bidtime - INTERVAL '1' SECOND`. An entity stands for all bids where the
example does not group by item, since a feature always has a key. The price is in cents: DECIMAL(10, 2) is not offered.
"""

from __future__ import annotations

import pytest
from window_cases import MINUTE, SECOND, Topic, at

COLUMNS = {"price": "int64", "item": "string"}
BIDS = [
    ("08:05", 400, "C", "supplier1"),
    ("08:07", 200, "A", "supplier1"),
    ("08:09", 500, "D", "supplier2"),
    ("08:11", 300, "B", "supplier2"),
    ("08:13", 100, "E", "supplier1"),
    ("08:17", 600, "F", "supplier2"),
]
SESSION_BIDS = [("08:07", 400, "A"), ("08:06", 200, "A"), ("08:09", 500, "B"), ("08:08", 300, "A"), ("08:17", 100, "B")]


def clock(text: str) -> int:
    return at(f"2020-04-15 {text}")


def bids(sql: str, key: str = "all") -> Topic:
    topic = Topic(sql, COLUMNS, lateness_us=SECOND)
    for time, price, item, supplier in BIDS:
        topic.send(clock(time), entity=supplier if key == "supplier" else "all", price=price, item=item)
    return topic


def closing(topic: Topic, end: str, entity: str = "all") -> int | None:
    """The sum when the watermark has just reached the end of a window (by the clock, as in a silent partition)."""
    t = clock(end) + SECOND
    topic.send(0, idle=clock(end), visible_at=t)
    return topic.read(t, entity)["s"]


TUMBLE = (
    "SELECT k, SUM(price) AS s FROM TABLE(TUMBLE(TABLE Bid, DESCRIPTOR(event_timestamp), INTERVAL '10' MINUTES)) "
    "GROUP BY k, window_start, window_end EMIT ON WINDOW CLOSE"
)
HOP = (
    "SELECT k, SUM(price) AS s FROM TABLE(HOP(TABLE Bid, DESCRIPTOR(event_timestamp), INTERVAL '5' MINUTES, "
    "INTERVAL '10' MINUTES)) GROUP BY k, window_start, window_end EMIT ON WINDOW CLOSE"
)
SESSION = (
    "SELECT k, SUM(price) AS s FROM TABLE(SESSION(TABLE Bid PARTITION BY k, DESCRIPTOR(event_timestamp), "
    "INTERVAL '5' MINUTES)) GROUP BY k, window_start, window_end EMIT ON WINDOW CLOSE"
)


def test_tumble():
    topic = bids(TUMBLE)
    assert topic.read(clock("08:11"), "all")["s"] == 1100  # [08:00, 08:10)
    assert topic.read(clock("08:17"), "all")["s"] == 1100
    assert closing(topic, "08:20") == 1000  # [08:10, 08:20)


def test_tumble_by_supplier():
    """The GROUPING SETS ((supplier_id), ()) example of "Window Aggregation", its rows with a supplier."""
    topic = bids(TUMBLE, "supplier")
    assert [topic.read(clock("08:11"), s)["s"] for s in ("supplier1", "supplier2")] == [600, 500]
    assert [closing(topic, "08:20", s) for s in ("supplier1", "supplier2")] == [100, 900]


@pytest.mark.parametrize(("end", "total"), [("08:20", 1000), ("08:25", 600), ("08:30", None)])
def test_hop(end, total):
    topic = bids(HOP)
    assert topic.read(clock("08:11"), "all")["s"] == 1100  # [08:00, 08:10)
    assert topic.read(clock("08:17"), "all")["s"] == 1500  # [08:05, 08:15)
    assert closing(topic, end) == total


def test_a_window_is_not_closed_before_the_watermark_is_at_its_end():
    topic = Topic(TUMBLE, COLUMNS, lateness_us=SECOND)
    topic.send(clock("08:05"), price=400)
    for end, expected in [("08:09:59.999999", None), ("08:10", 400)]:
        t = clock(end) + SECOND
        topic.send(0, idle=clock(end), visible_at=t)
        assert topic.read(t)["s"] == expected


def sessions(key: str) -> Topic:
    topic = Topic(SESSION, COLUMNS, lateness_us=2 * MINUTE)
    visible = clock("08:09")
    for time, price, item in SESSION_BIDS:
        visible = max(visible + 1, clock(time))
        topic.send(clock(time), visible_at=visible, entity=item if key == "item" else "all", price=price, item=item)
    return topic


def advance(topic: Topic, to: int) -> int:
    t = max(r.visible_at for r in topic.rows) + 1
    t = max(t, to)
    topic.send(0, idle=to, visible_at=t)
    return t


def test_session_by_item():
    """A: [08:06, 08:13) 9.00; B: [08:09, 08:14) 5.00 and [08:17, 08:22) 1.00."""
    topic = sessions("item")
    t = clock("08:17")
    assert [topic.read(t, i)["s"] for i in "AB"] == [900, 500]
    t = advance(topic, clock("08:22") + 1)
    assert [topic.read(t, i)["s"] for i in "AB"] == [900, 100]


def test_session_of_all():
    """[08:06, 08:14) 14.00 and [08:17, 08:22) 1.00."""
    topic = sessions("all")
    assert topic.read(clock("08:17"), "all")["s"] == 1400
    assert topic.read(advance(topic, clock("08:22") + 1), "all")["s"] == 100
