"""`visard coordinator start`. What is slow to import is imported when it is used."""

import re
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from common.config import RunConfig, Scalar
from common.errors import ConfigError
from common.options import with_run_options

console = Console()

LoadRecipe = Callable[[str, Mapping[str, Scalar]], RunConfig]


def start_command(load_recipe: LoadRecipe) -> Callable[..., None]:
    """The command. `load_recipe` turns a recipe's name or path, and the options given, into a configuration."""

    def start(
        recipe: Annotated[str, typer.Argument(help="Name of a recipe, or a path to a .toml")] = "demo",
        address: Annotated[str, typer.Option(help="HOST:PORT to listen on, loopback only")] = "127.0.0.1:9092",
        name: Annotated[str | None, typer.Option(help="Name of the run's folder [the recipe's]")] = None,
        resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run")] = False,
        runs_dir: Annotated[Path, typer.Option(help="Folder of all runs")] = Path("runs"),
        overrides: dict[str, Any] | None = None,
    ) -> None:
        """Train with the clients that connect (`visard client start`), each a process of its own with its own faces.

        Starts each round with the clients that are connected then, once there are --min-clients.

        TLS, node keys and supervision are a later addition: until then it listens on loopback only, and all processes are on this
        machine.
        """
        directory = runs_dir / _checked(name or Path(recipe).stem)
        if resume and overrides:
            raise ConfigError(
                f"a resumed run keeps its configuration: leave out --{', --'.join(overrides)}, or start a new run"
            )
        config = None if resume else load_recipe(recipe, overrides or {})
        with console.status("starting"):
            from server.app import open_run, run
            from server.coordinator import describe
            from server.progress import PlainProgress, ProgressBar
            from server.superlink import superlink_grid

            state = open_run(directory, config)
        promise = describe(state.config)
        console.print(
            Panel(f"[bold]{promise}[/]", style="white on red") if promise.startswith("NO PRIVACY") else promise,
            highlight=False,
        )
        try:
            with superlink_grid(address, directory) as grid:
                console.print(
                    f"{directory}: waiting for {state.config.training.min_clients} clients or more; start each with\n"
                    f"  visard client start --coordinator {address} --data FOLDER",
                    highlight=False,
                    soft_wrap=True,
                )
                if console.is_terminal:
                    with ProgressBar(console, state) as bar:
                        picture = run(grid, state, directory, [bar])
                else:
                    picture = run(grid, state, directory, [PlainProgress()])
        except KeyboardInterrupt:
            console.print(
                f"\nstopped; nothing is lost. Go on with: visard coordinator start --name {directory.name} --resume",
                highlight=False,
            )
            sys.exit(130)
        console.print(
            f"done\nfaces: {picture}\nmore:  visard generate {directory} -n 64", highlight=False, soft_wrap=True
        )

    return with_run_options(start, ("model", "privacy", "moments", "training"))


def _checked(name: str) -> str:
    if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
        raise ConfigError(f"--name {name!r}: letters, digits, '-', '_' and '.' only, not beginning with '.'")
    return name
