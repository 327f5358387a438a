"""What time it is: the one clock setting of sync, both stores and the server (`wall` or `replay`).

`wall` is the machine's clock. `replay` follows the source: it stands at the newest time at which an applied event was
known (`created`, or its event time where the source gives no `created`), so data of 2011 is fresh and the same tomorrow.
Below the command line nothing calls `now()`: a `Clock` is passed in. Times are timezone-aware UTC, in microseconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Literal, Protocol

ClockMode = Literal["wall", "replay"]
CLOCK_MODES: tuple[ClockMode, ...] = ("wall", "replay")

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)
MAX_SKEW = timedelta(seconds=5)
"""How far ahead of the clock an event may be dated before it is dead-lettered (semantics: `max_skew`)."""


class Clock(Protocol):
    """Anything that says what time it is."""

    @property
    def mode(self) -> ClockMode: ...

    def now(self) -> datetime: ...


@dataclass(frozen=True)
class WallClock:
    """The machine's clock."""

    mode: ClockMode = "wall"

    def now(self) -> datetime:
        return datetime.now(UTC)


def replay_clock_key(project: str) -> str:
    """The Redis key that holds the replay clock of a project: decimal microseconds since the epoch."""
    return f"predictflow:{project}:clock"


def to_micros(t: datetime) -> int:
    """Microseconds since the epoch, exactly; a naive `t` is taken as UTC."""
    return ((t if t.tzinfo else t.replace(tzinfo=UTC)) - EPOCH) // MICROSECOND


def from_micros(us: int) -> datetime:
    """The UTC time `us` microseconds after the epoch, exactly."""
    return EPOCH + timedelta(microseconds=us)
