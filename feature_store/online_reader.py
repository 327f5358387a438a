"""A read plan on a Redis client and a clock: one round trip per read."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from feature_store.clock import ClockMode, WallClock, from_micros, replay_clock_key, to_micros
from feature_store.errors import UnavailableError, UsageError
from feature_store.read_command import Replies
from feature_store.read_plan import Entity, OnlineRows, ReadPlan
from feature_store.redis_connection import answering
from feature_store.redis_socket import RedisSocket
from feature_store.redis_stream import Done, RedisStream
from feature_store.redis_wire import command
from feature_store.window_write import parse_watermarks, watermarks_key

if TYPE_CHECKING:
    import redis
    import redis.asyncio

    from feature_store.read_command import Reply

Requests = Sequence[tuple[bytes, list[bytes]]]


class AtNotAllowedError(UsageError):
    """A read at a chosen time under the wall clock, where the time of a read is the clock's."""

    code = "at_not_allowed"


class AtTooEarlyError(UsageError):
    """A read at a time before the newest applied event: what was known then can no longer be told online."""

    code = "at_too_early"


class ClockNotSetError(UnavailableError):
    """`replay` before anything set the clock."""

    code = "clock_not_set"


class OnlineReader:
    """Plan + Redis + clock: one round trip per read. Safe to share between threads, as its Redis client is.

    `redis`: `read` needs a RedisSocket or a blocking client that returns bytes, `aread` a RedisStream or an asyncio one.
    """

    def __init__(
        self,
        plan: ReadPlan,
        redis: RedisSocket | RedisStream | redis.Redis | redis.asyncio.Redis,
        project: str,
        clock: ClockMode,
    ) -> None:
        self.plan = plan
        self._redis: Any = redis
        self._direct = isinstance(redis, RedisSocket | RedisStream)
        self._clock = clock
        self._clock_key = replay_clock_key(project)
        # Before the states: what the clock and the watermarks say was applied is in them.
        self._before = [("GET", self._clock_key.encode())] if clock == "replay" else []
        self._before += [("HGETALL", watermarks_key(project, stored).encode()) for stored in plan.closing]
        self._first = b"".join([command(name.encode(), key) for name, key in self._before])
        self._extra = len(self._before)

    def read(self, entities: Sequence[Entity], at: datetime | None = None) -> OnlineRows:
        """Values and statuses of `entities` at the clock, or at `at` (replay only, not before the clock).

        UsageError for wrong entities or `at`; UnavailableError when Redis does not answer. Changes nothing.
        """
        replies, t_us = self.fetch(entities, at)
        return self.plan.decode(entities, replies, t_us)

    async def aread(self, entities: Sequence[Entity], at: datetime | None = None) -> OnlineRows:
        """As `read`, on an asyncio client."""
        replies, t_us = await self.afetch(entities, at)
        return self.plan.decode(entities, replies, t_us)

    def fetch(self, entities: Sequence[Entity], at: datetime | None = None) -> tuple[list[Reply], int]:
        """The raw replies and the time to read them at, in microseconds: what `ReadPlan.at` and `decode` take."""
        if not self._direct:
            return self.fetch_keys(self.plan.requests(entities), at)
        self._check(at)
        payload = self._first + self.plan.payload(entities)
        return self._answer(self._redis.ask(payload, self._extra + len(entities) * self.plan.width), at)

    async def afetch(self, entities: Sequence[Entity], at: datetime | None = None) -> tuple[list[Reply], int]:
        """As `fetch`, on an asyncio client."""
        if not self._direct:
            return await self.afetch_keys(self.plan.requests(entities), at)
        self._check(at)
        payload = self._first + self.plan.payload(entities)
        return self._answer(await self._redis.ask(payload, self._extra + len(entities) * self.plan.width), at)

    def start(self, entities: Sequence[Entity], done: Done) -> bool:
        """As `afetch` at the clock, without a task: `done` is called with the replies that `replied` takes.

        False, and nothing is sent: this reader has no RedisStream. UsageError as `fetch`.
        """
        if not isinstance(self._redis, RedisStream):
            return False
        payload = self._first + self.plan.payload(entities)
        self._redis.send(payload, self._extra + len(entities) * self.plan.width, done)
        return True

    def replied(self, replies: list[Any]) -> tuple[list[Reply], int]:
        """What `afetch` gives, from what `start` called back with. ClockNotSetError under an unset replay clock."""
        return self._answer(replies, None)

    def fetch_keys(self, requests: Requests, at: datetime | None = None) -> tuple[list[Reply], int]:
        """As `fetch`, for requests whose keys the caller made."""
        self._check(at)
        if self._direct:
            return self._answer(self._redis.ask(*self._commands(requests)), at)
        pipe = self._pipeline(requests)
        with answering(self._redis):
            return self._answer(pipe.execute() if len(pipe) else [], at)

    async def afetch_keys(self, requests: Requests, at: datetime | None = None) -> tuple[list[Reply], int]:
        """As `fetch_keys`, on an asyncio client."""
        self._check(at)
        if self._direct:
            return self._answer(await self._redis.ask(*self._commands(requests)), at)
        pipe = self._pipeline(requests)
        with answering(self._redis):
            return self._answer(await pipe.execute() if len(pipe) else [], at)

    def _check(self, at: datetime | None) -> None:
        if at is not None and self._clock != "replay":
            raise AtNotAllowedError(
                "`at` needs the replay clock",
                value=at.isoformat(),
                next_step="leave it out, or PREDICTFLOW_CLOCK=replay",
            )

    def _commands(self, requests: Requests) -> tuple[bytes, int]:
        made = b"".join([command(b"HMGET", key, *fields) for key, fields in requests])
        return self._first + made, self._extra + len(requests)

    def _pipeline(self, requests: Requests) -> Any:
        pipe = self._redis.pipeline(transaction=False)
        for name, before in self._before:
            pipe.execute_command(name, before)
        for key, fields in requests:
            pipe.execute_command("HMGET", key, *fields)
        return pipe

    def _answer(self, replies: list[Any], at: datetime | None) -> tuple[list[Reply], int]:
        if self.plan.closing:
            start = self._extra - len(self.plan.closing)
            held = Replies(replies[:start] + replies[self._extra :])
            read = map(parse_watermarks, replies[start : self._extra])
            held.watermarks = dict(zip(self.plan.closing, read))
            t_us = self._time(held, at)
            if start:
                del held[0]
            return held, t_us
        t_us = self._time(replies, at)
        return replies[1:] if self._clock == "replay" else replies, t_us

    def _time(self, replies: list[Any], at: datetime | None) -> int:
        if self._clock != "replay":
            return to_micros(WallClock().now())
        clock = None if replies[0] is None else int(replies[0])
        if at is not None:
            t_us = to_micros(at)
            if clock is not None and t_us < clock:
                raise AtTooEarlyError(
                    "`at` is before the newest applied event",
                    value=at.isoformat(),
                    next_step=f"read at {from_micros(clock).isoformat()} or later",
                )
            return t_us
        if clock is None:
            raise ClockNotSetError(
                f"the replay clock of project {self.plan.project} is not set",
                next_step="`predictflow windows bootstrap --known-by TIME` sets it; PREDICTFLOW_CLOCK=wall uses the machine's",
            )
        return clock
