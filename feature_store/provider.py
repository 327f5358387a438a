"""Feast's face of writes: `provider: feature_store.provider.PredictFlowProvider` in feature_store.yaml.

Feast's own provider turns every cell of a frame into a proto before a store sees it, which takes most of the time of
`write_to_online_store` and `push`. This one hands the frame's columns to our online store; all else is Feast's. See ADR 002.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

import pyarrow as pa
from feast.infra.passthrough_provider import PassthroughProvider

from feature_store.clock import WallClock
from feature_store.errors import DataError
from feature_store.online_store import PredictFlowOnlineStore
from feature_store.online_write import OnlineWriter
from feature_store.value_bytes import BY_COLUMN
from feature_store.windows.definition import definition_of

if TYPE_CHECKING:
    import pandas as pd


class PredictFlowProvider(PassthroughProvider):
    """Feast's provider for any stores; frames of plain views go to a PredictFlowOnlineStore by column."""

    def ingest_df(self, feature_view: Any, df: pd.DataFrame, field_mapping: dict[str, str] | None = None) -> None:
        """Writes a frame online: the columns as Feast's `write_to_online_store` takes them, a naive time being UTC.

        Errors, and what wins, as `OnlineWriter.write`: nothing is written of a frame that is refused. Safe to repeat.
        """
        writer = self._writer(feature_view)
        if writer is None:
            super().ingest_df(feature_view, df, field_mapping)
        else:
            # Feast passes no time: a direct write happens now.
            writer.write(self._table(feature_view, writer, df), wall=WallClock())

    async def ingest_df_async(
        self, feature_view: Any, df: pd.DataFrame, field_mapping: dict[str, str] | None = None
    ) -> None:
        """As `ingest_df`, in an event loop."""
        writer = self._writer(feature_view)
        if writer is None:
            await super().ingest_df_async(feature_view, df, field_mapping)
        else:
            await writer.awrite(self._table(feature_view, writer, df), wall=WallClock())

    def _writer(self, view: Any) -> OnlineWriter | None:
        """None where Feast's own way is taken: another store, an on-demand or a windowed view, types that go cell by cell."""
        from feast import FeatureView

        online = self.online_store
        if not isinstance(online, PredictFlowOnlineStore) or type(online).online_write_batch is not _OURS:
            return None
        if not isinstance(view, FeatureView) or view.batch_source is None or definition_of(view) is not None:
            return None
        # Vectors: Feast checks their length in its own conversion.
        if not all(f.dtype.to_value_type().name in BY_COLUMN and not f.vector_index for f in view.features):
            return None
        return online.writer(self.repo_config, view)

    def _table(self, view: Any, writer: OnlineWriter, frame: pd.DataFrame) -> pa.Table:
        """The rows but those of entities on the erasure list."""
        table = _columns(view, writer.columns, frame)
        return self.online_store.erased(self.repo_config).without(view.join_keys, table)


_OURS = PredictFlowOnlineStore.online_write_batch
"""A store derived from ours that writes in its own way gets its rows."""


def _columns(view: Any, wanted: Collection[str], frame: pd.DataFrame) -> pa.Table:
    """Those columns of the frame, or of an index that has a name, that the view knows, under its names for them.

    Column by column: `Table.from_pandas` takes several times as long for a few rows, for the other columns and for metadata.
    """
    if any(name is not None for name in frame.index.names):
        frame = frame.reset_index()
    mapping = view.batch_source.field_mapping or {}
    columns: dict[str, pa.Array] = {}
    for raw, series in frame.items():
        name = mapping.get(raw, raw)
        if name not in wanted:
            continue
        if name in columns:
            raise DataError(f"{view.name}: two columns of the frame are one and the same", value=name)
        try:
            columns[name] = pa.array(series, from_pandas=True)
        except (pa.ArrowInvalid, pa.ArrowTypeError) as e:
            raise DataError(f"{view.name}: column {raw} holds values of several types", value=str(e)) from e
    return pa.table(columns)
