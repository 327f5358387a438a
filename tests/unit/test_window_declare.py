"""Declaring windowed views: what Feast gets, what travels in the tags, and what is refused when the file is read."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from feast import Entity, FeatureView, ValueType
from feast.types import Bool, Bytes, Float64, Int64, String, UnixTimestamp

from feature_store.errors import DefinitionError
from feature_store.windows.declare import event_source, windowed_feature_view
from feature_store.windows.definition import SQL_TAG, WINDOW_TAG, EventSource, WindowedView, definition_of

customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
HOUR, DAY = timedelta(hours=1), timedelta(days=1)
COLUMNS: dict[str, Any] = {"kind": "string", "n": "int64", "price": "float64"}
SQL = """
SELECT customer_id, COUNT(*) AS c, AVG(price) AS a, MAX(event_timestamp) AS latest, MAX(n > 0) AS any_n,
       CASE WHEN COUNT(*) > 3 THEN 'many' ELSE 'few' END AS level
FROM events GROUP BY customer_id, HOP(event_timestamp, INTERVAL '1' HOUR, INTERVAL '1' DAY)
"""


def view(**changed: Any) -> FeatureView:
    given: dict[str, Any] = {
        "name": "v", "entity": customer, "source": event_source(topic="t", columns=COLUMNS), "sql": SQL, "ttl": DAY,
    }  # fmt: skip
    return windowed_feature_view(**given | changed)


def defined(v: FeatureView) -> WindowedView:
    definition = definition_of(v)
    assert definition is not None
    return definition


def test_the_outputs_are_typed_fields_and_the_state_one_more() -> None:
    v = view(features={"c": ("how many", "events")}, description="d", owner="o")
    assert {f.name: f.dtype for f in v.features} == {
        "c": Int64, "a": Float64, "latest": UnixTimestamp, "any_n": Bool, "level": String, "window_state": Bytes,
    }  # fmt: skip
    (c,) = [f for f in v.features if f.name == "c"]
    assert (c.description, c.tags["unit"]) == ("how many", "events")
    assert (v.name, v.description, v.owner, v.ttl, v.batch_source.path) == ("v", "d", "o", DAY, "v")


def test_an_error_of_the_sql_names_the_view_and_its_file(tmp_path: Path) -> None:
    wrong = "SELECT SUM(zz) AS x FROM events GROUP BY customer_id, TUMBLE(event_timestamp, INTERVAL '1' DAY)"
    with pytest.raises(DefinitionError, match=r"^v: SQL line 1, column 12: unknown column: 'zz'; valid: "):
        view(sql=wrong)
    file = tmp_path / "my views.sql"
    file.write_text(wrong, encoding="utf-8-sig")
    for given in (file, str(file)):
        with pytest.raises(DefinitionError, match=r"^v \(.*my views\.sql\): SQL line 1, column 12: unknown column"):
            view(sql=given)


def test_the_definition_travels_in_the_tags_of_view_and_source() -> None:
    v = view(history_sql="SELECT 1 AS x", path="p")
    assert v.tags[WINDOW_TAG] == v.batch_source.tags[WINDOW_TAG]
    assert v.batch_source.tags[SQL_TAG] == "SELECT 1 AS x"
    assert SQL_TAG not in view().batch_source.tags
    d = defined(v)
    assert WindowedView.from_json(d.to_json()) == d
    assert definition_of(v.batch_source) == d
    assert [o.name for o in d.outputs] == ["c", "a", "latest", "any_n", "level"]


def test_the_hash_changes_with_what_a_value_depends_on_only() -> None:
    d = defined(view())
    assert defined(view(features={"c": ("other words", "")}, owner="other")).hash == d.hash
    assert defined(view(source=event_source(topic="t", columns=dict(reversed(COLUMNS.items()))))).hash == d.hash
    for changed in (
        replace(d, sql=d.sql.replace("> 3", "> 4")), replace(d, ttl=2 * DAY), replace(d, max_events_per_entity=5),
        replace(d, source=replace(d.source, retention_us=5)), replace(d, source=replace(d.source, event_id="id")),
    ):  # fmt: skip
        assert changed.hash != d.hash


def test_a_definition_of_another_version_names_the_way_on() -> None:
    other = json.dumps({"version": 1, "name": "v"})
    with pytest.raises(DefinitionError, match=r"another version.*feast apply"):
        WindowedView.from_json(other)


@pytest.mark.parametrize(
    ("lateness", "retention", "kept"),
    [
        (HOUR, None, DAY),
        (3 * DAY, None, 3 * DAY),
        (HOUR, 2 * HOUR, 2 * HOUR),
        (timedelta(0), timedelta(0), timedelta(0)),
    ],
)
def test_retention_is_the_longest_window_unless_it_is_given(
    lateness: timedelta, retention: timedelta | None, kept: timedelta
) -> None:
    source = event_source(topic="t", columns=COLUMNS, allowed_lateness=lateness, retention=retention)
    assert timedelta(microseconds=defined(view(source=source)).source.retention_us) == kept


def test_the_sql_may_stand_in_a_file_beside_the_caller(tmp_path: Path) -> None:
    (tmp_path / "behaviour.sql").write_text(SQL)
    assert defined(view(sql=tmp_path / "behaviour.sql")).statements == defined(view()).statements
    caller = tmp_path / "caller.py"
    caller.write_text("def call(f, **given):\n    return f(**given, sql='behaviour.sql')\n")
    names: dict[str, Any] = {"__file__": str(caller)}
    exec(compile(caller.read_text(), str(caller), "exec"), names)
    source = event_source(topic="t", columns=COLUMNS)
    v = names["call"](windowed_feature_view, name="v", entity=customer, source=source, ttl=DAY)
    assert len(defined(v).outputs) == 5
    with pytest.raises(DefinitionError, match=r"cannot be read.*missing\.sql"):
        view(sql="missing.sql")


def test_int64_keys_and_bounded_keys() -> None:
    account = Entity(name="account", join_keys=["customer_id"], value_type=ValueType.INT64)
    v = view(entity=account, ttl=timedelta(0), bounded_keys=True, sql=SQL.replace("AVG(price)", "AVG(customer_id)"))
    assert defined(v).key_types == ("int64",)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"sql": SQL.replace("price", "prise")}, "line 2, column 40: unknown column: 'prise'"),
        ({"ttl": timedelta(0)}, "bounded_keys=True"),
        ({"ttl": -DAY}, "ttl must be positive"),
        ({"features": {"d": ("", "")}}, "not an output of the SQL: 'd'"),
        ({"max_events_per_entity": 0}, "max_events_per_entity"),
        ({"entity": Entity(name="e", join_keys=["e"], value_type=ValueType.DOUBLE)}, "string or an int64"),
        (
            {"entity": Entity(name="e", join_keys=["kind"], value_type=ValueType.STRING)},
            "the key is a column of its own",
        ),
    ],
)
def test_a_wrong_view_is_one_clear_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        view(**changed)
    assert message in caught.value.message
    assert "\n" not in caught.value.message


AVRO = json.dumps({"type": "record", "name": "e", "fields": [{"name": "event_timestamp", "type": "long"}]})


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"topic": ""}, "needs a topic"),
        ({"columns": {"n": "decimal"}}, "unknown type of column n: 'decimal'"),
        ({"columns": {"_offset": "int64"}}, "may not have this name"),
        ({"columns": {"created": "timestamp"}}, "may not have this name"),
        ({"columns": {"n": "int64", "N": "int64"}}, "two columns of one name"),
        ({"event_id": "n"}, "two columns of one name"),
        ({"allowed_lateness": -HOUR}, "allowed_lateness must be"),
        ({"allowed_lateness": DAY, "retention": HOUR}, "retention below allowed_lateness"),
        ({"idle_timeout": timedelta(0)}, "idle_timeout must be a positive"),
        ({"format": "csv"}, "unknown format: 'csv'"),
        ({"avro_schema": AVRO}, "avro_schema without avro"),
        ({"format": "avro", "avro_schema": "{"}, "not the JSON of an Avro record"),
        ({"format": "avro", "avro_schema": AVRO}, "not a field of the Avro schema: 'n'"),
    ],
)
def test_a_wrong_source_is_one_clear_line(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(DefinitionError) as caught:
        event_source(**{"topic": "t", "columns": {"n": "int64"}} | changed)
    assert message in caught.value.message


def avro(**changed: Any) -> EventSource:
    """A source whose schema fits but for what is changed; None leaves a field out."""
    fields = {
        "customer_id": "string", "kind": {"type": "enum", "name": "K", "symbols": ["ok"]}, "n": ["null", "long"],
        "price": "int", "event_timestamp": {"type": "long", "logicalType": "timestamp-micros"}, "created": "string",
        "id": "string",
    } | changed  # fmt: skip
    listed = [{"name": n, "type": t} for n, t in fields.items() if t is not None]
    schema = {"type": "record", "name": "e", "fields": listed}
    return event_source(topic="t", columns=COLUMNS, event_id="id", format="avro", avro_schema=json.dumps(schema))


def test_an_avro_schema_that_fits_is_taken() -> None:
    for changed in (
        {},
        {"created": None},
        {"price": ["double", "null"], "n": ["string", "int"]},
        {"kind": {"type": "string"}},
    ):
        assert defined(view(source=avro(**changed))).source.format == "avro"


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"other": "nonsense"}, "avro_schema is not an Avro schema"),
        ({"customer_id": None}, "v: not a field of the Avro schema: 'customer_id'"),
        ({"customer_id": "long"}, "v: field customer_id of the Avro schema cannot be string: 'long'"),
        ({"n": "string"}, "field n of the Avro schema cannot be int64: 'string'; valid: int, long"),
        ({"n": {"type": "int", "logicalType": "date"}}, "cannot be int64: 'int (date)'"),
        ({"n": "null"}, "cannot be int64: 'null'"),
        ({"price": "bytes"}, "field price of the Avro schema cannot be float64"),
        ({"event_timestamp": "long"}, "event_timestamp of the Avro schema cannot be timestamp: 'long'; valid: local-timestamp-"),
        ({"created": "long"}, "field created"),
        ({"id": {"type": "string", "logicalType": "uuid"}}, "field id of the Avro schema cannot be string"),
    ],
)  # fmt: skip
def test_an_avro_schema_whose_messages_would_all_be_refused_is_one_clear_line(
    changed: dict[str, Any], message: str
) -> None:
    with pytest.raises(DefinitionError) as caught:
        view(source=avro(**changed))
    assert message in caught.value.message


def test_an_avro_schema_of_another_type_than_a_record_is_refused() -> None:
    schema = str(avro().avro_schema).replace('"record"', '"recrd"', 1)
    with pytest.raises(DefinitionError, match="avro_schema is not"):
        view(source=replace(avro(), avro_schema=schema))


def test_more_filters_than_a_view_can_hold_are_refused() -> None:
    calls = ", ".join(f"COUNT(*) FILTER (WHERE n = {i}) AS c{i}" for i in range(64))
    sql = f"SELECT {calls} FROM e GROUP BY customer_id, TUMBLE(event_timestamp, INTERVAL '1' DAY)"
    with pytest.raises(DefinitionError, match="at most 63"):
        view(sql=sql)
