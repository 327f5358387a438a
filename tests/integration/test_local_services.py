"""`predictflow up` on real servers: what it starts, keeps, adopts and cleans, whatever kills it."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import psycopg2
import pytest
import redis
from confluent_kafka import Consumer, Producer

from feature_store.errors import UnavailableError
from predictflow.local import kafka, mlflow_database, postgres, processes, services, state
from predictflow.local.ports import HOST, answers
from predictflow.local.program import wait_until
from predictflow.local.watched import Watched

SETTINGS = ("POSTGRES_URL", "REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS", "MLFLOW_TRACKING_URI")
CLEAN = {k: v for k, v in os.environ.items() if k not in SETTINGS and not k.startswith("PREDICTFLOW_")}


def hear_ctrl_c() -> None:
    """A test run that was started in the background of a script ignores Ctrl-C, and its children would inherit that."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def predictflow(home: Path, *arguments: str, **more: str) -> subprocess.Popen[str]:
    """The command line in a process of its own, as a shell in the foreground starts it."""
    return subprocess.Popen(
        [sys.executable, "-m", "predictflow.cli", *arguments],
        env={**CLEAN, "PREDICTFLOW_HOME": str(home), **more},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        preexec_fn=hear_ctrl_c,
    )


def living(home: Path) -> list[str]:
    """Command lines of every process that works below `home`."""
    found = []
    for process in psutil.process_iter():
        try:
            line = " ".join(process.cmdline())
            mine = str(home) in line or (
                process.pid != os.getpid() and process.environ().get("PREDICTFLOW_HOME") == str(home)
            )
            if mine and process.status() != psutil.STATUS_ZOMBIE:
                found.append(line)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def pids(home: Path) -> dict[str, int]:
    return {r.name: r.pid for r in processes.running(home) if r.name != mlflow_database.NAME}


@pytest.fixture
def home(tmp_path: Path) -> Iterator[Path]:
    """A home whose servers are stopped afterwards, whatever happened."""
    yield tmp_path
    services.down(tmp_path)


@pytest.fixture(scope="session")
def real_kafka() -> None:
    """Skips, with the reason, where no real broker can run."""
    try:
        kafka.installation(Watched(), print)
    except kafka.NoRealKafka as error:
        if os.environ.get(services.REQUIRE_REAL_KAFKA) == "1":
            raise
        pytest.skip(error.message)


@pytest.mark.kafka
def test_up_down_up_keeps_ports_and_data(home: Path, real_kafka: None) -> None:
    said: list[str] = []
    first = services.up(home, {}, said.append)
    assert first.kafka_mode == "real"
    assert set(pids(home)) == {"postgres", "redis", "kafka"}
    before = pids(home)
    assert services.up(home, {}, said.append) == first
    assert services.up(home, first.environ(), said.append) == first  # after eval "$(predictflow env)"
    assert pids(home) == before

    connection = postgres.connect(first.postgres_url)
    with connection.cursor() as cursor:
        cursor.execute("CREATE TABLE kept AS SELECT 42 AS answer; CHECKPOINT")
    connection.close()
    cache = redis.Redis.from_url(first.redis_url)
    cache.set("kept", "42")
    assert b"16" in cache.config_get("hash-max-ziplist-entries")["hash-max-ziplist-entries"].encode()
    cache.close()
    producer = Producer({"bootstrap.servers": first.kafka_bootstrap_servers})
    producer.produce("kept", b"42", timestamp=1_300_000_000_000)  # 2011: older than any retention by time
    assert producer.flush(20) == 0

    assert services.down(home)[-3:] == ["kafka", "redis", "postgres"]
    assert living(home) == []
    again = services.up(home, {}, said.append)
    assert again == first
    connection = postgres.connect(again.postgres_url)
    with connection.cursor() as cursor:
        cursor.execute("SELECT answer FROM kept")
        assert cursor.fetchone() == (42,)
    connection.close()
    with redis.Redis.from_url(again.redis_url, decode_responses=True) as cache:
        assert cache.get("kept") == "42"
    consumer = Consumer(
        {"bootstrap.servers": again.kafka_bootstrap_servers, "group.id": "g", "auto.offset.reset": "earliest"}
    )
    consumer.subscribe(["kept"])
    message = consumer.poll(30)
    consumer.close()
    assert message is not None
    assert message.value() == b"42"

    mlflow_database.wait_for_mlflow(home, again.mlflow_tracking_uri)
    assert mlflow_database.is_prepared(home, again.mlflow_tracking_uri)
    services.up(home, {}, said.append)
    assert processes.find(mlflow_database.NAME, home) is None  # not a second time
    services.down(home)
    assert living(home) == []


