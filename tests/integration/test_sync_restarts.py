"""kill -9 of Redis and of the Kafka broker while `predictflow sync` runs and events flow: nothing lost, nothing twice.

Servers of the test's own, on the data they had. What must be true in the end: `stream_proof.py`.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import pytest
import redis as client
from stream_proof import Flow, check_all, finish, logged, project_of_two_views
from stream_support import wait_until

from predictflow.local import kafka, redis
from predictflow.local.ports import HOST, free_port
from predictflow.local.watched import Watched

pytestmark = [pytest.mark.kafka, pytest.mark.long]


class Servers:
    """A Redis and a broker that can be killed and started again."""

    def __init__(self, root: Path, watched: Watched) -> None:
        self.root, self.watched = root, watched
        self.redis_port, self.kafka_port, self.controller_port = free_port(), free_port(), free_port()
        self.broker = kafka.installation(watched, say=print)
        self.start_redis()
        self.start_kafka()

    def start_redis(self) -> None:
        redis.start(self.watched, self.root / "redis", self.redis_port, self.root / "redis.log")

    def start_kafka(self) -> None:
        place, log = self.root / "kafka", self.root / "kafka.log"
        kafka.start_real(self.watched, self.broker, place, self.kafka_port, self.controller_port, log)

    def kill_redis(self) -> None:
        with client.Redis(port=self.redis_port) as connection:
            os.kill(int(connection.info("server")["process_id"]), signal.SIGKILL)

    def kill_kafka(self) -> None:
        (broker,) = [int(p.parent.name) for p in Path("/proc").glob("[0-9]*/cmdline") if self._runs_broker(p)]
        os.kill(broker, signal.SIGKILL)

    def _runs_broker(self, cmdline: Path) -> bool:
        try:
            program, *arguments = cmdline.read_text().rstrip("\0").split("\0")
        except OSError:  # it ended meanwhile
            return False
        return Path(program).name == "java" and str(self.root / "kafka" / "server.properties") in arguments


def test_killed_servers_come_back_and_every_event_counts_once(
    tmp_path, postgres_url, kafka_bootstrap, topic_prefix, monkeypatch
):
    """`kafka_bootstrap`: that a real broker can run here."""
    rng = random.Random(1)
    with Watched() as watched:
        servers = Servers(tmp_path / "servers", watched)
        address, topic = f"redis://{HOST}:{servers.redis_port}/0", f"{topic_prefix}customer-events"
        project = project_of_two_views(
            tmp_path, postgres_url, address, f"{HOST}:{servers.kafka_port}", topic, monkeypatch
        )
        said = tmp_path / "sync.log"
        with said.open("w") as log:
            consumer = project.start("sync", "--max-batch", "60", errors=log)
        try:
            with Flow(project, 1) as flow:
                for kill, start in (
                    (servers.kill_redis, servers.start_redis),
                    (servers.kill_kafka, servers.start_kafka),
                    (servers.kill_redis, servers.start_redis),
                ):
                    before = logged(project)
                    wait_until(lambda before=before: logged(project) > before, 120)
                    time.sleep(rng.uniform(0, 0.5))  # anywhere in a batch
                    kill()
                    time.sleep(rng.uniform(0.2, 1.5))  # it stays away for a while
                    start()
            assert consumer.poll() is None, said.read_text()
            finish(project, consumer, len(flow.events))
            check_all(project, flow.events)
            assert len(said.read_text()) < 20_000, "a server that is away is told now and then"
        finally:
            consumer.kill()
            consumer.communicate()
