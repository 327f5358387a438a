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


def listed(rows: Rows) -> list[list[list[int]]]:
    return [rows.data[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:], strict=False)]


@pytest.mark.parametrize("keys", [3, 40, 10_000], ids=lambda n: f"{n} keys")
def test_rows_are_inserted_where_they_belong_whatever_their_order(keys):
    """Few keys: most rows have twins, old and new; many keys: none."""
    rng = np.random.default_rng(keys)
    for old in (0, 5, 400):
        held: list[list[list[int]]] = [[] for _ in range(9)]
        rows = Rows.empty(9, WIDTH)
        for new in (old, 1, 30, 0, 7):
            entity = rng.integers(0, 8, new)  # the last one has none
            data = np.stack([rng.integers(0, keys, new), rng.integers(-3, 3, new), rng.integers(0, 2, new)], axis=1)
            for e, row in zip(entity.tolist(), data.tolist(), strict=True):
                held[e].append(row)
            before, kept = listed(rows), rows
            rows = rows.insert(entity, data)
            assert listed(rows) == [sorted(of_one) for of_one in held]
            assert listed(kept) == before


@pytest.mark.parametrize("width", [1, WIDTH])
def test_rows_are_kept_replaced_and_put_in(width):
    rng = np.random.default_rng(width)
    for count in (0, 1, 60):
        entity, key = np.sort(rng.integers(0, 5, count)), np.arange(count) * 2
        data = np.column_stack([key, *[rng.integers(0, 9, count) for _ in range(width - 1)]]).astype(np.int64)
        rows = Rows.of(5, entity, data)
        wanted = rng.random(count) < 0.5
        kept = rows.keep(wanted)
        assert listed(kept) == [data[wanted & (entity == e)].tolist() for e in range(5)]
        some = np.flatnonzero(~wanted)
        again = np.column_stack([key[some], *[np.full(len(some), 99)] * (width - 1)]).astype(np.int64)
        places = kept.find(entity[some], again[:, 0])
        put = kept.put(places, kept.holds(places, entity[some], again[:, 0]), entity[some], again)
        assert put.data[:, 0].tolist() == key.tolist()
        places = rows.find(entity[some], again[:, 0])
        there = rows.holds(places, entity[some], again[:, 0])
        assert there.all()
        replaced = rows.put(places, there, entity[some], again)
        assert replaced.data[some].tolist() == again.tolist()
        assert replaced.data[wanted].tolist() == data[wanted].tolist()