@pytest.mark.kafka
def test_an_up_killed_anywhere_leaves_nothing_that_down_does_not_stop(home: Path, real_kafka: None) -> None:
    for known in (1, 3):  # as soon as so many servers are recorded, mostly before they are ready
        starter = predictflow(home, "up")
        assert wait_until(lambda: len(pids(home)) >= known or starter.poll() is not None, 60)  # noqa: B023  # called at once, within the round
        starter.kill()
        starter.communicate()
        shown = predictflow(home, "status", "--json")
        listed = {s["pid"] for s in json.loads(shown.communicate()[0])["services"] if s["pid"]}
        assert set(pids(home).values()) <= listed
        if known == 3:  # the next up adopts what runs
            adopted = pids(home)
            up = predictflow(home, "up")
            output, _ = up.communicate()
            assert up.returncode == 0, output
            assert pids(home).items() >= adopted.items()
        down = predictflow(home, "down")
        output, _ = down.communicate()
        assert down.returncode == 0, output
        assert wait_until(lambda: living(home) == [], 20), living(home)


@pytest.mark.kafka
def test_ctrl_c_during_up_stops_what_it_started(home: Path, real_kafka: None) -> None:
    starter = predictflow(home, "up")
    assert wait_until(lambda: "kafka" in pids(home) or starter.poll() is not None, 60)
    starter.send_signal(signal.SIGINT)
    output, _ = starter.communicate(timeout=60)
    assert starter.returncode == 130, output
    assert "Traceback" not in output
    assert living(home) == []


def test_existing_servers_are_used_and_never_stopped(
    home: Path, postgres_url: str, redis_url: str, kafka_bootstrap: str
) -> None:
    given = {"POSTGRES_URL": postgres_url, "REDIS_URL": redis_url, "KAFKA_BOOTSTRAP_SERVERS": kafka_bootstrap}
    found = services.up(home, {**given, "MLFLOW_TRACKING_URI": "http://mlflow.example"}, print)
    assert found.environ().items() >= given.items()
    assert found.kafka_mode == "external"
    assert pids(home) == {}
    assert {line.name: line.state for line in services.status(home)} == dict.fromkeys(state.SERVERS, "running")
    assert services.up(home, found.environ(), print) == found  # after eval "$(predictflow env)" they are still not ours
    assert services.down(home) == []
    postgres.connect(postgres_url).close()


def test_a_busy_port_is_replaced_and_said(home: Path, redis_url: str, kafka_bootstrap: str, postgres_url: str) -> None:
    given = {
        "KAFKA_BOOTSTRAP_SERVERS": kafka_bootstrap,
        "POSTGRES_URL": postgres_url,
        "MLFLOW_TRACKING_URI": "http://m",
    }
    first = services.up(home, given, print)
    services.down(home)
    port = int(first.redis_url.rpartition(":")[2].partition("/")[0])
    said: list[str] = []
    with socket.socket() as other:
        other.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        other.bind((HOST, port))
        other.listen()
        second = services.up(home, given, said.append)
    assert any(f"port {port} is in use" in line for line in said)
    assert second.redis_url != first.redis_url
    assert redis.Redis.from_url(second.redis_url).ping()


def test_a_failed_start_stops_the_others_and_shows_the_log(home: Path, kafka_bootstrap: str) -> None:
    (home / "services" / "redis").mkdir(parents=True)
    (home / "services" / "redis" / "appendonly.aof").write_text("this is no append-only file\n")
    with pytest.raises(UnavailableError, match=r"(?s)redis ended while starting.*redis\.log") as caught:
        services.up(home, {"KAFKA_BOOTSTRAP_SERVERS": kafka_bootstrap}, print)
    assert "append only file" in caught.value.message.lower()
    assert living(home) == []
    assert not state.env_file(home).exists()


