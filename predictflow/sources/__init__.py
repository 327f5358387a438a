"""Where raw data comes from: one small adapter per source, all writing the same files (docs/how-to/add-a-data-source.md)."""
