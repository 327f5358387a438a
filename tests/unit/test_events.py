"""Messages: what is accepted, and what is refused with which reason; and that a batch is read as its messages are."""

from __future__ import annotations

import io
import json
import struct
from datetime import UTC, datetime, timedelta, timezone

import fastavro
import pyarrow as pa
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from feature_store.clock import to_micros
from feature_store.errors import DefinitionError, UnavailableError, UsageError
from feature_store.event_codec import codec_of
from feature_store.event_decode import Decoder, RawBatch
from feature_store.events import BadMessageError, Message, MessageSchema, parse_message
from feature_store.iso_times import micros_of

SCHEMA = MessageSchema(
    topic="customer-events",
    keys={"customer_id": "string"},
    timestamp="event_timestamp",
    columns={"kind": "string", "n": "int64", "x": "float64", "flag": "bool", "due": "timestamp"},
    event_id="event_id",
)
GOOD = {
    "event_id": "e1",
    "customer_id": "C1",
    "kind": "usage",
    "n": 3,
    "x": 0.5,
    "flag": True,
    "due": "2024-03-02T00:00:00Z",
    "event_timestamp": "2024-02-29T23:59:59.999999Z",
    "created": "2024-03-01T00:00:00Z",
}


def encoded(changes: dict) -> bytes:
    return json.dumps({k: v for k, v in {**GOOD, **changes}.items() if v is not ...}).encode()


def parse(key: bytes | None = b"C1", **changes) -> Message:
    return parse_message(SCHEMA, key, encoded(changes))


def one_by_one(schema: MessageSchema, messages, codec=None) -> tuple[dict[int, dict], dict[int, str]]:
    rows, refused = {}, {}
    for i, (key, value) in enumerate(messages):
        try:
            m = parse_message(schema, key, value, codec)
        except BadMessageError as e:
            refused[i] = e.message
            continue
        rows[i] = dict(zip(schema.keys, m.key)) | m.values
        rows[i] |= {schema.timestamp: m.timestamp, "created": m.created}
        if schema.event_id:
            rows[i][schema.event_id] = m.event_id
    return rows, refused


def at_once(schema: MessageSchema, messages, codec=None) -> tuple[dict[int, dict], dict[int, str]]:
    keys, values = [k for k, _ in messages], [v for _, v in messages]
    decoded = Decoder(schema, codec).decode(RawBatch([0] * len(messages), list(range(len(messages))), keys, values))
    table = decoded.rows
    for i, f in enumerate(table.schema):
        if pa.types.is_timestamp(f.type):
            table = table.set_column(i, f.name, table[f.name].cast(pa.int64()))
    return dict(zip(decoded.places.tolist(), table.to_pylist(), strict=True)), dict(decoded.refused)


def test_a_good_message_is_read_to_the_microsecond():
    assert parse() == Message(
        key=("C1",),
        timestamp=to_micros(datetime(2024, 2, 29, 23, 59, 59, 999999, tzinfo=UTC)),
        created=to_micros(datetime(2024, 3, 1, tzinfo=UTC)),
        event_id="e1",
        values={
            "kind": "usage",
            "n": 3,
            "x": 0.5,
            "flag": True,
            "due": to_micros(datetime(2024, 3, 2, tzinfo=UTC)),
        },
    )


