"""The one way into the online store: a table of one view, or Feast's rows of protos, to atomic newest-wins writes.

Used by sync, materialisation, pushes and Feast's own `write_to_online_store`. Columns of the table: the view's join keys
and features by name, its source's timestamp column (any unit; naive is UTC) and, optionally, its created column.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from feature_store.clock import Clock, replay_clock_key, to_micros
from feature_store.proto_rows import Row, batches_of_rows
from feature_store.redis_batch import Batch
from feature_store.redis_connection import answering
from feature_store.redis_layout import datetime_of
from feature_store.redis_retry import BUDGET_SECONDS
from feature_store.redis_writer import awrite, write
from feature_store.table_rows import batches_of_table
from feature_store.write_layout import SKEW_NS, Limit, WriteLayout

if TYPE_CHECKING:
    from feast import FeatureView, RepoConfig

    from feature_store.online_store import PredictFlowOnlineStore

Progress = Callable[[int], Any]


@dataclass(frozen=True)
class Written:
    """What became of the rows: `rows` given, `written` of them won (the others were older), `left_out` had no state."""

    rows: int
    written: int
    left_out: int = 0


class OnlineWriter:
    """Writes rows of one view; no I/O before the first write. Keep it for as long as the definition stands.

    Safe to use from several threads. `view` comes from the registry; under versioned views its version is the one written.
    """

    def __init__(self, online: PredictFlowOnlineStore, config: RepoConfig, view: FeatureView) -> None:
        self._online, self._config = online, config
        self._layout = WriteLayout(config, view)
        self.event_column, self.created_column = self._layout.event_column, self._layout.created_column
        self.columns = {*self._layout.keys.names, *self._layout.types, self.event_column, self.created_column}
        """What a table's columns may be named; others are not looked at."""

    def write(
        self,
        table: pa.Table,
        *,
        wall: Clock | None,
        progress: Progress | None = None,
        budget_seconds: float = BUDGET_SECONDS,
    ) -> Written:
        """Writes a table; of each key the greatest (event, created) stays, whatever the order of rows and writers.

        A row without `created` counts as known at its event time; of equal pairs the last one stays. Rows of a windowed
        view without a window state are left out and logged. Before anything is written, DataError for: a missing column, a
        null key or event time, a number that does not fit its feature, a row dated more than MAX_SKEW after the clock (the
        replay clock's key under `replay`, unset: no check; else `wall`, None: no check; never for windowed views,
        whose events the stream has checked). A list or map that Feast cannot convert stops between chunks of 1,000 rows. Safe
        to repeat. UnavailableError when Redis has not answered for `budget_seconds`; chunks before it are written.
        """
        client, limit = self._client_and_limit(wall)
        left_out, batches = batches_of_table(self._layout, table, limit)
        return _counted(write(client, batches, budget_seconds), table.num_rows, left_out, progress)

    async def awrite(
        self,
        table: pa.Table,
        *,
        wall: Clock | None,
        progress: Progress | None = None,
        budget_seconds: float = BUDGET_SECONDS,
    ) -> Written:
        """As `write`, in an event loop: it is held up for the encoding of 1,000 rows at a time."""
        client, limit = await self._aclient_and_limit(wall)
        left_out, batches = batches_of_table(self._layout, table, limit)
        return await _acounted(awrite(client, batches, budget_seconds), table.num_rows, left_out, progress)

    def prepared(self, table: pa.Table, *, wall: Clock | None) -> Callable[[], Written]:
        """Checks and encodes all of the table, in memory; what it returns writes it. Errors as `write`, each at its time.

        For a caller who has something else to write that must not stay alone.
        """
        client, limit = self._client_and_limit(wall)
        left_out, batches = batches_of_table(self._layout, table, limit)
        encoded = list(batches)
        return lambda: _counted(write(client, encoded), table.num_rows, left_out, None)

    def batches(self, table: pa.Table) -> Iterator[Batch]:
        """A table's rows as `write` sends them, in order if no key repeats; for a writer with a script of its own."""
        return batches_of_table(self._layout, table, None)[1]

    def write_rows(self, rows: Sequence[Row], *, wall: Clock | None, progress: Progress | None = None) -> Written:
        """As `write`, of rows as Feast's provider hands them over. A key that the layout cannot hold: DataError."""
        client, limit = self._client_and_limit(wall)
        left_out, batches = batches_of_rows(self._layout, rows, limit)
        return _counted(write(client, batches), len(rows), left_out, progress)

    async def awrite_rows(
        self, rows: Sequence[Row], *, wall: Clock | None, progress: Progress | None = None
    ) -> Written:
        """As `write_rows`."""
        client, limit = await self._aclient_and_limit(wall)
        left_out, batches = batches_of_rows(self._layout, rows, limit)
        return await _acounted(awrite(client, batches), len(rows), left_out, progress)

    # --- the clock ----------------------------------------------------------------------------------------------------

    def newest_allowed(self, wall: Clock | None) -> datetime | None:
        """The newest event time that `write` takes now; None: any. UnavailableError: no Redis."""
        limit = self._client_and_limit(wall)[1]
        return None if limit is None else datetime_of(limit.ns)

    def _client_and_limit(self, wall: Clock | None) -> tuple[Any, Limit | None]:
        client = self._online._get_client(self._config.online_store)
        clock = None
        if self._replay:
            with answering(client):
                clock = client.get(self._clock_key)
        return client, self._limit(clock, wall)

    async def _aclient_and_limit(self, wall: Clock | None) -> tuple[Any, Limit | None]:
        client = await self._online._get_client_async(self._config.online_store)
        clock = None
        if self._replay:
            with answering(client):
                clock = await client.get(self._clock_key)
        return client, self._limit(clock, wall)

    @property
    def _replay(self) -> bool:
        return not self._layout.windowed and getattr(self._config.online_store, "clock", "wall") == "replay"

    @property
    def _clock_key(self) -> str:
        return replay_clock_key(self._config.project)

    def _limit(self, replay_clock: bytes | None, wall: Clock | None) -> Limit | None:
        """None: any event time may be written."""
        if self._layout.windowed:
            return None
        if self._replay:
            return None if replay_clock is None else Limit(int(replay_clock) * 1000 + SKEW_NS, "replay clock")
        return None if wall is None else Limit(to_micros(wall.now()) * 1000 + SKEW_NS, "clock")


