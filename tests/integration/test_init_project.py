"""`predictflow init`: a project of one's own that works at once, and what goes wrong said in one line."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from feature_store.errors import PredictFlowError, UsageError
from feature_store.registry import FeatureRegistry
from predictflow import init_project as module
from predictflow.init_project import init_project
from predictflow.project import project_name

BIN = Path(sys.executable).parent
FILES = [".feastignore", "README.md", "feature_store.yaml", "features/account.py", "features/activity.py"]


def run(*command: str, cwd: Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PREDICTFLOW_", "POSTGRES_", "REDIS_"))}
    full = {**inherited, "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}", "FEAST_USAGE": "False", **(env or {})}
    return subprocess.run(command, cwd=cwd, env=full, capture_output=True, text=True, timeout=180, check=False)


def written(directory: Path) -> list[str]:
    return sorted(p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file())


@pytest.fixture
def servers(postgres_url: str, redis_url: str, tmp_path: Path) -> dict[str, str]:
    return {"POSTGRES_URL": postgres_url, "REDIS_URL": redis_url, "PREDICTFLOW_OFFLINE": str(tmp_path / "offline")}


def test_a_new_project_applies_and_is_listed_by_the_commands_of_its_readme(
    tmp_path: Path, servers: dict[str, str]
) -> None:
    made = run("predictflow", "init", "my-shop", cwd=tmp_path)
    assert (made.returncode, made.stderr) == (0, "")
    assert "project my_shop in my-shop" in made.stdout
    shop = tmp_path / "my-shop"
    assert written(shop) == FILES

    applied = run("feast", "apply", cwd=shop, env=servers)
    assert applied.returncode == 0, applied.stderr
    listed = run("feast", "feature-views", "list", cwd=shop, env=servers)
    assert set(re.findall(r"^(\w+) +\{'customer'\}", listed.stdout, re.M)) == {"account", "activity"}

    features = run("predictflow", "features", cwd=shop, env=servers)
    assert features.returncode == 0, features.stderr
    assert "account:yearly_charges" in features.stdout
    assert "5 features" in features.stdout
    lineage = run("predictflow", "lineage", "feature_service:my_model_v1", cwd=shop, env=servers)
    assert "column:events.event_type" in lineage.stdout, lineage.stderr

    readme = (shop / "README.md").read_text()
    for command in (
        "feast apply",
        "feast feature-views list",
        "predictflow features",
        "predictflow lineage feature_service:",
    ):
        assert command in readme
    with FeatureRegistry(servers["POSTGRES_URL"], project=project_name(shop)) as registry:
        assert {f.version for f in registry.get_features()} == {1}


def test_an_unset_variable_is_one_line_that_names_it(tmp_path: Path) -> None:
    # The registry's, which Feast would hand to SQLAlchemy; the other sections: tests/unit/test_registry_config_check.py.
    init_project(tmp_path / "shop")
    env = {"REDIS_URL": "redis://127.0.0.1:1/0", "PREDICTFLOW_OFFLINE": str(tmp_path)}
    result = run("feast", "apply", cwd=tmp_path / "shop", env=env)
    assert result.returncode == 2
    assert (
        "Error: POSTGRES_URL is not set (feature_store.yaml, registry.path); next: run `predictflow up`"
        in result.stderr
    )
    assert "Traceback" not in result.stderr


def test_a_directory_with_something_in_it_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / "mine.txt").write_text("mine")
    result = run("predictflow", "init", "shop", cwd=tmp_path)
    assert result.returncode == 2
    assert result.stderr == "Error: directory is not empty: 'shop'; next: name a new directory\n"
    assert written(tmp_path) == ["shop/mine.txt"]
    with pytest.raises(UsageError, match="a file stands where"):
        init_project(tmp_path / "shop" / "mine.txt")


def test_an_empty_directory_and_missing_parents_are_fine(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    assert init_project(tmp_path / "empty") == "empty"
    assert written(tmp_path / "empty") == FILES
    assert init_project(tmp_path / "a" / "b" / "my project.2") == "my_project_2"
    assert project_name(tmp_path / "a" / "b" / "my project.2") == "my_project_2"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a", "empty"]
    with pytest.raises(UsageError, match="no project name"):
        init_project(tmp_path / "---")


@pytest.mark.parametrize("existing", [True, False])
def test_an_interruption_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, existing: bool) -> None:
    if existing:
        (tmp_path / "shop").mkdir()
    rename, count = Path.rename, iter(range(100))

    def interrupted(self: Path, target: Path) -> Path:
        if next(count) == 3:
            raise KeyboardInterrupt
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", interrupted)
    with pytest.raises(KeyboardInterrupt):
        init_project(tmp_path / "shop")
    assert written(tmp_path) == []
    assert (tmp_path / "shop").exists() == existing
    monkeypatch.undo()
    init_project(tmp_path / "shop")
    assert written(tmp_path / "shop") == FILES


def test_a_full_disk_is_a_clear_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(shutil, "copytree", full)
    with pytest.raises(PredictFlowError, match="cannot write the project: No space left on device") as e:
        init_project(tmp_path / "shop")
    assert e.value.exit_code == 1
    assert list(tmp_path.iterdir()) == []


def test_the_template_chooses_the_vendors_of_the_checkout() -> None:
    root = Path(module.__file__).parents[1]
    template = root / "predictflow" / "project_template"
    named = (template / "feature_store.yaml").read_text().replace(module.PROJECT, "predictflow")
    assert named == (root / "feature_store.yaml").read_text()
    assert (template / "feastignore").read_text() == (root / ".feastignore").read_text()
