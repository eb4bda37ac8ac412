"""The `visard` command: joins the sub-commands of the packages."""

# Little is imported here, and the rest once `main` has taken the signals.
import functools
import os
import signal
import sys
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NoReturn

if TYPE_CHECKING:
    import typer

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")


def build() -> "typer.Typer":
    """All commands."""
    import typer

    from client import ledger_cli
    from client.cli import check_command as check_run
    from client.cli import init as init_client
    from client.cli import peers
    from client.data_cli import check
    from client.join import fingerprint, join
    from client.node_cli import start as start_client
    from client.node_cli import status as node_status
    from server import cli as coordinator_cli
    from server import deployment_cli
    from simulations.audit.cli import audit
    from simulations.cli import generate, simulate
    from simulations.data_cli import show
    from simulations.evaluate_cli import evaluate
    from simulations.plan_cli import plan
    from simulations.recipe import load_recipe
    from simulations.recognise_cli import app as recognition

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
    app.command("evaluate")(evaluate)
    client = typer.Typer(help="An owner's side: keeps the faces, enforces the budget.", no_args_is_help=True)
    client.command("init")(init_client)
    client.command("check")(check_run(load_recipe))
    client.command("peers")(peers)
    client.command("join")(join)
    client.command("fingerprint")(fingerprint)
    client.command("start")(start_client)
    client.command("status")(node_status)
    coordinator = typer.Typer(help="The other side: keeps the generator, sees no photograph.", no_args_is_help=True)
    coordinator.command("init")(deployment_cli.init_command(load_recipe))
    coordinator.command("invite")(deployment_cli.invite)
    coordinator.command("nodes")(deployment_cli.nodes)
    coordinator.command("start")(coordinator_cli.start)
    coordinator.command("status")(coordinator_cli.status)
    coordinator.command("stop")(coordinator_cli.stop)
    worker = coordinator.command("worker", hidden=True)(coordinator_cli.worker_command(load_recipe))
    data = typer.Typer(help="Faces before a run: what an owner holds, and who holds what.", no_args_is_help=True)
    data.command("check")(check)
    data.command("show")(show)
    recognise = recognition()
    ledger = typer.Typer(help="What was spent of an owner's budget.", no_args_is_help=True)
    ledger.command("show")(ledger_cli.show)
    ledger.command("verify")(ledger_cli.verify)
    ledger.command("export")(ledger_cli.export)
    ledger.command("adopt")(ledger_cli.adopt)
    app.add_typer(ledger, name="ledger")
    app.add_typer(client, name="client")
    app.add_typer(coordinator, name="coordinator")
    app.add_typer(data, name="data")
    app.add_typer(recognise, name="recognise")
    for group in (app, client, coordinator, data, ledger, recognise):
        for command in group.registered_commands:
            # These two take signals otherwise.
            if command.callback is not None and command.callback not in (coordinator_cli.start, worker):
                command.callback = _leaving_in_order(command.callback)
    return app


def _show_warning(message: Warning | str, category: type[Warning], *_args: object, **_kwargs: object) -> None:
    """Ours are meant for the user; those of libraries are not."""
    if category.__module__.startswith("common."):
        from rich.console import Console
        from rich.markup import escape

        Console(stderr=True).print(f"[yellow]note:[/] {escape(str(message))}", highlight=False, soft_wrap=True)


def _leave(number: int, _frame: object) -> NoReturn:
    """Leave through the context managers: a command that is terminated leaves no copies of faces behind."""
    raise SystemExit(128 + number)


def _leave_at_once(number: int, _frame: object) -> NoReturn:
    """Before a command begins there is nothing to take down, and what is raised within an import may be swallowed."""
    os._exit(128 + number)


def _leaving_in_order(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command, which from its beginning on is left through its context managers."""

    @functools.wraps(command)
    def begin(*args: Any, **kwargs: Any) -> Any:
        signal.signal(signal.SIGTERM, _leave)
        if signal.getsignal(signal.SIGINT) is _leave_at_once:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return command(*args, **kwargs)

    return begin


def main() -> None:
    """Run the command; what Visard refuses on purpose is told in one line, without a traceback."""
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    signal.signal(signal.SIGTERM, _leave_at_once)
    if handlers[signal.SIGINT] is signal.default_int_handler:
        signal.signal(signal.SIGINT, _leave_at_once)
    import logging

    from common.errors import VisardError
    from common.telling import PlainFormatter, tell_error

    warnings.showwarning = _show_warning
    printing = logging.StreamHandler()
    printing.setFormatter(PlainFormatter("%(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[printing])
    try:
        build()()
    except (VisardError, OSError) as error:
        tell_error(error)
        sys.exit(1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


if __name__ == "__main__":
    main()
