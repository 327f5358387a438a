"""kill -9 of `predictflow sync` at random moments, one consumer or two, while events flow: nothing lost, nothing twice.

Real processes, a real broker and Redis. What must be true in the end: `stream_proof.py`. A few kills by default; `make prove-stream KILLS=200` for the whole proof.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import time
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from stream_proof import Flow, check_all, finish, logged, project_of_two_views
from stream_support import DAY, T0, wait_until

pytestmark = pytest.mark.kafka
KILLS = int(os.environ.get("PREDICTFLOW_STREAM_KILLS", "4"))
SEED = int(os.environ.get("PREDICTFLOW_STREAM_SEED", "1"))


@pytest.mark.parametrize(
    ("clock", "kills"), [("replay", KILLS // 2), ("wall", KILLS - KILLS // 2)], ids=["replay", "wall"]
)
def test_killed_at_random_moments_every_event_counts_once(
    tmp_path, postgres_url, redis_url, kafka_bootstrap, topic_prefix, monkeypatch, capfd, clock, kills
):
    """By the machine's clock a batch is prepared while the one before is written; by the replay clock one follows the other."""
    start, minute = (
        (T0, timedelta(minutes=1)) if clock == "replay" else (datetime.now(UTC) - 5 * DAY, timedelta(seconds=1))
    )
    topic = f"{topic_prefix}customer-events"
    project = project_of_two_views(
        tmp_path, postgres_url, redis_url, kafka_bootstrap, topic, monkeypatch, clock=clock, start=start
    )
    rng = random.Random(SEED)
    running: list[subprocess.Popen] = []
    moments: Counter[str] = Counter()
    try:
        with Flow(project, SEED, start, minute) as flow:
            for _ in range(kills):
                while len(running) < rng.choice([1, 1, 2]):
                    running.append(project.start("sync", "--max-batch", str(rng.choice([1, 7, 60, 20000]))))
                moment = rng.choice(["starting", "working", "working", "working", "right after a batch"])
                if moment == "starting":
                    time.sleep(rng.uniform(0, 6))
                else:
                    before = logged(project)
                    wait_until(lambda before=before: logged(project) > before, 120)
                    time.sleep(rng.uniform(0, 1.5) if moment == "working" else rng.uniform(0, 0.02))
                victim = running.pop(rng.randrange(len(running)))
                assert victim.poll() is None, victim.communicate()
                victim.send_signal(signal.SIGKILL)
                victim.communicate()
                moments[moment] += 1
        for consumer in running:
            consumer.send_signal(signal.SIGTERM)
            _, errors = consumer.communicate(timeout=120)
            assert consumer.returncode in (0, -signal.SIGTERM), errors
        running = [project.start("sync")]
        flow.send(30)  # else all may have been read before it was there
        finish(project, running[0], len(flow.events))
        running.clear()
    finally:
        for consumer in running:
            consumer.kill()
            consumer.communicate()

    check_all(project, flow.events, start)
    with capfd.disabled():
        print(f"\n{clock} clock: {sum(moments.values())} kills {dict(moments)}, {len(flow.events)} events")  # noqa: T201 - the proof's figures
