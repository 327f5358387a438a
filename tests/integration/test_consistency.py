"""The check of served rows against Parquet: equal where they are, and every kind of planted fault is seen."""

from __future__ import annotations

import copy
import json
from datetime import UTC, datetime, timedelta

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from feature_store.consistency import check, read_served, read_served_file, served_since
from feature_store.errors import DataError, NotFoundError
from feature_store.rewound import mark_rewound
from feature_store.windows.declare import event_source, windowed_feature_view

T = datetime(2024, 3, 1, tzinfo=UTC)
DAY = timedelta(days=1)
HOUR = timedelta(hours=1)
UTC_US = pa.timestamp("us", "UTC")


@pytest.fixture(scope="module")
def views():
    from feast import Entity, FeatureView, Field, FileSource, ValueType
    from feast.types import Float64, Int64, String

    customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
    source = FileSource(name="s", path="account", timestamp_field="event_timestamp", created_timestamp_column="created")
    schema = [Field(name="charges", dtype=Float64), Field(name="months", dtype=Int64), Field(name="plan", dtype=String)]
    account = FeatureView(name="account", entities=[customer], ttl=30 * DAY, schema=schema, source=source)
    account.entity_columns = [Field(name="customer_id", dtype=String)]
    return [account, behaviour_of(30 * DAY)]


def behaviour_of(ttl: timedelta):
    from feast import Entity, Field, ValueType
    from feast.types import String

    behaviour = windowed_feature_view(
        name="behaviour",
        entity=Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING),
        source=event_source(topic="events", columns={"kind": "string", "n": "int64"}, event_id="event_id"),
        path="events",
        sql="""SELECT customer_id, COUNT(*) OVER w AS count_7d, SUM(n) OVER w AS sum_7d,
                      COUNT(*) FILTER (WHERE kind IN ('ticket', 'it''s')) OVER w AS tickets_7d
               FROM events WINDOW w AS (PARTITION BY customer_id ORDER BY event_timestamp
                                        RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW)""",
        ttl=ttl,
    )
    behaviour.entity_columns = [Field(name="customer_id", dtype=String)]
    return behaviour


def account_row(customer: str, at: datetime, created: datetime, charges=1.5, months=3, plan="basic") -> dict:
    return {
        "customer_id": customer,
        "event_timestamp": at,
        "created": created,
        "charges": charges,
        "months": months,
        "plan": plan,
    }


def log_row(n: int, customer: str, at: datetime, visible: datetime, partition=0, kind="usage", dropped=None) -> dict:
    return {
        "event_id": f"e{n}",
        "customer_id": customer,
        "kind": kind,
        "n": n,
        "event_timestamp": at,
        "created": visible,
        "_topic_id": "",
        "_partition": partition,
        "_offset": n,
        "_visible_at": visible,
        "_watermark": None,
        "_dropped": dropped,
    }


LOG = pa.schema(
    [
        ("event_id", pa.string()),
        ("customer_id", pa.string()),
        ("kind", pa.string()),
        ("n", pa.int64()),
        ("event_timestamp", UTC_US),
        ("created", UTC_US),
        ("_topic_id", pa.string()),
        ("_partition", pa.int32()),
        ("_offset", pa.int64()),
        ("_visible_at", UTC_US),
        ("_watermark", UTC_US),
        ("_dropped", pa.string()),
    ]
)


@pytest.fixture
def offline(tmp_path):
    rows = [
        account_row("C1", T - 10 * DAY, T - 10 * DAY, charges=1.0),
        account_row("C1", T - DAY, T - DAY),
        account_row("C1", T - DAY, T - HOUR, charges=2.5),  # a correction
        account_row("C2", T - 40 * DAY, T - 40 * DAY),
        account_row("C3", T - DAY, T - DAY, charges=None, months=None, plan=None),
    ]
    write(tmp_path / "account" / "a.parquet", pa.Table.from_pylist(rows))
    history = [log_row(i, "C1", T - 8 * DAY + i * DAY, T - 8 * DAY + i * DAY, partition=-1) for i in range(3)]
    history.append(log_row(3, "C2", T - 40 * DAY, T - 40 * DAY, partition=-1))
    stream = [
        log_row(10, "C1", T - HOUR, T - HOUR, kind="it's"),
        {**log_row(11, "C1", T - HOUR, T - HOUR, dropped="duplicate"), "event_id": "e10"},
        log_row(12, "C1", T + HOUR, T, kind="ticket"),
        log_row(13, "C1", T - 2 * HOUR, T + 2 * HOUR),
    ]
    write(tmp_path / "events" / "history" / "h.parquet", pa.Table.from_pylist(history, LOG))
    write(tmp_path / "events" / "stream" / "s.parquet", pa.Table.from_pylist(stream, LOG))
    write(tmp_path / "events" / "stream" / "again.parquet", pa.Table.from_pylist(stream[:2], LOG))
    return tmp_path


