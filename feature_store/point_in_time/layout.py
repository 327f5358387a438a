"""The bucketed layout that backfill and compaction write, so that a retrieval finds a key's rows together and in order.

A table directory holds `_layout.json` and one Parquet file per chunk (a month, a correction, a compacted range), named
`<chunk>.parquet`. A file's rows are sorted by (bucket, keys, event_timestamp, created); a row group never spans two
buckets, and the footer says which row groups belong to which bucket. One file is one rename: a reader never sees half a
chunk. Any other Parquet file in the directory is read too, as a file of one bucket that is not sorted.

The bucket of a row is `hash(keys) % buckets`. A file has a power of two of buckets, as many as its rows need and at most
the table's, so bucket b of a file with 4 holds what buckets b, b + 4, b + 8.. of one with more would. The hash is
integer arithmetic and md5: the same in every version of DuckDB, and for every width of a key type.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import duckdb
import pyarrow as pa
import pyarrow.parquet as pq

from feature_store.errors import DataError, UsageError
from feature_store.point_in_time.engine import ident, reading
from feature_store.point_in_time.publish import appearing
from feature_store.point_in_time.types import kind, ticks

FILE = "_layout.json"
FOOTER = b"predictflow.layout"
HASH = "pf1"
VERSION = 1
ROW_GROUP_ROWS = 122_880
MAX_BUCKETS = 256
CHUNK = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,120}")
HASHABLE = ("integer", "bool", "string", "uuid", "bytes", "time")
_LOW = "4294967295"  # 32 bits


@dataclass(frozen=True)
class Layout:
    """What `_layout.json` says; column names are the files' own."""

    keys: tuple[str, ...]
    timestamp: str
    created: str | None
    buckets: int = MAX_BUCKETS
    hash: str = HASH
    version: int = VERSION

    @property
    def order(self) -> tuple[str, ...]:
        """The columns that the rows of one bucket are sorted by."""
        return (*self.keys, self.timestamp, *((self.created,) if self.created else ()))


def read_layout(table_dir: str | Path) -> Layout | None:
    """The layout of a table directory; None when it has none. DataError for one that this version cannot read."""
    path = Path(table_dir) / FILE
    try:
        raw = json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except (ValueError, OSError) as e:
        raise DataError(f"{path} cannot be read: {e}", next_step="run the backfill of this view again") from e
    if not isinstance(raw, dict) or raw.get("version") != VERSION or raw.get("hash") != HASH:
        raise DataError(
            f"{path} was written by another version", value=raw, next_step="use that version, or delete the file"
        )
    return Layout(**{**raw, "keys": tuple(raw["keys"])})


def create_layout(table_dir: str | Path, layout: Layout) -> Layout:
    """Writes `_layout.json` atomically unless it is there; safe to run twice. DataError when the one there differs."""
    if layout.buckets & (layout.buckets - 1) or not 1 <= layout.buckets <= 65_536:
        raise UsageError("the number of buckets must be a power of two", value=layout.buckets)
    directory = Path(table_dir)
    there = read_layout(directory)
    if there is not None:
        if there.order != layout.order:
            raise DataError(
                f"{directory / FILE} lays the table out by other columns",
                value=list(layout.order),
                valid=[list(there.order)],
                next_step="delete the table's directory and run its backfill again",
            )
        return there
    directory.mkdir(parents=True, exist_ok=True)
    temporary = directory / f".{FILE}.{os.getpid()}.tmp"
    try:
        temporary.write_text(json.dumps(asdict(layout), indent=1) + "\n")
        temporary.replace(directory / FILE)
    finally:
        temporary.unlink(missing_ok=True)
    return layout


def bucket_sql(keys: Mapping[str, str], buckets: int) -> str:
    """SQL for the bucket of a row; `keys` maps each key's SQL expression to its DuckDB type. Null keys have one too."""
    combined = "CAST(0 AS UBIGINT)"
    for expression, sql_type in keys.items():
        combined = f"((({combined}) * CAST(31 AS UBIGINT) + {_hash(expression, sql_type)}) & {_LOW})"
    return f"CAST(({combined}) % {buckets} AS INTEGER)"


def _hash(expression: str, sql_type: str) -> str:
    """32 bits as UBIGINT, so that no product overflows."""
    family = kind(sql_type)
    if family in ("integer", "bool", "time"):
        number = ticks(expression, sql_type) if family == "time" else expression
        if family == "time" and sql_type.endswith("_NS"):  # the width of a time is its unit: floor to us
            number = f"({number} - (({number} % 1000) + 1000) % 1000) // 1000"
        wide = f"coalesce(TRY_CAST({number} AS BIGINT), 0)"
        low = f"CAST({wide} & {_LOW} AS UBIGINT)"
        high = f"CAST(({wide} >> 32) & {_LOW} AS UBIGINT)"
        return f"(xor({low} * CAST(2654435761 AS UBIGINT), {high} * CAST(2246822519 AS UBIGINT)) >> 16 & {_LOW})"
    if family in ("string", "uuid", "bytes"):
        value = expression if family == "bytes" else f"CAST({expression} AS VARCHAR)"
        return f"(coalesce(md5_number_lower({value}), 0) & {_LOW})"
    raise UsageError("a column of this type cannot be a bucketed key", value=sql_type, valid=HASHABLE)


