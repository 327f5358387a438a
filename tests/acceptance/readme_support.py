"""A stranger's checkout for the acceptance tests: a copy with the tested environment, the README's blocks, a data sample."""

from __future__ import annotations

import csv
import gzip
import json
import os
import re
import shutil
import subprocess
import zlib
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SERVER_VARIABLES = ("POSTGRES_URL", "REDIS_URL", "KAFKA_BOOTSTRAP_SERVERS", "MLFLOW_TRACKING_URI")


class Checkout:
    """A copy of the tracked files with the tested environment linked in, and `make` in it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.home = path / ".predictflow"
        own = {k: v for k, v in os.environ.items() if not k.startswith("PREDICTFLOW_") and k not in SERVER_VARIABLES}
        keep = {k: v for k, v in os.environ.items() if k == "PREDICTFLOW_REQUIRE_REAL_KAFKA"}
        self.environ = {**own, **keep}

    def run(self, command: str, **more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", "-c", command],
            cwd=self.path,
            env={**self.environ, **more},
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )

    def summary(self) -> dict[str, Any]:
        summary: dict[str, Any] = json.loads((self.home / "report" / "summary.json").read_text())
        return summary

    def blocks(self) -> list[str]:
        """The fenced blocks of the README, in order."""
        return re.findall(r"^```\w+\n(.*?)^```$", (self.path / "README.md").read_text(), re.M | re.S)

    def block(self, holding: str) -> str:
        """The one block that holds this text."""
        (found,) = [b for b in self.blocks() if holding in b]
        return found

    def left(self) -> dict[str, object]:
        """What a run leaves for its user: report, summary, settings, and the processes that serve."""
        files = [*sorted((self.home / "report").iterdir()), self.home / "env"]
        status = json.loads(self.run(".venv/bin/predictflow status --json").stdout)["services"]
        return {
            **{f.name: f.read_bytes() for f in files},
            "processes": {s["name"]: (s["pid"], s["state"]) for s in status},
        }


def copy_checkout(path: Path) -> Path:
    """A copy of the tracked files (and new ones) at `path`, with the tested environment linked in; returns `path`."""
    listed = subprocess.run(
        ["git", "ls-files", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, path / name)  # with its times, so that make sees the environment as current
    (path / ".venv").symlink_to(ROOT / ".venv")
    return path


def as_printed(text: str) -> list[str]:
    """Patterns of the lines of a README block that shows output: any figure may stand where it has one."""
    lines = [line for line in text.splitlines() if line.strip() not in ("", "...")]
    return [r"\s+".join(_word(word) for word in line.split()) for line in lines]


def _word(word: str) -> str:
    if word == "real":  # where no broker can run
        return "(real|mock)"
    return r"[\d,.]+".join(re.escape(part) for part in re.split(r"\d[\d,.]*", word))


def sample(source: Path, target: Path, every: int) -> tuple[int, int]:
    """Every line of one customer in `every`, and a share of the lines without one; (lines with, lines without)."""
    kept = dirty = 0
    with (
        gzip.open(source, "rt", encoding="utf-8", newline="") as f,
        gzip.open(target, "wt", encoding="utf-8", newline="") as out,
    ):
        reader, writer = csv.reader(f), csv.writer(out)
        header = next(reader)
        writer.writerow(header)
        column = header.index("CustomerID")
        for number, row in enumerate(reader):
            if row[column]:
                if zlib.crc32(row[column].encode()) % every == 0:
                    writer.writerow(row)
                    kept += 1
            elif number % 20 == 0:
                writer.writerow(row)
                dirty += 1
    return kept, dirty
