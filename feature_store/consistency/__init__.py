"""The check that recomputes what was served, by another path than serving's, and counts what differs."""

from feature_store.consistency.check import check
from feature_store.consistency.result import Consistency, Difference
from feature_store.consistency.served_log import read_served, read_served_file
from feature_store.consistency.since import served_since

__all__ = ["Consistency", "Difference", "check", "read_served", "read_served_file", "served_since"]
