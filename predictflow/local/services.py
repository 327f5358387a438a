"""The set of local services: `up`, `down` and `status` of Postgres, Redis and Kafka, and the settings they give.

Everything is below one home (`.predictflow` in the checkout), so two checkouts do not collide; `down` keeps data and ports.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

from feature_store.errors import UnavailableError
from feature_store.masking import masked
from predictflow.local import external, kafka, mlflow_database, postgres, processes, program, redis, state
from predictflow.local.kafka_jars import NoRealKafka
from predictflow.local.ports import HOST, Ports, is_free
from predictflow.local.processes import Recorded
from predictflow.local.state import SERVERS, VARIABLE, Services, Where

Say = Callable[[str], None]
REQUIRE_REAL_KAFKA = "PREDICTFLOW_REQUIRE_REAL_KAFKA"


def up(home: Path, environ: Mapping[str, str] | None = None, say: Say = print) -> Services:
    """Start what does not run yet, in parallel; write `<home>/env`. Safe to run twice, and quick when all runs.

    A server whose variable is set in `environ` (default: the process's own) is used instead of a private one, unless the
    value is what our own last `up` wrote. PREDICTFLOW_OFFLINE and PREDICTFLOW_CLOCK stay as they were unless set. MLflow's schema is migrated in the background: call
    `mlflow_database.wait_for_mlflow` before the first use. A failure or Ctrl-C stops what this call started.
    """
    given = {k: v for k, v in (os.environ if environ is None else environ).items() if v.strip()}
    home = home.absolute()
    with processes.locked(home) as lock:
        launcher = Recorded(home, lock)
        try:
            return _Start(home, given, launcher, say).run()
        except BaseException:
            launcher.cancel()
            raise


@dataclass(frozen=True)
class _Server:
    """One started server: its address, and for Kafka the mode."""

    url: str
    mode: kafka.KafkaMode = "real"


class _Start:
    """One run of `up`."""

    def __init__(self, home: Path, environ: Mapping[str, str], launcher: Recorded, say: Say) -> None:
        self.home, self.environ, self.launcher, self.say = home, environ, launcher, say
        self.before = state.load(home)
        self.ports = Ports(home / "services" / "ports.json")

    def run(self) -> Services:
        where: dict[str, Where] = {name: "external" if self._is_external(name) else "private" for name in VARIABLE}
        for name in SERVERS:
            if where[name] == "external":
                external.CHECKS[name](self.environ[VARIABLE[name]])
        steps = {"postgres": self._postgres, "redis": self._redis, "kafka": self._kafka}
        servers = self._in_parallel({name: steps[name] for name in SERVERS if where[name] == "private"})
        for name in SERVERS:
            if where[name] == "external":
                servers[name] = _Server(self.environ[VARIABLE[name]], "external")
        before, default_offline = self.before, str(self.home / "offline")
        services = Services(
            postgres_url=servers["postgres"].url,
            redis_url=servers["redis"].url,
            kafka_bootstrap_servers=servers["kafka"].url,
            mlflow_tracking_uri=self._mlflow_uri(where, servers["postgres"].url),
            offline_path=self.environ.get("PREDICTFLOW_OFFLINE", before.offline_path if before else default_offline),
            clock=self.environ.get("PREDICTFLOW_CLOCK", before.clock if before else "wall"),
            kafka_mode=servers["kafka"].mode,
            where=where,
        )
        state.save(self.home, services)
        if where["mlflow"] == "private":
            mlflow_database.start_migration(self.launcher, services.mlflow_tracking_uri)
        return services

    def _is_external(self, name: str) -> bool:
        value = self.environ.get(VARIABLE[name])
        if value is None:
            return False
        return self.before is None or self.before.url(name) != value or self.before.where[name] == "external"

    def _in_parallel(self, steps: Mapping[str, Callable[[], _Server]]) -> dict[str, _Server]:
        with ThreadPoolExecutor(max_workers=len(SERVERS)) as pool:
            futures = {name: pool.submit(step) for name, step in steps.items()}
            try:
                done, _ = wait(futures.values(), return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
                return {name: future.result() for name, future in futures.items()}
            except BaseException:
                self.launcher.cancel()  # else leaving the pool would wait for starts that are still under way
                raise

    def _start_on_port(self, name: str, start: Callable[[int], None]) -> int:
        """Start on the remembered port, or on another one when that is busy, now or by the time the server binds it."""
        port, busy = self.ports.choose(name)
        if busy is not None:
            self.say(f"{name}: port {busy} is in use by another program, taking {port}")
        try:
            start(port)
        except UnavailableError:
            if is_free(port):
                raise
            self.say(f"{name}: port {port} was just taken by another program, taking another one")
            port, _ = self.ports.choose(name)
            start(port)
        return port

    def _postgres(self) -> _Server:
        directory, log = self.home / "services" / "postgres", self.home / "logs" / "postgres.log"
        port = self._port_of_running("postgres")
        if port is None:
            port = self._start_on_port("postgres", lambda port: postgres.start(self.launcher, directory, port, log))
        else:
            self._await("postgres", lambda: postgres.answers(postgres.url(port, "postgres")))
        server = postgres.url(port, "postgres")
        postgres.create_database(server, "predictflow")
        return _Server(postgres.url(port, "predictflow"))

    def _redis(self) -> _Server:
        directory, log = self.home / "services" / "redis", self.home / "logs" / "redis.log"
        port = self._port_of_running("redis")
        if port is None:
            port = self._start_on_port("redis", lambda port: redis.start(self.launcher, directory, port, log))
        else:
            self._await("redis", lambda: redis.answers_ping(HOST, port))
        return _Server(f"redis://{HOST}:{port}/0")

    def _kafka(self) -> _Server:
        directory, log = self.home / "services" / "kafka", self.home / "logs" / "kafka.log"
        record = processes.find("kafka", self.home)
        if record is not None and kafka.is_mock(record.argv):
            self._refuse_mock("Kafka runs as a mock cluster", "predictflow down, then predictflow up")
            address = kafka.mock_address(directory)
            self._await("kafka", lambda: address.exists() and kafka.serves(address.read_text()))
            return _Server(address.read_text(), "mock")
        port = self._port_of_running("kafka")
        if port is None:
            try:
                broker = kafka.installation(self.launcher, self.say)
            except NoRealKafka as error:
                self._refuse_mock(error.what, error.next_step)
                self.say(f"kafka: {error.message}")
                return self._mock(directory, log)

            def start(port: int) -> None:
                controller_port, _ = self.ports.choose("kafka-controller")
                kafka.start_real(self.launcher, broker, directory, port, controller_port, log)

            port = self._start_on_port("kafka", start)
        else:
            self._await("kafka", lambda: kafka.serves(f"{HOST}:{port}"))
        return _Server(f"{HOST}:{port}", "real")

    def _mock(self, directory: Path, log: Path) -> _Server:
        self.say(f"kafka: {kafka.MOCK_NOTICE}")
        return _Server(kafka.start_mock(self.launcher, directory, log), "mock")

    def _refuse_mock(self, what: str, next_step: str | None) -> None:
        if self.environ.get(REQUIRE_REAL_KAFKA) == "1":
            raise UnavailableError(f"{what}, and {REQUIRE_REAL_KAFKA}=1", next_step=next_step)

    def _port_of_running(self, name: str) -> int | None:
        return self.ports.get(name) if processes.find(name, self.home) is not None else None

    def _await(self, name: str, ready: Callable[[], bool]) -> None:
        """Wait for a server that runs already: the `up` that started it may have been killed before it was ready."""
        if not program.wait_until(
            lambda: ready() or processes.find(name, self.home) is None, program.START_TIMEOUT_SECONDS
        ):
            raise UnavailableError(
                f"{name} runs but does not answer", next_step="predictflow down, then predictflow up"
            )
        if processes.find(name, self.home) is None:
            log = self.home / "logs" / f"{name}.log"
            raise UnavailableError(f"{name} ended; the end of {log}:{program.log_tail(log)}")

    def _mlflow_uri(self, where: Mapping[str, Where], postgres_url: str) -> str:
        """MLflow's store: the user's own, which is never touched, or a database beside ours."""
        if where["mlflow"] == "external":
            return self.environ[VARIABLE["mlflow"]]
        address, _, database = postgres_url.partition("?")[0].rpartition("/")
        # On a server of the user's, a database called mlflow may be one that others rely on.
        name = "mlflow" if where["postgres"] == "private" else f"{database}_mlflow"
        try:
            postgres.create_database(postgres_url, name)
        except postgres.not_allowed() as error:
            raise UnavailableError(
                f"the user in POSTGRES_URL may not create the database {name} for MLflow",
                next_step="have it created, or set MLFLOW_TRACKING_URI",
            ) from error
        return f"{address}/{name}{postgres_url.partition('?')[1]}{postgres_url.partition('?')[2]}"


def down(home: Path) -> list[str]:
    """Stop everything that is recorded below `home` (serve and sync before the servers); the names. Data stays."""
    home = home.absolute()
    with processes.locked(home):
        stopped = [record.name for record in processes.running(home) if processes.stop(record.name, home)]
        state.env_file(home).unlink(missing_ok=True)
    return stopped


@dataclass(frozen=True)
class Status:
    """One line of `predictflow status`. `state`: running, not answering, starting, stopped; address without password."""

    name: str
    state: str
    where: Where
    address: str
    pid: int | None = None
    log: str | None = None
    detail: str = ""


def status(home: Path) -> list[Status]:
    """The three servers, MLflow's store, and every other child that is recorded below `home`. Changes nothing."""
    home = home.absolute()
    records = {record.name: record for record in processes.running(home)}
    last = state.load(home)
    lines = [_server_status(name, records.pop(name, None), last) for name in SERVERS]
    lines += [Status(r.name, "running", "private", "", r.pid, str(r.log)) for r in records.values()]
    return lines


def _server_status(name: str, record: processes.Record | None, last: Services | None) -> Status:
    where: Where = last.where[name] if last is not None else "private"
    url = last.url(name) if last is not None else ""
    detail = last.kafka_mode if last is not None and name == "kafka" else ""
    if where == "private" and record is None:
        return Status(name, "stopped", where, masked(url), detail=detail)
    pid, log = (record.pid, str(record.log)) if record is not None else (None, None)
    if last is None:  # an `up` that was killed before it could write what it had started
        return Status(name, "starting", where, "", pid, log)
    answer = "running" if external.answers(name, url) else "not answering"
    return Status(name, answer, where, masked(url), pid, log, detail)
