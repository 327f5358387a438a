"""What a backfill of one view reads and writes: its SELECT, the stored columns with their types, and their order."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from feature_store.errors import DataError, DefinitionError
from feature_store.point_in_time.engine import ident
from feature_store.point_in_time.layout import Layout
from feature_store.point_in_time.source import file_path
from feature_store.point_in_time.types import as_declared, kind, ns_per_tick, sql_type_of
from feature_store.source_columns import columns_of
from feature_store.windows.definition import SQL_TAG, STATE_FIELD, WindowedView, definition_of
from feature_store.windows.plan import NOT_FINITE, not_finite_sql

if TYPE_CHECKING:
    from feast import FeatureView

VERSION = 2
"""Of what backfill writes for the same plan; a new one makes runs of an older version count as other runs."""


@dataclass(frozen=True)
class Column:
    """A stored column; `dtype` is its Feast type, None for a time (UTC, microseconds)."""

    name: str
    dtype: Any

    @property
    def null(self) -> str:
        """SQL for no value, in the column's type."""
        return f"CAST(NULL AS {'TIMESTAMPTZ' if self.dtype is None else sql_type_of(self.dtype) or 'VARCHAR'})"

    def read(self, stored: str, where: str) -> str:
        """SQL that reads the column, of DuckDB type `stored`, as its own type; DataError where it does not fit."""
        column = ident(self.name)
        if self.dtype is not None:
            return as_declared(column, stored, self.dtype, where)
        if kind(stored) != "time":
            raise DataError(f"{where}: not a timestamp", value=stored)
        if ns_per_tick(stored) == 1:
            # The platform writes microseconds, and rounding a time could leak the future.
            return (
                f"CASE WHEN epoch_ns({column}) % 1000 = 0 THEN make_timestamptz(epoch_ns({column}) // 1000) "
                f"WHEN {column} IS NOT NULL THEN error('{where.replace(chr(39), '')}: finer than a microsecond') END"
            )
        return f"CAST({column} AS TIMESTAMP WITH TIME ZONE)"


@dataclass(frozen=True)
class Plan:
    """`stored` and `order` name the written columns and their sort order; `required` may not be null."""

    view: str
    path: str
    directory: str
    sql: str
    inputs: tuple[str, ...]
    columns: tuple[Column, ...]
    stored: tuple[str, ...]
    required: tuple[str, ...]
    timestamp: str
    created: str | None
    order: str
    definition: WindowedView | None
    keys: tuple[tuple[str, str], ...]
    """Entity keys: (stored column, join key)."""

    @property
    def hash(self) -> str:
        """Changes with everything that decides what is written, whatever the input."""
        parts: list[object] = [
            self.view,
            self.sql,
            [(c.name, str(c.dtype)) for c in self.columns],
            self.stored,
            self.order,
        ]
        if self.definition:
            parts += [self.definition.source.event_id, self.definition.entity_key]
            if not_finite := not_finite_sql(self.definition.source):
                parts.append(not_finite)
        return hashlib.sha256(json.dumps([VERSION, *parts]).encode()).hexdigest()[:16]

    @property
    def layout(self) -> Layout | None:
        """How a row view's files are laid out; None for the history of a windowed view, a log by time."""
        if self.definition is not None:
            return None
        return Layout(tuple(column for column, _ in self.keys), self.timestamp, self.created)

    @property
    def row_by_row(self) -> bool:
        """Whether each row of the SELECT comes from one raw row, so that a part of the range costs a part of the work."""
        from sqlglot import exp, parse_one

        if self.definition is not None:  # events are numbered over all of them
            return False
        tree = parse_one(self.sql, read="duckdb")
        whole = (
            exp.Join,
            exp.AggFunc,
            exp.Window,
            exp.Group,
            exp.Distinct,
            exp.Order,
            exp.Limit,
            exp.Subquery,
            exp.CTE,
        )
        return isinstance(tree, exp.Select) and tree.find(*whole, exp.Offset, exp.Unnest, exp.TableSample) is None

    @property
    def tables(self) -> list[str]:
        """The raw tables that the SELECT reads."""
        return sorted({column.rpartition(".")[0] for column in self.inputs})

    def wrap(self, select: str) -> str:
        """The rows to store, from the checked SELECT; for a windowed view with the columns of the event log."""
        if self.definition is None:
            return select
        # The number is the event's rank among all raw events, whatever range is asked for, so that it never changes.
        names = ", ".join(ident(c.name) for c in self.columns)
        event_id = self.definition.source.event_id
        tie = ident(event_id) if event_id is not None else names
        not_finite = not_finite_sql(self.definition.source)
        reasons = [f"WHEN {not_finite} THEN '{NOT_FINITE}'"] if not_finite else []
        if event_id is not None:
            # One that is dropped for another reason is no first event of its id, as a dead letter is none.
            apart = [f"{not_finite} IS TRUE"] if not_finite else []
            same = ", ".join([*(ident(c) for c in (*self.definition.entity_key, event_id)), *apart])
            reasons.append(f"WHEN row_number() OVER (PARTITION BY {same} ORDER BY _offset) > 1 THEN 'duplicate'")
        dropped = f"CASE {' '.join(reasons)} END" if reasons else "CAST(NULL AS VARCHAR)"
        return (
            f"SELECT {names}, '' AS _topic_id, CAST(-1 AS INTEGER) AS _partition, _offset, created AS _visible_at, "
            f"CAST(NULL AS TIMESTAMPTZ) AS _watermark, {dropped} AS _dropped FROM (SELECT *, "
            f"row_number() OVER (ORDER BY created, {tie}, {names}) - 1 AS _offset FROM ({select}))"
        )


