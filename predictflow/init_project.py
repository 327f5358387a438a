"""A user's own project from `project_template/`: the same vendors, two small feature files, all or nothing."""

from __future__ import annotations

import re
import shutil
import tempfile
from importlib import resources
from pathlib import Path

from feature_store.errors import PredictFlowError, UsageError

PROJECT = "__PROJECT__"
"""Stands for the project's name in the template's files."""


def init_project(directory: Path) -> str:
    """Write the template into `directory`, which is new or empty; the project's name, taken from the directory's.

    Nothing is written when `directory` is a file, holds something, or cannot be written; all files appear only when all
    are complete, feature_store.yaml last. UsageError and PredictFlowError say what is in the way.
    """
    target = directory.absolute()
    # Feast 0.67 refuses hyphens whatever the online store: its check for SQLite sees no store yet.
    project = re.sub(r"[^A-Za-z0-9]+", "_", target.name).strip("_")
    if not project:
        raise UsageError("no project name in this directory's name", value=str(directory), next_step="use letters")
    if target.exists() and not target.is_dir():
        raise UsageError("a file stands where the project should be", value=str(directory))
    if target.is_dir() and any(target.iterdir()):
        raise UsageError("directory is not empty", value=str(directory), next_step="name a new directory")
    try:
        _write(target, project)
    except OSError as e:
        raise PredictFlowError(f"cannot write the project: {e.strerror}", value=str(e.filename or directory)) from e
    return project


def _write(target: Path, project: str) -> None:
    is_new = not target.exists()
    target.parent.mkdir(parents=True, exist_ok=True)
    moved: list[Path] = []
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as staging:
        staged = Path(staging)
        with resources.as_file(resources.files("predictflow") / "project_template") as template:
            ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
            shutil.copytree(template, staged, dirs_exist_ok=True, ignore=ignore, copy_function=shutil.copyfile)
        for path in staged.rglob("*"):
            if path.is_file():
                path.write_text(path.read_text(encoding="utf-8").replace(PROJECT, project), encoding="utf-8")
        # A dot file in a package is easily lost on the way into a wheel.
        (staged / "feastignore").rename(staged / ".feastignore")
        try:
            target.mkdir(exist_ok=True)
            for path in sorted(staged.iterdir(), key=lambda p: p.name == "feature_store.yaml"):
                moved.append(path.rename(target / path.name))
        except BaseException:
            for path in moved:
                shutil.rmtree(path) if path.is_dir() else path.unlink()
            if is_new:
                target.rmdir()
            raise