def write(path, table: pa.Table) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path)


def record(customer: str, t: datetime, account: dict, behaviour: dict) -> dict:
    """A record of the served log; `account` and `behaviour`: status, values and what was read."""
    features, views = {}, {}
    for view, given in (("account", account), ("behaviour", behaviour)):
        for name, value in given["values"].items():
            status = given["status"]
            if status == "PRESENT" and value is None:
                status = "NULL_VALUE"
            features[name] = {"view": view, "feature": name, "value": value, "status": status, "event_timestamp": None}
        views[view] = {"event_timestamp": None, "created": None, "offsets": None, "visible_at": None, **given["read"]}
    return json.loads(
        json.dumps({"t": t, "entity": {"customer_id": customer}, "features": features, "views": views}, default=str)
    )


def of_account(status="PRESENT", charges=2.5, months=3, plan="basic", at=T - DAY, created=T - HOUR) -> dict:
    read = {"event_timestamp": at.isoformat(), "created": created.isoformat()} if at else {}
    return {"status": status, "values": {"charges": charges, "months": months, "plan": plan}, "read": read}


def of_behaviour(status="PRESENT", count=3, total=13, tickets=1, offsets=None) -> dict:
    values = {"count_7d": count, "sum_7d": total, "tickets_7d": tickets}
    return {"status": status, "values": values, "read": {"offsets": offsets}}


RIGHT = [
    record("C1", T, of_account(), of_behaviour(offsets={"-1": 2, "0": 12})),
    record("C1", T + HOUR, of_account(), of_behaviour(count=3, total=24, tickets=2, offsets={"-1": 2, "0": 12})),
    record("C1", T + 2 * HOUR, of_account(), of_behaviour(count=4, total=37, tickets=2, offsets={"-1": 2, "0": 13})),
    record("C1", T + 20 * DAY, of_account(), of_behaviour(count=0, total=None, tickets=0, offsets={"0": 13})),
    record(
        "C2",
        T,
        of_account("OUTSIDE_MAX_AGE", None, None, None, at=T - 40 * DAY, created=T - 40 * DAY),
        of_behaviour("OUTSIDE_MAX_AGE", None, None, None, offsets={"-1": 3}),
    ),
    record(
        "C3",
        T,
        of_account("PRESENT", None, None, None, created=T - DAY),
        of_behaviour("NOT_FOUND", None, None, None),
    ),
    record("C9", T, of_account("NOT_FOUND", None, None, None, at=None), of_behaviour("NOT_FOUND", None, None, None)),
]


def test_what_was_rightly_served_is_found_equal(offline, views):
    result = check(RIGHT, views, offline)
    assert (result.checked, result.different, result.stale) == (len(RIGHT) * 6, 0, 0), result.examples
    assert result.not_checked == 0


@pytest.mark.parametrize(
    ("number", "feature", "change"),
    [
        (0, "charges", {"value": 2.4999999}),
        (0, "charges", {"value": "2.5"}),
        (0, "months", {"value": None, "status": "NULL_VALUE"}),
        (0, "plan", {"value": "Basic"}),
        (0, "count_7d", {"value": 4}),
        (0, "sum_7d", {"value": True}),
        (3, "sum_7d", {"value": 0, "status": "PRESENT"}),
        (4, "charges", {"value": 1.5, "status": "PRESENT"}),
        (4, "count_7d", {"value": 0, "status": "PRESENT"}),
        (5, "charges", {"status": "NOT_FOUND"}),
        (6, "count_7d", {"value": 0, "status": "PRESENT"}),
    ],
)
def test_one_altered_value_or_status_is_one_difference(offline, views, number, feature, change):
    records = copy.deepcopy(RIGHT)
    records[number]["features"][feature].update(change)
    result = check(records, views, offline)
    assert result.different == 1
    assert result.examples[0].feature == feature


