"""One feature as the registry knows it: what its value depends on (versioned) and the words about it (not versioned)."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime


@dataclass(frozen=True)
class Feature:
    """A feature to register. `group` is its feature view.

    `definition` holds everything a value depends on (type, entity, expression, source, ttl) as JSON-able data: the
    registry opens a new version when it changes. Owner, description, unit and tags may change within a version.
    """

    group: str
    name: str
    dtype: str
    definition: Mapping[str, object]
    owner: str = ""
    description: str = ""
    unit: str = ""
    tags: Mapping[str, str] = field(default_factory=dict)

    @property
    def full_name(self) -> str:
        """`group:name`, as Feast writes a feature reference."""
        return f"{self.group}:{self.name}"

    @property
    def definition_hash(self) -> str:
        """16 hex digits of the SHA-256 of the definition's canonical JSON, type included."""
        content = {**self.definition, "dtype": self.dtype}
        text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=False)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


@dataclass(frozen=True, kw_only=True)
class RegisteredFeature(Feature):
    """A feature as it stands in the registry. Times are UTC; `retired_at` is when an apply no longer found it."""

    version: int
    created_at: datetime
    updated_at: datetime
    retired_at: datetime | None = None
