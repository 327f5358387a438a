"""Past values of a windowed view as Parquet: every entity's value at every step of a range, by the SQL of history.

One file per run of steps, each published by one rename. A repeated call goes on where it was: files that are there are not
made again. What a directory was made from stands in `_values.json`; another range, definition or log needs another one.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING

import pyarrow as pa

from feature_store.clock import MICROSECOND, from_micros, to_micros
from feature_store.durable import locked, write_whole
from feature_store.erasure_list import ErasureList, not_erased
from feature_store.errors import DataError, UsageError
from feature_store.event_log import HISTORY, STREAM
from feature_store.log_rows import log_directory
from feature_store.point_in_time.engine import EngineSettings, connect, ident
from feature_store.point_in_time.publish import publish
from feature_store.point_in_time.source import ParquetSource, open_source, scanning
from feature_store.point_in_time.windowed import EVENTS, make_events
from feature_store.windows.definition import WindowedView, definition_of
from feature_store.windows.history import LAST_SEEN, history_sql

if TYPE_CHECKING:
    import duckdb
    from feast import FeatureView

RECORD = "_values.json"
ROWS_PER_FILE = 500_000
LAST_EVENT = "last_event_timestamp"
"""Column of the files: the entity's newest event by then."""


@dataclass(frozen=True)
class PastValues:
    """What was written (or, for a dry run, would be). `rows`: of the files made now; of a dry run an upper bound, all
    entities at all steps. `skipped`: files found done, of `files`."""

    view: str
    path: str
    entities: int
    steps: int
    rows: int
    files: int
    skipped: int
    dry_run: bool


