"""`make bench-stream SIZE=small|full`: `predictflow sync` on a real broker, Redis and disk.

For two definitions (tiles and sessions; the same with an OVER RANGE of 7 days): events per second of the consumer's CPU and
of time, with one process and with two on a topic of two partitions, and bytes of state per entity. Then the time from the
broker's append of an event to its value over REST, at half of the rate that one process keeps up with while producer,
broker, Redis and REST server share the machine with it. What was counted is compared with what was sent first; a
difference ends the bench with code 2.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from benchmarks.harness import Row, report

ROOT = Path(__file__).parents[1]
PARTITIONS = 2
TILES = """
SELECT customer_id, COUNT(*) AS events_1h, SUM(quantity) AS quantity_1h, AVG(amount) AS amount_1h
FROM TABLE(HOP(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' MINUTE, INTERVAL '1' HOUR))
GROUP BY customer_id, window_start, window_end;
SELECT customer_id, COUNT(*) AS events_today, MAX(probe) AS newest_probe
FROM TABLE(TUMBLE(TABLE events, DESCRIPTOR(event_timestamp), INTERVAL '1' DAY))
GROUP BY customer_id, window_start, window_end;
SELECT customer_id, COUNT(*) AS session_events, SUM(quantity) AS session_quantity
FROM TABLE(SESSION(TABLE events PARTITION BY customer_id, DESCRIPTOR(event_timestamp), INTERVAL '30' MINUTES))
GROUP BY customer_id, window_start, window_end
"""
OVER = """;
SELECT customer_id, COUNT(*) OVER w AS events_7d, SUM(quantity) FILTER (WHERE event_type = 'sale') OVER w AS sold_7d
FROM events
WINDOW w AS (PARTITION BY customer_id ORDER BY event_timestamp RANGE BETWEEN INTERVAL '7' DAYS PRECEDING AND CURRENT ROW)
"""
DEFINITIONS = {"tiles_sessions": TILES, "with_over_7d": TILES + OVER}
TARGETS = {"tiles_sessions": (60_000.0, 120_000.0), "with_over_7d": (30_000.0, 80_000.0)}
FRESH_FLOOR_MS, FRESH_GOAL_MS = 500.0, 150.0
PROBE_SECONDS = 0.03
"""Between two probes, whether or not the last one is readable: a late one must not keep the next from being measured."""
READ_SECONDS = 0.02
"""Between two reads, which share the two cores with everything else; what is measured is late by up to that much."""
FEWEST_PROBES = 200
WARM_UP = 20_000
"""Events before the rate is measured that a consumer keeps up with: joining its group is no part of it."""


@dataclass(frozen=True)
class Size:
    events: int
    entities: int
    rounds: int
    fresh_seconds: float
    burst: int
    """Events by which the rate is measured that a consumer keeps up with."""


SIZES = {"small": Size(600_000, 5_000, 1, 15.0, 100_000), "full": Size(1_500_000, 50_000, 2, 30.0, 500_000)}


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every figure is at or above its floor, 1 when one is below, 2 when events were lost or counted twice."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.stream", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--only", action="append", choices=sorted(DEFINITIONS), help="only these definitions")
    parser.add_argument("--no-freshness", action="store_true", help="without the part over REST")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    from predictflow.local.watched import Watched

    directory = os.environ.get("PREDICTFLOW_BENCH_DIR")
    rows: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="predictflow-bench-", dir=directory) as place, Watched() as watched:
        servers = Servers(Path(place), watched)
        for name in options.only or DEFINITIONS:
            try:
                rows += Bench(servers, name, size).rows(not options.no_freshness)
            except WrongCountError as e:
                print(e)
                return 2
    return report("stream-part" if options.only or options.no_freshness else "stream", rows)


class WrongCountError(Exception):
    """Events were lost or counted twice."""


class Servers:
    """Private Postgres, Redis and Kafka."""

    def __init__(self, root: Path, watched: Any) -> None:
        from predictflow.local import kafka, postgres, redis
        from predictflow.local.ports import HOST, free_port

        self.root, self.watched = root, watched
        broker = kafka.installation(watched, say=print)
        pg, redis_port, kafka_port, controller = (free_port() for _ in range(4))
        postgres.start(watched, root / "pg", pg, root / "pg.log", settings=postgres.FOR_TESTS)
        redis.start(watched, root / "redis", redis_port, root / "redis.log", durable=True)
        kafka.start_real(watched, broker, root / "kafka", kafka_port, controller, root / "kafka.log")
        self.postgres = postgres.url(pg, "postgres")
        self.redis, self.kafka = f"redis://{HOST}:{redis_port}", f"{HOST}:{kafka_port}"


class Bench:
    """One definition: a project of its own, its topics and its runs."""

    def __init__(self, servers: Servers, name: str, size: Size) -> None:
        self.servers, self.name, self.size = servers, name, size
        self.runs = 0

    def rows(self, freshness: bool) -> list[Row]:
        """All figures of the definition."""
        cpu: list[float] = []
        rate: list[float] = []
        two: list[float] = []
        state = 0.0
        for _ in range(self.size.rounds):
            project = self.project()
            found = project.drain(1)
            cpu.append(found.events / found.cpu)
            rate.append(found.events / found.seconds)
            state = project.state_bytes()
            project = self.project()
            found = project.drain(2)
            two.append(found.events / found.seconds)
            print(
                f"{self.name}: {cpu[-1]:,.0f} events per CPU-second, {rate[-1]:,.0f} per second; two processes {two[-1]:,.0f} "
                f"per second; {state:,.0f} bytes of state per entity"
            )
        floor, goal = TARGETS[self.name]
        rows = [
            _more(f"{self.name}: events per CPU-second", "1/s", cpu, floor, "floor", (1, goal / floor)),
            # Two processes, a broker and Redis share the machine: what one process reaches is the peer, for information.
            _more(f"{self.name}: events per second", "1/s", rate, statistics.median(rate), "itself", (0.001, 0.001)),
            _more(f"{self.name}: two processes", "1/s", two, statistics.median(rate), "one process", (0.001, 2)),
            _more(f"{self.name}: state per entity", "B", [state], state, "itself", (0.001, 0.001)),
        ]
        if freshness:
            samples = self.project().freshness(self.size.fresh_seconds)
            p50, p99 = percentile(samples, 50), percentile(samples, 99)
            print(
                f"{self.name}: append to readable over REST p50 {p50:.0f} ms, p99 {p99:.0f} ms of {len(samples)} probes"
            )
            limit, goals = [FRESH_FLOOR_MS], (1, FRESH_FLOOR_MS / FRESH_GOAL_MS)
            rows.append(
                Row.less_is_better(f"{self.name}: freshness p99 at half load", "ms", [p99], limit, "limit", goals)
            )
            rows.append(
                Row.less_is_better(
                    f"{self.name}: freshness p50 at half load", "ms", [p50], limit, "limit", (0.001, 0.001)
                )
            )
        return rows

    def project(self) -> Project:
        self.runs += 1
        return Project(self.servers, f"{self.name}_{self.runs}", DEFINITIONS[self.name], self.size)


@dataclass(frozen=True)
class Drained:
    events: int
    seconds: float
    cpu: float


class Project:
    """A Feast project with one windowed view on a topic and a Redis database of its own."""

    databases = 0

    def __init__(self, servers: Servers, name: str, sql: str, size: Size) -> None:
        from feature_store.topic import client_config, ensure_topic
        from predictflow.local import postgres

        Project.databases += 1
        self.servers, self.name, self.size = servers, name, size
        self.topic = f"events-{name.replace('_', '-')}"
        self.repo = servers.root / name
        self.repo.mkdir()
        text = (ROOT / "feature_store.yaml").read_text()
        (self.repo / "feature_store.yaml").write_text(text.replace("project: predictflow\n", f"project: {name}\n"))
        postgres.create_database(servers.postgres, name)
        self.environ = {
            **os.environ,
            "POSTGRES_URL": f"{servers.postgres.rpartition('/')[0]}/{name}",
            "REDIS_URL": f"{servers.redis}/{Project.databases}",
            "KAFKA_BOOTSTRAP_SERVERS": servers.kafka,
            "PREDICTFLOW_OFFLINE": str(self.repo / "offline"),
            "PREDICTFLOW_CLOCK": "wall",
            "PREDICTFLOW_REPO": str(self.repo),
            "PREDICTFLOW_HOME": str(self.repo / "home"),
        }
        os.environ.update(
            {k: self.environ[k] for k in ("POSTGRES_URL", "REDIS_URL", "PREDICTFLOW_OFFLINE", "PREDICTFLOW_CLOCK")}
        )
        self.config = client_config(servers.kafka)
        ensure_topic(self.config, self.topic, partitions=PARTITIONS)
        self._append_time()
        self._apply(sql)

    def _append_time(self) -> None:
        """Messages carry the time at which the broker took them."""
        from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

        entry = ConfigEntry("message.timestamp.type", "LogAppendTime", incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, self.topic, incremental_configs=[entry])
        admin = AdminClient(self.config)
        admin.incremental_alter_configs([resource])[resource].result(30)

    def _apply(self, sql: str) -> None:
        from feast import Entity, FeatureService, FeatureStore, ValueType

        from feature_store.windows.declare import event_source, windowed_feature_view

        customer = Entity(name="customer", join_keys=["customer_id"], value_type=ValueType.STRING)
        source = event_source(
            topic=self.topic,
            columns={"event_type": "string", "quantity": "int64", "amount": "float64", "probe": "int64"},
            allowed_lateness=timedelta(seconds=10),
            retention=timedelta(hours=1),
        )
        view = windowed_feature_view(name="bench", entity=customer, source=source, sql=sql, ttl=timedelta(days=30))
        self.store = FeatureStore(repo_path=str(self.repo))
        self.store.apply([customer, view, FeatureService(name="bench_v1", features=[view])])

    # Throughput

    def drain(self, processes: int) -> Drained:
        """Fills the topic, then consumes it; from when a fifth is done to the end, which start-up is no part of."""
        self.produce(self.size.events)
        with self.consumers(processes) as consumers:
            first = self._wait(consumers, self.size.events // 5)
            last = self._wait(consumers, self.size.events)
        counted = self.counted()
        if counted != self.size.events:
            raise WrongCountError(f"{self.name}: {self.size.events:,} events sent, {counted:,} counted")
        return Drained(last.events - first.events, last.seconds - first.seconds, last.cpu - first.cpu)

    def produce(self, events: int) -> None:
        from confluent_kafka import Producer

        producer = Producer({**self.config, "linger.ms": 20, "queue.buffering.max.messages": 1_000_000})
        for key, value in messages(events, self.size.entities, seed=1):
            while True:
                try:
                    producer.produce(self.topic, key=key, value=value)
                    break
                except BufferError:
                    producer.poll(0.1)
        if producer.flush(120):
            raise SystemExit("the broker did not take all events")

    @contextmanager
    def consumers(self, processes: int) -> Iterator[list[Consumer]]:
        """`predictflow sync`, in processes of their own."""
        from predictflow.local.ports import free_port

        started = [Consumer(self, free_port()) for _ in range(processes)]
        try:
            yield started
        finally:
            for c in started:
                c.process.send_signal(signal.SIGTERM)
            for c in started:
                c.end()

    def _wait(self, consumers: Sequence[Consumer], events: int) -> Drained:
        until = time.monotonic() + 600
        while True:
            done = sum(c.events() for c in consumers)
            found = Drained(done, time.monotonic(), sum(c.cpu() for c in consumers))
            if done >= events:
                return found
            if time.monotonic() > until:
                raise SystemExit(f"{self.name}: only {done:,} of {events:,} events after 600 s")
            time.sleep(0.05)

    def counted(self) -> int:
        """The events that the log holds as counted, each once."""
        import duckdb

        files = str(self.repo / "offline" / "bench" / "stream" / "*.parquet")
        with duckdb.connect() as con:
            found = con.execute(
                "SELECT count(*) FROM (SELECT DISTINCT _partition, _offset FROM read_parquet($f) WHERE _dropped IS NULL)",
                {"f": files},
            ).fetchall()
        return int(found[0][0])

    def state_bytes(self) -> float:
        """The mean size of an entity's state in Redis."""
        import redis

        from feature_store.redis_layout import feature_field
        from feature_store.windows.definition import STATE_FIELD

        field = feature_field("bench", STATE_FIELD)
        with redis.Redis.from_url(self.environ["REDIS_URL"]) as client:
            pipe = client.pipeline(transaction=False)
            for i, key in enumerate(client.scan_iter(count=1000, _type="hash")):
                if i == 2000:
                    break
                pipe.hstrlen(key, field)
            sizes = [n for n in pipe.execute() if n]
        return statistics.fmean(sizes)

    # Freshness

    def freshness(self, seconds: float) -> list[float]:
        """Milliseconds from append to readable of probes sent at a steady pace, under half of the load that is kept up with."""
        with self.consumers(1) as consumers, self.server() as port:
            rate = self._kept_up(consumers[0]) / 2
            before = consumers[0].events()
            load = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "benchmarks.stream_load",
                    self.servers.kafka,
                    self.topic,
                    str(rate),
                    str(self.size.entities),
                ],
                cwd=ROOT,
            )
            try:
                until = time.monotonic() + 60
                while consumers[0].events() < before + rate * 2:
                    if time.monotonic() > until or load.poll() is not None:
                        raise SystemExit("the load did not start")
                    time.sleep(0.1)  # between looks at the consumer's metrics
                found = self._probe(port, seconds)
                print(
                    f"{self.name}: freshness under {rate:,.0f} events per second, {consumers[0].batches():.1f} ms per batch"
                )
                return found
            finally:
                load.terminate()
                load.wait()

    def _kept_up(self, consumer: Consumer) -> float:
        """Events per second from the first to the last of a burst, which a producer sends meanwhile."""
        until = time.monotonic() + 120
        while not consumer.listens():
            if time.monotonic() > until:
                raise SystemExit("sync did not start")
            time.sleep(0.1)  # between looks at the consumer's metrics
        self.produce(WARM_UP)
        self._wait([consumer], WARM_UP)  # its partitions are assigned, and its first batches done
        began = time.monotonic()
        self.produce(self.size.burst)
        return self.size.burst / (self._wait([consumer], WARM_UP + self.size.burst).seconds - began)

    def _probe(self, port: int, seconds: float) -> list[float]:
        """A thread sends numbered events; here the greatest number is read: all up to it are readable by then."""
        from confluent_kafka import Producer

        producer = Producer({**self.config, "linger.ms": 0})
        rng, over = random.Random(5), threading.Event()
        appended: dict[int, int] = {}  # number -> the broker's time of its append, milliseconds
        sent = 0

        def send() -> None:
            nonlocal sent
            until = time.monotonic() + seconds
            while (time.monotonic() < until or sent < FEWEST_PROBES) and not over.is_set():
                number = sent + 1

                def taken(_: Any, m: Any, number: int = number) -> None:
                    appended[number] = m.timestamp()[1]

                value = event("probe", datetime.now(UTC), rng, number)
                producer.produce(self.topic, key=b"probe", value=value, on_delivery=taken)
                sent = number
                producer.poll(0)
                time.sleep(PROBE_SECONDS * rng.uniform(0.5, 1.5))  # not in step with the batches
            producer.flush(30)

        body = json.dumps({"features": ["bench:newest_probe"], "entities": {"customer_id": ["probe"]}}).encode()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        sender = threading.Thread(target=send)
        sender.start()
        readable: dict[int, float] = {}
        until = time.monotonic() + seconds + 120
        try:
            while sender.is_alive() or len(readable) < sent:
                if time.monotonic() > until:
                    raise SystemExit(f"{self.name}: of {sent} probes {len(readable)} are readable")
                connection.request("POST", "/api/v1/features/online", body, {"Content-Type": "application/json"})
                newest = json.load(connection.getresponse())["rows"][0]["values"]["newest_probe"] or 0
                at = time.time() * 1000
                for number in range(len(readable) + 1, newest + 1):
                    readable[number] = at
                time.sleep(READ_SECONDS)  # more reads would be load of their own
        finally:
            over.set()
            sender.join()
            connection.close()
        return [max(0.0, at - appended[number]) for number, at in readable.items()]

    @contextmanager
    def server(self) -> Iterator[int]:
        """`predictflow serve` of this project."""
        from predictflow.local.ports import free_port
        from predictflow.local.program import Program

        port, grpc = free_port(), free_port()

        def ready() -> bool:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{port}/readyz", timeout=2) as answer:
                    return bool(answer.status == 200)
            except OSError:  # it listens before it is ready
                return False

        argv = [sys.executable, "-m", "predictflow.cli", "serve", "--no-model", "--no-served-log"]
        argv += ["--port", str(port), "--grpc-port", str(grpc)]
        self.servers.watched.start(
            Program(f"serve-{self.name}", argv, self.repo / "serve.log", env=self.environ, ready=ready, timeout=120)
        )
        yield port


