"""What the comparisons found in the states: a test each, the smallest that shows it."""

from __future__ import annotations

import pytest
from window_definitions import view_of

from feature_store.windows.state import States

COUNT = "SELECT k, COUNT(*) AS c FROM events GROUP BY k, TUMBLE(event_timestamp, INTERVAL '1' HOUR)"


@pytest.mark.parametrize("blobs", [[], [None], [None, None], [b"", None, b""]])
def test_entities_that_were_never_seen_have_states_too(blobs):
    states = States.decode(view_of(COUNT), blobs)
    assert len(states) == len(blobs)
    assert states.values(0).seen == [None] * len(blobs)
