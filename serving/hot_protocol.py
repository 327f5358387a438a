"""uvicorn's HTTP protocol with a short cut: a hot request is answered without an ASGI scope, a task and their messages.

uvicorn parses as ever (httptools). A POST to a hot route is kept until its body is complete and offered to
`HotRoutes.begin`; what that declines goes on as if nothing had been looked at. Order of pipelined requests, keep-alive,
back-pressure and graceful shutdown stay uvicorn's, through a stand-in for its request cycle. A body that has yet to come
is waited for as in the application: its request was let in, its length is known, and its time is limited.

Neither uvicorn nor its parser bounds what comes before the body, so this does, for every route: its size and its time.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any

from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol

from serving.errors import error_response
from serving.hot import Guard, Headers, Hot, HotRoutes
from serving.limits import Admitted
from serving.middleware import ABORT, request_id_of

_KEPT = 64
"""A body in more pieces than this goes on to the application as it arrives."""
_HEAD_BYTES = 64 * 1024
"""Request line and headers, by whole pieces after the first: a head that comes in one piece may be as long as a piece."""
_HEAD = b"%bcontent-type: application/json\r\ncontent-length: %d\r\nx-request-id: %b\r\n%b\r\n"
_ENDS_HERE = frozenset((b"x-forwarded-for", b"x-forwarded-proto", b"expect", b"transfer-encoding"))


class _Event:
    """In place of the event on which an application waits for more of the body."""

    def set(self) -> None:
        pass


class _HotCycle:
    """What the protocol asks of the request under way; see uvicorn's RequestResponseCycle."""

    message_event = _Event()

    def __init__(self, keep_alive: bool) -> None:
        self.started = time.perf_counter()
        self.keep_alive = keep_alive
        self.response_complete = False
        self.disconnected = False


