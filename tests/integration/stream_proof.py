"""Events that flow into two windowed views while things go wrong, and what must be true in the end.

Online values equal history's SQL over the log and a count by hand over what was produced; the log holds every offset, and
what it holds of one offset twice is the same.
"""

from __future__ import annotations

import random
import shutil
import signal
import subprocess
import threading
import time
from datetime import datetime, timedelta

import duckdb
import pyarrow as pa
import pytest
from stream_support import DAY, T0, UTC_US, event, make_project, message, produce, wait_until, write_history

from feature_store.clock import from_micros
from feature_store.event_log import EventLog, log_files
from feature_store.online_reader import OnlineReader
from feature_store.read_plan import ReadPlan
from feature_store.redis_connection import connect
from feature_store.replay_clock import ReplayClock
from feature_store.topic import client_config, ensure_topic
from feature_store.windows.declare import event_source, windowed_feature_view
from feature_store.windows.definition import definition_of
from feature_store.windows.history import history_sql

PARTITIONS = 3
CUSTOMERS = [f"C{i}" for i in range(8)]
MORE = """
SELECT customer_id, COUNT(*) AS day_n, SUM(quantity) AS day_sum, COUNT(DISTINCT event_type) AS day_types,
       AVG(quantity) AS day_avg, LAST(amount_cents) AS day_last
FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' DAY)) GROUP BY customer_id, window_start, window_end;
SELECT customer_id, COUNT(*) AS hop_n, SUM(amount_cents) AS hop_sum, STDDEV(quantity) AS hop_dev
FROM TABLE(HOP(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' HOUR, INTERVAL '12' HOUR))
GROUP BY customer_id, window_start, window_end EMIT ON WINDOW CLOSE;
SELECT customer_id, COUNT(*) AS session_n, SUM(quantity) AS session_sum, MIN(quantity) AS session_min
FROM TABLE(SESSION(TABLE events PARTITION BY customer_id, DESCRIPTOR(event_timestamp), INTERVAL '6' HOUR))
GROUP BY customer_id, window_start, window_end;
SELECT customer_id, COUNT(*) AS closed_n
FROM TABLE(SESSION(TABLE events PARTITION BY customer_id, DESCRIPTOR(event_timestamp), INTERVAL '6' HOUR))
GROUP BY customer_id, window_start, window_end EMIT ON WINDOW CLOSE
"""


def project_of_two_views(
    tmp_path, postgres_url, redis_url, kafka, topic, monkeypatch, clock: str = "replay", start: datetime = T0
):
    """The views that are fed, every kind of window among them, over a little history that is bootstrapped, up to `start`."""
    made = make_project(tmp_path, postgres_url, redis_url, kafka, topic, monkeypatch, clock=clock)
    ensure_topic(client_config(kafka), topic, partitions=PARTITIONS)
    source = event_source(
        topic=topic,
        columns={"event_type": "string", "quantity": "int64", "amount_cents": "int64"},
        event_id="event_id",
        retention=3 * DAY,
        allowed_lateness=timedelta(hours=1),
    )
    view = windowed_feature_view(
        name="customer_windows",
        entity=made.store.get_entity("customer"),
        source=source,
        path="customer_windows",
        sql=MORE,
        history_sql="SELECT * FROM events",
        ttl=60 * DAY,
    )
    made.store.apply([view])
    made.store.refresh_registry()
    write_history(
        made.offline, [event(10_000_000 + i, CUSTOMERS[i % 8], start - timedelta(hours=i)) for i in range(40)]
    )
    shutil.copytree(made.offline / "customer_events", made.offline / "customer_windows")
    made.bootstrap(start)
    return made


class Flow:
    """Produces events all the time, in a thread: some out of order, some late, some again with their id.

    `minute`: what stands for it in the times, so that they stay behind the machine's clock where that matters.
    """

    def __init__(self, project, seed: int, start: datetime = T0, minute: timedelta = timedelta(minutes=1)) -> None:
        self.project, self.random = project, random.Random(seed)
        self.events: list[dict] = []
        self.at, self._minute = start, minute
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Flow:
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.is_set():
            self.send(self.random.choice([1, 1, 2, 20]))
            self._stop.wait(self.random.choice([0.01, 0.05, 0.2]))

    def send(self, n: int) -> None:
        r = self.random
        fresh = []
        for _ in range(n):
            self.at += self._minute * r.choice([0, 0, 1, 3])
            happened = self.at - timedelta(minutes=r.choice([0, 0, 0, 30, 200, 6000]))
            again = bool(self.events) and r.random() < 0.05
            customer = r.choice(CUSTOMERS)
            kind = r.choice(["ticket", "usage", "visit"])
            new = event(len(self.events), customer, happened, self.at, kind, r.randint(-3, 9))
            self.events.append(r.choice(self.events[-30:]) if again else new)
            fresh.append(self.events[-1])
        produce(self.project.kafka, self.project.topic, [message(e) for e in fresh])


VIEWS = ("customer_behavior", "customer_windows")
DIRECTORIES = {"customer_behavior": "customer_events", "customer_windows": "customer_windows"}


def log_of(project, view: str) -> EventLog:
    return EventLog(project.offline / DIRECTORIES[view] / "stream", project.topic)


