"""Fixtures of the integration tests that several modules share."""

from serving_platform import feature_names, model, platform
from sync_support import project

__all__ = ["feature_names", "model", "platform", "project"]
