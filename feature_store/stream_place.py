"""How far a consumer has written, noted in Redis beside what it wrote: so that writes that Redis lost are noticed.

A replica that takes over, or a restart from an older snapshot, takes the note back together with the states. The consumer
then reads again what it has not committed yet (`commit_delay` says how much that is). What was lost while no consumer ran
is noticed by the note at the next start: it is below the committed offset.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from feature_store.redis_connection import answering

# Partition, next offset, and what must be noted at least, for each: else nothing is written, and 0 comes back. A note never
# goes back: a consumer that lost its partition may write late.
_NOTE = """
for i = 1, #ARGV, 3 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or 0) < tonumber(ARGV[i + 2]) then return 0 end
end
for i = 1, #ARGV, 3 do
  if tonumber(redis.call('HGET', KEYS[1], ARGV[i]) or -1) < tonumber(ARGV[i + 1]) then
    redis.call('HSET', KEYS[1], ARGV[i], ARGV[i + 1])
  end
end
return 1
"""


class StreamPlace:
    """The note of one group on one topic: a hash of partition -> next offset. UnavailableError: no Redis."""

    def __init__(self, redis: Any, project: str, group: str, topic: str) -> None:
        self._redis = redis
        self._key = f"predictflow:{project}:place:{group}:{topic}"
        self._script = redis.register_script(_NOTE)
        self._noted: dict[int, int] = {}
        self._started: dict[int, int] = {}

    @property
    def unchecked(self) -> bool:
        """Whether `lost` was not asked since a partition was started."""
        return bool(self._started)

    def start(self, partition: int, offset: int) -> None:
        """The partition is read from this offset on: what is before it was written, and noted, if anything ever was."""
        self._noted.pop(partition, None)
        self._started[partition] = offset

    def lost(self) -> dict[int, int]:
        """Partitions whose note is older than what was written, with what Redis holds now (0: nothing)."""
        wanted = self._started | self._noted
        if not wanted:
            return {}
        with answering(self._redis):
            held = self._redis.hmget(self._key, [str(p) for p in wanted])
        found = {p: int(h or 0) for p, h in zip(wanted, held, strict=True)}
        for p, h in zip(wanted, held, strict=True):
            if p in self._started and h is not None:
                self._noted[p] = max(self._started[p], int(h))
        self._started.clear()
        return {p: found[p] for p, offset in self._noted.items() if found[p] < offset}

    def note(self, next_offsets: Mapping[int, int]) -> bool:
        """What was written reaches up to these offsets. False, and nothing is noted: Redis has lost an earlier note."""
        if not next_offsets:
            return True
        arguments = [n for p, o in next_offsets.items() for n in (p, o, self._noted.get(p, 0))]
        with answering(self._redis):
            if not self._script(keys=[self._key], args=arguments):
                return False
        self._noted |= {p: max(o, self._noted.get(p, 0)) for p, o in next_offsets.items()}
        return True

    def set(self, next_offsets: Mapping[int, int]) -> None:
        """The states were made anew, and are complete up to these offsets."""
        with answering(self._redis):
            self._redis.hset(self._key, mapping={str(p): o for p, o in next_offsets.items()})

    def forget(self, partition: int) -> None:
        """The partition is read by another consumer now."""
        self._noted.pop(partition, None)
        self._started.pop(partition, None)


def forget_notes(redis: Any, project: str, topic: str) -> None:
    """Removes every group's note on a topic: its states were rebuilt, and are complete whatever was noted."""
    with answering(redis):
        for key in redis.scan_iter(match=f"predictflow:{project}:place:*", count=10_000):
            if key.decode().endswith(f":{topic}"):
                redis.delete(key)
