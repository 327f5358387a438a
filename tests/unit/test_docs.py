"""Documentation is a contract: settings, commands and links in docs/ and README.md are checked against the code."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from predictflow.cli import MODULES
from predictflow.settings import VARIABLES

ROOT = Path(__file__).parents[2]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


def test_every_setting_is_documented() -> None:
    text = (ROOT / "docs/reference/settings.md").read_text()
    assert [name for name in VARIABLES if f"| `{name}` |" not in text] == []


def test_the_command_reference_is_what_help_prints() -> None:
    # In a process of its own: click remembers the help option of the first context in which a command was shown.
    script = "import sys; from predictflow.help_pages import render; sys.stdout.write(render())"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs/reference/cli.md").read_text() == shown, "run `make docs`"


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_and_named_files_exist(page: Path) -> None:
    text = page.read_text()
    targets = [m for m in re.findall(r"\]\(([^)#\s]+)", text) if "://" not in m]
    assert [t for t in targets if not (page.parent / t).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_make_targets_named_in_the_docs_exist(page: Path) -> None:
    text = page.read_text()
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"`make ([a-z-]+)", text)) - targets == set()
    assert set(re.findall(r"`predictflow ([a-z-]+)", text)) - set(MODULES) == set()


@pytest.mark.parametrize("adr", sorted((ROOT / "docs/adr").glob("*.md")), ids=lambda p: p.stem)
def test_every_adr_ends_with_tests_that_exist(adr: Path) -> None:
    last = adr.read_text().rstrip().split("\n## ")[-1]
    assert last.startswith("Confirmed by"), "the last section of an ADR is 'Confirmed by'"
    named = re.findall(r"`(tests/[^`: ]+\.py)", last)
    assert named
    assert [n for n in named if not (ROOT / n).is_file()] == []
