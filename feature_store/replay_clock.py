"""The replay clock of a project, a key in Redis: decimal microseconds since the epoch, which only a bootstrap that rewinds moves back."""

from __future__ import annotations

from typing import Any

from feature_store.clock import replay_clock_key
from feature_store.redis_connection import answering

# The clock never goes back, whoever writes it last; numbers of 16 digits would lose precision as Lua numbers.
_ADVANCE = """
local held = redis.call('GET', KEYS[1])
if held and (#held > #ARGV[1] or (#held == #ARGV[1] and held >= ARGV[1])) then return 0 end
redis.call('SET', KEYS[1], ARGV[1])
return 1
"""


class ReplayClock:
    """Reads and moves the clock. UnavailableError: no Redis."""

    def __init__(self, redis: Any, project: str) -> None:
        self._redis = redis
        self._key = replay_clock_key(project)
        self._script = redis.register_script(_ADVANCE)

    def now_us(self) -> int:
        """Microseconds; 0 before it was set."""
        return self.held_us() or 0

    def held_us(self) -> int | None:
        """Microseconds; None before it was set."""
        with answering(self._redis):
            value = self._redis.get(self._key)
        return None if value is None else int(value)

    def advance(self, us: int) -> None:
        """Moves it forward, never back."""
        with answering(self._redis):
            self._script(keys=[self._key], args=[str(us)])

    def set(self, us: int) -> None:
        """Sets it, also back: for a rewind only."""
        with answering(self._redis):
            self._redis.set(self._key, str(us))
