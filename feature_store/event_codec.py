"""The bytes of one message as a record (column -> value): JSON, or Avro with a declared schema or a schema registry's.

A JSON value is an object. An Avro value is one record without a file header: as it is where the source declares
`avro_schema`; else in Confluent's framing (a zero byte, the schema's id in 4 bytes, the record), whose schema the registry
tells. Avro's logical times come as datetimes. Nothing is fetched before the first message.
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable
from typing import Any, Literal

import orjson

from feature_store.errors import DataError, DefinitionError, UnavailableError, UsageError
from feature_store.masking import masked

Codec = Callable[[bytes], dict[str, Any]]
"""A message's value as a record; BadMessageError says why it cannot be read."""

_FRAME = struct.Struct(">bI")
_REGISTRY_SECONDS = 10.0


class BadMessageError(DataError):
    """A message that does not fit the definition; it goes to the dead-letter topic with this reason."""

    code = "bad_message"


def codec_of(format: Literal["json", "avro"], avro_schema: str | None = None, registry_url: str | None = None) -> Codec:
    """What reads a topic's messages. DefinitionError: an Avro schema that is none, or neither a schema nor a registry."""
    if format == "json":
        return json_record
    if avro_schema is not None:
        return _PlainAvro(avro_schema)
    if registry_url is None:
        raise DefinitionError(
            "an avro topic needs a schema",
            valid=["avro_schema in the source", "SCHEMA_REGISTRY_URL for messages in a registry's framing"],
        )
    return _RegisteredAvro(registry_url)


def avro_fields(schema: str) -> dict[str, list[dict[str, Any]]]:
    """Field -> the types that its values may have, null left out, of an Avro record's schema. DefinitionError: it is none."""
    parsed = _parsed(schema, "avro_schema")
    named = parsed.get("__named_schemas", {})

    def types(of: Any) -> list[dict[str, Any]]:
        if isinstance(of, list):
            return [t for branch in of for t in types(branch)]
        if isinstance(of, str):
            of = named.get(of, {"type": of})
        elif not isinstance(of["type"], str) or of["type"] in named:
            return types(of["type"])
        return [] if of["type"] == "null" else [of]

    return {f["name"]: types(f["type"]) for f in parsed["fields"]}


def json_record(value: bytes) -> dict[str, Any]:
    """A JSON object. Of a name that stands twice the last counts; NaN, infinities and broken Unicode are no JSON."""
    try:
        row = orjson.loads(value)
    except orjson.JSONDecodeError as e:
        raise BadMessageError(f"not JSON ({e})") from e
    if type(row) is not dict:
        raise BadMessageError("not a JSON object", value=type(row).__name__)
    return row


class _PlainAvro:
    def __init__(self, schema: str) -> None:
        self._schema = _parsed(schema, "avro_schema")

    def __call__(self, value: bytes) -> dict[str, Any]:
        return _record(self._schema, value, 0)


class _RegisteredAvro:
    def __init__(self, url: str) -> None:
        self._url = url.rstrip("/")
        self._schemas: dict[int, Any] = {}

    def __call__(self, value: bytes) -> dict[str, Any]:
        if len(value) < _FRAME.size or value[0] != 0:
            raise BadMessageError("not in a schema registry's framing (a zero byte, then the schema's id)")
        number = _FRAME.unpack_from(value)[1]
        schema = self._schemas.get(number)
        if schema is None:
            schema = self._schemas[number] = self._fetch(number)
        return _record(schema, value, _FRAME.size)

    def _fetch(self, number: int) -> Any:
        """UnavailableError, so that the batch is tried again: a registry that is away says nothing of the message.

        UsageError, which ends sync: it does not let us in, and will not by itself.
        """
        import requests

        try:
            answer = requests.get(f"{self._url}/schemas/ids/{number}", timeout=_REGISTRY_SECONDS)
            if answer.status_code == 404:
                raise BadMessageError("the schema registry does not know this schema id", value=number)
            if answer.status_code in (401, 403):
                raise UsageError(
                    f"schema registry at {masked(self._url)} (SCHEMA_REGISTRY_URL) does not let us read schemas",
                    value=f"HTTP {answer.status_code}",
                    next_step="give a user who may: SCHEMA_REGISTRY_URL=https://USER:PASSWORD@HOST",
                )
            answer.raise_for_status()
            found = answer.json()
        except requests.RequestException as e:
            raise UnavailableError(
                f"schema registry at {masked(self._url)} (SCHEMA_REGISTRY_URL) does not answer ({type(e).__name__})",
                next_step="start it, or check SCHEMA_REGISTRY_URL",
            ) from e
        if found.get("schemaType", "AVRO") != "AVRO" or found.get("references"):
            raise BadMessageError("the schema registry has no self-contained Avro schema of this id", value=number)
        try:
            return _parsed(found["schema"], f"schema {number}")
        except (DefinitionError, KeyError) as e:
            raise BadMessageError(f"the schema registry's schema {number} cannot be read") from e


def _parsed(text: str, name: str) -> Any:
    import fastavro
    from fastavro.schema import SchemaParseException, UnknownType

    try:
        schema: Any = fastavro.parse_schema(json.loads(text))
    except (ValueError, SchemaParseException, UnknownType) as e:
        raise DefinitionError(f"{name} is not an Avro schema ({e})") from e
    if not isinstance(schema, dict) or schema.get("type") != "record":
        raise DefinitionError(f"{name} is not the schema of an Avro record")
    return schema


def _record(schema: Any, value: bytes, start: int) -> dict[str, Any]:
    import fastavro

    body = io.BytesIO(value)
    body.seek(start)
    try:
        row = fastavro.schemaless_reader(body, schema, None)
    # The reader has no base error: it walks bytes, and what it meets in bad ones differs.
    except (EOFError, ValueError, IndexError, KeyError, TypeError, OverflowError, StopIteration, MemoryError) as e:
        raise BadMessageError(f"not Avro of the schema ({type(e).__name__}: {e})") from e
    if body.tell() != len(value):
        raise BadMessageError(f"not Avro of the schema ({len(value) - body.tell()} bytes too many)")
    return row  # type: ignore[return-value]  # the schema is of a record
