"""What a server lets in: API keys, requests at a time, bytes per body, seconds per request. One gate per process.

The gate knows no framework: the middleware of the application and any faster path in front of it share one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from feature_store.errors import PredictFlowError, UnavailableError
from serving.access import ApiKey, ForbiddenError, Keys, UnauthorizedError, token_of

T = TypeVar("T")
MIB = 1024 * 1024
HISTORICAL_PATH = "/api/v1/features/historical"


class OverloadedError(UnavailableError):
    """As many requests are being answered as the server allows at a time: HTTP 503, try again."""

    code = "overloaded"


class TimeBudgetError(PredictFlowError):
    """A request took longer than the server gives one: HTTP 504."""

    code = "timeout"

    @classmethod
    def after(cls, seconds: float) -> TimeBudgetError:
        """Of a request that was given so long."""
        return cls(f"no answer within {seconds:g} s", next_step="ask for less, or try again later")


@dataclass(frozen=True)
class RequestLimits:
    """Per process and request: requests at a time, seconds until the answer begins, bytes of a body.

    JSON is parsed while nothing else is, so its limit is lower than that of an Arrow stream.
    """

    concurrent: int = 256
    seconds: float = 30.0
    body_bytes: int = 4 * MIB
    arrow_body_bytes: int = 64 * MIB

    def body_of(self, path: str) -> int:
        """The largest body in bytes for a request path."""
        return self.arrow_body_bytes if path == HISTORICAL_PATH else self.body_bytes


class Gate:
    """`keys` None: open to everyone. Not for several threads: it belongs to the event loop.

    A request that passes holds a slot from `acquire` to `release`:

        refused = gate.guard(headers, "read") or gate.acquire()
        if refused is None:
            try: ...
            finally: gate.release()
    """

    def __init__(self, keys: Keys | None = None, concurrent: int = RequestLimits.concurrent) -> None:
        self.keys = keys
        self.concurrent = concurrent
        self.busy = 0

    def caller(self, headers: Mapping[bytes, bytes]) -> ApiKey | None:
        """The key that a request came with; None for an unknown one, for none, and where no keys are asked for."""
        if self.keys is None:
            return None
        token = token_of(headers)
        return None if token is None else self.keys.find(token)

    def guard(self, headers: Mapping[bytes, bytes], scope_needed: str) -> PredictFlowError | None:
        """What is wrong with the request's key, None if it may pass. `headers`: names in lower case."""
        return None if self.keys is None else self.judge(self.caller(headers), headers, scope_needed)

    def judge(
        self, caller: ApiKey | None, headers: Mapping[bytes, bytes], scope_needed: str
    ) -> PredictFlowError | None:
        """As `guard`, for a caller that was looked up already."""
        if self.keys is None:
            return None
        if caller is None:
            what = "no API key" if token_of(headers) is None else "unknown API key"
            return UnauthorizedError(what, next_step="send `Authorization: Bearer <key>`; predictflow serve-key new")
        if not caller.may(scope_needed):
            return ForbiddenError(
                f"key {caller.name} lacks the scope", value=scope_needed, next_step="use a key with that scope"
            )
        return None

    def acquire(self) -> PredictFlowError | None:
        """Takes a slot; an OverloadedError, and no slot, when none is free."""
        if self.busy >= self.concurrent:
            return OverloadedError(
                f"{self.concurrent} requests are being answered, the limit", next_step="try again after Retry-After"
            )
        self.busy += 1
        return None

    def release(self) -> None:
        """Gives a slot back."""
        self.busy -= 1

    def hold_until(self, work: Future[Any]) -> None:
        """Keeps one more slot until `work` has ended, for a thread that goes on after its request was answered."""
        if work.done():
            return
        loop = asyncio.get_running_loop()
        self.busy += 1

        def ended(_: object) -> None:
            with suppress(RuntimeError):  # the loop, and the server with it, is gone
                loop.call_soon_threadsafe(self.release)

        work.add_done_callback(ended)


async def in_thread(gate: Gate | None, threads: ThreadPoolExecutor, work: Callable[..., T], *args: Any) -> T:
    """Runs `work` in a thread. When the caller gives up, work that waits for a thread is not begun; work that runs keeps a
    slot of `gate` until it ends, so that there are no more threads at work than the gate lets in."""
    running = threads.submit(work, *args)
    try:
        return await asyncio.wrap_future(running)
    except asyncio.CancelledError:
        if gate is not None:
            gate.hold_until(running)
        raise


@dataclass(frozen=True, slots=True)
class Admitted:
    """A request that holds a slot; `key`: the name of its API key, None where no keys are asked for."""

    key: str | None = None


_ANYONE = Admitted()


class Admission:
    """One route's way through a gate, for a path that leaves every refusal to the application's own answer."""

    def __init__(self, gate: Gate, scope_needed: str | None) -> None:
        self._gate = gate
        self._scope_needed = scope_needed

    def admit(self, headers: Sequence[tuple[bytes, bytes]]) -> Admitted | None:
        """Takes a slot for a request that may pass; None, and no slot, for another. `headers`: names in lower case."""
        gate = self._gate
        admitted = _ANYONE
        if gate.keys is not None and self._scope_needed is not None:
            named = dict(headers)
            caller = gate.caller(named)
            if caller is None or gate.judge(caller, named, self._scope_needed) is not None:
                return None
            admitted = Admitted(caller.name)
        return admitted if gate.acquire() is None else None

    def release(self) -> None:
        """Gives the slot back."""
        self._gate.release()