def test_a_row_that_does_not_exist_is_different_for_each_of_its_features(offline, views):
    wrong = record("C1", T, of_account(created=T - 2 * HOUR), of_behaviour(offsets={"-1": 2, "0": 12}))
    result = check([wrong], views, offline)
    assert result.different == 3
    assert result.examples[0].recomputed[0] == "NO SUCH ROW"


def test_wrong_offsets_are_seen(offline, views):
    wrong = record("C1", T, of_account(), of_behaviour(offsets={"-1": 2}))
    assert check([wrong], views, offline).different == 3


@pytest.mark.parametrize("part", ["history", "stream"])
def test_an_altered_event_is_seen(offline, views, part):
    (path,) = (offline / "events" / part).glob("[hs].parquet")
    (offline / "events" / "stream" / "again.parquet").unlink()
    rows = pq.read_table(path).to_pylist()
    for row in rows:
        row["n"] += 1
    write(path, pa.Table.from_pylist(rows, LOG))
    assert check(RIGHT[:1], views, offline).different == 1


def test_an_event_that_sync_wrongly_took_for_a_duplicate_is_seen(offline, views):
    """A consumer that ignores events logs them as dropped and serves values without them: both agree, and are wrong."""
    path = offline / "events" / "stream" / "s.parquet"
    rows = pq.read_table(path).to_pylist()
    rows[0]["_dropped"] = "duplicate"
    write(path, pa.Table.from_pylist(rows, LOG))
    served_without_it = {**RIGHT[0], **record("C1", T, of_account(), of_behaviour(count=2, total=3))}
    assert check([served_without_it], views, offline).different >= 1
    assert check(RIGHT[:1], views, offline).different == 0


def test_a_newer_row_that_was_known_is_stale_and_not_different(offline, views):
    served = record("C1", T, of_account(charges=1.5, created=T - DAY), of_behaviour(offsets={"-1": 2, "0": 12}))
    result = check([served], views, offline)
    assert (result.different, result.stale) == (0, 3)
    before = record(
        "C1", T - 2 * HOUR, of_account(charges=1.5, created=T - DAY), of_behaviour("NOT_FOUND", None, None, None)
    )
    before["features"] = {k: v for k, v in before["features"].items() if v["view"] == "account"}
    assert check([before], views, offline).stale == 0


def test_error_statuses_and_unknown_views_are_counted_apart(offline, views):
    records = copy.deepcopy(RIGHT[:1])
    records[0]["features"]["count_7d"].update(status="INVALID", value=None)
    records[0]["features"]["plan"]["view"] = "gone"
    result = check(records, views, offline)
    assert (result.checked, result.different, result.not_checked) == (4, 0, 2)
    assert result.why_not == {"status INVALID": 1, "no view gone": 1}


def test_nothing_served_is_nothing_checked(offline, views):
    assert check([], views, offline).checked == 0


def test_what_is_no_served_log_is_refused(offline, views, tmp_path):
    with pytest.raises(DataError, match="not a record of the served log"):
        check([{"t": "2024-01-01T00:00:00Z"}], views, offline)
    with pytest.raises(NotFoundError, match="no such file"):
        list(read_served_file(tmp_path / "missing"))
    (tmp_path / "bad.jsonl").write_text('{"t": 1}\n{oops\n')
    with pytest.raises(DataError, match=r"bad\.jsonl line 2"):
        list(read_served_file(tmp_path / "bad.jsonl"))
    with pytest.raises(NotFoundError, match="backfill"):
        check(RIGHT, views, tmp_path / "elsewhere")


@pytest.mark.kafka
def test_the_served_log_is_read_from_its_topic_up_to_its_end(kafka_bootstrap, topic_prefix):
    from confluent_kafka import Producer

    topic = f"{topic_prefix}served"
    assert list(read_served(kafka_bootstrap, topic)) == []
    producer = Producer({"bootstrap.servers": kafka_bootstrap})
    for i, r in enumerate(RIGHT):
        producer.produce(topic, key=str(i), value=json.dumps(r))
    assert producer.flush(30) == 0
    assert list(read_served(kafka_bootstrap, topic)) == RIGHT


