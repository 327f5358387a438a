"""`make soak-online MINUTES=30`: mixed load on predictflow serve while Redis restarts five times.

Passes when no value was ever wrong, nobody was refused for any other reason than Redis being away, reads came back after every
restart, no worker died or is stuck, and memory is flat. Every row that is written says which write it is of, in every
feature, so a torn, stale or foreign row shows at once. Exit code 1 with what went wrong.
"""

from __future__ import annotations

import argparse
import os
import random
import re
import signal
import statistics
import sys
import tempfile
import threading
import time
import urllib.request
from collections import Counter
from collections.abc import Callable, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from feature_store.errors import PredictFlowError, UnavailableError, UsageError

ROOT = Path(__file__).parents[1]
KEYS = 300
RESTARTS = 5
DOWN_SECONDS = 2.0
RECOVERY_SECONDS = 30.0
WORKERS = 2
GROWTH = 1.10
GROWTH_MB = 15.0
"""How much a process's memory may grow from the second fifth of the run to the last."""


class Soak:
    """The servers of a run, what was written, and what went wrong."""

    def __init__(self, home: Path, watched: Any) -> None:
        self.home, self.watched = home, watched
        self.lock = threading.Lock()
        self.written = [0] * KEYS
        self.counts: Counter[str] = Counter()
        self.faults: list[str] = []
        self.last_good = time.monotonic()
        self.redis_away = threading.Event()
        self.stop = threading.Event()

    def prepare(self) -> None:
        """Postgres, a durable Redis, one view, and the server."""
        from predictflow.local import postgres
        from predictflow.local.ports import HOST, free_port
        from predictflow.local.program import Program

        pg, self.redis_port, self.rest, self.grpc = (free_port() for _ in range(4))
        postgres.start(self.watched, self.home / "pg", pg, self.home / "pg.log", settings=postgres.FOR_TESTS)
        self.start_redis()
        repository = self.home / "repo"
        repository.mkdir()
        (repository / "feature_store.yaml").write_text((ROOT / "feature_store.yaml").read_text())
        environment = {
            "POSTGRES_URL": postgres.url(pg, "postgres"),
            "REDIS_URL": f"redis://{HOST}:{self.redis_port}/0",
            "PREDICTFLOW_OFFLINE": str(self.home / "offline"),
            "PREDICTFLOW_CLOCK": "wall",
            "PREDICTFLOW_REPO": str(repository),
            "PREDICTFLOW_HOME": str(self.home / "state"),
        }
        os.environ.update(environment)
        self._apply(repository)
        argv = [sys.executable, "-m", "predictflow.cli", "serve", "--no-model", "--no-served-log"]
        argv += ["--workers", str(WORKERS), "--port", str(self.rest), "--grpc-port", str(self.grpc)]
        log = self.home / "serve.log"
        guard = self.watched.start(Program("serve", argv, log, env=environment, ready=self.ready, timeout=180))
        self.workers = self._descendants(guard)

    def start_redis(self) -> None:
        import redis as client

        from predictflow.local import redis

        redis.start(self.watched, self.home / "redis", self.redis_port, self.home / "redis.log", durable=True)
        with client.Redis(port=self.redis_port) as connection:
            self.redis_pid = int(connection.info("server")["process_id"])

    def _apply(self, repository: Path) -> None:
        from feast import Entity, FeatureService, FeatureStore, FeatureView, Field, FileSource, ValueType
        from feast.types import Float64, Int64, String

        source = FileSource(
            name="soak_source",
            path=str(self.home / "soak.parquet"),
            timestamp_field="event_timestamp",
            created_timestamp_column="created",
        )
        key = Entity(name="soak_key", join_keys=["key"], value_type=ValueType.INT64)
        schema = [Field(name="n", dtype=Int64), Field(name="text", dtype=String), Field(name="half", dtype=Float64)]
        view = FeatureView(name="soak", entities=[key], ttl=timedelta(days=1), schema=schema, source=source)
        FeatureStore(repo_path=str(repository)).apply([key, view, FeatureService(name="soak_v1", features=[view])])

    def ready(self) -> bool:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.rest}/readyz", timeout=2) as answer:
                return bool(answer.status == 200)
        except OSError:  # it listens before it is ready
            return False

    def fault(self, text: str) -> None:
        with self.lock:
            self.faults.append(text)

    # Load. Each runs in a thread of its own until `stop`.
    def read(self, client: Any, seed: int) -> None:
        rng = random.Random(seed)
        name = type(client._transport).__name__
        while not self.stop.is_set():
            keys = [rng.randrange(KEYS) for _ in range(rng.choice((1, 1, 1, 20)))]
            with self.lock:
                least = [self.written[k] for k in keys]
            try:
                answer = client.get_online_features({"key": keys}, feature_service="soak_v1")
            except UnavailableError as e:
                self._away(f"{name} read", e)
                continue
            except PredictFlowError as e:
                self.fault(f"{name} read: {e.format_message()}")
                continue
            self.last_good = time.monotonic()
            self.counts[f"{name} rows read"] += len(keys)
            for key, n_before, row in zip(keys, least, answer.rows):
                self._judge(name, key, n_before, row.values)
            time.sleep(0.002)  # a mixed load, not the most that one reader can ask

    def _judge(self, name: str, key: int, least: int, values: dict[str, Any]) -> None:
        n = values["n"]
        if n is None:
            if least:
                self.fault(f"{name}: key {key} is gone, write {least} was acknowledged")
        elif n < least:
            self.fault(f"{name}: key {key} reads write {n}, {least} was acknowledged before")
        elif (values["text"], values["half"]) != (f"{key}:{n}", n / 2):
            self.fault(f"{name}: key {key} is torn or foreign: {values}")

    def write(self, client: Any) -> None:
        began = datetime.now(UTC) - timedelta(hours=1)
        n = 0
        while not self.stop.is_set():
            n += 1
            key = n % KEYS
            event = began + timedelta(microseconds=n)
            row = {"key": [key], "n": [n], "text": [f"{key}:{n}"], "half": [n / 2]}
            times = {"event_timestamp": [event], "created": [event]}
            try:
                client.push({**row, **times}, feature_view="soak", to="online")
            except UnavailableError as e:
                self._away("write", e)
                continue  # it may have been written or not: a later write settles it
            except PredictFlowError as e:
                if not self.redis_away.is_set():
                    self.fault(f"write: {e.format_message()}")
                self.counts["writes refused while Redis was away"] += 1
                continue
            with self.lock:
                self.written[key] = n
            self.counts["writes"] += 1
            time.sleep(0.005)  # writes are the smaller part of the mix

    def nonsense(self) -> None:
        """What no server should mind: broken bodies, unknown names, frames cut short."""
        import socket

        rng = random.Random(9)
        while not self.stop.is_set():
            for port in (self.rest, self.grpc):
                try:
                    with socket.create_connection(("127.0.0.1", port), 5) as raw:
                        raw.sendall(rng.randbytes(rng.randrange(300)))
                except OSError:
                    self.counts["nonsense cut off"] += 1
            from serving.client import FeatureClient

            for url in (f"http://127.0.0.1:{self.rest}", f"grpc://127.0.0.1:{self.grpc}"):
                with FeatureClient(url, retries=0) as client:
                    try:
                        client.get_online_features({"no": [1]}, feature_service="soak_v1")
                        self.fault(f"{url}: an unknown join key was answered")
                    except UsageError:
                        self.counts["nonsense refused"] += 1
                    except UnavailableError as e:
                        self._away("nonsense", e)
            time.sleep(0.2)  # nonsense now and then

    def _away(self, what: str, error: PredictFlowError) -> None:
        self.counts[f"{what}: unavailable"] += 1
        if not self.redis_away.is_set():
            self.fault(f"{what} with Redis there: {error.format_message()}")
        time.sleep(0.05)  # as a client that backs off

    def restart_redis(self) -> None:
        """Ends Redis as an operator would (it syncs its log), leaves it away for a while, and waits for reads to be back."""
        self.redis_away.set()
        os.kill(self.redis_pid, signal.SIGTERM)
        time.sleep(DOWN_SECONDS)  # how long it is away
        self.start_redis()
        there = time.monotonic()
        while self.last_good < there:
            if time.monotonic() - there > RECOVERY_SECONDS:
                self.fault(f"no read for {RECOVERY_SECONDS:.0f} s after Redis came back")
                break
            time.sleep(0.05)
        time.sleep(2.0)  # connections of the other workers
        self.redis_away.clear()
        self.counts["restarts"] += 1

    # What is looked at from outside.
    def memory_mb(self) -> dict[int, float]:
        return {pid: _resident_mb(pid) for pid in self.workers}

    @staticmethod
    def _descendants(pid: int) -> list[int]:
        """The processes that serve: those below `pid` with Redis's client in them are all of the server's."""
        children: dict[int, list[int]] = {}
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                parent = int(stat.read_text().rpartition(")")[2].split()[1])
            except OSError:  # it has just ended
                continue
            children.setdefault(parent, []).append(int(stat.parent.name))
        found, todo = [], [pid]
        while todo:
            below = children.get(todo.pop(), [])
            found += below
            todo += below
        return found

    def finish(self, samples: Sequence[dict[int, float]]) -> None:
        """Stuck workers, dead workers, memory."""
        for pid in self.workers:
            if not Path(f"/proc/{pid}").exists():
                self.fault(f"process {pid} of the server has died")
        for _ in range(8 * WORKERS):  # a connection each, so every worker gets some
            if not self.ready():
                self.fault("a worker does not answer after the load")
                break
        with urllib.request.urlopen(f"http://127.0.0.1:{self.rest}/metrics", timeout=10) as answer:
            found = re.search(r"^predictflow_requests_in_flight(?:\{\})? (\S+)", answer.read().decode(), re.M)
        if found is None or float(found[1]) > 1:  # the one that asks
            self.fault(f"requests are stuck: in flight {found and found[1]}")
        fifth = max(1, len(samples) // 5)
        for pid in self.workers:
            early = statistics.median(s.get(pid, 0.0) for s in samples[fifth : 2 * fifth] or samples)
            late = statistics.median(s.get(pid, 0.0) for s in samples[-fifth:])
            print(f"process {pid}: {early:.0f} MB early, {late:.0f} MB late", flush=True)
            if late > early * GROWTH + GROWTH_MB:
                self.fault(f"process {pid} grew from {early:.0f} to {late:.0f} MB")


def _resident_mb(pid: int) -> float:
    try:
        text = Path(f"/proc/{pid}/status").read_text()
    except OSError:  # it has died: told at the end
        return 0.0
    found = re.search(r"VmRSS:\s+(\d+)", text)
    return int(found[1]) / 1024 if found else 0.0


def main(argv: Sequence[str] | None = None) -> int:
    """0 when nothing went wrong."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.soak", description=__doc__.split("\n")[0])
    parser.add_argument("--minutes", type=float, default=30.0)
    options = parser.parse_args(argv)
    from predictflow.local.watched import Watched
    from serving.client import FeatureClient

    with tempfile.TemporaryDirectory(prefix="predictflow-soak-") as place, Watched() as watched:
        soak = Soak(Path(place), watched)
        soak.prepare()
        rest, grpc = f"http://127.0.0.1:{soak.rest}", f"grpc://127.0.0.1:{soak.grpc}"
        work: list[tuple[Callable[..., None], tuple[Any, ...]]] = [
            *((soak.read, (FeatureClient(rest, retries=0, timeout=20), i)) for i in range(2)),
            *((soak.read, (FeatureClient(grpc, retries=0, timeout=20), 10 + i)) for i in range(2)),
            (soak.write, (FeatureClient(grpc, retries=0, timeout=20),)),
            (soak.nonsense, ()),
        ]
        threads = [threading.Thread(target=_guarded, args=(soak, target, args)) for target, args in work]
        for thread in threads:
            thread.start()
        seconds = options.minutes * 60
        began = time.monotonic()
        due = [began + seconds * (i + 1) / (RESTARTS + 1) for i in range(RESTARTS)]
        samples = []
        while time.monotonic() - began < seconds and len(soak.faults) < 20:
            if due and time.monotonic() >= due[0]:
                due.pop(0)
                soak.restart_redis()
                print(f"{time.monotonic() - began:6.0f} s: Redis restarted; {dict(soak.counts)}", flush=True)
            samples.append(soak.memory_mb())
            time.sleep(1.0)  # between samples of memory
        soak.stop.set()
        for thread in threads:
            thread.join(60)
            if thread.is_alive():
                soak.fault("a caller is stuck")
        soak.finish(samples)
        print(dict(soak.counts))
        for fault in soak.faults[:20]:
            print(f"FAULT {fault}")
        print(f"{'FAILED' if soak.faults else 'passed'}: {len(soak.faults)} faults in {options.minutes:g} minutes")
        return int(bool(soak.faults))


def _guarded(soak: Soak, target: Callable[..., None], args: tuple[Any, ...]) -> None:
    try:
        target(*args)
    except Exception as e:  # a caller that dies must fail the run, not end quietly
        soak.fault(f"{target.__name__} died: {type(e).__name__}: {e}")
        raise


if __name__ == "__main__":
    sys.exit(main())