class HotProtocol(HttpToolsProtocol):
    """One per connection. `_kept`: the request that may turn out hot, while its body is read, and that body.

    `head_seconds`: how long a request line and its headers may take, or a new connection without any.
    """

    head_seconds = 30.0

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        app: Any = self.app
        while not isinstance(app, HotRoutes) and hasattr(app, "app"):
            app = app.app
        usable = isinstance(app, HotRoutes) and not self.root_path and self.limit_concurrency is None
        self._hot: HotRoutes | None = app if usable else None
        self._kept: tuple[_HotCycle, Hot, list[bytes]] | None = None
        self._admitted: Admitted | None = None
        self._guard: Guard | None = None
        self._budget: asyncio.TimerHandle | None = None
        self._in_head = False
        self._head_bytes = 0
        self._head_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]  # as uvicorn's
        super().connection_made(transport)
        self._head_due = self.loop.call_later(self.head_seconds, self._head_is_late)

    def data_received(self, data: bytes) -> None:
        was_in_head = self._in_head
        super().data_received(data)
        if self._kept is not None and self._budget is None:
            self._await_body()
        if self._in_head:
            self._await_head(len(data) if was_in_head else 0)
        elif self.cycle is None or self.cycle.response_complete:  # no part of a request, or of one that has its answer
            self._await_head(0)

    def connection_lost(self, exc: Exception | None) -> None:
        self._kept = None
        self._settle()
        self._head_ends()
        super().connection_lost(exc)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._in_head, self._head_bytes = True, 0

    def on_headers_complete(self) -> None:
        self._head_ends()
        hot = self._hot
        way = None if hot is None else hot.route(self.url.decode("latin-1"))
        if (
            hot is not None
            and way is not None
            and (self.cycle is None or self.cycle.response_complete)
            and not self.flow.write_paused  # uvicorn waits for a client that does not read
            and self.parser.get_method() == b"POST"
            and self.parser.get_http_version() == "1.1"
            and not self.parser.should_upgrade()
            and _ENDS_HERE.isdisjoint([name for name, _ in self.headers])
            and self._fits(hot.max_body)
        ):
            cycle = _HotCycle(self.parser.should_keep_alive())
            self.cycle = cycle  # type: ignore[assignment]  # see _HotCycle
            self._kept = cycle, way, []
        else:
            self._begin_application()

    def _begin_application(self) -> None:
        scope: Any = self.scope  # the task that gets it has not run yet
        scope["extensions"] = {ABORT: self.transport.abort}
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self._kept is None:
            super().on_body(body)
            return
        self._kept[2].append(body)
        if len(self._kept[2]) > _KEPT:
            self._decline()

    def on_message_complete(self) -> None:
        if self._kept is None or self._hot is None:
            super().on_message_complete()
            return
        cycle, way, parts = self._kept
        body = parts[0] if len(parts) == 1 else b"".join(parts)

        def answer(status: int, content: bytes, request_id: str, more: Headers) -> None:
            self._answer(cycle, status, content, request_id, more)

        admitted, self._admitted = self._admitted, None  # `begin` gives it back
        self._settle()
        client = self.client[0] if self.client else None
        if self._hot.begin(way, self.headers, body, client, answer, admitted, cycle.started):
            self._kept = None
        else:
            self._decline()
            super().on_message_complete()

    def _await_head(self, more: int) -> None:
        """A head has yet to end: what comes of it is counted, from its second piece on, and so is its time."""
        if self.transport.is_closing():
            return
        self._head_bytes += more
        if self._head_bytes > _HEAD_BYTES:
            self._refuse_head(431, "headers_too_large", f"request line and headers are larger than {_HEAD_BYTES} bytes")
        elif self._head_due is None:
            self._head_due = self.loop.call_later(self.head_seconds, self._head_is_late)

    def _head_is_late(self) -> None:
        self._head_due = None
        self._refuse_head(408, "timeout", f"no complete request within {self.head_seconds:g} s")

    def _refuse_head(self, status: int, code: str, message: str) -> None:
        """Says why, unless that would be taken for the answer to an earlier request, and hangs up."""
        if self._in_head and (self.cycle is None or self.cycle.response_complete):
            content = bytes(error_response(status, code, message).body)
            extra = b"connection: close\r\n"
            self.transport.write(
                _HEAD % (STATUS_LINE[status], len(content), request_id_of(None).encode(), extra) + content
            )
        self.transport.close()

    def _head_ends(self) -> None:
        self._in_head = False
        if self._head_due is not None:
            self._head_due.cancel()
            self._head_due = None

    def _fits(self, most: int) -> bool:
        """Whether the request says how long its body is, and may be that long: the parser holds it to that."""
        for name, value in self.headers:
            if name == b"content-length":
                return value.isdigit() and int(value) <= most
        return False

    def _await_body(self) -> None:
        """Part of the body is still to come: only who may ask is waited for, in a slot and for a limited time."""
        if self._hot is None or self._kept is None or self.transport.is_closing():
            return
        self._guard = self._kept[1].guard
        self._admitted = self._guard.admit(self.headers)
        if self._admitted is None:
            self._decline()  # the application says why
        else:
            self._budget = self.loop.call_later(self._hot.seconds, self._decline)

    def _settle(self) -> None:
        """No body is waited for any more."""
        if self._budget is not None:
            self._budget.cancel()
            self._budget = None
        if self._admitted is not None and self._guard is not None:
            self._admitted = None
            self._guard.release()

    def _decline(self) -> None:
        """Goes on as uvicorn would have at the end of the headers."""
        if self._kept is None:
            return
        (cycle, _, parts), self._kept = self._kept, None
        self._settle()
        cycle.response_complete = True  # so that the next one begins at once
        self._begin_application()
        self.cycle.keep_alive = self.cycle.keep_alive and cycle.keep_alive  # a shutdown may have begun
        for part in parts:
            super().on_body(part)

    def _answer(self, cycle: _HotCycle, status: int, content: bytes, request_id: str, more: Headers) -> None:
        cycle.response_complete = True
        if not cycle.disconnected and not self.transport.is_closing():
            extra = b"".join([b"%b: %b\r\n" % header for header in (*self.server_state.default_headers, *more)])
            if not cycle.keep_alive:
                extra += b"connection: close\r\n"
            head = _HEAD % (STATUS_LINE[status], len(content), request_id.encode(), extra)
            self.transport.write(head + content)
            if not cycle.keep_alive:
                self.transport.close()
        self.on_response_complete()
