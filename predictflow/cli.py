"""`predictflow`: the command line. Commands live in the `cli_*.py` module of their part and are imported on use."""

from __future__ import annotations

import importlib
import logging
import os
import sys

import click

# command -> the module whose COMMANDS list holds it; importing one part must not cost the others' imports.
MODULES = {
    "up": "cli_services",
    "down": "cli_services",
    "status": "cli_services",
    "env": "cli_services",
    "init": "cli_registry",
    "demo": "cli_demo",
    "data": "cli_data",
    "backfill": "cli_offline",
    "compact": "cli_offline",
    "erase": "cli_offline",
    "windows": "cli_stream",
    "sync": "cli_stream",
    "dlq": "cli_dlq",
    "online": "cli_online",
    "dataset": "cli_training",
    "train": "cli_training",
    "promote": "cli_training",
    "serve": "cli_serve",
    "serve-key": "cli_serve_key",
    "check": "cli_check",
    "features": "cli_registry",
    "lineage": "cli_registry",
    "migrate": "cli_registry",
}


class LazyGroup(click.Group):
    """A click group that imports a command's module when the command is named."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(MODULES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in MODULES:
            return None
        module = importlib.import_module(f"predictflow.{MODULES[cmd_name]}")
        return next(c for c in module.COMMANDS if c.name == cmd_name)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="predictflow")
@click.option("-v", "--verbose", is_flag=True, help="Log more.")
def cli(verbose: bool) -> None:
    """PredictFlow: features that are the same in training, in the stream and in serving."""
    # Feast and MLflow phone home unless told otherwise; a laptop behind a firewall would wait for it.
    os.environ.setdefault("FEAST_USAGE", "False")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    logging.basicConfig(
        level=logging.DEBUG if verbose else logging.INFO,
        format="%(asctime)s %(levelname)s %(name)s %(message)s",
        stream=sys.stderr,
    )
    for noisy in ("feast", "mlflow", "alembic", "urllib3", "sqlalchemy", "faker", "botocore"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def main() -> None:
    """Entry point: usage errors exit 2, failures exit 1, Ctrl-C 130, each with one line."""
    try:
        # Without standalone mode click returns the code of `Exit` instead of leaving with it.
        code = cli.main(standalone_mode=False)
        sys.exit(code if isinstance(code, int) else 0)
    except click.exceptions.Exit as e:
        sys.exit(e.exit_code)
    except click.ClickException as e:
        e.show()
        sys.exit(e.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted; run the same command again to continue", err=True)
        sys.exit(130)


if __name__ == "__main__":
    main()
