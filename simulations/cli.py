"""`visard simulate` and `visard generate`. What is slow to import is imported when it is used."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel
from rich.table import Table

from common.config import Scalar
from common.errors import ConfigError
from common.options import with_run_options
from simulations.recipe import load_recipe, recipe_names

if TYPE_CHECKING:
    from simulations.simulate import Outcome

console = Console()


def _simulate(
    recipe: Annotated[str, typer.Argument(help=f"{', '.join(recipe_names())}, or a path to a .toml")] = "demo",
    name: Annotated[str | None, typer.Option(help="Name of the run's folder [the recipe's, numbered]")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run")] = False,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs")] = Path("runs"),
    overrides: dict[str, Any] | None = None,
) -> None:
    """Train on one machine: a coordinator and simulated clients, each with its own faces, noise and ledger."""
    directory = _directory(runs_dir, recipe, name, resume)
    config = None
    if not resume:
        config = load_recipe(recipe, _absolute(overrides or {}))
    elif overrides:
        raise ConfigError(
            f"a resumed run keeps its configuration: leave out --{', --'.join(overrides)}, or start a new run"
        )

    from server.coordinator import describe
    from server.progress import PlainProgress, ProgressBar
    from simulations.simulate import declared_against_held, prepare, simulate

    with console.status("reading faces"):
        state, faces = prepare(directory, config)
    config = state.config
    private = config.privacy.privacy_model != "none"
    promise = describe(config)
    if private:
        console.print(f"{promise}; noise multiplier {config.privacy.noise_multiplier:.4g}", highlight=False)
    else:
        console.print(Panel(f"[bold]{promise}[/]", style="white on red"))
    if private and (remark := declared_against_held(config, faces)):
        console.print(f"[yellow]note:[/] {remark}", highlight=False, soft_wrap=True)
    console.print(f"{len(faces)} faces, {config.simulation.num_clients} clients -> {directory}", highlight=False)
    try:
        if console.is_terminal:
            with ProgressBar(console, state) as bar:
                outcome = simulate(directory, state, faces, [bar])
        else:
            outcome = simulate(directory, state, faces, [PlainProgress()])
    except KeyboardInterrupt:
        console.print(
            f"\nstopped; nothing is lost. Go on with: visard simulate {recipe} --name {directory.name} --resume"
        )
        sys.exit(130)
    console.print(_closing_table(outcome))
    console.print(
        f"faces: {outcome.picture}\nmore:  visard generate {directory} -n 64", highlight=False, soft_wrap=True
    )


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of images")] = 64,
    label: Annotated[int | None, typer.Option(help="Draw this label only")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the latents")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to [RUN/generated]")] = None,
) -> None:
    """Draw synthetic faces from a finished run: one PNG each, and a sheet of all."""
    from common.applications.generate import TrainedGenerator
    from common.pictures import save_grid, save_png

    images, labels = TrainedGenerator.load(run).draw(count, seed, label)
    folder = out or run / "generated"
    folder.mkdir(parents=True, exist_ok=True)
    for index, image in enumerate(images):
        suffix = "" if labels is None else f"-label{labels[index]}"
        save_png(folder / f"synthetic-{index:05d}{suffix}.png", image)
    save_grid(folder / "sheet.png", images[:400])
    console.print(f"{count} synthetic images and sheet.png in {folder}", highlight=False, soft_wrap=True)


simulate = with_run_options(_simulate)


def _directory(runs_dir: Path, recipe: str, name: str | None, resume: bool) -> Path:
    """runs/NAME. Without a name: the recipe's, with the next free number, or the latest where one is resumed."""
    if name:
        if not re.fullmatch(r"[\w.-]+", name) or name.startswith("."):
            raise ConfigError(f"--name {name!r}: letters, digits, '-', '_' and '.' only, not beginning with '.'")
        return runs_dir / name
    stem = Path(recipe).stem
    number = 1
    while (runs_dir / _numbered(stem, number)).exists():
        number += 1
    return runs_dir / _numbered(stem, max(number - 1, 1) if resume else number)


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"


def _absolute(overrides: dict[str, Scalar]) -> dict[str, Scalar]:
    """A run is resumed from anywhere: a data path is kept absolute."""
    data = overrides.get("data")
    if isinstance(data, str) and not data.startswith("procedural:"):
        return {**overrides, "data": str(Path(data).expanduser().resolve())}
    return overrides


def _closing_table(outcome: "Outcome") -> Table:
    state = outcome.state
    table = Table(show_header=False, title=f"{outcome.picture.parent.parent.name}: done", title_justify="left")
    table.add_row("rounds", f"{state.next_round - 1}")
    table.add_row("generator steps", f"{state.generator_steps}")
    table.add_row("time", f"{state.seconds / 60:.1f} min")
    for figure in ("moment_loss", "generator_loss", "fake_accuracy"):
        if figure in state.last:
            table.add_row(figure.replace("_", " "), f"{state.last[figure]:.4g}")
    if outcome.ledgers:
        most, tight = max(outcome.ledgers)
        table.add_row(
            f"epsilon spent, worst of {len(outcome.ledgers)} ledgers",
            f"{most:.3f} by RDP, {tight:.3f} by PRV, of {state.config.privacy.epsilon:g} (delta {state.config.privacy.delta:g})",
        )
    else:
        table.add_row("epsilon", "[bold red]infinite: no privacy[/]")
    return table
