"""Why no right value can be given from a window state: readers answer with an error status, never with a value."""

from __future__ import annotations

from feature_store.errors import DataError


class WindowStateError(DataError):
    """A state from which no right value can be given."""

    code = "window_state"


class TooManyEventsError(WindowStateError):
    """The window reaches back to events that `max_events_per_entity` made the state drop."""

    code = "too_many_events"


class OverflowedError(WindowStateError):
    """A result that does not fit into an int64, or is no finite double."""

    code = "overflow"
