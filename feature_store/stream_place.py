"""How far a consumer has written, noted in Redis beside what it wrote: so that writes that Redis lost are noticed.

A replica that takes over, or a restart from an older snapshot, takes the note back together with the states. The consumer
then reads again what it has not committed yet (`commit_delay` says how much that is).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from feature_store.redis_connection import answering


class StreamPlace:
    """The note of one group on one topic: a hash of partition -> next offset. UnavailableError: no Redis."""

    def __init__(self, redis: Any, project: str, group: str, topic: str) -> None:
        self._redis = redis
        self._key = f"predictflow:{project}:place:{group}:{topic}"
        self._noted: dict[int, int] = {}

    def lost(self) -> dict[int, int]:
        """Partitions whose note is older than what this process wrote, with what Redis holds now (0: nothing)."""
        if not self._noted:
            return {}
        partitions = list(self._noted)
        with answering(self._redis):
            held = self._redis.hmget(self._key, [str(p) for p in partitions])
        found = {p: int(h or 0) for p, h in zip(partitions, held, strict=True)}
        return {p: offset for p, offset in found.items() if offset < self._noted[p]}

    def note(self, next_offsets: Mapping[int, int]) -> None:
        """What was written reaches up to these offsets."""
        if next_offsets:
            with answering(self._redis):
                self._redis.hset(self._key, mapping={str(p): o for p, o in next_offsets.items()})
            self._noted |= next_offsets

    def forget(self, partition: int) -> None:
        """The partition is read from another place now, or by another consumer."""
        self._noted.pop(partition, None)
