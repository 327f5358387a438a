"""Runs the DVC pipeline of `dvc.yaml` in a workspace of its own, so that each data set keeps its data and its lock file."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from feature_store.errors import NotFoundError, PredictFlowError

PIPELINE, PARAMS = "dvc.yaml", "params.yaml"
CONFIG = """[core]
    no_scm = true
    analytics = false
    check_update = false
"""
DIRECTORIES = {"PREDICTFLOW_HOME": ".predictflow", "PREDICTFLOW_REPO": "."}
"""Settings that name a directory, with their defaults: a stage runs in the workspace, and would look for them there."""
STOP_SECONDS = 10.0
RUNNING = re.compile(r"Running stage '([^']+)'")


class PipelineError(PredictFlowError):
    """A stage failed, or DVC could not run; the stage's own message has been passed on already."""

    code = "pipeline"


def default_params(repo: Path) -> dict[str, dict[str, Any]]:
    """The parameters of `<repo>/params.yaml`."""
    return dict(_read_yaml(Path(repo) / PARAMS))


def prepare_workspace(directory: Path, params: Mapping[str, Mapping[str, Any]], repo: Path = Path()) -> None:
    """Make `directory` a DVC workspace that runs the pipeline of `repo` (holding dvc.yaml, features/) with `params`.

    `params` replaces whole sections of the repo's params.yaml: {"data": {"source": "telco", "seed": 7}}. Sources of
    the stages outside `work/`, and the data file of `params["data"]["path"]`, become dependencies by absolute path:
    when one changes, so does the stage. Safe to run again: what did not change is not run again.
    """
    directory, repo = Path(directory).absolute(), Path(repo).absolute()
    pipeline = _read_yaml(repo / PIPELINE)
    chosen = {**default_params(repo), **{k: dict(v) for k, v in params.items()}}
    if data_file := chosen["data"].get("path"):
        if not Path(data_file).is_file():
            raise NotFoundError("no such file", value=str(data_file))
        chosen["data"]["path"] = str(Path(data_file).absolute())
        pipeline["stages"]["data"]["deps"].append(chosen["data"]["path"])
    for stage in pipeline["stages"].values():
        stage["deps"] = [found for dep in stage["deps"] for found in _dependencies(dep, repo)]
    (directory / ".dvc").mkdir(parents=True, exist_ok=True)
    _write(directory / ".dvc" / "config", CONFIG)
    _write_yaml(directory / PARAMS, chosen)
    _write_yaml(directory / PIPELINE, pipeline)


def run_pipeline(
    directory: Path,
    env: Mapping[str, str],
    force: bool = False,
    stage: str | None = None,
    show: Callable[[str], None] | None = None,
) -> list[str]:
    """`dvc repro` in a prepared workspace; the stages that ran, in order (none: everything was up to date).

    `env` is the whole environment of the stages; its relative directories are taken from the caller's working
    directory. `stage` runs that one alone, `force` even what is up to date. `show` gets each line of output as it
    comes. PipelineError when a stage fails; run again to continue with it. Not at the same time twice: DVC locks the
    workspace.
    """
    # Not the run cache: it would bring back metrics.json without registering the model that it speaks of.
    command = [sys.executable, "-m", "dvc", "repro", "--no-run-cache"]
    command += ["--force"] * force + (["--single-item", stage] if stage is not None else [])
    environment = {
        **env,
        **{name: str(Path(env.get(name) or default).absolute()) for name, default in DIRECTORIES.items()},
        "DVC_NO_ANALYTICS": "1",
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        # Stages call `predictflow` by name: the one beside this interpreter.
        "PATH": os.pathsep.join([sysconfig.get_path("scripts"), env.get("PATH", os.defpath)]),
    }
    ran: list[str] = []
    errors: list[str] = []
    with _group(command, Path(directory), environment) as process:
        assert process.stdout is not None  # it is a pipe
        for line in process.stdout:
            line = line.rstrip()
            if match := RUNNING.match(line):
                ran.append(match.group(1))
            if line.startswith(("Error: ", "ERROR: ")):
                errors.append(line.partition(": ")[2])
            if show is not None:
                show(line)
        failed = process.wait() != 0
    if failed:
        where = f"stage {ran[-1]!r} failed" if ran else "dvc repro failed"
        # The stage's own message comes before DVC's.
        raise PipelineError(f"{where}: {errors[0] if errors else 'no message'}", next_step="mend it and run again")
    return ran


@contextmanager
def _group(command: list[str], directory: Path, env: Mapping[str, str]) -> Iterator[subprocess.Popen[str]]:
    """A child in a process group of its own, so that an interrupt here ends DVC together with the stage it runs."""
    process = subprocess.Popen(
        command,
        cwd=directory,
        env=dict(env),
        text=True,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        process_group=0,
    )
    try:
        yield process
    except BaseException:
        _end(process)
        raise


def _end(process: subprocess.Popen[str]) -> None:
    """Ends what is left of a group, also where its first process is gone: a stage can outlive DVC, since a command that was
    just forked misses the interrupt which its shell has taken."""
    for stop in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError, PermissionError):  # the latter from some systems where only zombies are left
            os.killpg(process.pid, stop)
        until = time.monotonic() + STOP_SECONDS
        while _lives(process.pid) and time.monotonic() < until:
            time.sleep(0.02)  # the system tells nobody of the end of a process that is not its child
    process.poll()


def _lives(group: int) -> bool:
    for process in psutil.process_iter():
        with suppress(psutil.NoSuchProcess, ProcessLookupError, PermissionError):
            if os.getpgid(process.pid) == group and process.status() != psutil.STATUS_ZOMBIE:
                return True
    return False


def _dependencies(dep: str, repo: Path) -> list[str]:
    """A stage's own output as it is; else the file, or the Python files of a directory, by absolute path.

    Single files, because DVC would count the byte code in a directory outside of its workspace as content.
    """
    if dep.startswith("work/") or Path(dep).is_absolute():
        return [dep]
    path = repo / dep
    if path.is_dir():
        return sorted(str(p) for p in path.rglob("*.py"))
    return [str(path)]


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    if not path.is_file():
        raise NotFoundError("the pipeline's file is missing", value=str(path), next_step="cd to the checkout")
    return dict(yaml.safe_load(path.read_text()))


def _write_yaml(path: Path, content: Mapping[str, Any]) -> None:
    import yaml

    _write(path, yaml.safe_dump(dict(content), sort_keys=False))


def _write(path: Path, text: str) -> None:
    """Only when it differs, atomically: an untouched file keeps its time, by which DVC knows it."""
    if path.is_file() and path.read_text() == text:
        return
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    temporary.write_text(text)
    temporary.replace(path)
