"""Reads from Redis in the calling thread: blocking sockets, one request's commands in one write, answers through hiredis.

Safe to share between threads and across a fork. Reads only: what was lost with a connection is asked again, once.
"""

from __future__ import annotations

import os
import socket
from typing import Any

from hiredis import HiredisError

from feature_store.redis_wire import Address, keep_alive, reader, refused, unavailable

Replies = list[Any]
_CHUNK = 1 << 18


class _Connection:
    def __init__(self, address: Address) -> None:
        if address.path is not None:
            raw = socket.socket(socket.AF_UNIX)
            raw.settimeout(address.connect_timeout)
            raw.connect(address.path)
        else:
            raw = socket.create_connection((address.host, address.port), address.connect_timeout)
            raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            keep_alive(raw, address.timeout)
        try:
            if address.tls is not None:
                raw = address.tls.wrap_socket(raw, server_hostname=address.host)
            raw.settimeout(address.timeout)
            self.socket = raw
            self._reader = reader()
            if address.hellos:
                for reply in self.ask(address.hello, address.hellos):
                    if isinstance(reply, Exception):
                        raise refused(address, reply)
        except BaseException:
            raw.close()
            raise

    def ask(self, payload: bytes, count: int) -> Replies:
        self.socket.sendall(payload)
        replies: Replies = []
        take, feed, receive = self._reader.gets, self._reader.feed, self.socket.recv
        while True:
            while len(replies) < count:
                reply = take()
                if reply is False:
                    break
                replies.append(reply)
            else:
                return replies
            data = receive(_CHUNK)
            if not data:
                raise ConnectionError("connection closed by the server")
            feed(data)


class RedisSocket:
    """As many connections as threads that ask at once; nothing connects before the first request."""

    def __init__(self, address: Address) -> None:
        self.address = address
        self._idle: list[_Connection] = []  # append and pop are atomic
        self._pid = os.getpid()

    def ask(self, payload: bytes, count: int) -> Replies:
        """The replies to `count` commands. UnavailableError when Redis does not answer, DataError for an error reply."""
        if not count:
            return []
        if self._pid != os.getpid():  # a forked child shares the parent's sockets: it must not talk on them
            self._idle, self._pid = [], os.getpid()
        try:
            try:
                held = self._idle.pop()
            except IndexError:
                held = None
            if held is not None:
                try:
                    return self._checked(held, held.ask(payload, count))
                except TimeoutError:
                    held.socket.close()
                    raise
                except OSError:  # the server closed it while it was idle, or is gone: a new connection tells which
                    held.socket.close()
                    self._close_idle()
            fresh = _Connection(self.address)
            try:
                replies = fresh.ask(payload, count)
            except BaseException:
                fresh.socket.close()
                raise
            return self._checked(fresh, replies)
        except (OSError, HiredisError) as e:
            raise unavailable(self.address, str(e) or type(e).__name__) from e

    def _checked(self, connection: _Connection, replies: Replies) -> Replies:
        self._idle.append(connection)
        if any(issubclass(kind, Exception) for kind in set(map(type, replies))):
            raise refused(self.address, next(r for r in replies if isinstance(r, Exception)))
        return replies

    def _close_idle(self) -> None:
        while self._idle:
            self._idle.pop().socket.close()

    def close(self) -> None:
        """Closes idle connections. Safe to call twice."""
        self._close_idle()
