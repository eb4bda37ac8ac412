"""`visard coordinator start`. What is slow to import is imported when it is used."""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from common.config import RunConfig
from common.fields import Scalar
from common.options import with_run_options
from common.privacy.units import PrivacyModel
from server.summary import RUNS_DIR, closing_table, run_directory, stopped

console = Console()

_ADDRESS = "127.0.0.1:9092"

LoadRecipe = Callable[[str, Mapping[str, Scalar]], RunConfig]


def start_command(load_recipe: LoadRecipe) -> Callable[..., None]:
    """The command. `load_recipe` turns a recipe's name or path, and the options given, into a configuration."""

    def start(
        recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a path to a .toml")] = "demo",
        address: Annotated[str, typer.Option(help="HOST:PORT to listen on, loopback only")] = _ADDRESS,
        name: Annotated[str | None, typer.Option(help="Name of the run's folder", show_default="the recipe's")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run")] = False,
        runs_dir: Annotated[Path, typer.Option(help="Folder of all runs")] = RUNS_DIR,
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """Train with the clients that connect (`visard client start`), each a process of its own with its own faces.

        Starts each round with the clients that are connected then, once there are --min-clients.

        TLS, node keys and supervision are a later addition: until then it listens on loopback only, and all processes are on this
        machine.
        """
        directory = run_directory(runs_dir, Path(recipe).stem if name is None else name)
        config = None if resume else load_recipe(recipe, overrides or {})
        with console.status("starting"):
            from common.privacy.planner import promise
            from server.app import open_run, run
            from server.progress import PlainProgress, ProgressBar
            from server.superlink import superlink_grid

            state = open_run(directory, config, overrides or {})
        promised = promise(state.config)
        private = state.config.privacy.privacy_model is not PrivacyModel.NONE
        console.print(
            promised if private else Panel(f"[bold]{promised}[/]", style="white on red"),
            highlight=False,
        )
        try:
            with superlink_grid(address, directory) as grid:
                console.print(
                    f"{directory}: waiting for {state.config.training.min_clients} clients or more; start each with\n"
                    f"  visard client start --coordinator {address} --policy owner.toml",
                    highlight=False,
                    soft_wrap=True,
                )
                if console.is_terminal:
                    with ProgressBar(console, state) as bar:
                        picture = run(grid, state, directory, [bar])
                else:
                    picture = run(grid, state, directory, [PlainProgress()])
        except KeyboardInterrupt:
            command = ["visard", "coordinator", "start"] + (["--address", address] if address != _ADDRESS else [])
            console.print(stopped(directory, command), highlight=False, markup=False, soft_wrap=True)
            sys.exit(130)
        console.print(closing_table(state, directory))
        console.print(f"faces: {picture}\nmore:  visard generate {directory} -n 64", highlight=False, soft_wrap=True)

    return with_run_options(start, ("model", "privacy", "augmentation", "moments", "training"))
