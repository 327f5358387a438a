"""The states a consumer keeps: bounded by bytes, the ones written longest ago go first."""

from __future__ import annotations

from feature_store.held_states import HeldStates


def test_the_ones_written_longest_ago_go_first() -> None:
    held = HeldStates(10)
    held.put([("a",), ("b",)], [b"aaaa", b"bbbb"])
    held.put([("a",)], [b"AAAAA"])
    assert held.of([("a",), ("b",), ("c",)]) == [b"AAAAA", b"bbbb", None]
    held.put([("c",)], [b"cc"])
    assert held.of([("a",), ("b",), ("c",)]) == [b"AAAAA", None, b"cc"]
    held.put([("c",)], [b"c" * 11])
    assert held.of([("a",), ("c",)]) == [None, None]
    held.put([("d",)], [b"d" * 10])
    assert held.of([("d",)]) == [b"d" * 10]
    held.forget()
    assert len(held) == 0
    held.put([("d",)], [b"d" * 10])
    assert held.of([("d",)]) == [b"d" * 10]


def test_without_room_nothing_is_held() -> None:
    held = HeldStates(0)
    held.put([("a",)], [b""])
    assert held.of([("a",)]) == [None]
