"""Windowed features: one definition, computed in the stream, recomputed from history, finalised at read time."""

from feature_store.windows.definition import Aggregate, Where, WindowedView, definition_of, windowed_feature_view

__all__ = ["Aggregate", "Where", "WindowedView", "definition_of", "windowed_feature_view"]
