"""DuckDB as the engine of the offline store: connections with bounded memory, SQL quoting, errors in our words."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import duckdb

from feature_store.errors import DataError, UsageError

_UNITS = {"bytes": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
MEMORY_SHARE = 0.4
"""Of the machine's (or container's) memory. The engine's own limit; rows on their way to the caller come on top."""


@dataclass(frozen=True)
class EngineSettings:
    """How much of the machine a query may take. None: MEMORY_SHARE of the memory, all cores."""

    memory_limit: str | None = None
    threads: int | None = None
    temp_directory: str | None = None


@contextmanager
def connect(settings: EngineSettings) -> Iterator[duckdb.DuckDBPyConnection]:
    """A private in-memory database in UTC that spills to a directory of its own, removed afterwards."""
    with tempfile.TemporaryDirectory(prefix="predictflow-", dir=settings.temp_directory) as spill:
        # Python variables must not be readable as tables: a misspelt source would find whatever is in scope.
        config: dict[str, str | bool | int | float | list[str]] = {
            "temp_directory": spill,
            "python_enable_replacements": "false",
            "allocator_background_threads": "true",  # gives back what one step freed before the next one's peak
        }
        if settings.memory_limit:
            config["memory_limit"] = settings.memory_limit
        if settings.threads:
            config["threads"] = settings.threads
        try:
            con = duckdb.connect(config=config)
        except duckdb.Error as e:
            raise UsageError(
                f"offline_store: settings of the engine are refused: {_first_line(e)}", value=config
            ) from e
        try:
            if not settings.memory_limit:  # the engine's default, 80%, knows the container's limit
                con.execute(f"SET memory_limit = '{int(memory_limit(con) / 0.8 * MEMORY_SHARE)}B'")
            con.execute("SET TimeZone = 'UTC'")
            con.execute("SET enable_progress_bar = false")  # it would be drawn on stdout, amid a command's JSON
            yield con
        finally:
            con.close()


def memory_limit(con: duckdb.DuckDBPyConnection) -> int:
    """The connection's memory limit in bytes, as near as the engine shows it (a tenth of its unit)."""
    shown = str(con.execute("SELECT current_setting('memory_limit')").fetchall()[0][0])
    number, _, unit = shown.partition(" ")
    return int((float(number) + 0.05) * _UNITS[unit])


def give_back(con: duckdb.DuckDBPyConnection) -> None:
    """Has the engine give what it freed, but kept for itself, back to the system: often as much as a step took.

    Setting the limit does so; to the value that it has, for the middle of what it shows is shown as the same.
    """
    con.execute(f"SET memory_limit = '{memory_limit(con)}B'")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turns DuckDB's errors into one DataError line that starts with `what` (a view or source, and its path)."""
    try:
        yield
    except duckdb.OutOfMemoryException as e:
        raise DataError(
            f"{what}: out of memory: {_first_line(e)}",
            next_step="raise offline_store.memory_limit in feature_store.yaml",
        ) from e
    except duckdb.Error as e:
        line = _first_line(e)
        raise DataError(line[line.index(what) :] if what in line else f"{what}: {line}") from e


def ident(name: str) -> str:
    """`name` as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


def text(value: str) -> str:
    """`value` as an SQL string literal."""
    return "'" + value.replace("'", "''") + "'"


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__
