"""A private Kafka: a real single-node KRaft broker run from jars, else librdkafka's mock cluster, plainly announced.

Real needs Java 17 and either KAFKA_HOME or the cached jars (`kafka_jars.py`). The mock keeps nothing on disk, caps a
partition at 5 MiB or 100,000 messages and has no admin calls: it is for the tutorial only.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import subprocess
import sys
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from feature_store.errors import UnavailableError
from predictflow.local import kafka_archive, kafka_jars, kafka_mock
from predictflow.local.kafka_jars import NoRealKafka
from predictflow.local.ports import HOST, answers
from predictflow.local.program import Launcher, Program

KafkaMode = Literal["real", "external", "mock"]
MOCK_NOTICE = "mock: not durable, for the tutorial only"
JAVA_AT_LEAST = 17
HERE = Path(__file__).parent
# Started often and small: quick class loading and the first compiler tier matter more than peak throughput.
JVM_OPTIONS = ("-Xms64m", "-Xmx512m", "-XX:+UseSerialGC", "-XX:TieredStopAtLevel=1", "-Xshare:auto")


@dataclass(frozen=True)
class Installation:
    """A broker that can be run: the java binary and the class path with its jars."""

    java: str
    class_path: str
    archive_option: str | None = None

    def command(self, main_class: str, *arguments: str, archive: bool = False) -> list[str]:
        options = [*JVM_OPTIONS, f"-Dlog4j2.configurationFile={HERE / 'log4j2.properties'}"]
        if archive and self.archive_option is not None:
            options.append(self.archive_option)
        return [self.java, *options, "-cp", self.class_path, main_class, *arguments]


def installation(launcher: Launcher, say: Callable[[str], None]) -> Installation:
    """Find a broker to run, fetching its jars on first use. Raises `NoRealKafka` with the reason when there is none."""
    java, java_version = _java()
    if kafka_home := os.environ.get("KAFKA_HOME"):
        libs = Path(kafka_home) / "libs"
        if not any(libs.glob("kafka_2*.jar")):
            raise UnavailableError(
                "KAFKA_HOME has no libs/kafka_2*.jar", value=kafka_home, next_step="point it at a Kafka, or unset it"
            )
        return Installation(java, str(libs / "*"))
    class_path = kafka_jars.class_path(launcher, say)
    archive = kafka_archive.option(java, java_version, class_path, kafka_jars.cache_directory())
    return Installation(java, class_path, archive)


def start_real(
    launcher: Launcher, broker: Installation, directory: Path, port: int, controller_port: int, log: Path
) -> None:
    """Start a broker on 127.0.0.1:port with its data in `directory` (formatted on first use); returns when it serves."""
    directory.mkdir(parents=True, exist_ok=True)
    data = directory / "data"
    properties = directory / "server.properties"
    if not (data / "meta.properties").exists():
        _format(launcher, broker, directory, log)
    properties.write_text(_properties(data, port, controller_port))
    argv = broker.command("kafka.Kafka", str(properties), archive=True)
    launcher.start(Program("kafka", argv, log, ready=lambda: answers(port) and serves(f"{HOST}:{port}"), timeout=90.0))


def start_mock(launcher: Launcher, directory: Path, log: Path) -> str:
    """Start the mock cluster in a process of its own; its bootstrap servers (the port is librdkafka's choice)."""
    directory.mkdir(parents=True, exist_ok=True)
    address = mock_address(directory)
    address.unlink(missing_ok=True)
    argv = [sys.executable, "-I", kafka_mock.__file__, str(address)]

    def ready() -> bool:
        return address.exists() and serves(address.read_text())

    launcher.start(Program("kafka", argv, log, ready=ready))
    return address.read_text()


def mock_address(directory: Path) -> Path:
    """The file in which a running mock cluster says where it is."""
    return directory / "mock-bootstrap"


def is_mock(argv: Sequence[str]) -> bool:
    """Whether a recorded command line is the mock's."""
    return kafka_mock.__file__ in argv


def serves(bootstrap_servers: str) -> bool:
    """Whether a broker there answers a metadata request within two seconds."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient

    admin = AdminClient({"bootstrap.servers": bootstrap_servers, "log_level": 0, "socket.timeout.ms": 2000})
    try:
        return bool(admin.list_topics(timeout=2).brokers)
    except KafkaException:
        return False


def _java() -> tuple[str, str]:
    """The java binary, and what it says about its version."""
    home = os.environ.get("JAVA_HOME")
    java = str(Path(home) / "bin" / "java") if home else shutil.which("java")
    next_step = f"install Java {JAVA_AT_LEAST} or newer, or set JAVA_HOME or KAFKA_BOOTSTRAP_SERVERS"
    if java is None or not Path(java).exists():
        raise NoRealKafka(
            "no real Kafka: no java " + (f"in JAVA_HOME {home}" if home else "on PATH"), next_step=next_step
        )
    shown = subprocess.run([java, "-version"], capture_output=True, text=True)
    version = re.search(r'version "(\d+)', shown.stderr + shown.stdout)
    if shown.returncode or version is None:
        raise NoRealKafka(f"no real Kafka: {java} -version does not run", next_step=next_step)
    if int(version[1]) < JAVA_AT_LEAST:
        raise NoRealKafka(f"no real Kafka: {java} is Java {version[1]}", next_step=next_step)
    return java, shown.stderr + shown.stdout


def _format(launcher: Launcher, broker: Installation, directory: Path, log: Path) -> None:
    """Format beside the final place, then rename: a killed one leaves nothing that looks like a log directory."""
    temporary = directory / "data.new"
    shutil.rmtree(temporary, ignore_errors=True)
    properties = directory / "format.properties"
    properties.write_text(_properties(temporary, 9092, 9093))
    cluster_id = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=")
    if cluster_id.startswith("-"):  # it would be read as an option
        cluster_id = "A" + cluster_id[1:]
    argv = broker.command("kafka.tools.StorageTool", "format", "-t", cluster_id, "-c", str(properties))
    launcher.run(Program("kafka-format", argv, log))
    temporary.rename(directory / "data")


def _properties(data: Path, port: int, controller_port: int) -> str:
    settings = {
        "process.roles": "broker,controller",
        "node.id": 1,
        "controller.quorum.voters": f"1@{HOST}:{controller_port}",
        "listeners": f"PLAINTEXT://{HOST}:{port},CONTROLLER://{HOST}:{controller_port}",
        "advertised.listeners": f"PLAINTEXT://{HOST}:{port}",
        "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
        "controller.listener.names": "CONTROLLER",
        "log.dirs": data,
        # One node: nothing to replicate to, and few internal partitions to open at start.
        "offsets.topic.replication.factor": 1,
        "offsets.topic.num.partitions": 1,
        "transaction.state.log.replication.factor": 1,
        "transaction.state.log.min.isr": 1,
        "transaction.state.log.num.partitions": 1,
        "share.coordinator.state.topic.replication.factor": 1,
        "share.coordinator.state.topic.min.isr": 1,
        "share.coordinator.state.topic.num.partitions": 1,
        "group.initial.rebalance.delay.ms": 0,
        # Replayed events carry old timestamps: Kafka's seven days would delete them at once, and a consumer group that
        # is picked up again next year must find its offsets.
        "log.retention.ms": -1,
        "offsets.retention.minutes": 2**31 - 1,
        # A laptop's broker: the defaults are for a server (the cleaner alone would take 128 MB of the heap).
        "log.cleaner.dedupe.buffer.size": 4 * 1024 * 1024,
        "num.network.threads": 2,
        "num.io.threads": 4,
    }
    return "".join(f"{key}={value}\n" for key, value in settings.items())
