"""Random event histories for a windowed definition: out of order, late, repeated, equal, null, huge, tiny, ahead of time."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from random import Random

from window_definitions import SECOND, TIME, Meant, random_definition
from window_oracle import Value

STARTS = {
    "a day like any other": 1_728_000_000 * SECOND,  # 2024-10-04
    "the epoch": 0,
    "before the epoch": -3 * 86_400 * SECOND,
    "a leap day": 1_709_164_800 * SECOND,  # 2024-02-29
    "the end of a leap day": 1_709_251_199 * SECOND,
    "the turn of a year": 1_735_689_600 * SECOND,
}
LAST = 2**63 - 1


@dataclass(frozen=True)
class Message:
    """What a producer wrote: `produced` is the source's clock then. `idle`: instead, the partition's watermark moves there."""

    entity: str | None
    time: int
    produced: int
    columns: Mapping[str, Value] = field(default_factory=dict)
    event_id: str | None = None
    idle: int | None = None


@dataclass(frozen=True)
class Scenario:
    """All that a run depends on. `plan`: seed of the batches, crashes and reads."""

    seed: int
    meant: Meant
    history: tuple[Message, ...]
    partitions: tuple[tuple[Message, ...], ...]
    plan: int
    entities: tuple[str, ...]

    def without(self, partition: int, first: int, count: int = 1) -> Scenario:
        """Without some messages of a partition (-1: of history)."""
        end = first + count
        if partition < 0:
            return replace(self, history=self.history[:first] + self.history[end:])
        kept = tuple(p[:first] + p[end:] if i == partition else p for i, p in enumerate(self.partitions))
        return replace(self, partitions=kept)


def random_scenario(seed: int) -> Scenario:
    random = Random(seed)
    # Topics are keyed by the entity, and a consumer checks it. Tiles and OVER windows are right for an entity in several
    # partitions too; which of two ids came first, and which sessions are still needed, would depend on the order of reading.
    spread = random.random() < 0.15
    event_id = not spread and random.random() < 0.5
    meant = random_definition(random, event_id=event_id, sessions=not spread)
    u = meant.unit_us
    entities = tuple(f"e{i}" for i in range(random.choice([1, 2, 3, 5])))
    partitions: list[list[Message]] = [[] for _ in range(random.choice([1, 1, 2, 3]))]
    clock = random.choice(list(STARTS.values())) + random.choice([0, 0, 1, -1, u // 2])
    rare = _Rare(random)
    history = []
    if random.random() < 0.4:
        for _ in range(random.randint(1, 15)):
            time = clock - random.randint(0, 40) * u
            entity = random.choice(entities)
            columns = rare.columns(time, u) | {TIME: time}
            created = min(clock, time + random.choice([0, 0, 1, u]))
            history.append(Message(entity, time, created, columns, f"h{len(history)}" if event_id else None))
    pace = random.choice([[0, 0, 0, 1], [0, 1, 2], [0, 1, 5, 30]])
    unordered = random.choice([0.05, 0.3, 0.6])
    for i in range(random.choice([3, 12, 25, 50, 70])):
        clock += random.choice(pace) * u + random.choice([0, 0, 1, 7, u // 3])
        grid = clock // u * u
        age = random.choice([1, 1, 2, 3, 8, 40]) if random.random() < unordered else 0
        time = grid - age * u + random.choice([0, 0, 0, 0, 1, -1, u // 2])
        if random.random() < 0.06:  # ahead of the clock, within the skew
            time = clock + random.choice([1, SECOND, 5 * SECOND])
        entity_number = random.randrange(len(entities))
        partition = random.randrange(len(partitions)) if spread else entity_number % len(partitions)
        of = partitions[partition]
        if random.random() < 0.05:
            of.append(Message(None, 0, clock, idle=time))
            continue
        same_id = random.random() < 0.25
        ids = None
        if event_id:
            ids = f"r{random.randrange(6)}" if same_id else f"u{i}"
            if history and random.random() < 0.1:
                ids = random.choice(history).event_id
        of.append(Message(entities[entity_number], time, clock, rare.columns(time, u) | {TIME: time}, ids))
    return Scenario(seed, meant, tuple(history), tuple(map(tuple, partitions)), random.getrandbits(32), entities)


class _Rare:
    """Column values, with an eye for the rare ones."""

    def __init__(self, random: Random) -> None:
        self.random = random
        self.nulls = random.choice([0.0, 0.1, 0.5])
        self.huge = random.choice([0.0, 0.1, 0.4])

    def columns(self, time: int, u: int) -> dict[str, Value]:
        r = self.random
        n = r.randint(-9, 9)
        if r.random() < self.huge:
            n = r.choice([2**62, -(2**62), LAST, -LAST, 2**53 + 1, -(2**60) - 1, 2**58 + 7])
        out: dict[str, Value] = {
            "kind": r.choice(["a", "a", "B", "b", "it's", "é", "É", "", "日本", "a b"]),
            "n": n,
            "m": r.randint(-3, 3),
            "x": r.randint(-20, 20) / 4,
            "y": r.choice([0.1, -0.3, 1e300, -1e300, 1e-300, 5e-324, 12345.678, 0.0]),
            "z": 1e9 + r.randint(0, 9) / 10,
            "flag": r.random() < 0.5,
            "at": time + r.choice([0, 1, -1, u]),
        }
        return {c: None if r.random() < self.nulls else v for c, v in out.items()}
