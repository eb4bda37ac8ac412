"""The `visard` command: joins the sub-commands of the packages."""

import logging
import os
import signal
import sys
import warnings
from typing import NoReturn

import typer
from rich.console import Console
from rich.markup import escape

from common.errors import VisardError

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


def build() -> typer.Typer:
    """All commands."""
    from client import ledger_cli
    from client.cli import check_command as check_run
    from client.cli import init as init_client
    from client.cli import peers
    from client.cli import start as start_client
    from client.data_cli import check
    from server.cli import start_command
    from simulations.audit.cli import audit
    from simulations.cli import generate, simulate
    from simulations.data_cli import show
    from simulations.plan_cli import plan
    from simulations.recipe import load_recipe

    app = typer.Typer(
        help="Train one face generator together, without showing a photograph to anyone.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
    )
    app.command("plan")(plan)
    app.command("simulate")(simulate)
    app.command("generate")(generate)
    app.command("audit")(audit)
    client = typer.Typer(help="An owner's side: keeps the faces, enforces the budget.", no_args_is_help=True)
    client.command("init")(init_client)
    client.command("check")(check_run(load_recipe))
    client.command("peers")(peers)
    client.command("start")(start_client)
    coordinator = typer.Typer(help="The other side: keeps the generator, sees no photograph.", no_args_is_help=True)
    coordinator.command("start")(start_command(load_recipe))
    coordinator.callback()(lambda: None)
    data = typer.Typer(help="Faces before a run: what an owner holds, and who holds what.", no_args_is_help=True)
    data.command("check")(check)
    data.command("show")(show)
    ledger = typer.Typer(help="What was spent of an owner's budget.", no_args_is_help=True)
    ledger.command("show")(ledger_cli.show)
    ledger.command("verify")(ledger_cli.verify)
    ledger.command("export")(ledger_cli.export)
    ledger.command("adopt")(ledger_cli.adopt)
    app.add_typer(ledger, name="ledger")
    app.add_typer(client, name="client")
    app.add_typer(coordinator, name="coordinator")
    app.add_typer(data, name="data")
    return app


def _show_warning(message: Warning | str, category: type[Warning], *_args: object, **_kwargs: object) -> None:
    """Ours are meant for the user; those of libraries are not."""
    if category.__module__.startswith("common."):
        Console(stderr=True).print(f"[yellow]note:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def _leave(number: int, _frame: object) -> NoReturn:
    """Leave through the context managers: a command that is terminated leaves no copies of faces behind."""
    raise SystemExit(128 + number)


def main() -> None:
    """Run the command; what Visard refuses on purpose is told in one line, without a traceback."""
    warnings.showwarning = _show_warning
    signal.signal(signal.SIGTERM, _leave)
    logging.basicConfig(level=logging.WARNING, format="%(name)s: %(message)s")
    try:
        build()()
    except (VisardError, OSError) as error:
        Console(stderr=True).print(
            f"[bold red]{type(error).__name__}[/]: {escape(str(error))}", highlight=False, soft_wrap=True
        )
        sys.exit(1)


if __name__ == "__main__":
    main()