ACCEPTED = [
    {"created": ...},
    {"created": None},
    {"kind": None},
    {"n": None},
    {"x": None},
    {"flag": None},
    {"due": None},
    {"n": -(2**63)},
    {"x": 3},
    {"x": 2**60 + 1},
    {"x": 2**70},
    {"x": -0.0},
    {"unknown": [1, {"x": 2}]},
    {"kind": "a\nb"},
    {"event_timestamp": "2024-02-29 23:59:59"},
    {"event_timestamp": "2024-02-29T23:59:59.1"},
    {"event_timestamp": "2024-03-01T01:00:00+01:00"},
    {"event_timestamp": "1678-01-01T00:00:00-00:30"},
]
REFUSED = [
    ({"n": ...}, "missing column: 'n'"),
    ({"x": ...}, "missing column: 'x'"),
    ({"event_timestamp": ...}, "missing column: 'event_timestamp'"),
    ({"event_id": ...}, "missing column: 'event_id'"),
    ({"customer_id": ...}, "missing column: 'customer_id'"),
    ({"event_timestamp": None}, "event_timestamp is null"),
    ({"event_id": None}, "event_id is null"),
    ({"event_id": ""}, "event_id is null or empty"),
    ({"customer_id": None}, "customer_id is null"),
    ({"customer_id": ""}, "customer_id is null or empty"),
    ({"customer_id": 17}, "customer_id is not a string"),
    ({"n": 1.0}, "n is not an integer"),
    ({"n": True}, "n is not an integer"),
    ({"n": "3"}, "n is not an integer"),
    ({"n": 2**63}, "n does not fit"),
    ({"n": 2**64}, "n is not an integer"),
    ({"x": "1"}, "x is not a number"),
    ({"x": False}, "x is not a number"),
    ({"x": float("inf")}, "not JSON"),
    ({"flag": 1}, "flag is not true or false"),
    ({"kind": 5}, "kind is not a string"),
    ({"kind": "\ud800"}, "not JSON"),
    ({"due": "tomorrow"}, "due is not an ISO 8601 time"),
    ({"event_timestamp": 1709251200}, "not an ISO 8601 time"),
    ({"event_timestamp": "2024-02-30T00:00:00Z"}, "is not a time"),
    ({"event_timestamp": "2023-02-29T00:00:00Z"}, "is not a time"),
    ({"event_timestamp": "2024-01-01T24:00:00Z"}, "is not a time"),
    ({"event_timestamp": "2024-02-29T00:00:00.1234567Z"}, "at most microseconds"),
    ({"event_timestamp": "2024-02-29"}, "not an ISO 8601 time"),
    ({"event_timestamp": "٢٠٢٤-02-29T00:00:00Z"}, "not an ISO 8601 time"),
    ({"created": "soon"}, "created is not an ISO 8601 time"),
    ({"event_timestamp": "0001-01-01T00:00:00Z"}, "outside the years 1678 to 2261"),
    ({"created": "2262-01-01T00:00:00Z"}, "outside the years 1678 to 2261"),
]


@pytest.mark.parametrize("changes", ACCEPTED)
def test_what_else_is_accepted(changes):
    message = parse(**changes)
    for column in ("kind", "n", "x", "flag"):
        if column in changes:
            expected = changes[column]
            assert message.values[column] == (float(expected) if column == "x" and expected is not None else expected)


def test_a_time_without_offset_is_utc():
    assert parse(event_timestamp="2024-03-01T00:00:00") == parse(event_timestamp="2024-03-01T00:00:00Z")
    assert parse(event_timestamp="2024-03-01T01:00:00+01:00").timestamp == to_micros(datetime(2024, 3, 1, tzinfo=UTC))


@pytest.mark.parametrize(("changes", "reason"), REFUSED)
def test_a_bad_message_is_refused_with_the_reason(changes, reason):
    with pytest.raises(BadMessageError, match=reason):
        parse(**changes)


NO_OBJECTS = [None, b"", b"{", b"null", b"[]", b'"x"', b"\xff\xff", b"[" * 100_000, b'{"n": NaN}', b"{}\n{}", b"{}"]


@pytest.mark.parametrize("value", NO_OBJECTS)
def test_what_is_no_json_object_is_refused(value):
    with pytest.raises(BadMessageError):
        parse_message(SCHEMA, b"C1", value)


@pytest.mark.parametrize("key", [None, b"", b"C2", b"c1", b"\xff"])
def test_the_message_key_must_be_the_entity_key(key):
    with pytest.raises(BadMessageError, match="is not the entity key 'C1'"):
        parse(key=key)


def test_integer_keys_are_integers():
    schema = MessageSchema("t", {"customer_id": "int64", "shop": "string"}, "event_timestamp", {})
    good = encoded({"customer_id": 17, "shop": "S"})
    assert parse_message(schema, b"17|S", good).key == (17, "S")
    with pytest.raises(BadMessageError, match="customer_id is not an integer"):
        parse_message(schema, b"C1|S", encoded({"shop": "S"}))
    messages = [(b"17|S", good), (b"17", good), (b"C1|S", encoded({"shop": "S"}))]
    assert at_once(schema, messages) == one_by_one(schema, messages)