def past_values(
    view: FeatureView,
    offline_path: str,
    out: Path,
    start: datetime,
    end: datetime,
    every: timedelta,
    *,
    dry_run: bool = False,
    rows_per_file: int = ROWS_PER_FILE,
    engine: EngineSettings | None = None,
    progress: Callable[[int], object] | None = None,
) -> PastValues:
    """Writes the values of all entities at start, start + every, ... before end, as known at each of these times.

    Columns of the files: the entity keys, `event_timestamp` (the step), the outputs of the SQL, `last_event_timestamp`;
    times are UTC microseconds. An entity has no row before its first event, nor when silent for longer than the view's
    ttl. Safe to repeat and to kill; two at once wait for each other. `progress` is told of steps done.
    UsageError: a range without steps, or a directory of other values; NotFoundError: no events; DataError: unreadable
    files, or a value that does not fit its type.
    """
    definition = definition_of(view)
    if definition is None:
        raise UsageError("not a windowed feature view", value=view.name, next_step="`predictflow backfill` is for it")
    if every < MICROSECOND:
        raise UsageError("the step must be positive", value=str(every), next_step="--every 1h")
    if end <= start:
        raise UsageError("the range has no step: its end is not after its start", value=end.isoformat())
    first, last, step = to_micros(start), to_micros(end), every // MICROSECOND
    steps = range(first, last, step)
    directory = log_directory(offline_path, view).parent
    erasures = ErasureList(offline_path)
    conditions = list(not_erased([(k, k, erasures.digests_of(k)) for k in definition.entity_key]))
    with connect(engine or EngineSettings()) as con:
        places = [str(directory / part) for part in (HISTORY, STREAM)]
        source = open_source(con, view.name, places, f"`predictflow backfill {view.name}`")
        columns = make_events(con, source, definition)
        with scanning(source, columns):
            entities = _load(con, definition, conditions, steps[-1])
        per_file = max(rows_per_file // max(entities, 1), 1)
        runs = [steps[i : i + per_file] for i in range(0, len(steps), per_file)]
        if dry_run:
            done = sum(_file_of(out, run).is_file() for run in runs) if _record_of(out) else 0
            return PastValues(
                view.name, str(out), entities, len(steps), entities * len(steps), len(runs), done, dry_run=True
            )
        rows = skipped = 0
        out.mkdir(parents=True, exist_ok=True)
        with locked(out / ".lock", seconds=3600.0):
            _claim(out, _identity(definition, source, steps, per_file, conditions))
            for run in runs:
                path = _file_of(out, run)
                if path.is_file():
                    skipped += 1
                else:
                    with scanning(source, columns):
                        table = _values(con, definition, run)
                    publish(table, path)
                    rows += table.num_rows
                if progress is not None:
                    progress(len(run))
    return PastValues(view.name, str(out), entities, len(steps), rows, len(runs), skipped, dry_run=False)


def _load(con: duckdb.DuckDBPyConnection, definition: WindowedView, conditions: list[str], until_us: int) -> int:
    """Tables `_logged`, the events that any step may know, and `_keys`, the entities in it; how many there are."""
    keys = ", ".join(ident(k) for k in definition.entity_key)
    # Rows without a key only move the watermark.
    idle = " AND ".join(f"{ident(k)} IS NULL" for k in definition.entity_key)
    wanted = " AND ".join(conditions) or "true"
    con.execute(
        f"CREATE TEMP TABLE _logged AS SELECT * FROM {EVENTS} "
        f"WHERE epoch_us(_visible_at) <= {until_us} AND (({idle}) OR ({wanted}))"
    )
    con.execute(
        f"CREATE TEMP TABLE _keys AS SELECT DISTINCT {keys} FROM _logged WHERE _dropped IS NULL ORDER BY {keys}"
    )
    return int(con.execute("SELECT count(*) FROM _keys").fetchall()[0][0])


def _values(con: duckdb.DuckDBPyConnection, definition: WindowedView, run: range) -> pa.Table:
    keys = ", ".join(ident(k) for k in definition.entity_key)
    outputs = "".join(f", v.{ident(o.name)}" for o in definition.outputs)
    con.execute(
        f"""CREATE OR REPLACE TEMP TABLE _asked AS
        SELECT row_number() OVER (ORDER BY s.us, {keys}) AS _row, {keys}, make_timestamptz(s.us) AS _t
        FROM _keys, (SELECT unnest(range({run.start}, {run.stop}, {run.step})) AS us) AS s"""
    )
    asked = ", ".join(f"a.{ident(k)}" for k in definition.entity_key)
    return con.sql(
        f"""SELECT {asked}, a._t AS event_timestamp{outputs}, v.{LAST_SEEN} AS {LAST_EVENT}
        FROM ({history_sql(definition, "_asked", "_logged")}) AS v JOIN _asked AS a USING (_row)
        WHERE v.{LAST_SEEN} IS NOT NULL ORDER BY _row"""
    ).to_arrow_table()


def _identity(
    definition: WindowedView, source: ParquetSource, steps: range, per_file: int, conditions: list[str]
) -> dict[str, object]:
    """All that the files depend on. The log's files never change but by name, size or time."""
    files = hashlib.sha256()
    for name in source.files:
        stat = Path(name).stat()
        files.update(f"{name} {stat.st_size} {stat.st_mtime_ns}\n".encode())
    return {
        "view": definition.name,
        "definition": definition.hash,
        "start": from_micros(steps.start).isoformat(),
        "end": from_micros(steps.stop).isoformat(),
        "every_us": steps.step,
        "steps_per_file": per_file,
        "log": files.hexdigest()[:16],
        "erased": hashlib.sha256(json.dumps(conditions).encode()).hexdigest()[:16],
    }


def _claim(out: Path, identity: dict[str, object]) -> None:
    found = _record_of(out)
    if found is None:
        if any(out.glob("*.parquet")):
            raise UsageError("the directory holds other files", value=str(out), next_step="pass an empty --out")
        write_whole(out / RECORD, json.dumps(identity, indent=1).encode())
        return
    changed = sorted(k for k in identity.keys() | found.keys() if identity.get(k) != found.get(k))
    if changed:
        raise UsageError(
            f"the directory holds values of another run: {', '.join(changed)} differ",
            value=str(out),
            next_step="pass an empty --out",
        )


def _record_of(out: Path) -> dict[str, object] | None:
    path = out / RECORD
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as e:
        raise DataError("cannot be read", value=str(path), next_step="pass an empty --out") from e
    return found if isinstance(found, dict) else {}


def _file_of(out: Path, run: range) -> Path:
    def name(us: int) -> str:
        return from_micros(us).astimezone(UTC).strftime("%Y%m%dT%H%M%S.%fZ")

    return out / f"values-{name(run[0])}-{name(run[-1])}.parquet"
