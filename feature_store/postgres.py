"""One lazy connection to Postgres: transactions that join, clear errors when the server is away, no password in any text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from feature_store.errors import UnavailableError, UsageError

if TYPE_CHECKING:
    from psycopg2.extensions import connection as Connection
    from psycopg2.extensions import cursor as Cursor

CONNECT_TIMEOUT_S = 5
_SCHEMES = ("postgresql+psycopg2://", "postgresql+psycopg://", "postgresql://", "postgres://")


def is_postgres(url: str) -> bool:
    """Whether `url` is one that Postgres takes: `postgresql://`, with or without SQLAlchemy's driver name."""
    return url.startswith(_SCHEMES)


class Postgres:
    """Connects on first use, and again after the server was away. Threads may share it: transactions take turns.

    Times come back in UTC. UsageError for a URL of another kind, UnavailableError when the server does not answer.
    """

    def __init__(self, url: str) -> None:
        if not is_postgres(url):
            # The URL may hold a password: only its scheme is shown.
            scheme = url.partition("://")[0] + "://" if "://" in url else "no scheme"
            raise UsageError("the feature registry needs a Postgres URL", value=scheme, next_step="set POSTGRES_URL")
        self._dsn = "postgresql://" + url.partition("://")[2]
        self._connection: Connection | None = None
        self._cursor: Cursor | None = None
        self._lock = threading.RLock()

    def close(self) -> None:
        """End the connection; the next transaction opens a new one. Safe to call twice."""
        with self._lock:
            if self._connection is not None:
                self._connection.close()
            self._connection = None

    @property
    def address(self) -> str:
        """`host:port/database` without user and password."""
        import psycopg2
        from psycopg2.extensions import parse_dsn

        try:
            parts = parse_dsn(self._dsn)
        except psycopg2.ProgrammingError:
            # libpq's own message may quote the URL, password included.
            raise UsageError("POSTGRES_URL cannot be read", next_step="write it as user@host:port/database") from None
        host, port = parts.get("host", "localhost"), parts.get("port", "5432")
        if "@" in host:
            raise UsageError("POSTGRES_URL has an @ in its user or password", next_step="write it as %40")
        return f"{host}:{port}/{parts.get('dbname', '')}"

    @contextmanager
    def transaction(self) -> Iterator[Cursor]:
        """A cursor; commits at the end of the block, rolls back when it raises. A nested block joins the outer one."""
        import psycopg2

        with self._lock:
            if self._cursor is not None:
                yield self._cursor
                return
            connection = self._connect()
            try:
                with connection, connection.cursor() as cursor:
                    self._cursor = cursor
                    yield cursor
            except (psycopg2.OperationalError, psycopg2.InterfaceError) as e:
                self.close()
                raise self._unavailable(e) from e
            finally:
                self._cursor = None

    def _connect(self) -> Connection:
        import psycopg2

        if self._connection is None or self._connection.closed:
            self.address  # noqa: B018  # refuses a URL whose password libpq would quote
            try:
                self._connection = psycopg2.connect(
                    self._dsn,
                    connect_timeout=CONNECT_TIMEOUT_S,
                    application_name="predictflow",
                    options="-c timezone=UTC",
                )
            except psycopg2.OperationalError as e:
                raise self._unavailable(e) from None
        return self._connection

    def _unavailable(self, error: Exception) -> UnavailableError:
        # Of libpq's several lines only the reason, which names neither user's password nor the address again.
        first = (str(error).strip().splitlines() or ["gone"])[0]
        return UnavailableError(
            f"Postgres does not serve {self.address} (POSTGRES_URL): {first.rpartition('failed: ')[2]}",
            next_step="`predictflow status`, or `predictflow up`",
        )
