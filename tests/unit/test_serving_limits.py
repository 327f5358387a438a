"""A slot lasts as long as the thread that it was taken for, whether or not anybody still waits for the answer."""

from __future__ import annotations

import asyncio
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from serving.limits import Gate, in_thread


async def abandoned(gate: Gate, threads: ThreadPoolExecutor, work: threading.Event, began: threading.Event) -> None:
    """A request as the middleware holds it, given up on while its thread runs."""

    def run() -> None:
        began.set()
        assert work.wait(20)

    assert gate.acquire() is None
    try:
        async with asyncio.timeout(0.05):
            await in_thread(gate, threads, run)
    finally:
        gate.release()


def test_work_that_nobody_waits_for_keeps_its_slot_until_it_ends() -> None:
    async def run() -> None:
        gate, work, began = Gate(None, 1), threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            with pytest.raises(TimeoutError):
                await abandoned(gate, threads, work, began)
            assert began.is_set()
            refused = gate.acquire()
            assert refused is not None
            assert refused.code == "overloaded"
            work.set()
            async with asyncio.timeout(20):
                while gate.busy:
                    await asyncio.sleep(0.005)

    asyncio.run(run())


def test_work_that_has_not_begun_never_begins_and_keeps_nothing() -> None:
    async def run() -> None:
        gate, work, began = Gate(None, 2), threading.Event(), threading.Event()
        with ThreadPoolExecutor(1) as threads:
            other = threads.submit(work.wait, 20)
            with pytest.raises(TimeoutError):
                await abandoned(gate, threads, work, began)
            assert gate.busy == 0
            work.set()
            other.result()
        assert not began.is_set()
        assert gate.busy == 0

    asyncio.run(run())


def test_the_result_and_the_error_are_those_of_the_work() -> None:
    async def run() -> None:
        gate = Gate(None, 1)
        with ThreadPoolExecutor(1) as threads:
            assert await in_thread(gate, threads, divmod, 7, 2) == (3, 1)
            with pytest.raises(ZeroDivisionError):
                await in_thread(gate, threads, divmod, 7, 0)
        assert gate.busy == 0

    asyncio.run(run())
