"""`predictflow dataset`, `train` and `promote`: from labels to a registered champion."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime
from pathlib import Path

import click

from predictflow.settings import Settings
from training.model import TrainParams

DEFAULT = TrainParams()
DIRECTORY = click.Path(path_type=Path, file_okay=False)


@click.command()
@click.option("--raw", type=DIRECTORY, required=True, help="Raw directory: labels.parquet and summary.json.")
@click.option("--out", type=DIRECTORY, required=True, help="Directory for point_in_time.parquet and leaky.parquet.")
@click.option("--service", default="churn_v1", show_default=True, help="Feature service: the model's input.")
@click.option("--offline", help="Offline store directory; default: PREDICTFLOW_OFFLINE.")
def dataset(raw: Path, out: Path, service: str, offline: str | None) -> None:
    """Join labels with the features known at each label's own time (and the leaky way, for comparison)."""
    from predictflow.wiring import feast_store, feature_registry, run_id
    from training.dataset import build_both, lineage_of
    from training.raw import RawSummary, read_labels

    if offline is not None:
        os.environ["PREDICTFLOW_OFFLINE"] = str(Path(offline).absolute())  # feature_store.yaml reads the variable
    settings = Settings.from_environ()
    summary = RawSummary.read(raw)
    labels = read_labels(raw, summary)
    sets = build_both(feast_store(settings), labels, summary.dataset, service, summary.cut)
    for variant, training_set in sets.items():
        training_set.save(out / f"{variant}.parquet")
        click.echo(f"{out / variant}.parquet: {training_set.table.num_rows:,} rows, {training_set.name}")
    names = " ".join(s.name for s in sets.values())
    feature_registry(settings).record_lineage(
        lineage_of(sets.values()), at=datetime.now(UTC), run_id=run_id("dataset", names)
    )


@click.command()
@click.option("--training", type=DIRECTORY, required=True, help="Directory that `predictflow dataset` wrote.")
@click.option("--raw", type=DIRECTORY, required=True, help="Raw directory: summary.json has the time limits.")
@click.option("--out", type=DIRECTORY, required=True, help="Directory for metrics.json.")
@click.option(
    "--held-out", type=float, default=DEFAULT.held_out, show_default=True, help="Share of customers kept out."
)
@click.option("--knots", type=click.IntRange(2), default=DEFAULT.knots, show_default=True, help="Knots per number.")
@click.option(
    "--regularisation",
    type=click.FloatRange(0, min_open=True),
    default=DEFAULT.regularisation,
    show_default=True,
    help="Strength of the penalty on large coefficients.",
)
@click.option("--seed", type=int, default=DEFAULT.seed, show_default=True, help="Seed of the model.")
def train(training: Path, raw: Path, out: Path, held_out: float, knots: int, regularisation: float, seed: int) -> None:
    """Train on point-in-time features (and on leaky ones, for comparison), track both, register the first as champion."""
    from predictflow.wiring import feature_registry, model_tracker
    from training.train import train as run_training

    settings = Settings.from_environ()
    tracker = model_tracker(settings)
    metrics = run_training(
        training,
        raw,
        out,
        tracker=tracker,
        registry=feature_registry(settings),
        params=TrainParams(held_out=held_out, knots=knots, regularisation=regularisation, seed=seed),
        at=datetime.now(UTC),
        tags=_git_commit(settings.repo),
        dvc_lock=Path("dvc.lock"),
    )
    click.echo(f"{metrics['model']} version {metrics['model_version']} is champion; data {metrics['data_version']}")
    for name, value in metrics["auc"].items():
        click.echo(f"AUC {name:14} {'unknown' if value is None else f'{value:.4f}'}")


@click.command()
@click.argument("version")
@click.option("--force", is_flag=True, help="Even when its AUC on held-out customers is below the champion's.")
def promote(version: str, force: bool) -> None:
    """Make VERSION of the registered model the champion, if it is not worse than the present one."""
    from predictflow.wiring import model_tracker
    from training.promote import promote as run_promotion

    tracker = model_tracker(Settings.from_environ())
    done = run_promotion(tracker, version, force)
    was = "there was none" if done.before is None else f"it was version {done.before}"
    click.echo(f"{tracker.model} version {done.after} is champion; {was}")


def _git_commit(repo: Path) -> dict[str, str]:
    """The commit of the definitions as a tag; nothing where they are not under git, or git is not installed."""
    try:
        done = subprocess.run(
            ["git", "-C", str(repo), "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return {}
    return {"git_commit": done.stdout.strip()} if done.returncode == 0 else {}


COMMANDS = [dataset, train, promote]
