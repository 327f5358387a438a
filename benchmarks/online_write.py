"""Writing online: our engine beside Feast's `write_to_online_store`, and that API on our store beside one that does nothing.

Feast's API runs twice: as feature_store.yaml sets it up, with our provider, and with Feast's own (`provider: local`), whose
conversion of each cell to a proto is part of what the store that does nothing takes too.

Run it: `python -m benchmarks.online_write --size small|full`. It starts a private Redis, checks first that stock Feast
reads from both writers' Redis what was written, then measures all contenders in turn. Every write goes into rows that are
there already, is newer than they are, and has newest-wins (or stock's own check) on. Exit code 2 when values differ. `CPU` rows
count the processor time of writer and Redis together: they hold on a machine that is not quiet.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import redis

from benchmarks.harness import Row, measure, report, save
from feature_store.online_store import PredictFlowOnlineStore, PredictFlowOnlineStoreConfig

THIS = "benchmarks.online_write"
OURS, STOCK, STORE, LOCAL, NO_STORE = (
    "our engine",
    "Feast write_to_online_store",
    "Feast's API on our store",
    "the same, provider local",
    "on a no-op store",
)
MATERIALISE, STOCK_MATERIALISE = "our materialise", "Feast materialize"
NOW = datetime.now(UTC).replace(microsecond=0)  # a bench is a command line of its own
ENGINE, API, BULK = (8.0, 12.0), (0.8, 0.9), (8.0, 15.0)
"""(floor, goal) of ratios; of the engine for 10 features."""
ENGINE_WIDE = (5.0, 9.0)
"""For 50 features: Redis sets every field, for both sides, and that is most of our time."""
ENGINE_ONE_ROW = (1.0, 1.0)
BULK_CPU = (5.0, 8.0)
"""By CPU: of 2.5 seconds of ours Redis takes 1.5 for its hashes, as it does for stock."""
API_LOCAL = (0.5, 0.9)
"""With Feast's own provider: what Redis takes cannot be hidden beside so little else."""
SMOKE = 0.5
"""At SIZE=small the floors are this part of the real ones: the runs are short and the machine is rarely quiet."""
BATCHES = {"small": [1, 100, 1_000], "full": [1, 100, 1_000, 10_000]}
_WARM = 3
"""Writes of each side before its runs: whoever writes small batches all day has done some."""
BULK_ROWS = {"small": 20_000, "full": 200_000}


class NoOpOnlineStoreConfig(PredictFlowOnlineStoreConfig):
    """Settings of a store that does nothing."""

    type: str = "benchmarks.online_write.NoOpOnlineStore"  # type: ignore[assignment]  # any name but ours


class NoOpOnlineStore(PredictFlowOnlineStore):
    """Takes rows and drops them: what is left is Feast's own part of a write."""

    def online_write_batch(self, config: Any, table: Any, data: Any, progress: Any) -> None:
        """Does nothing."""


def table(rows: int, features: int, event: datetime) -> pa.Table:
    """`driver_id`, features (three of five doubles, one integer, one short text), times; the same for the same arguments."""
    rng = np.random.default_rng(rows)
    columns: dict[str, Any] = {"driver_id": np.arange(rows)}
    for i in range(features):
        kind = i % 5
        if kind == 1:
            columns[f"f{i}"] = rng.integers(0, 1_000_000, rows)
        elif kind == 2:
            columns[f"f{i}"] = pa.array([f"value {n}" for n in rng.integers(0, 1000, rows)])
        else:
            columns[f"f{i}"] = rng.random(rows)
    times = pa.array([event] * rows, pa.timestamp("us", "UTC"))
    return pa.table({**columns, "event_timestamp": times, "created": times})


def feast(home: Path, url: str, kind: str, features: int, *, ours: bool, provider: str = "local") -> Any:
    """A Feast store of its own with one view `stats`, on database `url`."""
    from feast import Entity, FeatureStore, FeatureView, Field, FileSource, RepoConfig, ValueType
    from feast.types import Float64, Int64, String

    home.mkdir(parents=True, exist_ok=True)
    driver = Entity(name="driver", join_keys=["driver_id"], value_type=ValueType.INT64)
    types = [Float64, Int64, String, Float64, Float64]
    source = FileSource(
        name="stats",
        path=str(home / "stats.parquet"),
        timestamp_field="event_timestamp",
        created_timestamp_column="created",
    )
    view = FeatureView(
        name="stats",
        entities=[driver],
        ttl=timedelta(0),
        schema=[Field(name=f"f{i}", dtype=types[i % 5]) for i in range(features)],
        source=source,
    )
    options: dict[str, Any] = {}
    if ours:
        options = {
            "batch_engine": {"type": "feature_store.materialise.PredictFlowEngine"},
            "offline_store": {"type": "feature_store.offline_store.PredictFlowOfflineStore", "path": str(home)},
        }
    address = url if kind != "redis" else url.removeprefix("redis://").replace("/", ",db=")
    store = FeatureStore(
        config=RepoConfig(
            project="bench",
            provider=provider,
            registry=str(home / f"{kind.rsplit('.', 1)[-1]}.db"),
            online_store={"type": kind, "connection_string": address},
            entity_key_serialization_version=3,
            **options,
        )
    )
    store.apply([driver, view])
    return store


