"""`make bench-online SIZE=small|full`: predictflow serve and our online store beside feast serve, feast listen and the SDK.

Both sides read the same hashes of one private Redis, written by stock Feast, from the same registry, with as many
workers. Answers are compared first; a difference ends the bench with code 2. Then the sides take turns under the load
generator (`loadgen.py`): closed loops of 1, 8 and 32 callers, and open loops: both at half of stock's throughput, and each
at half of its own, where ours has many times the load.
"""

from __future__ import annotations

import argparse
import base64
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from benchmarks import online_data as data
from benchmarks.harness import Row, measure, report
from benchmarks.loadgen import Job, Result
from benchmarks.online_data import KEY, MODEL, OURS, SHAPES, STOCK

ROOT = Path(__file__).parents[1]
CALLERS = (1, 8, 32)
BUSY = 0.85
"""CPU share of the load generator beyond which a figure says more of it than of the server."""
PREDICT_LIMIT_MS = 50.0

REST = {"1x10": ((12, 20), (4, 8)), "1x50": ((10, 16), (4, 8)), "100x50": ((10, 16), (5, 8))}
GRPC = {"1x10": ((2.5, 3.5), (1, 2.5)), "1x50": ((2.5, 3.5), (1, 2.5)), "100x50": ((8, 10), (4, 8))}
SDK = {"1x10": (4, 10), "1x50": (4, 6), "100x50": (4, 6)}
"""(floor, goal) of throughput and of p99 by shape; for the SDK, of p50."""


@dataclass(frozen=True)
class Size:
    keys: int
    seconds: float
    rounds: int
    least: int


SIZES = {"small": Size(500, 0.7, 1, 10), "full": Size(5000, 5.0, 3, 60)}


@dataclass(frozen=True)
class Target:
    """One server's way in."""

    side: str
    name: str
    protocol: str
    port: int
    path: str
    pid: int = 0