@pytest.mark.parametrize("view", ["account", "events/history", "events/stream"])
@pytest.mark.parametrize("unit", ["s", "ms", "ns"])
def test_times_of_any_unit_are_compared_exactly(offline, views, view, unit):
    (path,) = (offline / view).glob("[ahs].parquet")
    table = pq.read_table(path)
    for i, field in enumerate(table.schema):
        if pa.types.is_timestamp(field.type):
            to = pa.timestamp(unit, "UTC") if unit != "ns" else pa.timestamp("ns")
            table = table.set_column(i, field.name, table[field.name].cast(to))
    write(path, table)
    result = check(RIGHT, views, offline)
    assert (result.checked, result.different, result.stale) == (len(RIGHT) * 6, 0, 0), result.examples


def test_a_nanosecond_after_t_is_not_known_at_t(offline, views):
    after = (T - HOUR).timestamp() * 10**9
    row = {"customer_id": "C1", "charges": 9.0, "months": 1, "plan": "later"}
    times = {c: pa.array([int(after) + 1], pa.timestamp("ns")) for c in ("event_timestamp", "created")}
    write(offline / "account" / "b.parquet", pa.table({**{k: [v] for k, v in row.items()}, **times}))
    early = record("C1", T - HOUR, of_account(), of_behaviour(count=3, total=13, offsets={"-1": 2, "0": 11}))
    early["features"] = {k: v for k, v in early["features"].items() if v["view"] == "account"}
    assert (check([early], views, offline).different, check([early], views, offline).stale) == (0, 0)
    assert check(RIGHT[:1], views, offline).stale == 3


