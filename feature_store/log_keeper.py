"""Keeps event logs at few files beside the stream: in a thread, because merging takes as long as several batches."""

from __future__ import annotations

import logging
import threading
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import TYPE_CHECKING

from feature_store.durable import StorageError

if TYPE_CHECKING:
    from feature_store.event_log import Rest
    from feature_store.stream_topic import AnyView

log = logging.getLogger(__name__)


class LogKeeper:
    """At most one round of merging at a time."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log-keeper")
        self._round: Future[None] | None = None
        self._hurry = threading.Event()

    def start(self, views: Sequence[AnyView], partitions: Collection[int], wall_us: int) -> None:
        """Begins a round over these partitions, unless the last one is still under way. `wall_us`: the machine's clock.

        DataError: a file of the log that the last round could not read.
        """
        if self._round is not None and not self._round.done():
            return
        last, self._round = self._round, None
        if last is not None:
            last.result()
        self._round = self._thread.submit(_compact, list(views), sorted(partitions), wall_us, self._hurry.wait)

    def wait(self) -> None:
        """Returns when nothing is under way: before a partition starts or is given up, where its owner merges too."""
        if self._round is not None:
            self._hurry.set()  # nothing goes on beside it: it need not rest
            wait([self._round])
            self._hurry.clear()

    def close(self) -> None:
        """Call when no round will follow; waits for the last one."""
        self._hurry.set()
        self._thread.shutdown()
        if self._round is not None and (error := self._round.exception()) is not None:
            log.warning("event log not compacted: %s", error)


def _compact(views: Sequence[AnyView], partitions: Sequence[int], wall_us: int, rest: Rest) -> None:
    """It can wait, for instance for room on the disk."""
    for view in views:
        for partition in partitions:
            try:
                view.compact(partition, wall_us, rest)
            except (OSError, StorageError) as e:
                log.warning("event log of %s not compacted: %s", view.name, e)
