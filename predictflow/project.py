"""The name of the Feast project in a directory: it keeps one project's features, lineage and keys apart from another's."""

from __future__ import annotations

import os
from pathlib import Path

from feature_store.errors import DataError

DEFAULT = "predictflow"


def project_name(repo: Path) -> str:
    """`project` of `repo`/feature_store.yaml, read without Feast (seconds of imports); DEFAULT where there is no file.

    DataError for a file that is no YAML or names no project.
    """
    path = repo / "feature_store.yaml"
    if not path.is_file():
        return DEFAULT
    import yaml

    try:
        content = yaml.safe_load(os.path.expandvars(path.read_text(encoding="utf-8")))
    except yaml.YAMLError as e:
        raise DataError(f"{path} is not YAML: {' '.join(str(e).split())}") from e
    name = content.get("project") if isinstance(content, dict) else None
    if not isinstance(name, str) or not name:
        raise DataError(f"{path} names no project", next_step="add a line `project: my_project`")
    return name
