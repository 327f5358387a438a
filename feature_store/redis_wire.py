"""Redis' wire protocol as the read path uses it: commands as bytes, replies through hiredis, how a connection begins.

`redis_stream.py` (asyncio) and `redis_socket.py` (blocking) build on it. They exist because most of a small read's time
through a general client is that client's own: see docs/performance.md.
"""

from __future__ import annotations

import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError, UnavailableError

if TYPE_CHECKING:
    import hiredis

Command = Sequence[bytes]
KEEPALIVE_SECONDS = 15
"""After so long without a byte the system asks whether the other side is still there."""

_UNAVAILABLE = (
    "LOADING",
    "MASTERDOWN",
    "CLUSTERDOWN",
    "TRYAGAIN",
    "BUSY",
    "OOM",
    "NOAUTH",
    "WRONGPASS",
    "NOPERM",
    "MAXCLIENTS",
    "ERR max number of clients",
    "ERR invalid password",
    "ERR DB index",
)
"""How the error replies begin that mean: this server cannot answer now, or not to us."""
_KNOWN = {"host", "port", "path", "db", "username", "password", "client_name", "ssl", "socket_timeout"}
_KNOWN |= {"socket_connect_timeout", "socket_keepalive", "max_connections", "retry_on_timeout"}
_TLS = {
    "ssl_keyfile": "keyfile",
    "ssl_certfile": "certfile",
    "ssl_cert_reqs": "cert_reqs",
    "ssl_ca_certs": "ca_certs",
    "ssl_ca_data": "ca_data",
    "ssl_ca_path": "ca_path",
    "ssl_check_hostname": "check_hostname",
    "ssl_min_version": "min_version",
    "ssl_ciphers": "ciphers",
    "ssl_password": "password",
}


def command(*parts: bytes) -> bytes:
    """One command as Redis reads it."""
    out = [b"*%d\r\n" % len(parts)]
    for part in parts:
        out.append(b"$%d\r\n%b\r\n" % (len(part), part))
    return b"".join(out)


def hmget_parts(fields: Sequence[bytes]) -> tuple[bytes, bytes]:
    """What goes before and after `$<length of key>\\r\\n<key>` in an HMGET of these fields; no command has no fields."""
    return b"*%d\r\n$5\r\nHMGET\r\n$" % (2 + len(fields)), b"\r\n" + b"".join(
        b"$%d\r\n%b\r\n" % (len(f), f) for f in fields
    )


@dataclass(frozen=True)
class Address:
    """Where a server is and how a connection to it begins. `tls` None: plain. Timeouts in seconds."""

    host: str
    port: int
    path: str | None
    hello: bytes
    """AUTH, SELECT and CLIENT SETNAME, as far as they are needed."""
    hellos: int
    tls: ssl.SSLContext | None
    connect_timeout: float
    timeout: float

    @property
    def name(self) -> str:
        """`host:port` or the socket's path; never a password."""
        return self.path or f"{self.host}:{self.port}"


def address_from(options: Mapping[str, Any]) -> Address | None:
    """The address of `redis_connection.connection_options`; None where an option is not known here.

    The caller then reads through the general client, which knows them all.
    """
    if options.keys() - _KNOWN - _TLS.keys():
        return None
    hello: list[bytes] = []
    password = options.get("password")
    if password:
        user = options.get("username")
        parts = [str(user).encode()] if user else []
        hello.append(command(b"AUTH", *parts, str(password).encode()))
    if options.get("db"):
        hello.append(command(b"SELECT", str(int(options["db"])).encode()))
    if options.get("client_name"):
        hello.append(command(b"CLIENT", b"SETNAME", str(options["client_name"]).encode()))
    return Address(
        str(options.get("host", "localhost")),
        int(options.get("port", 6379)),
        options.get("path"),
        b"".join(hello),
        len(hello),
        _tls(options) if options.get("ssl") else None,
        float(options.get("socket_connect_timeout") or 5.0),
        float(options.get("socket_timeout") or 10.0),
    )


def _tls(options: Mapping[str, Any]) -> ssl.SSLContext:
    """As redis-py reads the same options, its default of requiring a good certificate included."""
    from redis.asyncio.connection import RedisSSLContext

    given = {ours: options[theirs] for theirs, ours in _TLS.items() if theirs in options}
    given.setdefault("cert_reqs", "required")
    given.setdefault("check_hostname", given["cert_reqs"] in ("required", ssl.CERT_REQUIRED))
    context: ssl.SSLContext = RedisSSLContext(**given).get()
    return context


def keep_alive(connection: Any, timeout: float) -> None:
    """Lets the system notice that the other side of an idle TCP connection is gone, or was forgotten on the way.

    `timeout`: seconds that what was sent may go unacknowledged. No-op for a Unix socket, and where the system has no
    such setting.
    """
    if connection is None or connection.family not in (socket.AF_INET, socket.AF_INET6):
        return
    # Not every event loop's stand-in for the socket can set options.
    own = socket.socket(fileno=connection.fileno())
    try:
        _set_keep_alive(own, timeout)
    finally:
        own.detach()


def _set_keep_alive(connection: socket.socket, timeout: float) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (
        ("TCP_KEEPIDLE", KEEPALIVE_SECONDS),
        ("TCP_KEEPINTVL", KEEPALIVE_SECONDS),
        ("TCP_USER_TIMEOUT", max(1000, round(timeout * 1000))),
    ):
        option = getattr(socket, name, None)
        if option is not None:
            connection.setsockopt(socket.IPPROTO_TCP, option, value)


def reader() -> hiredis.Reader:
    """Parses replies: bytes, None, int, lists; an error reply comes as an exception object in its place."""
    import hiredis

    return hiredis.Reader()


def unavailable(address: Address, reason: str) -> UnavailableError:
    """Redis at `address` cannot answer, and why."""
    return UnavailableError(
        f"Redis at {address.name} (REDIS_URL) does not answer ({reason.rstrip('.')})",
        next_step="start it, or `predictflow up`, and check REDIS_URL",
    )


def refused(address: Address, error: Exception) -> UnavailableError | DataError:
    """What an error reply means: a server that is not ready or not ours to use, or a key that is not as we write it."""
    text = str(error)
    if text.startswith(_UNAVAILABLE):
        return unavailable(address, text)
    return DataError("Redis refused a read", value=text, next_step="does another program write these keys?")
