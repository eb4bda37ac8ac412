"""The `visard` command: joins the sub-commands of the packages."""

import logging
import os
import sys

import typer
from rich.console import Console

from common.errors import VisardError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


def build() -> typer.Typer:
    """All commands."""
    from simulations.cli import generate, simulate

    app = typer.Typer(
        help="Train one face generator together, without showing a photograph to anyone.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("simulate")(simulate)
    app.command("generate")(generate)
    return app


def main() -> None:
    """Run the command; what Visard refuses on purpose is told in one line, without a traceback."""
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        build()()
    except VisardError as error:
        Console(stderr=True).print(f"[bold red]{type(error).__name__}[/]: {error}", highlight=False, soft_wrap=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
