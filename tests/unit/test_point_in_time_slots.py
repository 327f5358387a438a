"""The slots' grid against a plain search, over spans from one tick to all of 64 bits, where its arithmetic could wrap."""

from __future__ import annotations

import numpy as np
import pytest

from feature_store.point_in_time.slots import _by_key_and_time, _Grid

LEAST, GREATEST = -(2**63), 2**63 - 1


@pytest.mark.parametrize("span", [1, 5, 100, 2**40, 2**62, 2**64 - 1])
def test_the_grid_finds_the_slot_that_a_plain_search_finds(span: int) -> None:
    rng = np.random.default_rng(span % 1000)
    for _ in range(40):
        first = int(rng.integers(LEAST, GREATEST - span, endpoint=True)) if span < 2**63 else LEAST
        rows, keys = int(rng.integers(1, 40)), int(rng.integers(1, 8))

        def times(n: int, first: int = first) -> np.ndarray:
            return rng.integers(first, first + span, n, endpoint=True)

        codes, t = rng.integers(-1, keys, rows), times(rows)
        if span > 2**62:
            t[0], t[-1] = LEAST, GREATEST
        order = _by_key_and_time(codes, t)
        assert sorted(order) == [i for i in range(rows) if codes[i] >= 0]
        slots = list(zip(codes[order].tolist(), t[order].tolist(), strict=True))
        assert slots == sorted(slots)
        if not slots:
            continue
        asked = rng.integers(0, slots[-1][0] + 1, 60)
        at = np.where(rng.random(60) < 0.4, t[rng.integers(0, rows, 60)], times(60))
        at[:2] = LEAST, GREATEST
        found = _Grid(codes[order], t[order]).first_slots(asked, at)
        for key, time, slot in zip(asked.tolist(), at.tolist(), found.tolist(), strict=True):
            want = next((i for i, s in enumerate(slots) if s[0] == key and s[1] >= time), None)
            assert (slot if slot >= 0 else None) == want
