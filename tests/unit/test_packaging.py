"""The lock files are complete, hashed, free of index hosts, and agree with pyproject.toml (ADR 005)."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LOCKS = ("requirements.lock", "requirements-dev.lock")


def _pins(lock: str) -> dict[str, str]:
    text = (ROOT / lock).read_text()
    return {m[1].lower(): m[2] for m in re.finditer(r"^([A-Za-z0-9_.-]+)(?:\[[^\]]*\])?==([^ ;\\]+)", text, re.M)}


def _name(requirement: str) -> str:
    return re.split(r"[\[<>=;! ]", requirement, maxsplit=1)[0].lower()


@pytest.mark.parametrize("lock", LOCKS)
def test_every_pin_has_hashes_and_no_line_names_a_host(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    requirements = re.split(r"\n(?=[A-Za-z0-9])", text.split("\n", 2)[2])
    assert len(requirements) > 100
    assert [r for r in requirements if "==" in r and "--hash=sha256:" not in r] == []


def test_every_dependency_of_pyproject_is_pinned() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    pins = _pins("requirements.lock")
    assert [d for d in project["project"]["dependencies"] if _name(d) not in pins] == []
    dev = _pins("requirements-dev.lock")
    groups = project["dependency-groups"]
    assert [d for group in groups.values() for d in group if _name(d) not in dev] == []


def test_the_dev_lock_holds_the_same_versions_as_the_runtime_lock() -> None:
    dev = _pins("requirements-dev.lock")
    assert {n: v for n, v in _pins("requirements.lock").items() if dev.get(n) != v} == {}


def test_makefile_pins_the_installer() -> None:
    assert re.search(r"^UV_VERSION := \d+\.\d+\.\d+$", (ROOT / "Makefile").read_text(), re.M)
