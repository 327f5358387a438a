"""When the demo's proof holds: nothing different, stale, unchecked or lost, and every malformed message set aside."""

from __future__ import annotations

import dataclasses

import pytest

from predictflow.demo.proof import Proof

GOOD = Proof(checked=10, different=0, stale=0, not_checked=0, examples=[], lost_events=0, dead_lettered=2)


def test_a_proof_with_nothing_wrong_holds() -> None:
    assert GOOD.failure(2) is None


@pytest.mark.parametrize(
    "wrong",
    [
        {"checked": 0},
        {"different": 1, "examples": ["C1 charges"]},
        {"stale": 3},
        {"not_checked": 1},
        {"lost_events": 1},
        {"dead_lettered": 1},
    ],
)
def test_anything_wrong_fails_it_and_is_said(wrong: dict[str, object]) -> None:
    failure = dataclasses.replace(GOOD, **wrong).failure(2)
    assert failure is not None
    for name, value in wrong.items():
        if name != "checked":
            shown = str(value[0]) if isinstance(value, list) else str(value)
            assert shown in failure.format_message()