def logged(project) -> int:
    """How far the second view's log is: the greatest offset of each partition, from the names of the files."""
    newest: dict[int, int] = {}
    for f in log_of(project, VIEWS[1]).files():
        newest[f.partition] = max(newest.get(f.partition, 0), f.last + 1)
    return sum(newest.values())


def read_to_the_end(project, view: str, events: int) -> bool:
    newest: dict[int, int] = {}
    for f in log_of(project, view).files():
        newest[f.partition] = max(newest.get(f.partition, 0), f.last + 1)
    return sum(newest.values()) == events


def finish(project, consumer: subprocess.Popen, events: int) -> None:
    """Lets a consumer read to the end of the topic, and ends it."""
    wait_until(lambda: all(read_to_the_end(project, view, events) for view in VIEWS), 180)
    time.sleep(2)  # the values of the last batch follow its log rows
    consumer.send_signal(signal.SIGTERM)
    _, errors = consumer.communicate(timeout=120)
    assert consumer.returncode == 0, errors


def check_all(project, events: list[dict], start: datetime = T0) -> None:
    """The log holds every event, and online values equal history's SQL and a count by hand."""
    for view in VIEWS:
        check_log(project, view, len(events))
    check_values(project, events, start)


def check_log(project, view: str, events: int) -> None:
    """Every offset of the topic is there; rows that stand in two files (a killed batch, made again) are the same."""
    with duckdb.connect() as con:
        files = [str(f.path) for f in log_of(project, view).files()]
        con.execute("CREATE TABLE rows_of AS SELECT * FROM read_parquet($1, union_by_name => true)", [files])
        total, differing = con.execute(
            "SELECT count(*), count(*) FILTER (kinds > 1) FROM (SELECT _partition, _offset, "
            "count(DISTINCT (_visible_at, _watermark, _dropped, event_id, event_timestamp, quantity)) AS kinds "
            "FROM rows_of GROUP BY ALL)"
        ).fetchone()
        assert (total, differing) == (events, 0)
        gaps = con.execute(
            "SELECT _partition FROM rows_of GROUP BY 1 HAVING min(_offset) <> 0 OR max(_offset) + 1 <> count(DISTINCT _offset)"
        ).fetchall()
        assert gaps == []


def check_values(project, events: list[dict], start: datetime = T0) -> None:
    redis = connect(project.environ["REDIS_URL"])
    at = None
    if project.clock == "replay":
        at = from_micros(ReplayClock(redis, project.store.project).now_us())
    unique = {e["event_id"]: e for e in events}.values()
    for view in VIEWS:
        t, online = read(project, view, at)
        history = history_of(project, view, t)
        for customer, a, b in zip(CUSTOMERS, online, history, strict=True):
            for name in a:
                if None in (a[name], b[name]):
                    assert a[name] == b[name], (view, customer, name, t, a, b)
                else:
                    assert a[name] == pytest.approx(b[name], rel=1e-9), (view, customer, name, t, a, b)
        if view == "customer_behavior":
            for customer, got in zip(CUSTOMERS, online):
                mine = [e for e in unique if e["customer_id"] == customer and t - 7 * DAY <= e["event_timestamp"] <= t]
                past = [
                    start - timedelta(hours=i)
                    for i in range(40)
                    if CUSTOMERS[i % 8] == customer and start - timedelta(hours=i) >= t - 7 * DAY
                ]
                assert got["events_7d"] == len(mine) + len(past)
                total = sum(e["quantity"] for e in mine) + len(past)
                assert got["quantity_7d"] == (total if mine or past else None)


def read(project, view: str, at: datetime | None) -> tuple[datetime, list[dict]]:
    """The time of the values (None: the machine's clock says it), and the values of every customer."""
    names = [o.name for o in definition_of(project.store.get_feature_view(view)).outputs]
    plan = ReadPlan.compile(project.store, [f"{view}:{n}" for n in names])
    reader = OnlineReader(plan, connect(project.environ["REDIS_URL"]), project.store.project, project.clock)
    rows = reader.read([{"customer_id": c} for c in CUSTOMERS], at)
    assert at in (None, rows.t)
    assert not any(s in ("INVALID",) for r in rows.rows for s in r.statuses.values())
    return rows.t, [{n: r.values[n] for n in names} for r in rows.rows]


def history_of(project, view: str, t: datetime) -> list[dict]:
    definition = definition_of(project.store.get_feature_view(view))
    with duckdb.connect() as con:
        files = log_files(project.offline / DIRECTORIES[view])
        con.execute("CREATE TABLE event_rows AS SELECT * FROM read_parquet($1, union_by_name => true)", [files])
        asked = pa.table(
            {"_row": range(len(CUSTOMERS)), "customer_id": CUSTOMERS, "_t": [t] * len(CUSTOMERS)},
            schema=pa.schema([("_row", pa.int64()), ("customer_id", pa.string()), ("_t", UTC_US)]),
        )
        con.register("asked_rows", asked)
        rows = con.sql(history_sql(definition, "asked_rows", "event_rows")).to_arrow_table().to_pylist()
    names = [o.name for o in definition.outputs]
    return [{n: r[n] for n in names} for r in sorted(rows, key=lambda r: r["_row"])]