def plan_of(view: FeatureView) -> Plan:
    """The plan of a view; DefinitionError when its source carries no SELECT, or one that is none."""
    source = view.batch_source
    sql = ((source.tags if source else None) or {}).get(SQL_TAG, "").strip().rstrip(";")
    if source is None or not sql:
        raise DefinitionError(
            f"view {view.name}: its source has no tag {SQL_TAG}, so there is nothing to run",
            next_step=f'add tags={{"{SQL_TAG}": "SELECT ... FROM ..."}} to its FileSource, then feast apply',
        )
    inputs = tuple(sorted({c for out in columns_of(sql, f"view {view.name}").values() for c in out.columns}))
    definition = definition_of(view)
    return _row_plan(view, sql, inputs) if definition is None else _window_plan(view, sql, inputs, definition)


def row_layout(view: FeatureView) -> Layout:
    """How a row view's files are laid out, whether or not its source has a SELECT."""
    layout = _row_plan(view, "", ()).layout
    assert layout is not None
    return layout


def _row_plan(view: FeatureView, sql: str, inputs: tuple[str, ...]) -> Plan:
    source = view.batch_source
    assert source is not None
    to_source = {mapped: raw for raw, mapped in (source.field_mapping or {}).items()}
    joined = [e.name for e in view.entity_columns if e.name != "__dummy_id"]
    keys = [to_source.get(name, name) for name in joined]
    timestamp = to_source.get(source.timestamp_field, source.timestamp_field)
    created = to_source.get(source.created_timestamp_column, source.created_timestamp_column) or None
    declared = {to_source.get(f.name, f.name): f.dtype for f in [*view.entity_columns, *view.features]}
    columns = [Column(k, declared[k]) for k in keys]
    columns += [Column(c, None) for c in (timestamp, created) if c]
    columns += [Column(n, t) for n, t in declared.items() if n not in keys and n != "__dummy_id"]
    times = tuple(c for c in (timestamp, created) if c)
    names = tuple(c.name for c in columns)
    order = [*keys, *times, *(n for n in names if n not in {*keys, *times})]
    return Plan(
        view=view.name,
        path=file_path(source),
        directory="",
        sql=sql,
        inputs=inputs,
        columns=tuple(columns),
        stored=names,
        required=(*keys, *times),
        timestamp=timestamp,
        created=created,
        order=", ".join(ident(n) for n in order),
        definition=None,
        keys=tuple((k, e) for k, e in zip(keys, joined, strict=True)),
    )


def _window_plan(view: FeatureView, sql: str, inputs: tuple[str, ...], definition: WindowedView) -> Plan:
    from feast import types as feast_types

    assert view.batch_source is not None
    events = definition.source
    kinds = {
        "string": feast_types.String, "int64": feast_types.Int64, "float64": feast_types.Float64, "bool": feast_types.Bool,
        "timestamp": None,
    }  # fmt: skip
    columns = [Column(events.event_id, feast_types.String)] if events.event_id is not None else []
    columns += [Column(k, kinds[t]) for k, t in zip(definition.entity_key, definition.key_types, strict=True)]
    columns += [Column(events.timestamp, None), Column("created", None)]
    columns += [Column(n, kinds[t]) for n, t in events.columns.items()]
    names = tuple(c.name for c in columns)
    log = ("_topic_id", "_partition", "_offset", "_visible_at", "_watermark", "_dropped")
    assert STATE_FIELD not in names
    return Plan(
        view=view.name,
        path=file_path(view.batch_source),
        directory="history",
        sql=sql,
        inputs=inputs,
        columns=tuple(columns),
        stored=(*names, *log),
        # Events without an id would count as repetitions of one another.
        required=(*definition.entity_key, *([events.event_id] if events.event_id else []), events.timestamp, "created"),
        timestamp=events.timestamp,
        created="created",
        order=", ".join(ident(c) for c in (*definition.entity_key, events.timestamp, "_offset")),
        definition=definition,
        keys=tuple((k, k) for k in definition.entity_key),
    )