def prepare(name: str, case: dict[str, Any]) -> tuple[Callable[[], Any], Callable[[Any], dict[str, Any]]]:
    """The contender's side: a run writes the next, newer version of the same rows."""
    from feature_store.online_write import OnlineWriter

    rows, features, repeat = case["rows"], case["features"], case["calls"]
    home = Path(case["home"]) / name.replace(" ", "-").replace("'", "")
    kind = {
        OURS: "feature_store.online_store.PredictFlowOnlineStore",
        STORE: "feature_store.online_store.PredictFlowOnlineStore",
        LOCAL: "feature_store.online_store.PredictFlowOnlineStore",
        MATERIALISE: "feature_store.online_store.PredictFlowOnlineStore",
        NO_STORE: "benchmarks.online_write.NoOpOnlineStore",
        STOCK: "redis",
        STOCK_MATERIALISE: "redis",
    }[name]
    provider = "feature_store.provider.PredictFlowProvider" if name == STORE else "local"
    store = feast(home, case["urls"][name], kind, features, ours=name == MATERIALISE, provider=provider)
    version = iter(range(1, 10**6))
    start = NOW - timedelta(days=30)

    def next_table() -> pa.Table:
        return table(rows, features, start + timedelta(seconds=next(version)))

    server = redis.Redis.from_url(case["urls"][name])
    server.flushdb()  # rows of the case before would be newer than this one's first
    spent: list[float] = []

    def cpu() -> float:
        of_server: Any = server.info("cpu")
        return time.process_time() + float(of_server["used_cpu_user"]) + float(of_server["used_cpu_sys"])

    def counted(work: Callable[[], Any]) -> Callable[[], Any]:
        def run() -> None:
            before = cpu()
            work()
            spent.append(cpu() - before)

        return run

    def describe(_: Any) -> dict[str, Any]:
        return {"cpu": spent.pop()}

    if name in (MATERIALISE, STOCK_MATERIALISE):
        pq.write_table(next_table(), home / "stats.parquet")
        return counted(lambda: store.materialize(start - timedelta(days=1), NOW)), describe
    if name == OURS:
        view = store.get_feature_view("stats")
        writer = OnlineWriter(store._get_provider().online_store, store.config, view)
        for _ in range(_WARM):
            writer.write(next_table(), wall=None)  # the rows that the runs overwrite
        tables = [next_table() for _ in range(repeat * case["runs"])]

        def run_ours() -> None:
            for _ in range(repeat):
                writer.write(tables.pop(0), wall=None)

        return counted(run_ours), describe
    first = [next_table() for _ in range(_WARM)]
    frames = [next_table().to_pandas() for _ in range(repeat * case["runs"])]
    for warm in first:  # connects, fills caches
        store.write_to_online_store("stats", warm.to_pandas())

    def run_feast() -> None:
        for _ in range(repeat):
            store.write_to_online_store("stats", frames.pop(0))

    return counted(run_feast), describe


