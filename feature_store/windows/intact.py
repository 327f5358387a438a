"""States of which some may be damaged: those are found, and left out, so that one of them stops nobody else. Pure."""

from __future__ import annotations

from collections.abc import Sequence

from feature_store.windows.definition import WindowedView
from feature_store.windows.state import States, WindowStateError


def decode_intact(
    definition: WindowedView, blobs: Sequence[bytes | None]
) -> tuple[States, dict[int, WindowStateError]]:
    """As `States.decode`; the damaged ones come as empty states, with the error of each by its place.

    DefinitionError: any written under another definition or format.
    """
    try:
        return States.decode(definition, blobs), {}
    except WindowStateError:
        damaged = _damaged(definition, blobs, 0)
    return States.decode(definition, [None if i in damaged else b for i, b in enumerate(blobs)]), damaged


def _damaged(definition: WindowedView, blobs: Sequence[bytes | None], first: int) -> dict[int, WindowStateError]:
    """By halves: few of many are damaged."""
    try:
        States.decode(definition, blobs)
    except WindowStateError as e:
        if len(blobs) == 1:
            return {first: e}
        half = len(blobs) // 2
        return _damaged(definition, blobs[:half], first) | _damaged(definition, blobs[half:], first + half)
    return {}
