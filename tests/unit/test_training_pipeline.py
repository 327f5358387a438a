"""The DVC pipeline in a workspace: what runs again and what does not, and how failures are told. Runs the real DVC."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from feature_store.errors import NotFoundError
from training import pipeline
from training.data_version import data_version
from training.pipeline import PipelineError, default_params, prepare_workspace, run_pipeline

ROOT = Path(__file__).parents[2]
PIPELINE = """
stages:
  data:
    cmd: mkdir -p work/raw/sub && echo ${data.seed} > work/raw/a && echo "${data.path}" > work/raw/sub/b
    deps: [features]
    params: [data]
    outs: [work/raw]
  train:
    cmd: >-
      test ${train.ok} = yes || { echo "Error: no luck"; exit 3; }; echo "{}" > work/metrics.json
    deps: [work/raw]
    params: [train]
    metrics: [{work/metrics.json: {cache: false}}]
"""


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    repo = tmp_path / "repo with space"
    (repo / "features" / "__pycache__").mkdir(parents=True)
    (repo / "features" / "a.py").write_text("A = 1\n")
    (repo / "dvc.yaml").write_text(PIPELINE)
    (repo / "params.yaml").write_text("data: {seed: 1, path: ''}\ntrain: {ok: 'yes'}\n")
    return repo


def run(workspace: Path, **options: bool | str) -> list[str]:
    return run_pipeline(workspace, os.environ, **options)


def test_only_what_changed_runs_again(tmp_path: Path, repo: Path) -> None:
    source = tmp_path / "in.csv"
    source.write_text("1\n")
    data = {"seed": 7, "path": str(source)}
    workspace = tmp_path / "telco"
    prepare_workspace(workspace, {"data": data}, repo)
    assert run(workspace) == ["data", "train"]
    assert (workspace / "work" / "raw" / "a").read_text() == "7\n"

    (repo / "features" / "__pycache__" / "a.pyc").write_bytes(b"1")
    prepare_workspace(workspace, {"data": data}, repo)
    assert run(workspace) == []

    source.write_text("2\n")  # the same path with other content; the stage's result does not depend on it here
    assert run(workspace) == ["data"]
    (repo / "features" / "a.py").write_text("A = 2\n")
    assert run(workspace) == ["data"]
    prepare_workspace(workspace, {"data": {**data, "seed": 8}}, repo)
    assert run(workspace) == ["data", "train"]
    assert run(workspace, force=True, stage="train") == ["train"]


def test_our_data_version_is_the_one_in_the_lock_file(tmp_path: Path, repo: Path) -> None:
    workspace = tmp_path / "telco"
    prepare_workspace(workspace, {}, repo)
    run(workspace)
    lock = yaml.safe_load((workspace / "dvc.lock").read_text())
    (out,) = lock["stages"]["data"]["outs"]
    assert out["path"] == "work/raw"
    assert data_version(workspace / "work" / "raw") == out["md5"]
    (workspace / "work" / "raw" / "a").write_text("changed by hand\n")
    assert data_version(workspace / "work" / "raw") != out["md5"]
    with pytest.raises(NotFoundError):
        data_version(workspace / "work" / "nothing")


def test_a_failing_stage_is_named_with_its_own_message_and_a_rerun_continues_there(tmp_path: Path, repo: Path) -> None:
    workspace = tmp_path / "telco"
    prepare_workspace(workspace, {"train": {"ok": "no"}}, repo)
    lines: list[str] = []
    with pytest.raises(PipelineError, match="stage 'train' failed: no luck"):
        run_pipeline(workspace, os.environ, show=lines.append)
    assert "Error: no luck" in lines
    prepare_workspace(workspace, {}, repo)
    assert run(workspace) == ["train"]


def test_a_missing_data_file_is_an_error_before_anything_is_written(tmp_path: Path, repo: Path) -> None:
    with pytest.raises(NotFoundError, match="no such file"):
        prepare_workspace(tmp_path / "w", {"data": {"path": str(tmp_path / "none.csv")}}, repo)
    assert not (tmp_path / "w").exists()


def test_an_interrupted_run_ends_with_its_stage_and_the_next_one_continues(tmp_path: Path, repo: Path) -> None:
    (repo / "dvc.yaml").write_text(PIPELINE.replace("test ${train.ok} = yes", "echo waiting; sleep ${train.s}"))
    workspace = tmp_path / "telco"
    prepare_workspace(workspace, {"train": {"s": 321}}, repo)

    def interrupt(line: str) -> None:
        if line == "waiting":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_pipeline(workspace, os.environ, show=interrupt)
    assert "sleep 321" not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    prepare_workspace(workspace, {"train": {"s": 0}}, repo)
    assert run(workspace) == ["train"]


def test_a_stage_that_outlives_dvc_is_ended_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And so is one that does not care for an interrupt; what has left the group is not waited for."""
    stage = "trap '' INT; echo started; sleep 654"
    command = ["sh", "-c", f'setsid sleep 655 & echo $!; (sh -c "{stage}") & exit 1']
    monkeypatch.setattr(pipeline, "STOP_SECONDS", 0.5)
    lines: list[str] = []

    def interrupted() -> None:
        with pipeline._group(command, tmp_path, os.environ) as process:
            assert process.stdout is not None
            lines.extend([process.stdout.readline(), process.stdout.readline()])
            process.wait()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    apart = int(next(line for line in lines if line.strip().isdecimal()))
    try:
        running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
        assert "sleep 654" not in running
        assert "sleep 655" in running
    finally:
        os.kill(apart, signal.SIGKILL)


def test_the_checkouts_own_pipeline_is_complete() -> None:
    """Every dependency outside of work/ exists, and each stage's command is one of ours with known options."""
    from click.testing import CliRunner

    from predictflow.cli import cli

    stages = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
    assert list(stages) == ["data", "backfill", "dataset", "train"]
    made: set[str] = set()
    for name, stage in stages.items():
        for dep in stage["deps"]:
            assert dep in made if dep.startswith("work/") else (ROOT / dep).exists(), dep
        made |= set(stage.get("outs", []))
        help_text = CliRunner().invoke(cli, [name, "--help"]).output
        options = [word for word in stage["cmd"].split() if word.startswith("--")]
        options += [f"--{key}" for key in default_params(ROOT)["data"]] if name == "data" else []
        assert all(option in help_text for option in options), (name, options)


def test_the_root_pipelines_defaults_are_the_training_defaults() -> None:
    from training.model import TrainParams

    assert default_params(ROOT)["train"] == TrainParams().as_dict()


def test_dvc_reads_the_checkouts_pipeline_without_network_or_analytics() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "dvc", "config", "core.analytics"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.stdout.strip() == "false"
    done = subprocess.run([sys.executable, "-m", "dvc", "stage", "list"], cwd=ROOT, capture_output=True, text=True)
    assert [line.split()[0] for line in done.stdout.splitlines()] == ["data", "backfill", "dataset", "train"]
