"""`predictflow data`: raw data of a source, checked, into one directory."""

from __future__ import annotations

from pathlib import Path

import click


@click.command("data")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Directory to write; replaced as a whole.")
@click.option("--source", help="telco, online_retail, or your own as package.module:ClassName.  [default: by --path]")
@click.option("--path", type=click.Path(path_type=Path), help="The source's input file, e.g. online_retail.csv.gz.")
@click.option("--customers", type=int, help="Customers to simulate.  [default: 2000]")
@click.option("--days", type=int, help="Days to simulate.  [default: 270]")
@click.option("--seed", type=int, help="Seed of the simulation.  [default: 7]")
def data(
    out: Path, source: str | None, path: Path | None, customers: int | None, days: int | None, seed: int | None
) -> None:
    """Write raw data: accounts, events, labels, rejects and a summary.

    Without --source and --path the telco simulator runs. The same options and input give the same bytes.
    """
    from predictflow.progress import progress
    from predictflow.sources.base import SourceOptions
    from predictflow.sources.raw import publish
    from predictflow.sources.registry import choose

    adapter = choose(source, path)(SourceOptions(path, customers, days, seed))
    summary = publish(out, lambda raw_dir: adapter.write(raw_dir, progress))
    click.echo(
        f"{summary.dataset}: {summary.customers:,} customers, {summary.events:,} events, {summary.rejected:,} rejected\n"
        f"  from {summary.start:%Y-%m-%d} to {summary.end:%Y-%m-%d}, live stream from {summary.cut:%Y-%m-%d %H:%M} UTC"
    )
    for reason, count in sorted(summary.rejected_by_reason.items(), key=lambda item: -item[1]):
        click.echo(f"  rejected {count:,}: {reason}")
    click.echo(f"  written to {out}")


COMMANDS = [data]
