"""What a check found, and when a served value equals the recomputed one."""

from __future__ import annotations

import base64
import math
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from feature_store.clock import EPOCH, MICROSECOND, to_micros
from feature_store.consistency.served_log import Served, micros

PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE = "PRESENT", "NULL_VALUE", "NOT_FOUND", "OUTSIDE_MAX_AGE"
CHECKED_STATUSES = (PRESENT, NULL_VALUE, NOT_FOUND, OUTSIDE_MAX_AGE)
_EXAMPLES = 20
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""How the served log writes what JSON has no number for."""


@dataclass(frozen=True)
class Difference:
    """One served value that history does not give. `served` and `recomputed` are `status value` pairs.

    `reason` says why where equal values are wrong all the same; else it is empty.
    """

    entity: dict[str, Any]
    feature: str
    t: str
    served: tuple[str, Any]
    recomputed: tuple[str, Any]
    reason: str = ""


@dataclass
class Consistency:
    """Counts of served values.

    `stale`: right for what had been written, while more was known by t. `not_checked`: what could not be recomputed,
    and `why_not` how many for which reason. `left_out`: records that are older than what is checked.
    """

    checked: int = 0
    different: int = 0
    stale: int = 0
    not_checked: int = 0
    why_not: dict[str, int] = field(default_factory=dict)
    left_out: int = 0
    examples: list[Difference] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        """As a JSON-able object."""
        return asdict(self)

    def skip(self, reason: str, count: int = 1) -> None:
        """Counts values that cannot be recomputed."""
        if count:
            self.not_checked += count
            self.why_not[reason] = self.why_not.get(reason, 0) + count

    def compare(self, s: Served, recomputed: tuple[str, Any], reason: str = "") -> None:
        """Counts one value, and keeps it as an example when it is among the first that differ.

        With a `reason` it is different whatever was recomputed.
        """
        t = (EPOCH + s.t_us * MICROSECOND).isoformat()
        equal = not reason and s.status == recomputed[0] and same(s.value, recomputed[1])
        self.count(Difference(s.entity, s.feature, t, (s.status, s.value), recomputed, reason), equal=equal)

    def count(self, compared: Difference, *, equal: bool) -> None:
        """Counts one comparison, whoever made it."""
        self.checked += 1
        if equal:
            return
        self.different += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(compared)


def status_at(seen_us: int | None, t_us: int, ttl: timedelta) -> str:
    """The status at t of an entity last seen at a time (None: never); ttl 0 is no limit."""
    if seen_us is None:
        return NOT_FOUND
    return OUTSIDE_MAX_AGE if ttl and t_us - seen_us > ttl // MICROSECOND else PRESENT


def same(served: Any, recomputed: Any) -> bool:
    """Whether a value of the served log (JSON) is exactly the recomputed one; a time to the second, as Feast keeps it."""
    if isinstance(recomputed, datetime):
        recomputed = recomputed.replace(tzinfo=recomputed.tzinfo or UTC)
        try:
            return served is not None and micros(served) // 1_000_000 == to_micros(recomputed) // 1_000_000
        except (TypeError, ValueError):
            return False
    if isinstance(recomputed, list):
        return isinstance(served, list) and len(served) == len(recomputed) and all(map(same, served, recomputed))
    if isinstance(recomputed, bytes):
        recomputed = base64.b64encode(recomputed).decode()
    if isinstance(recomputed, float) and isinstance(served, str):
        served = _NOT_FINITE.get(served, served)
    if isinstance(served, bool) or isinstance(recomputed, bool) or not isinstance(recomputed, (int, float)):
        return type(served) is type(recomputed) and bool(served == recomputed)
    if not isinstance(served, (int, float)):
        return False
    return bool(served == recomputed) or (math.isnan(served) and math.isnan(recomputed))