def main(argv: Sequence[str] | None = None) -> int:
    """0 when every ratio is at or above its floor, 1 when one is below, 2 when answers differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.online", description=__doc__.split("\n")[0])
    parser.add_argument("--size", choices=sorted(SIZES), default="small")
    parser.add_argument("--only", action="append", choices=["rest", "grpc", "sdk", "predict"], help="only these parts")
    parser.add_argument("--shape", action="append", choices=sorted(SHAPES), help="only these shapes")
    parser.add_argument("--workers", type=int, default=1, help="worker processes of both REST servers")
    parser.add_argument("--seconds", type=float, help="seconds per measurement (default: the size's)")
    parser.add_argument("--rounds", type=int, help="turns per measurement (default: the size's)")
    options = parser.parse_args(argv)
    size = SIZES[options.size]
    size = Size(size.keys, options.seconds or size.seconds, options.rounds or size.rounds, size.least)
    parts, shapes = options.only or ["rest", "grpc", "sdk", "predict"], options.shape or list(SHAPES)
    from predictflow.local.watched import Watched

    directory = os.environ.get("PREDICTFLOW_BENCH_DIR")
    with tempfile.TemporaryDirectory(prefix="predictflow-bench-", dir=directory) as place, Watched() as watched:
        bench = Bench(Path(place), watched, size, options.workers)
        bench.prepare("predict" in parts)
        if not bench.same_answers(shapes):
            return 2
        rows: list[Row] = []
        if "rest" in parts:
            rows += bench.serve_rows("REST", bench.rest, REST, data.rest_bodies, shapes)
        if "grpc" in parts:
            rows += bench.serve_rows("gRPC", bench.grpc, GRPC, data.grpc_bodies, shapes)
        if "sdk" in parts:
            rows += bench.sdk_rows(shapes)
        if "predict" in parts:
            rows += bench.predict_rows()
    partial = options.only or options.shape
    return report("online-part" if partial else "online", rows)


class Bench:
    """Private servers, both sides' processes, and the measurements."""

    def __init__(self, root: Path, watched: Any, size: Size, workers: int) -> None:
        self.root, self.watched, self.size, self.workers = root, watched, size, workers
        self.rest: list[Target] = []
        self.grpc: list[Target] = []

    def prepare(self, with_model: bool) -> None:
        """Postgres, Redis, the data, and the three servers, until each answers."""
        from predictflow.local import postgres, redis
        from predictflow.local.ports import free_port
        from predictflow.local.program import Program

        say("starting Postgres, Redis and the servers")
        pg, redis_port = free_port(), free_port()
        postgres.start(self.watched, self.root / "pg", pg, self.root / "pg.log", settings=postgres.FOR_TESTS)
        redis.start(self.watched, self.root / "redis", redis_port, self.root / "redis.log", durable=False)
        server = postgres.url(pg, "postgres")
        urls = []
        for name in ("bench", "mlflow"):
            postgres.create_database(server, name)
            urls.append(f"{server.rpartition('/')[0]}/{name}")
        servers = data.Servers(urls[0], urls[1], redis_port)
        training = None
        if with_model:
            command = [sys.executable, "-m", "benchmarks.online_data", servers.mlflow_url, str(self.root / "artifacts")]
            training = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        data.write_repositories(self.root, servers, (ROOT / "feature_store.yaml").read_text())
        data.apply_and_write(self.root, self.size.keys)
        if training is not None:
            _, log = training.communicate()
            if training.returncode:
                raise RuntimeError(f"no model: {log[-2000:]}")
        ports = [free_port() for _ in range(4)]
        environment = {
            "POSTGRES_URL": servers.postgres_url,
            "REDIS_URL": f"redis://127.0.0.1:{redis_port}/0",
            "MLFLOW_TRACKING_URI": servers.mlflow_url,
            "PREDICTFLOW_OFFLINE": str(self.root / "offline"),
            "PREDICTFLOW_CLOCK": "wall",
            "PREDICTFLOW_REPO": str(self.root / OURS),
            "PREDICTFLOW_HOME": str(self.root / "home"),
            "FEAST_USAGE": "False",
        }
        os.environ.update(environment)  # our feature_store.yaml names them, for the SDK too
        feast = [str(Path(sys.executable).parent / "feast"), "-c", str(self.root / STOCK)]
        # As docs/how-to-guides/online-server-performance-tuning.md of Feast advises; and no restarts, which cost it more.
        serve = [
            *feast,
            "serve",
            "--port",
            str(ports[0]),
            "--workers",
            str(self.workers),
            "--worker-connections",
            "2000",
        ]
        serve += ["--max-requests", "100000000", "--max-requests-jitter", "0", "--registry_ttl_sec", "300"]
        listen = [*feast, "listen", "--address", f"127.0.0.1:{ports[1]}", "--registry_ttl_sec", "300"]
        ours = [sys.executable, "-m", "predictflow.cli", "serve", "--no-served-log", "--workers", str(self.workers)]
        ours += ["--port", str(ports[2]), "--grpc-port", str(ports[3])]
        ours += ["--model", MODEL] if with_model else ["--no-model"]
        pids = []
        for name, argv, ready in (
            ("feast-serve", [*serve, "--no-access-log"], lambda: answers(ports[0], "/health")),
            ("feast-listen", listen, lambda: listens(ports[1])),
            ("predictflow-serve", ours, lambda: answers(ports[2], "/readyz")),
        ):
            log = self.root / f"{name}.log"
            pids.append(self.watched.start(Program(name, argv, log, env=environment, ready=ready, timeout=180)))
        self.rest = [
            Target(STOCK, "feast serve", "http", ports[0], "/get-online-features", pids[0]),
            Target(OURS, "ours", "http", ports[2], "/api/v1/features/online", pids[2]),
        ]
        compatible = Target(OURS, "ours, Feast's route", "http", ports[2], "/get-online-features", pids[2])
        if post(compatible, data.rest_bodies("1x10", 1)[0])[0] == 200:
            self.rest.append(compatible)
        self.grpc = [
            Target(STOCK, "feast listen", "grpc", ports[1], "/GrpcFeatureServer/GetOnlineFeatures", pids[1]),
            Target(OURS, "ours", "grpc", ports[3], "/GrpcFeatureServer/GetOnlineFeatures", pids[2]),
        ]

    def same_answers(self, shapes: Sequence[str]) -> bool:
        """Whether every server gives the same values, statuses and times, for some requests of each shape."""
        good = True
        for shape in shapes:
            for body in data.rest_bodies(shape, self.size.keys)[:5]:
                want = rest_answer(self.rest[0], body)
                for target in self.rest[1:]:
                    good &= same(f"REST {shape}, {target.name}", want, rest_answer(target, body))
            for body in data.grpc_bodies(shape, self.size.keys)[:5]:
                want = grpc_answer(self.grpc[0], body)
                good &= same(f"gRPC {shape}", want, grpc_answer(self.grpc[1], body))
        say("answers are equal" if good else "answers differ: no speed is reported")
        return good

    def serve_rows(
        self, what: str, targets: Sequence[Target], goals: Any, bodies: Any, shapes: Sequence[str]
    ) -> list[Row]:
        rows = []
        stock = targets[0]
        for shape in shapes:
            (through, tail), sent = goals[shape], bodies(shape, self.size.keys)
            speed: dict[Target, list[float]] = {}
            for callers in CALLERS:
                found: dict[Target, list[Result]] = {t: [] for t in targets}
                for _ in range(self.size.rounds):
                    for target in targets:
                        found[target].append(self.load(target, sent, callers=callers))
                        show(f"{what} {shape} c={callers}", target, found[target][-1])
                rates = {t: [len(r.latencies) / r.seconds for r in found[t]] for t in targets}
                tails = {t: [percentile(r.latencies, 99) * 1000 for r in found[t]] for t in targets}
                costs = {t: [r.server_cpu * 1000 for r in found[t]] for t in targets}
                for ours in targets[1:]:
                    # Of one caller, and of the route that is there for stock clients: not slower than stock.
                    targeted = callers > 1 and not route(ours)
                    floors = (through, tail) if targeted else ((1, through[0]), (1, tail[0]))
                    name = f"{what}{route(ours)} {shape} c={callers}"
                    rows.append(
                        more_is_better(f"{name}: throughput", "rps", rates[ours], rates[stock], stock.name, floors[0])
                    )
                    rows.append(
                        Row.less_is_better(f"{name}: p99", "ms", tails[ours], tails[stock], stock.name, floors[1])
                    )
                    # What a busy machine distorts least; on an idle one it is what bounds the throughput.
                    rows.append(
                        Row.less_is_better(
                            f"{name}: CPU", "ms", costs[ours], costs[stock], stock.name, (1, floors[0][0])
                        )
                    )
                for target in targets:
                    speed.setdefault(target, []).append(statistics.median(rates[target]))
            half = {t: max(speed[t]) / 2 for t in targets}
            opened: dict[tuple[Target, float], list[float]] = {}
            for _ in range(self.size.rounds):
                for target in targets:
                    for rate in sorted({half[stock], half[target]}):
                        result = self.load(target, sent, rate=rate, seconds=2 * self.size.seconds)
                        opened.setdefault((target, rate), []).append(percentile(result.latencies, 99) * 1000)
                        show(f"{what} {shape} at {rate:.0f}/s", target, result)
            for ours in targets[1:]:
                name = f"{what}{route(ours)} {shape} open loop at half of"
                theirs = opened[stock, half[stock]]
                same_rate, own = opened[ours, half[stock]], opened[ours, half[ours]]
                targets_of = (1, tail[0]) if route(ours) else tail
                rows.append(Row.less_is_better(f"{name} stock's: p99", "ms", same_rate, theirs, stock.name, targets_of))
                # At another load: for information.
                rows.append(Row.less_is_better(f"{name} its own: p99", "ms", own, theirs, stock.name, (0.001, 0.001)))
        return rows

    def sdk_rows(self, shapes: Sequence[str]) -> list[Row]:
        rows = []
        for shape in shapes:
            calls = 20 if shape == "100x50" else 200
            case = {"root": str(self.root), "shape": shape, "keys": self.size.keys, "calls": calls}
            runs = max(2, self.size.rounds)
            found = measure("benchmarks.online_data", [STOCK, OURS], case, runs, False, lambda *_: None)
            answers = {side: found[side][0].answer["answer"] for side in found}
            if not same(f"SDK {shape}", answers[STOCK], answers[OURS]):
                raise SystemExit(2)
            halves = {s: [percentile(r.answer["latencies"], 50) * 1000 for r in found[s]] for s in found}
            tails = {s: [percentile(r.answer["latencies"], 99) * 1000 for r in found[s]] for s in found}
            for side in (STOCK, OURS):
                say(f"  SDK {shape:8} {side:12} p50 {halves[side][0]:8.2f} ms  p99 {tails[side][0]:8.2f} ms")
            name = "stock SDK"
            rows.append(Row.less_is_better(f"SDK {shape}: p50", "ms", halves[OURS], halves[STOCK], name, SDK[shape]))
        return rows

    def predict_rows(self) -> list[Row]:
        """p99 of predictions at half of the throughput of 8 callers, against a fixed limit: Feast has no peer for it."""
        target = Target(OURS, "ours", "http", self.rest[1].port, f"/api/v1/predict/{MODEL}", self.rest[1].pid)
        bodies = data.predict_bodies(self.size.keys)
        tails = []
        for _ in range(self.size.rounds):
            full = self.load(target, bodies, callers=8)
            show("predict c=8", target, full)
            rate = len(full.latencies) / full.seconds / 2
            result = self.load(target, bodies, rate=rate, seconds=2 * self.size.seconds)
            show(f"predict at {rate:.0f}/s", target, result)
            tails.append(percentile(result.latencies, 99) * 1000)
        limit = [PREDICT_LIMIT_MS] * len(tails)
        return [Row.less_is_better("predict 1 row, open loop at half load: p99", "ms", tails, limit, "limit", (1, 1))]

    def load(self, target: Target, bodies: list[str], **how: Any) -> Result:
        """One run of the load generator in a process of its own, after a short warm-up of the same kind."""
        how.setdefault("seconds", self.size.seconds)
        job = Job(target.protocol, "127.0.0.1", target.port, target.path, bodies, least=self.size.least, **how)
        warm = Job(target.protocol, "127.0.0.1", target.port, target.path, bodies, how.get("callers", 8), None, 0.2, 2)
        generate(warm)
        before = cpu_seconds(target.pid)
        result = generate(job)
        result.server_cpu = (cpu_seconds(target.pid) - before) / max(1, len(result.latencies))
        if result.errors:
            raise SystemExit(f"{target.name} {target.path}: {result.errors} errors, the first: {result.first_error}")
        return result


