"""The one base error and its kinds: every message a user can meet says what, the value, the valid ones, the next step.

It derives from `click.ClickException`, because `feast apply` prints a traceback for any other exception that our stores
raise, and one line for this one. Exit codes: 1 for a failure, 2 for wrong usage.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import click


class PredictFlowError(click.ClickException):
    """Base of every error a user can meet.

    `what` is a clause without a full stop; `value` the offending value; `valid` the accepted ones; `next_step` the
    command or action that mends it. `code` is stable and machine-readable (REST answers carry it).
    """

    code = "failure"
    exit_code = 1

    def __init__(
        self, what: str, *, value: object = None, valid: Iterable[object] | None = None, next_step: str | None = None
    ) -> None:
        self.what = what
        self.value = value
        self.valid = sorted(str(v) for v in valid) if valid is not None else None
        self.next_step = next_step
        super().__init__(self._line())

    def _line(self) -> str:
        parts = [self.what if self.value is None else f"{self.what}: {self.value!r}"]
        if self.valid is not None:
            shown = ", ".join(self.valid[:12]) + (f", ... ({len(self.valid)} in all)" if len(self.valid) > 12 else "")
            close = difflib.get_close_matches(str(self.value), self.valid, n=1) if self.value is not None else []
            parts.append(f"valid: {shown or 'none'}" + (f"; did you mean {close[0]!r}?" if close else ""))
        if self.next_step:
            parts.append(f"next: {self.next_step}")
        return "; ".join(parts)


class UsageError(PredictFlowError):
    """The command line, request or definition is wrong, whatever the data: exit code 2, HTTP 400."""

    code = "usage"
    exit_code = 2


class DefinitionError(UsageError):
    """A feature definition that cannot be kept as written (unknown function, colliding names, lossy type change)."""

    code = "definition"


class NotFoundError(UsageError):
    """A view, feature service, model, file or topic that does not exist."""

    code = "not_found"


class DataError(PredictFlowError):
    """Input data that breaks its contract: missing column, unreadable file, time out of range, wrong key type."""

    code = "data"


class UnavailableError(PredictFlowError):
    """A server that does not answer; HTTP 503. The message names it and the setting that points at it."""

    code = "unavailable"
