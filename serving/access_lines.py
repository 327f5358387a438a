"""Access-log lines of the hot routes and of gRPC: the JSON of `serving.logs`, written some at a time instead of one by one.

A line that goes through `logging` costs as much as the whole answer to a small read. A crash loses the lines of the last
`FLUSH_SECONDS`; a shutdown none.
"""

from __future__ import annotations

import asyncio
import logging
import time
from datetime import UTC, datetime
from typing import Any

import orjson

from serving.logs import JSONFormatter

access = logging.getLogger("predictflow.access")
FLUSH_SECONDS = 0.1


class AccessLines:
    """Of one event loop. Where no JSON handler is installed, lines go through `logging` as any other."""

    def __init__(self) -> None:
        self._lines: list[tuple[float, str, str, str, int | str, float, str | None, str | None]] = []

    def add(
        self,
        request_id: str,
        method: str,
        path: str,
        status: int | str,
        seconds: float,
        client: str | None,
        key: str | None = None,
    ) -> None:
        """One answered request; `client` is its address, `key` the name of its API key."""
        if not access.isEnabledFor(logging.INFO):
            return
        if not self._lines:
            asyncio.get_running_loop().call_later(FLUSH_SECONDS, self.flush)
        self._lines.append((time.time(), request_id, method, path, status, round(seconds * 1000, 3), client, key))

    def flush(self) -> None:
        """Writes what waits. Safe to call at any time."""
        lines, self._lines = self._lines, []
        if not lines:
            return
        handlers = logging.getLogger().handlers
        plain = [h for h in handlers if isinstance(h, logging.StreamHandler) and isinstance(h.formatter, JSONFormatter)]
        if len(plain) != len(handlers) or access.handlers:
            for _, request_id, method, path, status, ms, client, key in lines:
                fields: dict[str, Any] = {"request_id": request_id, "method": method, "path": path, "status": status}
                access.info("%s %s %s", method, path, status, extra={**fields, "ms": ms, "client": client, "key": key})
            return
        text = "".join([_line(*line) for line in lines])
        for handler in plain:
            handler.acquire()
            try:
                handler.stream.write(text)
                handler.flush()
            finally:
                handler.release()


def _line(
    at: float,
    request_id: str,
    method: str,
    path: str,
    status: int | str,
    ms: float,
    client: str | None,
    key: str | None,
) -> str:
    line = {
        "time": datetime.fromtimestamp(at, UTC),
        "level": "INFO",
        "logger": access.name,
        "message": f"{method} {path} {status}",
        "request_id": request_id,
        "method": method,
        "path": path,
        "status": status,
        "ms": ms,
        "client": client,
        "key": key,
    }
    return orjson.dumps(line, option=orjson.OPT_UTC_Z | orjson.OPT_APPEND_NEWLINE).decode()
