"""Row values recomputed from the Parquet row with exactly the served (event_timestamp, created)."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from feature_store.consistency.parquet import in_micros, load_reads, not_after, place_of
from feature_store.consistency.result import NULL_VALUE, OUTSIDE_MAX_AGE, PRESENT, Consistency, same, status_at
from feature_store.consistency.served_log import Served, after_t, micros
from feature_store.point_in_time.engine import EngineSettings, connect, ident, reading
from feature_store.point_in_time.source import file_path, open_source, require_same_kind, scanning
from feature_store.point_in_time.types import as_declared

if TYPE_CHECKING:
    from feast import FeatureView


def check_rows(view: FeatureView, features: Mapping[str, list[Served]], offline_path: str, result: Consistency) -> None:
    """Recomputes the served values of one row view and counts them in `result`. Errors as `check` says."""
    source: Any = view.batch_source
    back = {ours: theirs for theirs, ours in (source.field_mapping or {}).items()}
    event_name = back.get(source.timestamp_field, source.timestamp_field)
    created_name = source.created_timestamp_column
    dtypes = {f.name: f.dtype for f in view.features}
    known_features = [f for f in features if f in dtypes]
    with connect(EngineSettings()) as con:
        place = place_of(offline_path, file_path(source))
        files = open_source(con, view.name, [place], f"`predictflow backfill {view.name}`")
        column = {c: ident(back.get(c, c)) for c in [*view.join_keys, *known_features]}
        event_type = files.require_time(event_name, "the event timestamp")
        event = in_micros(f"p.{ident(event_name)}", event_type)
        not_later = not_after(f"p.{ident(event_name)}", event_type, "r.t_us")
        created, known = "NULL::BIGINT", not_later
        if created_name:
            created_type = files.require_time(created_name, "the created time")
            created = in_micros(f"p.{ident(created_name)}", created_type)
            known = f"coalesce({not_after(f'p.{ident(created_name)}', created_type, 'r.t_us')}, {not_later})"
        listed = []
        for f in known_features:
            stored = files.require(back.get(f, f), f"feature {f}")
            listed.append(f"{as_declared(f'p.{column[f]}', stored, dtypes[f], f'{files.label}, {f}')} AS {ident(f)}")
        stored_keys = [back.get(k, k) for k in view.join_keys]
        for key in stored_keys:
            files.require(key, "a join key")
        load_reads(con, view, view.join_keys, features)
        wanted = [*stored_keys, event_name, *([created_name] if created_name else [])]
        require_same_kind(files, wanted)
        wanted += [back.get(f, f) for f in known_features]
        selected = ", ".join(ident(c) for c in dict.fromkeys(wanted))
        mine = ", ".join(column[k] for k in view.join_keys)
        theirs = ", ".join(ident(k) for k in view.join_keys)
        with scanning(files, wanted):
            con.execute(
                f"""CREATE TEMP TABLE rows AS SELECT {selected} FROM {files.relation}
                WHERE ({mine}) IN (SELECT ({theirs}) FROM read)"""
            )
        on_key = " AND ".join(f"p.{column[k]} = r.{ident(k)}" for k in view.join_keys)
        with reading(files.label):
            exact: Any = con.sql(
                f"""SELECT {", ".join(["r.id", *listed])} FROM read AS r JOIN rows AS p ON {on_key}
                AND {event} = r.event_us
                AND {created} IS NOT DISTINCT FROM {"r.created_us" if created_name else "NULL"}"""
            ).to_arrow_table()
            newer: dict[int, bool] = dict(
                con.execute(
                    f"""SELECT r.id, bool_or((r.event_us IS NULL OR {event} > r.event_us OR
                                              ({event} = r.event_us AND {created} > r.created_us)))
                    FROM read AS r JOIN rows AS p ON {on_key} AND {not_later} AND {known} GROUP BY r.id"""
                ).fetchall()
            )
    rows: dict[int, list[dict[str, Any]]] = defaultdict(list)
    for r in exact.to_pylist():
        rows[r["id"]].append(r)
    stale = {i for i, is_newer in newer.items() if is_newer}
    result.stale += sum(s.record in stale for f in known_features for s in features[f])
    ttl = view.ttl or timedelta(0)
    missing = ("NO SUCH ROW", None)
    for name, served in features.items():
        if name not in dtypes:
            result.skip(f"no feature {view.name}:{name}", len(served))
            continue
        for s in served:
            event_us = micros(s.read["event_timestamp"]) if s.read.get("event_timestamp") else None
            status = status_at(event_us, s.t_us, ttl)
            leak = after_t(s, "event_timestamp", "created")
            if status == PRESENT:
                if s.record not in rows:
                    result.compare(s, missing, leak)
                    continue
                # Twins with the same times may differ: the served one must be among them.
                values = [r[name] for r in rows[s.record]]
                value = next((v for v in values if same(s.value, v)), values[0])
                result.compare(s, (PRESENT if value is not None else NULL_VALUE, value), leak)
            elif status == OUTSIDE_MAX_AGE and s.record not in rows:
                result.compare(s, missing, leak)
            else:
                result.compare(s, (status, None), leak)