def test_a_batch_is_read_as_its_messages_are():
    """All that is named above, good and bad, in one batch, and each alone."""
    messages = [(b"C1", encoded(c)) for c in ACCEPTED] + [(b"C1", encoded(c)) for c, _ in REFUSED]
    messages += [(b"C1", v) for v in NO_OBJECTS] + [(k, encoded({})) for k in (None, b"", b"C2", b"\xff")]
    expected = one_by_one(SCHEMA, messages)
    assert len(expected[0]) == len(ACCEPTED)
    assert at_once(SCHEMA, messages) == expected
    for m in messages:
        assert at_once(SCHEMA, [m]) == one_by_one(SCHEMA, [m])
    assert at_once(SCHEMA, []) == ({}, {})


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text()),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=5,
)
iso_like = st.one_of(
    st.from_regex(
        r"[0-9]{4}-[01][0-9]-[0-3][0-9][T ][0-2][0-9]:[0-6][0-9]:[0-6][0-9](\.[0-9]{0,7})?(Z|[+-][0-9]{2}:[0-9]{2})?"
    ),
    st.datetimes(datetime(1600, 1, 1), datetime(2300, 1, 1)).map(datetime.isoformat),
    st.datetimes(timezones=st.integers(-1439, 1439).map(lambda m: timezone(timedelta(minutes=m)))).map(
        datetime.isoformat
    ),
    st.text(max_size=32),
)
changed = st.dictionaries(
    st.sampled_from(sorted(GOOD)),
    st.one_of(json_values, iso_like, st.integers(-(2**65), 2**65), st.just(...)),
    max_size=2,
)
message_bytes = st.one_of(
    changed.map(lambda c: (b"C1", json.dumps({k: v for k, v in {**GOOD, **c}.items() if v is not ...}).encode())),
    st.tuples(st.one_of(st.none(), st.binary(max_size=4)), st.binary(max_size=30)),
    st.tuples(st.just(b"C1"), st.just(encoded({}) + b"\n" + encoded({}))),
    st.tuples(st.just(b"C1"), st.just(encoded({})[:-1] + b', "n": "twice"}')),
)


@given(st.lists(message_bytes, max_size=8))
def test_any_batch_is_read_as_its_messages_are(messages):
    assert at_once(SCHEMA, messages) == one_by_one(SCHEMA, messages)


@given(st.lists(iso_like, min_size=1, max_size=20))
@example(["2024-02-29T23:59:59.999999Z", "2024-02-29T23:59:59+00:00", "1900-02-29T00:00:00", "2000-02-29T00:00:00.1"])
def test_times_read_at_once_are_those_read_one_by_one(texts):
    us, known = micros_of(pa.array(texts, pa.string()))
    for text, got, read in zip(texts, us.tolist(), known.tolist()):
        if read:
            t = datetime.fromisoformat(text)
            assert got == to_micros(t)


def test_the_usual_shapes_of_a_time_are_read_at_once():
    base = datetime(2024, 2, 29, 23, 59, 59, 120000, tzinfo=UTC)
    texts = [base.isoformat(), base.replace(microsecond=0).isoformat(), base.strftime("%Y-%m-%dT%H:%M:%S.%fZ")]
    texts += [
        "2024-02-29 23:59:59",
        "2024-02-29T23:59:59.12",
        "2024-02-29T23:59:59.12Z",
        "2024-03-01T01:29:59.120+01:30",
    ]
    us, known = micros_of(pa.array(texts, pa.string()))
    assert known.all()
    assert us.tolist() == [to_micros(datetime.fromisoformat(t)) for t in texts]


@given(st.binary(max_size=60))
def test_any_bytes_are_either_a_message_or_refused(value):
    with pytest.raises(BadMessageError):
        parse_message(SCHEMA, b"C1", value)


# Avro

MICROS = {"type": "long", "logicalType": "timestamp-micros"}
AVRO = {
    "type": "record",
    "name": "Event",
    "fields": [
        {"name": "event_id", "type": "string"},
        {"name": "customer_id", "type": "string"},
        {"name": "kind", "type": ["null", "string"]},
        {"name": "n", "type": ["null", "long"]},
        {"name": "x", "type": ["null", "double"]},
        {"name": "flag", "type": "boolean"},
        {"name": "due", "type": ["null", MICROS]},
        {"name": "event_timestamp", "type": MICROS},
        {"name": "created", "type": ["null", "string"]},
    ],
}
AVRO_SCHEMA = MessageSchema(
    SCHEMA.topic,
    SCHEMA.keys,
    SCHEMA.timestamp,
    SCHEMA.columns,
    SCHEMA.event_id,
    format="avro",
    avro_schema=json.dumps(AVRO),
)


