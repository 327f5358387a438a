"""The jars of a real Kafka broker: fetched once into a per-user cache, checked against `kafka_jars.lock`.

By Maven, whose own settings decide which repository is asked; where there is none, by the Python package jgo if that is
installed. The lock has one line per jar: group, name, version, sha512, size.
`python -m predictflow.local.kafka_jars lock` resolves pom.xml afresh and writes the lock (for a change of version).
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from feature_store.errors import UnavailableError
from predictflow.local.program import Launcher, Program
from predictflow.local.watched import Watched

HERE = Path(__file__).parent
POM = HERE / "pom.xml"
LOCK = HERE / "kafka_jars.lock"
DOWNLOAD_TIMEOUT_SECONDS = 600.0


class NoRealKafka(UnavailableError):
    """A real broker cannot run here; the message says why."""


@dataclass(frozen=True)
class Jar:
    """One line of the lock; `size` in bytes."""

    group: str
    name: str
    version: str
    sha512: str
    size: int

    @property
    def file(self) -> str:
        return f"{self.name}-{self.version}.jar"

    def fault_in(self, directory: Path) -> str | None:
        """What is wrong with this jar in `directory`; None when it is the locked one."""
        path = directory / self.file
        if not path.exists():
            return f"{self.file} is missing"
        if path.stat().st_size != self.size:
            return f"{self.file} has {path.stat().st_size} bytes, the lock says {self.size}"
        return None if _sha512(path) == self.sha512 else f"{self.file} differs from the sha512 in the lock"


def locked_jars() -> list[Jar]:
    """The jars of `kafka_jars.lock`, by name."""
    lines = [line.split() for line in LOCK.read_text().splitlines() if line and not line.startswith("#")]
    return [Jar(group, name, version, sha512, int(size)) for group, name, version, sha512, size in lines]


def kafka_version() -> str:
    """The version of the broker in the lock."""
    return next(jar.version for jar in locked_jars() if jar.name == "kafka_2.13")


def cache_directory() -> Path:
    """Per user, and new when the lock changes: `~/.cache/predictflow/kafka-VERSION-LOCK` (or below XDG_CACHE_HOME)."""
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "predictflow" / f"kafka-{kafka_version()}-{hashlib.sha256(LOCK.read_bytes()).hexdigest()[:8]}"


def class_path(launcher: Launcher, say: Callable[[str], None]) -> str:
    """The class path of the locked jars, downloaded on first use; every jar is checked on every call (about 0.1 s).

    Only locked jars are named in it: others in the directory are not loaded. A second process waits for the first one's
    download. Raises `NoRealKafka` when they cannot be resolved, `UnavailableError` when what came is not what is locked.
    """
    directory = cache_directory()
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(directory.with_name(f"{directory.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if _fault(directory) is not None:
            _download(directory, launcher, say)
    return os.pathsep.join(str(directory / jar.file) for jar in locked_jars())


def _fault(directory: Path) -> str | None:
    return next((fault for jar in locked_jars() if (fault := jar.fault_in(directory))), None)


def _download(directory: Path, launcher: Launcher, say: Callable[[str], None]) -> None:
    megabytes = sum(jar.size for jar in locked_jars()) / 1e6
    say(f"kafka: fetching Kafka {kafka_version()}, once ({megabytes:.0f} MB) ...")
    for left_by_a_killed_one in directory.parent.glob(f".{directory.name}.*"):
        shutil.rmtree(left_by_a_killed_one)
    temporary = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _fetch(temporary / "jars", launcher)
        if fault := _fault(temporary / "jars"):
            raise UnavailableError(
                f"a jar of Kafka {kafka_version()} that was fetched is not the locked one: {fault}",
                next_step="check the repository that Maven's settings name, or set KAFKA_HOME or KAFKA_BOOTSTRAP_SERVERS",
            )
        shutil.rmtree(directory, ignore_errors=True)
        (temporary / "jars").rename(directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _fetch(output: Path, launcher: Launcher) -> None:
    """Put the jars into `output`, in a process that dies with us. Raises `NoRealKafka` when that is not possible."""
    if mvn := shutil.which("mvn"):
        name, argv = "mvn", _maven(mvn, output)
    elif importlib.util.find_spec("jgo") is not None:
        name, argv = "jgo", [sys.executable, "-m", "predictflow.local.kafka_jars", "fetch", str(output)]
    else:
        raise NoRealKafka(
            "no real Kafka: its jars are not in the cache and there is no Maven to fetch them",
            next_step="install Maven (apt install maven, brew install maven) or the Python package jgo, "
            "or set KAFKA_HOME or KAFKA_BOOTSTRAP_SERVERS",
        )
    try:
        launcher.run(Program(name, argv, output.parent / f"{name}.log", timeout=DOWNLOAD_TIMEOUT_SECONDS))
    except UnavailableError as error:
        raise NoRealKafka(f"no real Kafka: its jars could not be fetched: {error.message}") from error


def _maven(mvn: str, output: Path, *options: str) -> list[str]:
    goal = ["dependency:copy-dependencies", "-DincludeScope=runtime", f"-DoutputDirectory={output}"]
    return [mvn, "-B", "-q", "-f", str(POM), *goal, *options]


def fetch_with_jgo(output: Path) -> None:
    """Fetch every locked jar by its coordinates; the lock has already resolved the dependencies."""
    from jgo.maven import MavenContext

    context = MavenContext()

    def fetch(jar: Jar) -> None:
        path = context.project(jar.group, jar.name).at_version(jar.version).artifact().resolve()
        shutil.copyfile(path, output / jar.file)

    output.mkdir(parents=True)
    with ThreadPoolExecutor(8) as pool:
        for _ in pool.map(fetch, locked_jars()):
            pass


def _sha512(path: Path) -> str:
    with open(path, "rb") as jar:
        return hashlib.file_digest(jar, "sha512").hexdigest()


def write_lock() -> None:
    """Resolve pom.xml with Maven and write what came to `kafka_jars.lock`."""
    with tempfile.TemporaryDirectory() as temporary:
        jars = Path(temporary) / "jars"
        argv = _maven("mvn", jars, "-Dmdep.useRepositoryLayout=true")
        Watched().run(Program("mvn", argv, Path(temporary) / "mvn.log", timeout=DOWNLOAD_TIMEOUT_SECONDS))
        lines = ["# group name version sha512 size; written by: python -m predictflow.local.kafka_jars lock"]
        for path in sorted(jars.rglob("*.jar"), key=lambda path: path.name):
            *group, name, version = path.parent.relative_to(jars).parts
            lines.append(f"{'.'.join(group)} {name} {version} {_sha512(path)} {path.stat().st_size}")
    LOCK.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    if sys.argv[1] == "lock":
        write_lock()
    else:
        fetch_with_jgo(Path(sys.argv[2]))
