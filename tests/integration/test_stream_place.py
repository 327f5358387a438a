"""The note of how far a consumer has written, on a real Redis that goes back to an older snapshot."""

from __future__ import annotations

import pytest

from feature_store.redis_connection import connect
from feature_store.stream_place import StreamPlace

KEY = "predictflow:p:place:g:t"


@pytest.fixture
def redis(redis_url):
    return connect(redis_url)


@pytest.fixture
def place(redis) -> StreamPlace:
    return StreamPlace(redis, "p", "g", "t")


def test_what_redis_lost_before_the_start_is_noticed_at_the_start(redis, place):
    place.note({0: 100, 1: 7})
    snapshot = redis.dump(KEY)
    place.note({0: 300})
    redis.restore(KEY, 0, snapshot, replace=True)
    again = StreamPlace(redis, "p", "g", "t")
    again.start(0, 300)
    again.start(1, 7)
    assert again.unchecked
    assert again.lost() == {0: 100}
    assert not again.unchecked


def test_where_nothing_was_ever_noted_nothing_is_lost(place):
    place.start(0, 300)
    assert place.lost() == {}
    assert place.note({0: 400})
    assert place.lost() == {}


def test_going_back_within_a_batch_is_not_covered_by_the_batch_s_own_note(redis, place):
    place.note({0: 100, 1: 5})
    snapshot = redis.dump(KEY)
    place.note({0: 200})
    assert place.lost() == {}
    redis.restore(KEY, 0, snapshot, replace=True)
    assert not place.note({0: 300, 1: 9})
    assert redis.hgetall(KEY) == {b"0": b"100", b"1": b"5"}
    assert place.lost() == {0: 100}
    place.start(0, 100)
    assert place.lost() == {}
    assert place.note({0: 300})


def test_a_consumer_that_lost_its_partition_does_not_take_the_note_back(redis, place):
    place.note({0: 100})
    StreamPlace(redis, "p", "g", "t").note({0: 300})
    assert place.note({0: 200})
    assert redis.hget(KEY, "0") == b"300"


def test_states_made_anew_may_reach_less_far(redis, place):
    place.note({0: 300})
    place.set({0: 100})
    place.start(0, 100)
    assert place.lost() == {}
    assert redis.hget(KEY, "0") == b"100"
