"""SQL kept in .sql files as named blocks: `-- name: upsert_edges` starts a block, the next name ends it."""

from __future__ import annotations

import re
from importlib import resources

_NAME = re.compile(r"^-- name: (\w+)$", re.MULTILINE)


def blocks(file: str) -> dict[str, str]:
    """The blocks of `feature_store/sql/<file>` by name. Reads the file on each call."""
    text = resources.files(__package__).joinpath(file).read_text(encoding="utf-8")
    parts = _NAME.split(text)[1:]
    return {name: body.strip() for name, body in zip(parts[::2], parts[1::2], strict=True)}
