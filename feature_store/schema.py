"""The `predictflow` schema in Postgres: where its SQL stands, which steps a database has had, and bringing it up to date.

`migrations/` stands at the root of the checkout, not inside a package: it is read by people and by other tools too. An
editable install (what `make install` does) finds it beside the package; a wheel carries it as data files.
"""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from feature_store.errors import NotFoundError, PredictFlowError

if TYPE_CHECKING:
    from psycopg2.extensions import cursor as Cursor

_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('predictflow.schema', 0))"
# Not to_regclass(): its cache may not yet know of a schema that another process made while this one waited for the lock.
_EXISTS = """
SELECT EXISTS (SELECT FROM pg_class AS c JOIN pg_namespace AS n ON n.oid = c.relnamespace
               WHERE n.nspname = 'predictflow' AND c.relname = 'schema_version')
"""
_STEP_FILE = re.compile(r"(\d{3})_\w+\.sql")


class SchemaError(PredictFlowError):
    """The database's schema is not the one this code works with."""

    code = "schema"


@dataclass(frozen=True)
class MigrationStep:
    """One ordered upgrade step, a file `NNN_what.sql`."""

    number: int
    name: str
    path: Path

    def sql(self) -> str:
        return self.path.read_text(encoding="utf-8")


def migrations_dir() -> Path:
    """The directory of feature_registry.sql; NotFoundError names the places that were tried."""
    places = (Path(__file__).parents[1] / "migrations", Path(sys.prefix) / "share" / "predictflow" / "migrations")
    for place in places:
        if (place / "feature_registry.sql").is_file():
            return place
    raise NotFoundError(
        "migrations/feature_registry.sql is missing; tried " + ", ".join(map(str, places)),
        next_step="install PredictFlow from a complete checkout: make install",
    )


def steps() -> list[MigrationStep]:
    """All upgrade steps in order; SchemaError when numbers repeat or leave a gap."""
    found = sorted((migrations_dir() / "steps").glob("*.sql"))
    result = []
    for expected, path in enumerate(found):
        match = _STEP_FILE.fullmatch(path.name)
        if match is None or int(match[1]) != expected:
            raise SchemaError(
                "migration step out of order", value=path.name, next_step=f"name it {expected:03}_what.sql"
            )
        result.append(MigrationStep(expected, path.stem, path))
    return result


def applied(cursor: Cursor) -> set[int] | None:
    """Numbers of the steps the database has had; None when it has no `predictflow` schema yet."""
    cursor.execute(_EXISTS)
    if not cursor.fetchone()[0]:  # type: ignore[index]  # SELECT EXISTS gives a row
        return None
    cursor.execute("SELECT step FROM predictflow.schema_version")
    return {row[0] for row in cursor.fetchall()}


def migrate(cursor: Cursor) -> list[str]:
    """Bring the schema up to date inside the caller's transaction; the names of the steps it took, empty if none.

    Safe to run twice and from several processes at once: an advisory lock, held to the end of the transaction, lets one
    of them work and the others find it done. SchemaError when the database is newer than this code.
    """
    cursor.execute(_LOCK)
    had = applied(cursor)
    known = steps()
    if had is None:
        cursor.execute((migrations_dir() / "feature_registry.sql").read_text(encoding="utf-8"))
        missing = known
    else:
        _refuse_newer(had, known)
        missing = [step for step in known if step.number not in had]
        for step in missing:
            cursor.execute(step.sql())
    for step in missing:
        cursor.execute("INSERT INTO predictflow.schema_version (step, name) VALUES (%s, %s)", (step.number, step.name))
    return [step.name for step in missing]


def ensure(cursor: Cursor) -> None:
    """Make the schema where there is none, for the first write to a fresh database; SchemaError unless it is current.

    To be called before anything else in a transaction. An older schema is left to `predictflow migrate`.
    """
    cursor.execute(_LOCK)
    if applied(cursor) is None:
        migrate(cursor)
    require_current(cursor)


def require_current(cursor: Cursor) -> None:
    """SchemaError, with the command that mends it, unless the database has exactly the steps this code knows."""
    had = applied(cursor)
    known = steps()
    if had is None:
        raise SchemaError("the database has no predictflow schema yet", next_step="predictflow migrate")
    _refuse_newer(had, known)
    missing = [step.name for step in known if step.number not in had]
    if missing:
        raise SchemaError(f"the predictflow schema lacks {', '.join(missing)}", next_step="predictflow migrate")


def _refuse_newer(had: set[int], known: list[MigrationStep]) -> None:
    newer = had - {step.number for step in known}
    if newer:
        raise SchemaError(
            f"the database has had migration step {max(newer):03}, this code knows steps up to {known[-1].number:03}",
            next_step="update the checkout",
        )
