"""The message key of a record of served features, and which keys are logged: the same in the server's log and the client's."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import mmh3

from serving.encoding import dumps, plain

_HASHES = 2**32


def message_key(entity: Mapping[str, Any], inputs: Collection[str] = ()) -> bytes:
    """The value of a single join key as text, or of several as a JSON array in the order of the keys' names.

    `inputs`: what else the entity holds, which on-demand views take from the request; it counts where nothing else is there.
    """
    names = [name for name in sorted(entity) if name not in inputs] or sorted(entity)
    values = [plain(entity[name]) for name in names]
    return str(values[0]).encode() if len(values) == 1 else dumps(values)


class Sample:
    """A share of all keys, 0 to 1; always the same ones, so that an entity's history is whole or absent."""

    def __init__(self, share: float) -> None:
        self._below = round(share * _HASHES)

    def __contains__(self, key: bytes) -> bool:
        return self._below >= _HASHES or mmh3.hash(key, signed=False) < self._below
