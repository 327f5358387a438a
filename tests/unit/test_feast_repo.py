"""What `feast apply` scans: only features/*.py, each definition documented, owned and expiring (ADR 001, ADR 005)."""

from __future__ import annotations

import importlib.util
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
from feast.repo_contents import RepoContents
from feast.repo_operations import get_repo_files, parse_repo

from feature_store.windows.definition import definition_of
from predictflow.init_project import init_project

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def repo() -> Iterator[RepoContents]:
    """The definitions as `feast apply` finds them, from the checkout; once, as the scan walks .venv too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.syspath_prepend(str(ROOT))
        yield parse_repo(ROOT)


def test_the_scan_finds_exactly_the_files_of_features() -> None:
    found = {p.relative_to(ROOT).as_posix() for p in get_repo_files(ROOT)}
    assert found == {
        f"features/{name}.py"
        for name in ("entities", "sources", "customer_features", "behavioral_features", "services")
    }


def test_a_new_directory_of_any_first_letter_stays_out_of_the_scan(tmp_path: Path) -> None:
    (tmp_path / ".feastignore").write_text((ROOT / ".feastignore").read_text())
    for place in ("features", "feature_store", "feature_store/windows", "tests", "zoo", "fixtures", "notebooks"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "module.py").touch()
    (tmp_path / "setup.py").touch()
    assert [p.relative_to(tmp_path.resolve()).as_posix() for p in get_repo_files(tmp_path)] == ["features/module.py"]


def test_the_scan_of_a_new_project_finds_its_two_feature_files(tmp_path: Path) -> None:
    init_project(tmp_path / "shop")
    found = [p.name for p in get_repo_files(tmp_path / "shop")]
    assert found == ["account.py", "activity.py"]


def test_every_view_has_an_owner_a_description_and_a_ttl(repo: RepoContents) -> None:
    assert {v.name for v in repo.feature_views} >= {"churn_features", "customer_behavior"}
    assert [v.name for v in repo.feature_views if not (v.owner and v.description and v.ttl)] == []
    assert [s.name for s in repo.feature_services if not (s.owner and s.description)] == []


def test_every_field_has_a_description_and_a_unit(repo: RepoContents) -> None:
    fields = [(v.name, f) for v in repo.feature_views for f in v.features]
    assert len(fields) >= 10
    assert [f"{v}:{f.name}" for v, f in fields if not (f.description and f.tags.get("unit"))] == []


def test_churn_v1_reads_both_views_and_no_internal_state(repo: RepoContents) -> None:
    service = next(s for s in repo.feature_services if s.name == "churn_v1")
    assert {p.name for p in service.feature_view_projections} == {"churn_features", "customer_behavior"}
    read = {f.name for p in service.feature_view_projections for f in p.features}
    assert "tenure_months" in read
    assert "window_state" not in read


def test_source_paths_name_no_machine_and_windowed_views_carry_their_definition(repo: RepoContents) -> None:
    paths = {v.name: v.batch_source.path for v in repo.feature_views}
    assert paths == {"churn_features": "churn_features", "customer_behavior": "customer_events"}
    windowed = {v.name for v in repo.feature_views if definition_of(v.batch_source)}
    assert windowed == {"customer_behavior"}


def test_features_is_not_an_installed_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    # An installed `features` would win over the one in the directory where a user runs `feast apply`.
    include = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"]["find"]["include"]
    assert not [pattern for pattern in include if pattern.startswith(("features", "*"))]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p and Path(p).resolve() != ROOT])
    monkeypatch.delitem(sys.modules, "features", raising=False)
    assert importlib.util.find_spec("features") is None
