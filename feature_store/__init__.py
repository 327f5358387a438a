"""The engine: offline and online store, windows, sync, backfill, consistency, registry and lineage."""
