"""Rows of many entities gathered out of several matrices, against gathering them one by one."""

from __future__ import annotations

import numpy as np
import pytest

from feature_store.windows.rows import Rows

WIDTH = 3


def made(rng: np.random.Generator, sizes: list[int]) -> Rows:
    """Rows of entities with so many rows each."""
    starts = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
    return Rows(starts, rng.integers(-(2**62), 2**62, (int(starts[-1]), WIDTH)))


@pytest.mark.parametrize("most", [0, 1, 5, 40, 200], ids=lambda n: f"up to {n} rows")
def test_gathered_rows_are_those_of_each_part(most):
    rng = np.random.default_rng(most)
    for count in (1, 2, 30):
        wholes = [made(rng, rng.integers(0, most + 1, 20).tolist()) for _ in range(count)]
        places = rng.permutation(7 * count)
        parts = [(w, rng.permutation(20)[:7], places[7 * i : 7 * i + 7]) for i, w in enumerate(wholes)]
        found = Rows.gathered(len(places), WIDTH, parts)
        expected: dict[int, list[list[int]]] = {}
        for whole, some, where in parts:
            for entity, place in zip(some.tolist(), where.tolist(), strict=True):
                expected[place] = whole.data[whole.starts[entity] : whole.starts[entity + 1]].tolist()
        assert [found.data[a:b].tolist() for a, b in zip(found.starts, found.starts[1:], strict=False)] == [
            expected[place] for place in range(len(places))
        ]


def test_of_no_entities_no_rows():
    found = Rows.gathered(0, WIDTH, [])
    assert (found.entities, found.data.shape) == (0, (0, WIDTH))