class Consumer:
    """One `predictflow sync`, seen through its metrics and the system's count of its CPU."""

    def __init__(self, project: Project, port: int) -> None:
        self._port = port
        self._log = (project.repo / f"sync-{port}.log").open("w+")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "predictflow.cli", "sync", "--metrics-port", str(port)],
            cwd=ROOT,
            env=project.environ,
            stdout=self._log,
            stderr=self._log,
        )

    def events(self) -> int:
        """Events applied so far; 0 before it listens."""
        found = (
            x for x in self._metrics() if x.startswith("predictflow_sync_events_total") and 'outcome="applied"' in x
        )
        return sum(int(float(x.rpartition(" ")[2])) for x in found)

    def listens(self) -> bool:
        """Whether it tells its metrics."""
        return bool(self._metrics())

    def batches(self) -> float:
        """Mean milliseconds of a batch so far."""
        name = "predictflow_sync_batch_seconds_"
        found = {x.partition(" ")[0]: float(x.rpartition(" ")[2]) for x in self._metrics() if x.startswith(name)}
        return 1000 * found[name + "sum"] / max(1.0, found[name + "count"])

    def _metrics(self) -> list[str]:
        """The lines of its metrics; none before it listens."""
        if self.process.poll() is not None:
            self._log.seek(0)
            raise SystemExit(f"sync ended with code {self.process.returncode}:\n{self._log.read()[-3000:]}")
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self._port}/metrics", timeout=10) as answer:
                return list(answer.read().decode().splitlines())
        except OSError:
            return []

    def cpu(self) -> float:
        """CPU seconds that it has used."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def end(self) -> None:
        """Waits for its end, which must be a clean one."""
        code = self.process.wait(60)
        self._log.seek(0)
        log = self._log.read()
        self._log.close()
        if code:
            raise SystemExit(f"sync ended with code {code}:\n{log[-3000:]}")


def messages(events: int, entities: int, seed: int) -> Iterator[tuple[bytes, bytes]]:
    """Keys and values: a few customers have many events; times are of the last hour, some seconds out of order."""
    rng = random.Random(seed)
    start = datetime.now(UTC) - timedelta(hours=1)
    for i in range(events):
        customer = f"C{int(entities * rng.random() ** 2)}"
        at = start + timedelta(hours=i / events) - timedelta(seconds=rng.random() * 5)
        yield customer.encode(), event(customer, at, rng, 0)


def event(customer: str, at: datetime, rng: random.Random, probe: int) -> bytes:
    """A message's value."""
    return json.dumps(
        {
            "customer_id": customer,
            "event_timestamp": at.strftime("%Y-%m-%dT%H:%M:%S.%fZ"),
            "event_type": "sale" if rng.random() < 0.3 else "view",
            "quantity": rng.randrange(10),
            "amount": round(rng.random() * 100, 2),
            "probe": probe,
        }
    ).encode()


def percentile(samples: Sequence[float], p: float) -> float:
    """The p-th percentile, by rank."""
    ordered = sorted(samples)
    return ordered[min(len(ordered) - 1, int(len(ordered) * p / 100))]


def _more(
    metric: str, unit: str, ours: Sequence[float], peer: float, peer_name: str, targets: tuple[float, float]
) -> Row:
    mine = statistics.median(ours)
    samples = {"ours": [round(s, 1) for s in ours], "peer": [round(peer, 1)]}
    return Row(metric, unit, round(mine, 1), round(peer, 1), peer_name, round(mine / peer, 3), *targets, samples)


if __name__ == "__main__":
    raise SystemExit(main())
