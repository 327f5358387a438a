"""What every bench shares: one process per contender, measured from inside, and the report that each bench ends with.

A contender runs in a process of its own, so that its peak memory is its own. The bench asks the contenders in turn, one
at a time, and starts over: a slow spell of the machine meets all of them, and only ratios within a run are reported.
"""

from __future__ import annotations

import importlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


@dataclass(frozen=True)
class Row:
    """One line of a report. `ratio` > 1 means that ours is better, whichever way the unit runs."""

    metric: str
    unit: str
    ours: float
    peer: float
    peer_name: str
    ratio: float
    floor: float
    goal: float
    samples: dict[str, list[float]]

    @classmethod
    def less_is_better(
        cls,
        metric: str,
        unit: str,
        ours: Sequence[float],
        peer: Sequence[float],
        peer_name: str,
        targets: tuple[float, float],
    ) -> Row:
        """From the samples of both sides; the figures are medians, `targets` are (floor, goal) of the ratio."""
        mine, theirs = statistics.median(ours), statistics.median(peer)
        samples = {"ours": [round(s, 4) for s in ours], "peer": [round(s, 4) for s in peer]}
        return cls(
            metric, unit, round(mine, 4), round(theirs, 4), peer_name, round(theirs / mine, 3), *targets, samples
        )


def save(name: str, rows: Sequence[Row]) -> None:
    """Writes `results/<name>.json`: a long bench does so after each of its cases."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{name}.json").write_text(json.dumps([asdict(r) for r in rows], indent=1) + "\n")


def report(name: str, rows: Sequence[Row]) -> int:
    """Prints the table, writes `results/<name>.json`, prints the worst row last; 1 when a ratio is below its floor."""
    save(name, rows)
    width = max(len(r.metric) for r in rows)
    peers = max(len(r.peer_name) for r in rows)
    print(
        f"\n{'metric':{width}}  {'ours':>9}  {'peer':>9}  unit  {'peer name':{peers}}  {'ratio':>7}  {'floor':>6}  {'goal':>6}"
    )
    for r in rows:
        mark = "  BELOW FLOOR" if r.ratio < r.floor else ""
        print(
            f"{r.metric:{width}}  {r.ours:9.2f}  {r.peer:9.2f}  {r.unit:4}  {r.peer_name:{peers}}  "
            f"{r.ratio:6.2f}x  {r.floor:5.2f}x  {r.goal:5.2f}x{mark}"
        )
    worst = min(rows, key=lambda r: r.ratio / r.floor)
    print(f"{worst.metric} {worst.ratio} {worst.floor}")
    return int(worst.ratio < worst.floor)


@dataclass(frozen=True)
class Measured:
    """One run of a contender: seconds, seconds of processor time in all threads (which other work on the machine moves
    less), its process's peak resident memory in MB, and what it said of its result."""

    seconds: float
    cpu: float
    peak_mb: float
    answer: dict[str, Any]


class Contender:
    """A process that holds one prepared contender and runs it when asked; a context manager."""

    def __init__(self, module: str, name: str, case: Mapping[str, Any]) -> None:
        self.name = name
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115  # lives as long as the process
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.harness", module, name, json.dumps(case)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            text=True,
            cwd=Path(__file__).parents[1],
        )

    def __enter__(self) -> Contender:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin
        self._process.stdin.close()
        self._process.wait()
        self._log.close()

    def ready(self) -> None:
        """Waits until its imports and preparations are done."""
        self._reply()

    def run(self) -> Measured:
        """One run. RuntimeError with the end of the contender's own log when it failed."""
        assert self._process.stdin
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        reply = self._reply()
        return Measured(reply["seconds"], reply["cpu"], reply["peak_mb"], reply["answer"])

    def _reply(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            self._process.wait()
            self._log.seek(0)
            raise RuntimeError(f"{self.name} ended with code {self._process.returncode}:\n{self._log.read()[-3000:]}")
        reply: dict[str, Any] = json.loads(line)
        return reply


def measure(
    module: str,
    names: Sequence[str],
    case: Mapping[str, Any],
    repeat: int,
    fresh: bool,
    progress: Callable[[str, Measured], None],
) -> dict[str, list[Measured]]:
    """Each contender `repeat` times, in turn. `fresh`: a new process for every run; else one for all, the first run's
    peak memory being the one to read."""
    found: dict[str, list[Measured]] = {name: [] for name in names}

    def once(contender: Contender) -> None:
        found[contender.name].append(contender.run())
        progress(contender.name, found[contender.name][-1])

    if fresh:
        for _ in range(repeat):
            for name in names:
                with Contender(module, name, case) as contender:
                    contender.ready()
                    once(contender)
        return found
    contenders = [Contender(module, name, case) for name in names]
    try:
        for contender in contenders:
            contender.ready()
        for _ in range(repeat):
            for contender in contenders:
                once(contender)
    finally:
        for contender in contenders:
            contender.__exit__()
    return found


def peak_mb() -> float:
    """Peak resident memory of this process so far, in MB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise RuntimeError("/proc/self/status has no VmHWM")


def _serve(module: str, name: str, case: dict[str, Any]) -> None:
    """The contender's side: prepare, then run once per line; the time covers the run alone, not the look at its result."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print must not reach the replies
    run, describe = importlib.import_module(module).prepare(name, case)
    _send(replies, {})
    for _ in sys.stdin:
        began, busy = time.perf_counter(), time.process_time()
        result = run()
        seconds, cpu = time.perf_counter() - began, time.process_time() - busy
        peak = peak_mb()
        answer = describe(result)
        del result
        _send(replies, {"seconds": seconds, "cpu": cpu, "peak_mb": peak, "answer": answer})


def _send(stream: Any, reply: dict[str, Any]) -> None:
    stream.write(json.dumps(reply) + "\n")
    stream.flush()


if __name__ == "__main__":
    _serve(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))
