"""Only the locked jars are ever run: a wrong or missing one stops the start and leaves nothing in the cache."""

from __future__ import annotations

import hashlib
import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

from feature_store.errors import UnavailableError
from predictflow.local import kafka_jars
from predictflow.local.kafka_jars import Jar, NoRealKafka
from predictflow.local.watched import Watched


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty per-user cache, and a PATH on which a test may put an `mvn`."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "bin").mkdir()
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:/usr/bin:/bin")
    return tmp_path / "cache"


@pytest.fixture
def lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Jar]:
    """A lock of one small jar."""
    content = b"a jar"
    path = tmp_path / "kafka_jars.lock"
    path.write_text(
        f"# comment\norg.apache.kafka kafka_2.13 4.1.1 {hashlib.sha512(content).hexdigest()} {len(content)}\n"
    )
    monkeypatch.setattr(kafka_jars, "LOCK", path)
    return kafka_jars.locked_jars()


def put_mvn(tmp_path: Path, body: str) -> None:
    """A program called mvn that gets the output directory in $out."""
    mvn = tmp_path / "bin" / "mvn"
    mvn.write_text(f'#!/bin/sh\nfor a in "$@"; do case $a in -DoutputDirectory=*) out=${{a#*=}};; esac; done\n{body}\n')
    mvn.chmod(0o755)


def left_in(cache: Path) -> list[str]:
    return [path.name for path in (cache / "predictflow").iterdir() if not path.name.endswith(".lock")]


def test_the_committed_lock_holds_the_versions_of_the_pom() -> None:
    locked = {jar.name: jar.version for jar in kafka_jars.locked_jars()}
    space = {"m": "http://maven.apache.org/POM/4.0.0"}
    wanted = ET.parse(kafka_jars.POM).getroot().findall("m:dependencies/m:dependency", space)
    assert wanted
    for dependency in wanted:
        assert locked[dependency.findtext("m:artifactId", "", space)] == dependency.findtext("m:version", "", space)
    assert all(re.fullmatch("[0-9a-f]{128}", jar.sha512) and jar.size > 0 for jar in kafka_jars.locked_jars())


def test_jars_are_fetched_once_and_checked_on_every_use(cache: Path, lock: list[Jar], tmp_path: Path) -> None:
    put_mvn(
        tmp_path,
        f'echo x >> {tmp_path}/calls; mkdir -p $out; printf "a jar" > $out/kafka_2.13-4.1.1.jar; touch $out/extra.jar',
    )
    left_by_a_killed_download = cache / "predictflow" / f".{kafka_jars.cache_directory().name}.abc"
    left_by_a_killed_download.mkdir(parents=True)
    said: list[str] = []
    first = kafka_jars.class_path(Watched(), said.append)
    assert first == str(kafka_jars.cache_directory() / "kafka_2.13-4.1.1.jar")  # not the extra one
    assert left_in(cache) == [kafka_jars.cache_directory().name]
    assert kafka_jars.class_path(Watched(), said.append) == first
    assert (tmp_path / "calls").read_text() == "x\n"
    assert len(said) == 1
    assert "fetching Kafka 4.1.1" in said[0]
    Path(first).write_text("A jar")  # same size, other bytes
    assert kafka_jars.class_path(Watched(), said.append) == first
    assert Path(first).read_text() == "a jar"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ('mkdir -p $out; printf "b jar" > $out/kafka_2.13-4.1.1.jar', "differs from the sha512"),
        ('mkdir -p $out; printf "a longer jar" > $out/kafka_2.13-4.1.1.jar', "has 12 bytes, the lock says 5"),
        ("mkdir -p $out", "kafka_2.13-4.1.1.jar is missing"),
    ],
)
def test_a_jar_that_is_not_the_locked_one_is_refused(
    cache: Path, lock: list[Jar], tmp_path: Path, body: str, message: str
) -> None:
    put_mvn(tmp_path, body)
    with pytest.raises(UnavailableError, match=message) as caught:
        kafka_jars.class_path(Watched(), lambda _: None)
    assert not isinstance(caught.value, NoRealKafka)  # else the mock would quietly take its place
    assert left_in(cache) == []


def test_a_maven_that_fails_is_no_real_kafka_with_its_last_words(cache: Path, lock: list[Jar], tmp_path: Path) -> None:
    put_mvn(tmp_path, "mkdir -p $out; echo 'Could not transfer artifact'; exit 1")
    with pytest.raises(NoRealKafka, match=r"(?s)jars could not be fetched.*Could not transfer artifact"):
        kafka_jars.class_path(Watched(), lambda _: None)
    assert left_in(cache) == []


def test_without_maven_and_cache_there_is_no_real_kafka(
    cache: Path, lock: list[Jar], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr(kafka_jars.importlib.util, "find_spec", lambda name: None)  # nor jgo
    with pytest.raises(NoRealKafka, match=r"no Maven to fetch them.*install Maven"):
        kafka_jars.class_path(Watched(), lambda _: None)
