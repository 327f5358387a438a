"""Log lines of the server as JSON objects, one per line: time (UTC), level, logger, message and the record's own fields."""

from __future__ import annotations

import logging
from datetime import UTC, datetime

from serving.encoding import dumps

_STANDARD = set(vars(logging.makeLogRecord({}))) | {"message", "asctime", "color_message", "taskName"}


class JSONFormatter(logging.Formatter):
    """`extra={...}` of a log call become fields of their own."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC),
            "level": record.levelname,
            "logger": record.name,
            "message": record.getMessage(),
            **{
                k: v if isinstance(v, str | int | float) or v is None else repr(v)
                for k, v in vars(record).items()
                if k not in _STANDARD
            },
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return dumps(line).decode()


def use_json(level: int = logging.INFO) -> None:
    """Makes the process's root logger write JSON lines to standard error; safe to repeat."""
    handler = logging.StreamHandler()
    handler.setFormatter(JSONFormatter())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level)
