"""Times as options of the command line."""

from __future__ import annotations

from datetime import UTC, datetime

from feature_store.errors import UsageError


def parse_time(option: str, text: str) -> datetime:
    """An ISO 8601 time, UTC where it has no zone; UsageError names the option."""
    try:
        t = datetime.fromisoformat(text)
    except ValueError as e:
        raise UsageError(f"{option} is not an ISO 8601 time", value=text, next_step="2026-01-31T00:00:00Z") from e
    return t.replace(tzinfo=t.tzinfo or UTC)
