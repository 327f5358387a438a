"""What a failed write to Redis means: wait and send again, load the script again, or give up with one clear error."""

from __future__ import annotations

import random
import time
from typing import Any

from feature_store.errors import UnavailableError
from feature_store.redis_connection import address_of, raise_forbidden

BUDGET_SECONDS = 5.0
"""How long a write waits for a Redis that does not answer, before it fails."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.05, 1.0


class Pause:
    """Growing, jittered pauses within one time budget. Use: `yield`ed seconds to sleep; the error when none are left."""

    def __init__(self, client: Any, budget_seconds: float) -> None:
        self._client, self._budget = client, budget_seconds
        self.reset()

    def reset(self) -> None:
        """Redis has answered: the budget begins anew."""
        self._until: float | None = None
        self._pause = _FIRST_PAUSE

    def after(self, error: Exception) -> float:
        """Seconds to sleep before the next try; UnavailableError when the budget is used up."""
        now = time.monotonic()
        if self._until is None:
            self._until = now + self._budget
        if now >= self._until:
            raise UnavailableError(
                f"Redis at {address_of(self._client)} (REDIS_URL) does not answer ({str(error).rstrip('.')}); "
                f"tried for {self._budget:g} s",
                next_step="start it, or `predictflow up`, and check REDIS_URL; then write again: it is safe to repeat",
            ) from error
        pause = min(self._pause * random.uniform(0.5, 1.5), self._until - now)  # jitter, no secret
        self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        return pause


class ScriptLost(Exception):  # not an error that anybody sees
    """The server does not know the script: new, restarted, or failed over to."""


def retried() -> tuple[type[Exception], ...]:
    """redis-py's errors after which a write is sent again."""
    from redis import exceptions

    return (exceptions.ConnectionError, exceptions.TimeoutError, exceptions.ReadOnlyError, exceptions.MasterDownError)


def checked(client: Any, read: Any, **options: Any) -> int:
    """The script's reply, of how many rows won; an error reply as `raise_meaning` tells it."""
    try:
        return int(read(**options))
    except Exception as e:
        raise_meaning(client, e)
        raise


def raise_meaning(client: Any, error: Exception) -> None:
    """Raises what an error reply means to the writer; returns where it means nothing special."""
    from redis.exceptions import NoScriptError, ReadOnlyError, ResponseError

    if isinstance(error, NoScriptError):
        raise ScriptLost from error
    raise_forbidden(client, error)
    text = str(error)
    if "-READONLY" in text:  # raised within the script: a primary that became a replica
        raise ReadOnlyError(text) from error
    if isinstance(error, ResponseError) and any(f in text for f in ("OOM command", "-MISCONF", "-NOREPLICAS")):
        raise UnavailableError(
            f"Redis at {address_of(client)} (REDIS_URL) refuses writes ({text[-160:]})",
            next_step="give it memory (maxmemory) or mend what it names; then write again: it is safe to repeat",
        ) from error