def file_buckets(rows: int, layout: Layout) -> int:
    """How many buckets a file of so many rows has: about one row group each."""
    wanted = 1
    while wanted < layout.buckets and rows > wanted * ROW_GROUP_ROWS:
        wanted *= 2
    return wanted


def chunk_path(table_dir: str | Path, chunk: str) -> Path:
    """The file of a chunk; UsageError for a name that is no plain file name."""
    if not CHUNK.fullmatch(chunk):
        raise UsageError("not a chunk name", value=chunk, next_step="use letters, digits, and any of _ . + -")
    return Path(table_dir) / f"{chunk}.parquet"


def write_chunk(
    con: duckdb.DuckDBPyConnection, relation: str, table_dir: str | Path, chunk: str, layout: Layout
) -> tuple[Path, int, int]:
    """Writes the rows of `relation` (SQL: a table, or a SELECT in parentheses) as one chunk: (file, rows, bytes).

    Atomic: the file appears whole, or, when anything fails, not at all; a chunk of that name is replaced. Deterministic:
    the same rows give the same bytes, in whatever order they come. No rows: no file, and one of that name is removed.
    """
    create_layout(table_dir, layout)
    path = chunk_path(table_dir, chunk)
    with reading(f"chunk {chunk} of {table_dir}"):
        described = con.execute(f"DESCRIBE SELECT * FROM {relation}").fetchall()
        types = {str(r[0]): str(r[1]) for r in described}
        for column in layout.order:
            if column not in types:
                raise DataError(f"chunk {chunk} of {table_dir} lacks a column of its layout", value=column, valid=types)
        rows = int(con.execute(f"SELECT count(*) FROM {relation}").fetchall()[0][0])
        if not rows:
            path.unlink(missing_ok=True)
            return path, 0, 0
        buckets = file_buckets(rows, layout)
        batches = con.sql(_sorted_sql(relation, types, layout, buckets)).to_arrow_reader(ROW_GROUP_ROWS)
        with batches:
            return path, rows, _publish(_by_bucket(batches), batches.schema, path, layout, buckets)


def _sorted_sql(relation: str, types: Mapping[str, str], layout: Layout, buckets: int) -> str:
    """The rows in the file's order with `_bucket`. Equal rows are ordered by every other column: the bytes are a function of the rows."""
    rest = [c for c in types if c not in layout.order]
    order = ", ".join(["_bucket", *(f"{ident(c)} NULLS FIRST" for c in (*layout.order, *rest))])
    keys = {ident(k): types[k] for k in layout.keys}
    if buckets == 1:
        return f"SELECT 0 AS _bucket, * FROM {relation} ORDER BY {order}"
    return f"SELECT {bucket_sql(keys, buckets)} AS _bucket, * FROM {relation} ORDER BY {order}"


def _by_bucket(batches: pa.RecordBatchReader) -> Iterator[tuple[int, pa.Table]]:
    """The rows cut at bucket bounds and at ROW_GROUP_ROWS, whatever batches the engine cut them into."""
    held: list[pa.Table] = []
    bucket, rows = -1, 0
    for batch in batches:
        table = pa.Table.from_batches([batch])
        numbers = table.column("_bucket").combine_chunks().to_numpy()
        start = 0
        while start < len(numbers):
            if numbers[start] != bucket or rows == ROW_GROUP_ROWS:
                if held:
                    yield bucket, pa.concat_tables(held)
                held, rows, bucket = [], 0, int(numbers[start])
            end = min(int(numbers.searchsorted(bucket, side="right")), start + ROW_GROUP_ROWS - rows)
            held.append(table.slice(start, end - start))
            rows, start = rows + end - start, end
    if held:
        yield bucket, pa.concat_tables(held)


def _publish(
    groups: Iterator[tuple[int, pa.Table]], schema: pa.Schema, path: Path, layout: Layout, buckets: int
) -> int:
    bare = pa.schema([f for f in schema if f.name != "_bucket"])
    firsts: list[int] = []  # the bucket of each row group
    with appearing(path) as temporary:
        with pq.ParquetWriter(temporary, bare, **writer_options(bare, layout)) as writer:
            for bucket, table in groups:
                firsts.append(bucket)
                writer.write_table(table.select(bare.names).combine_chunks(), row_group_size=ROW_GROUP_ROWS)
            footer = {**asdict(layout), "buckets": buckets, "row_groups": firsts}
            writer.add_key_value_metadata({FOOTER.decode(): json.dumps(footer)})
        return temporary.stat().st_size


def writer_options(schema: pa.Schema, layout: Layout) -> dict[str, object]:
    """Options of ParquetWriter. Numbers are written plain: a dictionary of many values costs more to decode than it saves."""
    plain = (pa.types.is_floating, pa.types.is_timestamp)
    coded = [f.name for f in schema if f.name in layout.keys or not any(test(f.type) for test in plain)]
    return {"compression": "lz4", "use_dictionary": coded, "write_page_checksum": True, "store_schema": False}


def row_group_buckets(metadata: pq.FileMetaData, keys: Sequence[str]) -> tuple[int, list[int]] | None:
    """(number of buckets, bucket of each row group) of a file laid out by these keys; None for any other file."""
    raw = (metadata.metadata or {}).get(FOOTER)
    if raw is None:
        return None
    footer = json.loads(raw)
    if footer.get("hash") != HASH or footer.get("version") != VERSION or footer.get("keys") != list(keys):
        return None
    return int(footer["buckets"]), [int(b) for b in footer["row_groups"]]