def online_write(
    online: PredictFlowOnlineStore,
    config: RepoConfig,
    view: FeatureView,
    table: pa.Table,
    *,
    wall: Clock | None,
    progress: Progress | None = None,
    budget_seconds: float = BUDGET_SECONDS,
) -> Written:
    """`OnlineWriter.write` for a caller that writes a view once."""
    writer = OnlineWriter(online, config, view)
    return writer.write(table, wall=wall, progress=progress, budget_seconds=budget_seconds)


async def online_write_async(
    online: PredictFlowOnlineStore,
    config: RepoConfig,
    view: FeatureView,
    table: pa.Table,
    *,
    wall: Clock | None,
    progress: Progress | None = None,
    budget_seconds: float = BUDGET_SECONDS,
) -> Written:
    """`OnlineWriter.awrite` for a caller that writes a view once."""
    writer = OnlineWriter(online, config, view)
    return await writer.awrite(table, wall=wall, progress=progress, budget_seconds=budget_seconds)


def _counted(done: Iterable[tuple[int, int]], rows: int, left_out: int, progress: Progress | None) -> Written:
    written = 0
    for n, won in done:
        written += won
        if progress:
            progress(n)
    if progress and left_out:
        progress(left_out)
    return Written(rows, written, left_out)


async def _acounted(
    done: AsyncIterator[tuple[int, int]], rows: int, left_out: int, progress: Progress | None
) -> Written:
    written = 0
    async for n, won in done:
        written += won
        if progress:
            progress(n)
    if progress and left_out:
        progress(left_out)
    return Written(rows, written, left_out)
