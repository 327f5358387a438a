"""A batch is prepared while the one before is on its way into Redis: in which order, and what happens when that fails."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from feature_store.batch_result import BatchResult, PartitionResult
from feature_store.errors import DefinitionError, UnavailableError
from feature_store.event_decode import Raw, RawBatch
from feature_store.in_hand import Delivered
from feature_store.stream_batch import Begun, Prepared
from feature_store.stream_metrics import StreamMetrics
from feature_store.sync import Sync, SyncOptions

AWAY = UnavailableError("Redis is away")


class View:
    """Says what is asked of it."""

    name = "v"

    def __init__(self, world: World) -> None:
        self._step = world.step
        self.fenced: set[str] = set()

    def prepare(self, batch, now_us, wall_us) -> Prepared:
        self._step(f"prepare {batch.offsets}")
        result = BatchResult(clock_us=9, partitions={p: PartitionResult(applied=1) for p in set(batch.partitions)})
        return Prepared(batch, now_us, wall_us, result)

    def begin(self, prepared) -> Begun:
        name = str(prepared.batch.offsets)
        self._step(f"begin {name}")
        return Begun(
            prepared.result, SimpleNamespace(finish=lambda: self.finish(name), drop=lambda: self._step("drop"))
        )

    def finish(self, name: str) -> SimpleNamespace:
        self._step(f"finish {name}")
        return SimpleNamespace(without_values=0, fenced=int(name in self.fenced))

    def committed(self, partition, next_offset) -> None:
        self._step(f"committed {next_offset}")


class World:
    """A `Sync` between a consumer, a view, and a place in Redis, that say what happens."""

    def __init__(self, clock: str) -> None:
        self.said: list[str] = []
        self.fail: dict[str, Exception] = {}  # at the step of this name, once
        self.lost: dict[int, int] = {}
        self.owned = {0: 0}
        self.view = View(self)
        self.sync = sync = Sync(SimpleNamespace(project="p"), SyncOptions("kafka", "", clock, group="g"))
        sync.metrics = StreamMetrics()
        sync.views, sync._topic = [self.view], "t"
        sync._consumer = SimpleNamespace(
            owned=self.owned,
            done=lambda offsets: self.step(f"commit {offsets}"),
            wait=lambda _: None,
            resume=lambda: None,
            lag=lambda _: 0,
            lags=lambda _: {},
            go_back=self.go_back,
        )
        sync._place = SimpleNamespace(lost=lambda: self.lost, note=self.note)
        sync._letters = SimpleNamespace(write=None, flush=lambda: None)
        sync._replay = SimpleNamespace(now_us=lambda: 5, advance=lambda us: self.step(f"advance {us}"))

    def step(self, name: str) -> None:
        if name in self.fail:
            raise self.fail.pop(name)
        self.said.append(name)

    def note(self, offsets) -> bool:
        return not self.lost

    def go_back(self) -> dict[int, int]:
        self.step("go back")
        self.lost = {}
        return {}

    def apply(self, *offsets: int, partition: int = 0) -> list[str]:
        """What happens when these messages come; none: the loop found no message."""
        before = len(self.said)
        raw = RawBatch.of([Raw(partition, o, None, b"") for o in offsets])
        self.sync._apply(Delivered(raw, {partition: 1000} if offsets else {}))
        return self.said[before:]

    def applied(self) -> float:
        """As the metrics say."""
        return self.sync.metrics.registry.get_sample_value(
            "predictflow_sync_events_total", {"view": "v", "partition": "0", "outcome": "applied"}
        )


@pytest.fixture
def world():
    return World("wall")


def test_the_next_batch_is_prepared_before_the_last_one_is_awaited(world):
    assert world.apply(0, 1) == ["prepare [0, 1]", "begin [0, 1]"]
    assert world.apply(2) == ["prepare [2]", "finish [0, 1]", "commit {0: 2}", "committed 2", "begin [2]"]
    assert world.apply() == ["finish [2]", "commit {0: 3}", "committed 3"]
    assert world.apply() == []
    assert world.applied() == 2


def test_by_the_replay_clock_the_last_batch_moves_it_first():
    world = World("replay")
    world.apply(0)
    assert world.apply(1) == ["finish [0]", "advance 9", "commit {0: 1}", "committed 1", "prepare [1]", "begin [1]"]


def test_a_view_is_placed_after_the_replay_clock_that_the_one_before_it_moved():
    world = World("replay")
    world.sync.views.append(View(world))
    assert world.apply(0) == ["prepare [0]", "begin [0]", "prepare [0]", "begin [0]"]


def test_what_another_owner_wrote_meanwhile_is_read_before_the_next_batch_is_applied(world):
    world.view.fenced.add("[0]")
    world.apply(0)
    assert world.apply(1) == ["prepare [1]", "finish [0]", "commit {0: 1}", "committed 1", "prepare [1]", "begin [1]"]


@pytest.mark.parametrize("messages", [(1, 2), ()])
def test_a_batch_that_was_not_written_comes_again_before_the_next(world, messages):
    world.apply(0)
    world.fail["finish [0]"] = AWAY
    together = str([0, *messages])
    said = [s for s in world.apply(*messages) if s != "prepare [1, 2]"]
    assert said == ["drop", f"prepare {together}", f"begin {together}"]
    assert world.apply() == [
        f"finish {together}",
        f"commit {{0: {len(messages) + 1}}}",
        f"committed {len(messages) + 1}",
    ]


def test_lag_is_told_while_a_server_is_away(world, caplog):
    caplog.set_level("INFO", "feature_store")
    asked = []
    world.sync._consumer.lags = lambda ask: asked.append(ask) or {0: 7}
    world.fail["begin [0]"] = AWAY
    world.apply(0)
    assert asked == [True]
    assert world.sync.metrics.registry.get_sample_value("predictflow_sync_lag", {"partition": "0"}) == 7
    assert "lag 7" in caplog.text


def test_a_batch_that_cannot_be_begun_leaves_the_written_one_committed(world):
    world.apply(0)
    world.fail["begin [1]"] = OSError("no space left")
    assert world.apply(1) == [
        "prepare [1]", "finish [0]", "commit {0: 1}", "committed 1", "prepare [1]", "begin [1]"
    ]  # fmt: skip


def test_a_batch_that_cannot_be_prepared_does_not_keep_the_last_one_from_its_commit(world):
    world.apply(0)
    world.fail["prepare [1]"] = UnavailableError("no schema registry")
    assert world.apply(1) == ["finish [0]", "commit {0: 1}", "committed 1", "prepare [1]", "begin [1]"]


def test_of_a_partition_that_was_lost_nothing_is_applied_again(world):
    world.apply(0)
    world.fail["finish [0]"] = AWAY
    assert not world.sync._settled()
    world.owned.clear()
    world.owned[1] = 0
    world.apply(5, partition=1)
    assert world.said[-2:] == ["prepare [5]", "begin [5]"]


def test_when_redis_lost_something_both_batches_are_read_again(world):
    world.apply(0)
    world.lost = {0: 0}
    said = world.apply(1)
    assert said[-1] == "go back"
    assert not any(s.startswith("commit") for s in said)
    assert world.apply() == []


def test_a_batch_in_hand_is_written_before_its_partition_goes_and_at_the_end(world):
    world.apply(0)
    world.sync._place.forget = lambda _: None
    world.view.stop_partition = lambda p: world.step(f"stop {p}")
    before = len(world.said)
    world.sync._stop_partition(0)
    assert world.said[before:] == ["finish [0]", "commit {0: 1}", "committed 1", "stop 0"]


def test_states_of_another_definition_end_the_stream(world):
    world.apply(0)
    world.fail["finish [0]"] = DefinitionError("of another definition")
    with pytest.raises(DefinitionError):
        world.apply(1)
    assert not world.sync._settled()