def avro(**changes) -> bytes:
    times = {k: datetime.fromisoformat(GOOD[k]) for k in ("due", "event_timestamp")}
    out = io.BytesIO()
    fastavro.schemaless_writer(out, fastavro.parse_schema(AVRO), {**GOOD, **times, **changes})
    return out.getvalue()


def test_avro_gives_what_json_gives():
    assert parse_message(AVRO_SCHEMA, b"C1", avro()) == parse()
    messages = [
        (b"C1", avro()),
        (b"C1", avro(kind=None, n=None, x=None, due=None, created=None)),
        (b"C1", avro(x=float("nan"))),
        (b"C1", avro(event_timestamp=datetime(1500, 1, 1, tzinfo=UTC))),
        (b"C1", avro()[:-3]),
        (b"C1", avro() + b"x"),
        (b"C1", b""),
        (b"C1", None),
        (b"C2", avro()),
        (b"C1", encoded({})),
    ]
    rows, refused = one_by_one(AVRO_SCHEMA, messages)
    assert sorted(rows) == [0, 1]
    assert "x is not finite" in refused[2]
    assert at_once(AVRO_SCHEMA, messages) == (rows, refused)


@given(st.binary(max_size=40))
def test_any_bytes_are_either_avro_or_refused(value):
    messages = [(b"C1", value), (b"C1", avro())]
    assert at_once(AVRO_SCHEMA, messages) == one_by_one(AVRO_SCHEMA, messages)


@pytest.fixture
def schema_registry():
    """A registry's one path that matters, over real HTTP; schema 7 is known, 9 and 10 are not for everybody."""
    import threading
    from http.server import BaseHTTPRequestHandler, HTTPServer

    asked = []

    class Registry(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)
            body = json.dumps({"schema": json.dumps(AVRO)}).encode()
            status = {"/schemas/ids/7": 200, "/schemas/ids/9": 401, "/schemas/ids/10": 403}.get(self.path, 404)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Registry)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/", asked
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_registrys_framing_is_read_with_its_schema_asked_for_once(schema_registry):
    url, asked = schema_registry
    codec = codec_of("avro", None, url)
    framed = struct.pack(">bI", 0, 7) + avro()
    messages = [
        (b"C1", framed),
        (b"C1", framed),
        (b"C1", struct.pack(">bI", 0, 8) + avro()),
        (b"C1", avro()),
        (b"C1", b""),
    ]
    rows, refused = one_by_one(AVRO_SCHEMA, messages, codec)
    assert sorted(rows) == [0, 1]
    assert "does not know this schema id" in refused[2]
    assert "framing" in refused[3]
    assert at_once(AVRO_SCHEMA, messages, codec) == (rows, refused)
    assert asked.count("/schemas/ids/7") == 1


@pytest.mark.parametrize("number", [9, 10])
def test_a_registry_that_lets_nobody_in_ends_the_stream(schema_registry, number):
    """Waiting does not help, and the password stays out of the log."""
    url, _ = schema_registry
    codec = codec_of("avro", None, url.replace("http://", "http://reader:hidden@"))
    with pytest.raises(UsageError, match=r"does not let us read.*HTTP 40[13].*USER:PASSWORD") as refused:
        parse_message(AVRO_SCHEMA, b"C1", struct.pack(">bI", 0, number) + avro(), codec)
    assert "hidden" not in str(refused.value)


def test_a_registry_that_is_away_refuses_no_message():
    codec = codec_of("avro", None, "http://reader:hidden@127.0.0.1:9")
    with pytest.raises(UnavailableError, match="SCHEMA_REGISTRY_URL") as away:
        parse_message(AVRO_SCHEMA, b"C1", struct.pack(">bI", 0, 7) + avro(), codec)
    assert "hidden" not in str(away.value)


@pytest.mark.parametrize(
    "schema",
    ["{", '"long"', '{"type": "record"}', '{"type": "record", "name": "x", "fields": [{"name": "a", "type": "Z"}]}'],
)
def test_a_schema_that_is_none_is_refused(schema):
    with pytest.raises(DefinitionError, match="avro_schema"):
        codec_of("avro", schema)


def test_avro_without_any_schema_is_refused():
    with pytest.raises(DefinitionError, match="SCHEMA_REGISTRY_URL"):
        codec_of("avro")
