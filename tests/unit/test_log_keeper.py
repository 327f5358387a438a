"""Log files are merged beside the stream, one round at a time; what a round met is told."""

from __future__ import annotations

import threading
from collections.abc import Callable

import pytest

from feature_store.errors import DataError
from feature_store.log_keeper import LogKeeper


class View:
    name = "v"

    def __init__(self, error: Exception | None = None) -> None:
        self.rounds: list[int] = []
        self.began, self.go = threading.Event(), threading.Event()
        self.rest_seconds = 0.0
        self.go.set()
        self._error = error

    def compact(self, partition: int, wall_us: int, rest: Callable[[float], object]) -> None:
        self.began.set()
        rest(self.rest_seconds)
        assert self.go.wait(10)
        assert threading.current_thread() is not threading.main_thread()
        self.rounds.append(partition)
        if self._error:
            raise self._error


@pytest.fixture
def keeper():
    made = LogKeeper()
    yield made
    made.close()


def test_one_round_at_a_time(keeper):
    view = View()
    view.go.clear()
    keeper.start([view], {1: 0, 0: 0}, 5)
    keeper.start([view], [7], 5)  # the first is under way
    assert view.rounds == []
    view.go.set()
    keeper.wait()
    assert view.rounds == [0, 1]
    keeper.start([view], [2], 5)
    keeper.wait()
    assert view.rounds == [0, 1, 2]


def test_a_full_disk_is_logged_and_the_next_view_has_its_turn(keeper, caplog):
    full, fine = View(OSError("no space left")), View()
    keeper.start([full, fine], [0, 1], 5)
    keeper.wait()
    assert (full.rounds, fine.rounds) == ([0, 1], [0, 1])
    assert "event log of v not compacted: no space left" in caplog.text
    keeper.start([fine], [0], 5)


def test_a_file_that_cannot_be_read_ends_the_next_round_s_start(keeper):
    keeper.start([View(DataError("event log file cannot be read"))], [0], 5)
    keeper.wait()
    with pytest.raises(DataError, match="cannot be read"):
        keeper.start([View()], [0], 5)
    keeper.start([View()], [0], 5)


def test_what_the_last_round_met_is_told_at_the_end(caplog):
    keeper = LogKeeper()
    keeper.start([View(DataError("event log file cannot be read"))], [0], 5)
    keeper.close()
    assert "event log not compacted: event log file cannot be read" in caplog.text


@pytest.mark.parametrize("end", [LogKeeper.wait, LogKeeper.close])
def test_who_waits_for_a_round_need_not_wait_for_its_rests(end):
    keeper, view = LogKeeper(), View()
    view.rest_seconds = 1e6
    keeper.start([view], [0, 1, 2], 5)
    assert view.began.wait(10)
    assert view.rounds == []
    end(keeper)
    assert view.rounds == [0, 1, 2]
    keeper.close()
