"""One clear line when the Postgres under Feast's SQL registry does not answer, where Feast shows a traceback.

An SQLAlchemy engine plugin, named in feature_store.yaml (`registry.sqlalchemy_config_kwargs.plugins`) and found through
the entry point group `sqlalchemy.plugins`: it sees the registry's engine only, and no other in the process.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import event
from sqlalchemy.engine import CreateEnginePlugin

from feature_store.errors import UnavailableError

if TYPE_CHECKING:
    from sqlalchemy.engine import URL, Engine, ExceptionContext


class ClearErrors(CreateEnginePlugin):
    """Turns a failed connect into an UnavailableError that names host, port and POSTGRES_URL, and no password."""

    def update_url(self, url: URL) -> URL:
        return url

    def engine_created(self, engine: Engine) -> None:
        url = engine.url

        def connect_failed(context: ExceptionContext) -> None:
            is_operational = isinstance(context.original_exception, context.dialect.loaded_dbapi.OperationalError)
            if context.connection is None and is_operational:
                first = (str(context.original_exception).strip().splitlines() or ["no reason given"])[0]
                raise UnavailableError(
                    f"Postgres does not serve {url.host}:{url.port or 5432}/{url.database} (POSTGRES_URL): "
                    + first.rpartition("failed: ")[2],
                    next_step="`predictflow status`, or `predictflow up`",
                ) from None

        event.listen(engine, "handle_error", connect_failed)
