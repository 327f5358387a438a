"""`predictflow demo`: the main job on real servers, from raw data to a checked prediction."""

from __future__ import annotations

from pathlib import Path

import click


@click.command()
@click.option(
    "--data",
    "path",
    type=click.Path(path_type=Path),
    help="UCI Online Retail CSV (or .csv.gz) instead of the simulator.",
)
@click.option("--customers", type=click.IntRange(min=200), default=2000, show_default=True, help="Simulated customers.")
@click.option("--days", type=click.IntRange(min=150), default=270, show_default=True, help="Simulated days.")
@click.option("--seed", type=int, default=7, show_default=True, help="Seed of the simulator.")
@click.option("--events", type=click.IntRange(min=100), default=2000, show_default=True, help="Live events to stream.")
def demo(path: Path | None, customers: int, days: int, seed: int, events: int) -> None:
    """Run the whole platform: data, backfill, apply, train, stream, serve, check, report.

    Leaves the servers running; `predictflow down` stops them. Run it again: finished steps are not repeated.
    """
    from predictflow.demo.run import Options, run
    from predictflow.settings import Settings

    run(Settings.from_environ(), Options(path, customers, days, seed, events))


COMMANDS = [demo]
