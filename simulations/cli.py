"""`visard simulate` and `visard generate`. What is slow to import is imported when it is used."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.panel import Panel

from common.options import with_run_options
from common.privacy.units import PrivacyModel
from server.summary import RUNS_DIR, closing_table, run_directory, stopped
from simulations.recipe import load_recipe, recipe_names

console = Console()


def _simulate(
    recipe: Annotated[str, typer.Argument(help=f"{', '.join(recipe_names())}, or a path to a .toml")] = "demo",
    name: Annotated[
        str | None, typer.Option(help="Name of the run's folder", show_default="the recipe's, numbered")
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run")] = False,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all runs")] = RUNS_DIR,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Train on one machine: a coordinator and simulated clients, each with its own faces, noise and ledger."""
    directory = _directory(runs_dir, recipe, name, resume)
    config = None
    if not resume:
        config = load_recipe(recipe, overrides or {})

    from common.privacy.planner import noise_told, promise
    from server.progress import PlainProgress, ProgressBar
    from simulations.simulate import declared_against_held, prepare, simulate

    with console.status("reading faces"):
        state, faces = prepare(directory, config, overrides or {})
    config = state.config
    private = config.privacy.privacy_model is not PrivacyModel.NONE
    promised = promise(config)
    if private:
        console.print(f"{promised}; {noise_told(config)}", highlight=False)
    else:
        console.print(Panel(f"[bold]{promised}[/]", style="white on red"))
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
        command = ["visard", "simulate", recipe]
        console.print(stopped(directory, command), highlight=False, markup=False, soft_wrap=True)
        sys.exit(130)
    table = closing_table(state, directory)
    if outcome.ledgers:
        most, tight = max(outcome.ledgers)
        table.add_row(f"worst of {len(outcome.ledgers)} ledgers", f"{most:.3f} of the budget used; {tight:.3f} by PRV")
    console.print(table)
    console.print(
        f"faces: {outcome.picture}\nmore:  visard generate {directory} -n 64", highlight=False, soft_wrap=True
    )


def generate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run")],
    count: Annotated[int, typer.Option("-n", "--count", min=1, help="Number of images")] = 64,
    label: Annotated[int | None, typer.Option(help="Draw this label only")] = None,
    seed: Annotated[int, typer.Option(help="Seed of the latents")] = 0,
    out: Annotated[Path | None, typer.Option(help="Folder to write to", show_default="RUN/generated")] = None,
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
    if name is not None:
        return run_directory(runs_dir, name)
    stem = run_directory(runs_dir, Path(recipe).stem).name
    number = 1
    while (runs_dir / _numbered(stem, number)).exists():
        number += 1
    return runs_dir / _numbered(stem, max(number - 1, 1) if resume else number)


def _numbered(stem: str, number: int) -> str:
    return stem if number == 1 else f"{stem}-{number}"