def cpu_seconds(pid: int) -> float:
    """CPU that a process and its descendants have used."""
    used, children = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        used[int(stat.parent.name)] = int(fields[11]) + int(fields[12])
        children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    total, todo = 0, [pid]
    while todo:
        at = todo.pop()
        total += used.get(at, 0)
        todo += children.get(at, [])
    return total / os.sysconf("SC_CLK_TCK")


def generate(job: Job) -> Result:
    command = [sys.executable, "-m", "benchmarks.loadgen"]
    done = subprocess.run(command, input=json.dumps(asdict(job)), capture_output=True, text=True, cwd=ROOT, check=False)
    if done.returncode:
        raise RuntimeError(f"the load generator failed:\n{done.stderr[-2000:]}")
    return Result(**json.loads(done.stdout))


def more_is_better(
    metric: str, unit: str, ours: Sequence[float], peer: Sequence[float], peer_name: str, targets: tuple[float, float]
) -> Row:
    mine, theirs = statistics.median(ours), statistics.median(peer)
    samples = {"ours": [round(s, 2) for s in ours], "peer": [round(s, 2) for s in peer]}
    return Row(metric, unit, round(mine, 2), round(theirs, 2), peer_name, round(mine / theirs, 3), *targets, samples)


def percentile(values: Sequence[float], p: float) -> float:
    """The smallest value that p per cent of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * p / 100) - 1)]


def route(target: Target) -> str:
    return ", Feast's route," if target.name != "ours" else ""


def say(text: str) -> None:
    print(text, flush=True)


def show(what: str, target: Target, result: Result) -> None:
    rate = len(result.latencies) / result.seconds
    p50, p99 = (percentile(result.latencies, p) * 1000 for p in (50, 99))
    busy = f"  LOAD GENERATOR BUSY {result.cpu:.0%}" if result.cpu > BUSY else f"  generator {result.cpu:.0%}"
    say(
        f"  {what:24} {target.name:20} {rate:9.0f}/s  p50 {p50:8.2f} ms  p99 {p99:8.2f} ms  CPU {result.server_cpu * 1000:7.3f} ms{busy}"
    )


def post(target: Target, body: str) -> tuple[int, Any]:
    request = urllib.request.Request(
        f"http://127.0.0.1:{target.port}{target.path}",
        base64.b64decode(body),
        {"Content-Type": "application/json"},
    )
    try:
        with urllib.request.urlopen(request, timeout=60) as response:
            return response.status, json.load(response)
    except urllib.error.HTTPError as e:
        return e.code, e.read()


def answers(port: int, path: str) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=2) as response:
            return bool(response.status == 200)
    except OSError:  # it listens before it answers
        return False


def listens(port: int) -> bool:
    import socket

    try:
        with socket.create_connection(("127.0.0.1", port), 0.5):
            return True
    except OSError:
        return False


def rest_answer(target: Target, body: str) -> dict[str, list[Any]]:
    """Values, statuses and times by feature name, whichever of the two shapes the answer has."""
    status, answer = post(target, body)
    if status != 200:
        raise SystemExit(f"{target.name} {target.path} answers {status}: {answer!r}")
    if "results" in answer:
        by_name = dict(zip(answer["metadata"]["feature_names"], answer["results"]))
        return {
            n: [v["values"], v["statuses"], [_seconds(t) for t in v["event_timestamps"]]]
            for n, v in by_name.items()
            if n != KEY
        }
    return {
        name: [
            [row["values"][name] for row in answer["rows"]],
            [row["statuses"][name] for row in answer["rows"]],
            [_seconds(row["event_timestamps"][name]) for row in answer["rows"]],
        ]
        for name in answer["feature_names"]
    }


def _seconds(text: str) -> float:
    from datetime import datetime

    return round(datetime.fromisoformat(text).timestamp(), 3)


def grpc_answer(target: Target, body: str) -> dict[str, Any]:
    import grpc
    from feast.protos.feast.serving.ServingService_pb2 import GetOnlineFeaturesResponse

    with grpc.insecure_channel(f"127.0.0.1:{target.port}") as channel:
        raw = channel.unary_unary(target.path)(base64.b64decode(body), timeout=60, wait_for_ready=True)
    answer = GetOnlineFeaturesResponse.FromString(raw)
    return {n: v.SerializeToString() for n, v in zip(answer.metadata.feature_names.val, answer.results) if n != KEY}


def same(what: str, stock: Any, ours: Any) -> bool:
    if stock == ours:
        return True
    for name in stock:
        if stock[name] != ours.get(name):
            say(f"{what}: {name} differs: stock {str(stock[name])[:300]}, ours {str(ours.get(name))[:300]}")
            break
    else:
        say(f"{what}: other names: stock {sorted(stock)}, ours {sorted(ours)}")
    return False


if __name__ == "__main__":
    began = time.monotonic()
    code = main()
    print(f"{time.monotonic() - began:.0f} s", file=sys.stderr)
    sys.exit(code)
