"""Messages: what is accepted, and what is refused with which reason."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from feature_store.clock import to_micros
from feature_store.events import BadMessageError, Message, parse_message
from feature_store.windows import Aggregate, WindowedView

VIEW = WindowedView(
    name="v",
    entity_key=("customer_id",),
    topic="customer-events",
    columns={"kind": "string", "n": "int64"},
    aggregates=(Aggregate("c", "count", window=timedelta(days=1)),),
    ttl=timedelta(days=1),
    event_id="event_id",
)
GOOD = {
    "event_id": "e1",
    "customer_id": "C1",
    "kind": "usage",
    "n": 3,
    "event_timestamp": "2024-02-29T23:59:59.999999Z",
    "created": "2024-03-01T00:00:00Z",
}


def parse(key: bytes | None = b"C1", **changes) -> Message:
    row = {k: v for k, v in {**GOOD, **changes}.items() if v is not ...}
    return parse_message(VIEW, key, json.dumps(row).encode())


def test_a_good_message_is_read_to_the_microsecond():
    assert parse() == Message(
        key=("C1",),
        timestamp=to_micros(datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=UTC)),
        created=to_micros(datetime(2024, 3, 1, tzinfo=UTC)),
        event_id="e1",
        values={"kind": "usage", "n": 3},
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"created": ...},
        {"created": None},
        {"kind": None},
        {"n": None},
        {"n": -(2**63)},
        {"unknown": [1, {"x": 2}]},
        {"event_timestamp": "2024-02-29 23:59:59"},
        {"event_timestamp": "2024-03-01T01:00:00+01:00"},
    ],
)
def test_what_else_is_accepted(changes):
    message = parse(**changes)
    for column in ("kind", "n"):
        if column in changes:
            assert message.values[column] == changes[column]


def test_a_time_without_offset_is_utc():
    assert (
        parse(event_timestamp="2024-03-01T00:00:00").timestamp
        == parse(event_timestamp="2024-03-01T00:00:00Z").timestamp
    )
    assert parse(event_timestamp="2024-03-01T01:00:00+01:00").timestamp == to_micros(datetime(2024, 3, 1, tzinfo=UTC))


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"n": ...}, "missing column: 'n'"),
        ({"event_timestamp": ...}, "missing column: 'event_timestamp'"),
        ({"event_id": ...}, "missing column: 'event_id'"),
        ({"customer_id": ...}, "missing column: 'customer_id'"),
        ({"event_timestamp": None}, "event_timestamp is null"),
        ({"event_id": None}, "event_id is null"),
        ({"event_id": ""}, "event_id is null or empty"),
        ({"customer_id": None}, "customer_id is null"),
        ({"customer_id": 17}, "customer_id is not a string"),
        ({"n": 1.0}, "n is not an integer"),
        ({"n": True}, "n is not an integer"),
        ({"n": "3"}, "n is not an integer"),
        ({"n": 2**63}, "n does not fit"),
        ({"kind": 5}, "kind is not a string"),
        ({"kind": "\ud800"}, "not valid Unicode"),
        ({"event_timestamp": 1709251200}, "not an ISO 8601 time"),
        ({"event_timestamp": "2024-02-30T00:00:00Z"}, "is not a time"),
        ({"event_timestamp": "2024-02-29T00:00:00.1234567Z"}, "at most microseconds"),
        ({"created": "soon"}, "created is not an ISO 8601 time"),
        ({"event_timestamp": "0001-01-01T00:00:00Z"}, "outside the years 1678 to 2261"),
        ({"created": "2262-01-01T00:00:00Z"}, "outside the years 1678 to 2261"),
    ],
)
def test_a_bad_message_is_refused_with_the_reason(changes, reason):
    with pytest.raises(BadMessageError, match=reason):
        parse(**changes)


@pytest.mark.parametrize("value", [None, b"", b"{", b"null", b"[]", b'"x"', b"\xff\xff", b"[" * 100_000, b'{"n": NaN}'])
def test_what_is_no_json_object_is_refused(value):
    with pytest.raises(BadMessageError):
        parse_message(VIEW, b"C1", value)


@pytest.mark.parametrize("key", [None, b"", b"C2", b"c1", b"\xff"])
def test_the_message_key_must_be_the_entity_key(key):
    with pytest.raises(BadMessageError, match="is not the entity key 'C1'"):
        parse(key=key)


def test_integer_keys_are_integers():
    row = json.dumps({**GOOD, "customer_id": 17}).encode()
    assert parse_message(VIEW, b"17", row, {"customer_id"}).key == (17,)
    with pytest.raises(BadMessageError, match="customer_id is not an integer"):
        parse_message(VIEW, b"C1", json.dumps(GOOD).encode(), {"customer_id"})


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(GOOD)), json_values), st.one_of(st.none(), st.binary(max_size=8)))
def test_whatever_comes_is_either_a_message_or_refused(changes, key):
    try:
        message = parse_message(VIEW, key, json.dumps({**GOOD, **changes}).encode())
    except BadMessageError:
        return
    assert key == message.key[0].encode()
    assert -(2**63) <= (message.values["n"] or 0) < 2**63


@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_message_or_refused(value):
    with pytest.raises(BadMessageError):
        parse_message(VIEW, b"C1", value)
