"""Feature values as of a time, out of Parquet: reading sources, entity rows, join strategies, latest row per key."""
