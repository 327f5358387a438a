"""When a windowed view's log was last rewound: what was served before refers to events that are forgotten.

Kept beside the log, as `_rewound.json`, so that whoever reads the log without a server (the check) knows it. The time is
the wall clock's, like `served_at` in the served log, whatever clock the features follow.
"""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path

from feature_store.durable import write_whole
from feature_store.errors import DataError

FILE = "_rewound.json"


def mark_rewound(table: Path, at: datetime) -> None:
    """Sets the time of the last rewind of the view whose directory is `table`. Safe to repeat."""
    table.mkdir(parents=True, exist_ok=True)
    write_whole(table / FILE, json.dumps({"at": at.astimezone(UTC).isoformat()}).encode())


def rewound_at(table: Path) -> datetime | None:
    """The time of the last rewind, None when there was none. DataError when the file cannot be read."""
    path = table / FILE
    try:
        at = datetime.fromisoformat(json.loads(path.read_text(encoding="utf-8"))["at"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as e:
        raise DataError("the time of the last rewind cannot be read", value=str(path), next_step="restore it") from e
    return at.replace(tzinfo=at.tzinfo or UTC)
