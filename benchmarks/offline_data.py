"""Generates the offline bench's data: three feature tables of 35 features, and entity rows that ask for them.

The values are functions of the row number: the same size gives the same data. There are no ties, no missing values, and
every entity row has a row within ttl, because on anything else the stock file store gives wrong answers (its faults are
shown in tests/unit/test_offline_traps.py), and the bench demands equal ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import duckdb

START = datetime(2025, 1, 1, tzinfo=UTC)
SPAN = timedelta(days=60)
TTL = timedelta(days=30)
KEY, TIME, CREATED = "customer_id", "event_timestamp", "created"
WIDTHS = {"profile": 15, "orders": 10, "visits": 10}
"""Features per view, 35 in all: the first of each view is a string, the second an integer, the rest doubles."""

MONTHS = {
    "2025-01": f"{TIME} < TIMESTAMPTZ '2025-02-01 00:00:00+00'",
    "2025-02": f"{TIME} >= TIMESTAMPTZ '2025-02-01 00:00:00+00'",
}
"""The chunks of our layout, as a backfill by month leaves them before compaction; March 1 is in the second."""


@dataclass(frozen=True)
class Size:
    """`rows` per view with `per_key` rows of each key, and `entities` entity rows."""

    rows: int
    per_key: int
    entities: int

    @property
    def keys(self) -> int:
        return self.rows // self.per_key


def features(view: str) -> list[str]:
    return [f"{view}_{j}" for j in range(WIDTHS[view])]


def table_sql(view: str, size: Size, first: int = 0, last: int | None = None) -> str:
    """SELECT of the rows of a view; `first` and `last` cut by row number, so that a huge table is made in chunks.

    Rows come roughly in the order of time, as a pipeline appends them; the keys come scattered.
    """
    seed = list(WIDTHS).index(view) * 100
    step = int(SPAN.total_seconds() * 1_000_000) // size.per_key
    start = int(START.timestamp()) * 1_000_000
    columns = []
    for j, name in enumerate(features(view)):
        number = f"hash(n, {seed + j})"
        value = (
            f"'label-' || ({number} % 500)" if j == 0
            else f"CAST({number} % 100000 AS BIGINT)" if j == 1
            else f"CAST({number} % 1000000007 AS DOUBLE) / 1000"
        )  # fmt: skip
        columns.append(f"{value} AS {name}")
    event = f"{start} + (n // {size.keys}) * {step} + CAST(hash(n, {seed + 90}) % {step} AS BIGINT)"
    return f"""
        SELECT (n % {size.keys}) * 7919 % {size.keys} AS {KEY},
            CAST(make_timestamp({event}) AS TIMESTAMPTZ) AS {TIME},
            CAST(make_timestamp({event} + 1 + CAST(hash(n, {seed + 91}) % 3600000000 AS BIGINT)) AS TIMESTAMPTZ) AS {CREATED},
            {", ".join(columns)}
        FROM (SELECT range AS n FROM range({first}, {size.keys * size.per_key if last is None else last}))
    """


def entities_sql(size: Size) -> str:
    """SELECT of the entity rows: `row_id`, key, time at random after each key's first rows, and a label."""
    step = int(SPAN.total_seconds() * 1_000_000) // size.per_key
    room = int(SPAN.total_seconds() * 1_000_000) - step
    return f"""
        SELECT range AS row_id, CAST(hash(range, 1) % {size.keys} AS BIGINT) AS {KEY},
            CAST(make_timestamp({int(START.timestamp()) * 1_000_000 + step} + CAST(hash(range, 2) % {room} AS BIGINT))
                AS TIMESTAMPTZ) AS {TIME}, CAST(hash(range, 3) % 2 AS BIGINT) AS label
        FROM range({size.entities})
    """


def generate(root: Path, size: Size) -> Path:
    """The directory, below `root`, of a size's data, made unless it is there: `plain/<view>.parquet`, the bucketed layout
    `layout/<view>/`, and `entities-<n>.parquet`. Sizes that differ in their entity rows alone share one."""
    from feature_store.point_in_time.engine import EngineSettings, connect
    from feature_store.point_in_time.layout import Layout, write_chunk

    place = root / f"{size.rows}-by-{size.per_key}"
    with connect(EngineSettings(temp_directory=str(root))) as con:
        for view in WIDTHS:
            plain = place / "plain" / f"{view}.parquet"
            if not plain.exists():
                plain.parent.mkdir(parents=True, exist_ok=True)
                write(con, table_sql(view, size), plain)
            for month, condition in MONTHS.items():
                if not (place / "layout" / view / f"{month}.parquet").exists():
                    chunk = f"(SELECT * FROM read_parquet('{plain}') WHERE {condition})"
                    write_chunk(con, chunk, place / "layout" / view, month, Layout((KEY,), TIME, CREATED))
        write(con, entities_sql(size), place / f"entities-{size.entities}.parquet")
    return place


def write(con: duckdb.DuckDBPyConnection, select: str, path: Path) -> None:
    half = path.with_name(f".{path.name}")
    con.execute(f"COPY ({select}) TO '{half}' (FORMAT parquet)")
    half.replace(path)