@pytest.mark.parametrize("view", ["account", "events"])
@pytest.mark.parametrize("fault", ["truncated", "no Parquet", "damaged page", "column missing", "time is text"])
def test_parquet_that_cannot_be_read_is_one_error_that_names_it(offline, views, view, fault):
    path = next((offline / view).rglob("[as].parquet"))
    data = path.read_bytes()
    if fault == "truncated":
        path.write_bytes(data[: len(data) // 2])
    elif fault == "no Parquet":
        path.write_bytes(b"hello")
    elif fault == "damaged page":
        pq.write_table(pq.read_table(path), path, compression="zstd", write_page_checksum=True)
        path.write_bytes(b"PAR1" + b"\xff" * 200 + path.read_bytes()[204:])
    else:
        for other in (offline / view).rglob("*.parquet"):
            table = pq.read_table(other)
            if fault == "column missing":
                table = table.drop_columns("customer_id")
            else:
                i = table.schema.get_field_index("event_timestamp")
                table = table.set_column(i, "event_timestamp", table["event_timestamp"].cast(pa.string()))
            write(other, table)
    with pytest.raises(DataError) as e:
        check(RIGHT, views, offline)
    named = str(path) if fault in ("truncated", "no Parquet", "damaged page") else str(offline / view)
    assert named in e.value.format_message()
    assert "\n" not in e.value.format_message()


def test_files_that_a_compaction_replaced_are_not_read(offline, views):
    """What was absorbed stays on disk for readers that listed it before: here it holds another value for the same row."""
    replaced = f"append-{'0' * 24}.parquet"
    wrong = account_row("C1", T - DAY, T - HOUR, charges=99.0)
    write(offline / "account" / replaced, pa.Table.from_pylist([wrong]))
    (offline / "account" / "_compacted.json").write_text(json.dumps({"files": [], "replaced": [replaced]}))
    served = record("C1", T, of_account(charges=99.0), of_behaviour(offsets={"-1": 2, "0": 12}))
    assert check([served], views, offline).different == 1
    assert check(RIGHT[:1], views, offline).different == 0


@pytest.mark.parametrize("late", ["event_timestamp", "created"])
def test_a_row_from_the_future_is_different_though_it_exists(offline, views, late):
    """Serving gives the newest row whatever t: the row is there, its values are right, and t could not know it."""
    at, created = (T + HOUR, T + HOUR) if late == "event_timestamp" else (T - DAY, T + HOUR)
    write(offline / "account" / "future.parquet", pa.Table.from_pylist([account_row("C1", at, created, charges=7.0)]))
    served = record("C1", T, of_account(charges=7.0, at=at, created=created), of_behaviour(offsets={"-1": 2, "0": 12}))
    result = check([served], views, offline)
    assert result.different == 3
    assert f"{late} {(T + HOUR).isoformat()} is after t" in result.examples[0].reason
    in_time = record(
        "C1",
        T + HOUR,
        of_account(charges=7.0, at=at, created=created),
        of_behaviour(total=24, tickets=2, offsets={"-1": 2, "0": 12}),
    )
    assert check([in_time], views, offline).different == 0


def test_a_window_that_counts_an_event_before_it_was_visible_is_different(offline, views):
    early = record("C1", T + HOUR, of_account(), of_behaviour(count=4, total=37, tickets=2, offsets={"0": 13}))
    result = check([early], views, offline)
    assert result.different == 3
    assert "is after t" in result.examples[0].reason
    state = record("C1", T, of_account(), of_behaviour(offsets={"0": 12}))
    state["views"]["behaviour"]["visible_at"] = (T + HOUR).isoformat()
    assert check([state], views, offline).different == 3


def test_a_window_that_lacks_an_event_visible_by_t_is_stale(offline, views):
    """Equal for its offsets, and not different; but the log had more by then, and that is said."""
    behind = record("C1", T + 2 * HOUR, of_account(), of_behaviour(count=3, total=24, tickets=2, offsets={"0": 12}))
    result = check([behind], views, offline)
    assert (result.different, result.stale) == (0, 3)
    never = record("C1", T, of_account(), of_behaviour(count=2, total=3, tickets=0))
    never["features"] = {k: v for k, v in never["features"].items() if v["view"] == "behaviour"}
    assert check([never], views, offline).stale == 3
    assert check(RIGHT, views, offline).stale == 0


def test_what_overflows_in_an_entity_that_is_too_old_stops_no_check(offline, views):
    big = [{**log_row(20 + i, "C2", T - 3 * DAY, T - 3 * DAY, partition=-1), "n": 2**62} for i in range(2)]
    write(offline / "events" / "history" / "big.parquet", pa.Table.from_pylist(big, LOG))
    with pytest.raises(DataError, match="does not fit into an int64"):  # while it is not too old it would
        check([record("C2", T, of_account(), of_behaviour(offsets={"-1": 21}))], views, offline)
    old = record("C2", T, of_account(), of_behaviour("OUTSIDE_MAX_AGE", None, None, None, offsets={"-1": 21}))
    fresh = record("C1", T - HOUR, of_account(), of_behaviour(count=3, total=13, tickets=1, offsets={"-1": 2, "0": 10}))
    for r in (old, fresh):
        r["features"] = {k: v for k, v in r["features"].items() if v["view"] == "behaviour"}
    result = check([old, fresh], [behaviour_of(DAY)], offline)
    assert (result.checked, result.different) == (6, 0), result.examples


def test_what_was_served_before_a_rewind_is_left_out_and_counted(offline, views):
    rewind = datetime(2026, 1, 1, tzinfo=UTC)
    before = {**RIGHT[0], "served_at": (rewind - HOUR).isoformat()}
    after = {**RIGHT[1], "served_at": rewind.isoformat()}
    row_view_only = {**before, "views": {"account": before["views"]["account"]}}
    records = [before, after, row_view_only]
    assert served_since(records, views, str(offline)) == (records, 0)
    mark_rewound(offline / "events", rewind)
    # Also what was read of row views alone: they are replaced with the windowed ones.
    assert served_since(records, views, str(offline)) == ([after], 2)
    assert served_since(records, views, str(offline), rewind + HOUR) == ([], 3)
    assert served_since(records, views, str(offline), rewind - DAY) == (records, 0)
    with pytest.raises(DataError, match="served_at"):
        served_since(RIGHT[:1], views, str(offline))
    (offline / "events" / "_rewound.json").write_text("{}")
    with pytest.raises(DataError, match="last rewind"):
        served_since(records, views, str(offline))
