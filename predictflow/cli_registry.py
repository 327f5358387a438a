"""`predictflow features`, `lineage`, `migrate` and `init`: the catalogue on Postgres, and a project of one's own."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from feature_store.errors import NotFoundError

if TYPE_CHECKING:
    from feature_store.registry import FeatureRegistry


@click.command()
@click.option("--group", help="Only this feature view.")
@click.option("--owner", help="Only this owner's.")
@click.option("--search", help="Only those that have every word of this somewhere: name, description, unit, tags.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON, definitions included.")
def features(group: str | None, owner: str | None, search: str | None, as_json: bool) -> None:
    """List the features that `feast apply` registered: version, type, unit, owner, description."""
    with _registry() as registry:
        found = registry.get_features(group, owner, search)
        if not found:
            everything = registry.get_features()
            if not everything:
                raise NotFoundError(f"no features in project {registry.project}", next_step="feast apply")
            _require("group", group, {f.group for f in everything})
            _require("owner", owner, {f.owner for f in everything})
    if as_json:
        rows = [
            {
                "feature": f.full_name,
                "version": f.version,
                "dtype": f.dtype,
                "unit": f.unit,
                "owner": f.owner,
                "description": f.description,
                "tags": dict(f.tags),
                "definition": dict(f.definition),
                "created_at": f.created_at.isoformat(),
            }
            for f in found
        ]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    header = ("FEATURE", "VERSION", "TYPE", "UNIT", "OWNER", "DESCRIPTION")
    _table([header, *[(f.full_name, str(f.version), f.dtype, f.unit, f.owner, f.description) for f in found]])
    click.echo(f"{len(found)} features")


@click.command()
@click.argument("node")
@click.option("--upstream/--downstream", default=True, show_default=True, help="What it was made from, or made into.")
@click.option("--depth", type=click.IntRange(min=1), help="Follow at most so many edges (default: all).")
@click.option("--json", "as_json", is_flag=True, help="Print the edges as JSON, with transformation, run and times.")
def lineage(node: str, upstream: bool, depth: int | None, as_json: bool) -> None:
    """Show what NODE was made from, or what was made from it.

    NODE is kind:name, such as feature:churn_features:tenure_months, column:events.quantity or
    model_version:churn-predictor/3.
    """
    from feature_store.lineage import Node, tree

    start = Node.parse(node)
    with _registry() as registry:
        steps = registry.upstream(start, depth) if upstream else registry.downstream(start, depth)
    if as_json:
        rows = [
            {
                "depth": s.depth,
                "source": str(s.edge.source),
                "target": str(s.edge.target),
                "transformation_kind": s.edge.transformation_kind,
                "transformation": s.edge.transformation,
                "run_id": s.run_id,
                "recorded_at": s.recorded_at.isoformat(),
                "last_recorded_at": s.last_recorded_at.isoformat(),
            }
            for s in steps
        ]
        click.echo(json.dumps(rows, indent=1, ensure_ascii=False))
        return
    for line in tree(steps, start, upstream=upstream):
        click.echo(line)


@click.command()
def migrate() -> None:
    """Bring the predictflow schema in Postgres up to date. Safe to run at any time, and twice."""
    with _registry() as registry:
        taken = registry.migrate()
    click.echo(f"applied {', '.join(taken)}" if taken else "the schema is up to date")


@click.command()
@click.argument("directory", type=click.Path(path_type=Path))
def init(directory: Path) -> None:
    """Write a small project of your own into DIRECTORY (new or empty): feature_store.yaml and two feature files."""
    from predictflow.init_project import init_project

    project = init_project(directory)
    click.echo(f"project {project} in {directory}")
    activate = Path(sys.executable).parent / "activate"
    click.echo(f"next: source {activate} && cd {directory} && feast apply   (README.md there has the rest)")


def _registry() -> FeatureRegistry:
    from feature_store.registry import FeatureRegistry
    from predictflow.project import project_name
    from predictflow.settings import Settings

    settings = Settings.from_environ()
    return FeatureRegistry(settings.need("postgres_url"), project_name(settings.repo))


def _require(what: str, value: str | None, valid: set[str]) -> None:
    if value is not None and value not in valid:
        raise NotFoundError(f"no feature has this {what}", value=value, valid=valid)


def _table(rows: Sequence[Sequence[str]]) -> None:
    """Columns aligned; on a terminal the last one is cut to its width, in a pipe nothing is."""
    import sys

    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    limit = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=False)]
        click.echo("  ".join([*cells, row[-1]]).rstrip()[:limit])


COMMANDS = [features, lineage, migrate, init]