def agree(home: Path, urls: dict[str, str], features: int) -> bool:
    """Stock Feast reads from our Redis and from its own the same rows, and they are those that were written."""
    from feature_store.online_write import online_write

    wanted = table(300, features, NOW - timedelta(hours=1))
    ours = feast(
        home / "check-ours", urls[OURS], "feature_store.online_store.PredictFlowOnlineStore", features, ours=True
    )
    online_write(ours._get_provider().online_store, ours.config, ours.get_feature_view("stats"), wanted, wall=None)
    stock = feast(home / "check-stock", urls[STOCK], "redis", features, ours=False)
    stock.write_to_online_store("stats", wanted.to_pandas())
    reader = feast(home / "check-reader", urls[OURS], "redis", features, ours=False)
    refs = [f"stats:f{i}" for i in range(features)]
    entities = {"driver_id": list(range(300))}
    answers = [s.get_online_features(refs, entities).to_dict() for s in (stock, reader, ours)]
    for name in (OURS, STOCK):
        redis.Redis.from_url(urls[name]).flushdb()
    return all(a == answers[0] for a in answers) and all(
        answers[0][f"f{i}"] == wanted.column(f"f{i}").to_pylist() for i in range(features)
    )


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every ratio is at or above its floor, 1 when one is below, 2 when values differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online_write", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(BATCHES), default="small")
    parser.add_argument(
        "--repeat",
        type=int,
        default=3,
        help="runs per contender; of batches up to 1,000 rows five times as many, of larger ones twice",
    )
    parser.add_argument("--only", metavar="TEXT", default="", help="only the cases whose name holds TEXT")
    options = parser.parse_args(argv)
    smoke = SMOKE if options.size == "small" else 1.0

    from predictflow.local import redis as local_redis
    from predictflow.local.ports import HOST, free_port
    from predictflow.local.watched import Watched

    found: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="predictflow-bench-") as root, Watched() as watched:
        home, port = Path(root), free_port()
        local_redis.start(watched, home / "redis", port, home / "redis.log", durable=False, databases=16)
        names = [OURS, STOCK, STORE, LOCAL, NO_STORE, MATERIALISE, STOCK_MATERIALISE]
        urls = {name: f"redis://{HOST}:{port}/{i}" for i, name in enumerate(names)}
        for features in (10, 50):
            if not agree(home / str(features), urls, features):
                print(f"values differ at {features} features", file=sys.stderr)
                return 2
            for rows in BATCHES[options.size]:
                found += write_case(home, urls, rows, features, smoke, options)
                if found:
                    save("online-write", found)
        case = f"materialise {BULK_ROWS[options.size]:,} x 10"
        if options.only in case:
            got = _measure(home, urls, [MATERIALISE, STOCK_MATERIALISE], BULK_ROWS[options.size], 10, 1, 1)
            found += _rows(case, got, MATERIALISE, STOCK_MATERIALISE, 1, BULK, smoke, BULK_CPU)
    return report("online-write", found)


def write_case(home: Path, urls: dict[str, str], rows: int, features: int, smoke: float, options: Any) -> list[Row]:
    """One batch size at one width: the engine against stock, and our store against the no-op one."""
    name = f"write {rows:,} x {features}"
    if options.only not in name:
        return []
    # Short turns and many: the machine's slow spells and full garbage collections meet a few of them, not the median.
    calls, turns = max(2, min(20, 3_000 // rows)), options.repeat * (5 if rows <= 1_000 else 2)
    got = _measure(home, urls, [OURS, STOCK, STORE, LOCAL, NO_STORE], rows, features, calls, turns)
    engine = ENGINE_ONE_ROW if rows == 1 else ENGINE if features == 10 else ENGINE_WIDE
    return [
        *_rows(name, got, OURS, STOCK, calls, engine, smoke),
        *_rows(f"{name} by Feast", got, STORE, NO_STORE, calls, API, smoke),
        *_rows(f"{name} by Feast, local", got, LOCAL, NO_STORE, calls, API_LOCAL, smoke),
    ]


def _measure(
    home: Path, urls: dict[str, str], names: Sequence[str], rows: int, features: int, calls: int, repeat: int
) -> dict[str, list[tuple[float, float]]]:
    where = home / f"{rows}-{features}-{time.monotonic_ns()}"
    case = {"rows": rows, "features": features, "calls": calls, "runs": repeat, "home": str(where), "urls": urls}

    def say(name: str, run: Any) -> None:
        print(f"  {rows:,} x {features}  {name:28} {rows * calls / run.seconds:12,.0f} rows/s", flush=True)

    runs = measure(THIS, names, case, repeat, False, say)
    return {name: [(m.seconds, m.answer["cpu"]) for m in ms] for name, ms in runs.items()}


def _rows(
    metric: str,
    got: dict[str, list[tuple[float, float]]],
    ours: str,
    peer: str,
    calls: int,
    targets: tuple[float, float],
    smoke: float,
    cpu: tuple[float, float] | None = None,
) -> list[Row]:
    """One row by time, one by CPU, which has the same targets unless `cpu` says others."""
    rows = []
    for i, (label, (floor, goal)) in enumerate((("", targets), (" CPU", cpu or targets))):
        mine, theirs = ([s[i] * 1000 / calls for s in got[n]] for n in (ours, peer))
        rows.append(Row.less_is_better(metric + label, "ms", mine, theirs, peer, (round(floor * smoke, 3), goal)))
    return rows


if __name__ == "__main__":
    sys.exit(main())
