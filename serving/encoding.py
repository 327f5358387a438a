"""JSON as this service writes it: floats and int64 round-trip exactly, NaN and infinities are the strings "NaN",
"Infinity" and "-Infinity" (as in protobuf's JSON), bytes are base64 (RFC 4648 section 4), times ISO 8601 UTC in microseconds.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from typing import Any

from pydantic_core import to_json
from starlette.responses import Response

_PLAIN = (str, int, float, bool, type(None))


def dumps(value: Any) -> bytes:
    """UTF-8 JSON of plain values, datetimes, lists and maps; TypeError-like PydanticSerializationError for others."""
    return to_json(value, inf_nan_mode="strings", bytes_mode="base64")


def plain(value: Any) -> Any:
    """A feature value as JSON can hold it: bytes as standard base64 text, also inside lists and maps; others unchanged."""
    if isinstance(value, _PLAIN):
        return value
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(value).decode()
    if isinstance(value, Mapping):
        return {str(plain(k)): plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        return [plain(v) for v in value]
    return value


class JSONBytes(Response):
    """A response whose body is `dumps` of its content."""

    media_type = "application/json"

    def render(self, content: Any) -> bytes:
        return dumps(content)
