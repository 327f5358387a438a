"""The command that reads an entity's hash, as bytes.

HMGET, though Redis walks a hash of up to 128 fields (a listpack) once per field asked for: HGETALL is one walk, but sends
every name along, and the reader pays for that (figures in docs/performance.md). A setting ends the walks
(`redis_settings.py` says which).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from feature_store.redis_wire import hmget_parts

if TYPE_CHECKING:
    from feature_store.redis_layout import KeyLayout

Reply = Sequence[bytes | None]
"""The fields asked for, in their order; None where there is none."""
_STRING_KEY = (2).to_bytes(4, "little")


class Replies(list[Reply]):
    """The replies to a plan's HMGETs. `watermarks`: stored name of each view that closes windows -> what its hash of
    watermarks held before the states were read (see `parse_watermarks`)."""

    watermarks: dict[str, tuple[dict[int, int], int | None]]


class Hmget:
    """The bytes of one HMGET around its key; `name` is the join key where that is a single string."""

    def __init__(self, layout: KeyLayout, fields: Sequence[bytes]) -> None:
        self.layout = layout
        self.head, self.tail = hmget_parts(fields)
        self.name: str | None = None
        if len(layout.parts) == 1 and layout.parts[0].type == "STRING":
            self.name = layout.parts[0].requested
        self.prefix = layout.prefix + _STRING_KEY
        self.bare = len(self.prefix) + 4 + len(layout.suffix)
        self.suffix = layout.suffix + self.tail