def test_without_java_the_mock_is_announced_or_refused(
    home: Path, postgres_url: str, redis_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(home / "empty"))
    monkeypatch.delenv("JAVA_HOME", raising=False)
    monkeypatch.delenv("KAFKA_HOME", raising=False)
    given = {"POSTGRES_URL": postgres_url, "REDIS_URL": redis_url, "MLFLOW_TRACKING_URI": "http://mlflow.example"}
    with pytest.raises(UnavailableError, match=r"no java on PATH.*PREDICTFLOW_REQUIRE_REAL_KAFKA=1"):
        services.up(home, {**given, services.REQUIRE_REAL_KAFKA: "1"}, print)
    said: list[str] = []
    found = services.up(home, given, said.append)
    assert found.kafka_mode == "mock"
    assert any("mock: not durable, for the tutorial only" in line for line in said)
    producer = Producer({"bootstrap.servers": found.kafka_bootstrap_servers})
    producer.produce("t", b"1")
    assert producer.flush(20) == 0
    assert services.up(home, given, said.append) == found
    with pytest.raises(UnavailableError, match="Kafka runs as a mock cluster"):
        services.up(home, {**given, services.REQUIRE_REAL_KAFKA: "1"}, print)


def test_servers_of_a_killed_test_run_die_with_it(tmp_path: Path) -> None:
    """The fixtures' way of starting, in a process that is then killed."""
    code = f"""
import sys, time
from pathlib import Path
from predictflow.local import postgres, redis
from predictflow.local.ports import free_port
from predictflow.local.watched import Watched
home, watched = Path({str(tmp_path)!r}), Watched()
p, r = free_port(), free_port()
postgres.start(watched, home / "postgres", p, home / "postgres.log", settings=postgres.FOR_TESTS)
redis.start(watched, home / "redis", r, home / "redis.log")
(home / "ports").write_text(f"{{p}} {{r}}")
time.sleep(300)
"""
    run = subprocess.Popen([sys.executable, "-c", code])
    ports = tmp_path / "ports"
    try:
        assert wait_until(
            lambda: (ports.exists() and len(ports.read_text().split()) == 2) or run.poll() is not None, 60
        )
        assert all(answers(int(port)) for port in ports.read_text().split())
    finally:
        run.kill()
        run.wait()
    assert wait_until(lambda: living(tmp_path) == [], 20), living(tmp_path)
    assert not any(answers(int(port)) for port in ports.read_text().split())


@pytest.mark.skipif(
    shutil.which("unshare") is None or os.geteuid() != 0, reason="only root needs another way to run Postgres"
)
def test_as_root_without_user_namespaces_postgres_runs_as_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgres, "UNSHARE", ("false",))
    import tempfile

    from predictflow.local.ports import free_port

    with tempfile.TemporaryDirectory() as temporary, Watched() as watched:
        directory, port = Path(temporary), free_port()
        directory.chmod(0o755)
        postgres.start(watched, directory / "postgres", port, directory / "postgres.log", settings=postgres.FOR_TESTS)
        pid = int((directory / "postgres" / "data" / "postmaster.pid").read_text().split()[0])
        assert psutil.Process(pid).username() == "nobody"


def test_postgres_data_of_another_version_is_refused(home: Path, redis_url: str, kafka_bootstrap: str) -> None:
    data = home / "services" / "postgres" / "data"
    data.mkdir(parents=True)
    (data / "PG_VERSION").write_text("9\n")
    with pytest.raises(UnavailableError, match="made by Postgres 9, the Postgres here is"):
        services.up(home, {"REDIS_URL": redis_url, "KAFKA_BOOTSTRAP_SERVERS": kafka_bootstrap}, print)


def test_the_database_url_of_the_fixture_is_private_to_a_test(postgres_url: str) -> None:
    with psycopg2.connect(postgres_url.replace("+psycopg2", "")) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT count(*) FROM pg_tables WHERE schemaname = 'public'")
        assert cursor.fetchone() == (0,)
