"""`visard evaluate`: a finished run's faces beside photographs. What is slow to import is imported when it is used."""

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from common.errors import ConfigError

if TYPE_CHECKING:
    from common.config import RunConfig
    from common.sections import FaceSource
    from simulations.evaluate_report import Section

# Below, five nearest neighbours are not to be had.
_FEWEST = 7
_THE_RUNS = "the run's"

console = Console()


def evaluate(
    run: Annotated[Path, typer.Argument(help="Folder of a finished run")],
    reference: Annotated[
        str, typer.Option(help="Photographs to compare to, read like --data: a folder, an .npz file or a source")
    ],
    holdout: Annotated[
        str | None,
        typer.Option(help="Others of the same source that the run did not learn from, for utility and memorisation"),
    ] = None,
    synthetic: Annotated[int, typer.Option(min=_FEWEST, help="Number of faces to draw")] = 5000,
    by: Annotated[str, typer.Option(help="Attributes to tell fairness by, comma-separated: gender,race")] = "",
    crop: Annotated[
        float | None, typer.Option(help="Share of the shorter side to keep", show_default=_THE_RUNS)
    ] = None,
    detect: Annotated[str | None, typer.Option(help="Find faces: none, largest or all", show_default=_THE_RUNS)] = None,
    attributes: Annotated[
        str | None,
        typer.Option(
            help="CSV of attributes, or 'utkface'; of the reference and the holdout",
            show_default="the run's, where the reference is a folder",
        ),
    ] = None,
    file_column: Annotated[
        str | None, typer.Option(help="The CSV's column of file names", show_default=_THE_RUNS)
    ] = None,
    person_column: Annotated[
        str | None, typer.Option(help="The CSV's column that says who it is", show_default=_THE_RUNS)
    ] = None,
    label_column: Annotated[
        str | None, typer.Option(help="The attribute that the run is conditioned on", show_default=_THE_RUNS)
    ] = None,
    label_values: Annotated[
        str | None, typer.Option(help="Its values in the order of the labels", show_default=_THE_RUNS)
    ] = None,
    network: Annotated[
        str, typer.Option(help="Whose features distances are on: visard-drawn-1 or visard-random-1")
    ] = "visard-drawn-1",
    inception: Annotated[
        Path | None, typer.Option(help="inception-2015-12-05.pt, for true FIDs, in place of --network")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of what is drawn")] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder for evaluation.json and evaluation.md", show_default="RUN")
    ] = None,
) -> None:
    """Judge a finished run's faces beside photographs: fidelity, utility, fairness by group, memorisation.

    The figures are computed from the photographs and carry no privacy promise: keep them where the photographs are.
    """
    if out is not None and out.is_file():
        raise ConfigError(f"{out} is a file: --out names a folder")
    from common.applications.generate import TrainedGenerator
    from common.evaluation.networks import feature_network
    from common.faces import load_faces
    from common.fields import listed
    from common.files import write_atomically
    from common.privacy.planner import promise
    from simulations.evaluate import NOTE, evaluate_run
    from simulations.evaluate_report import sections, to_json, to_markdown

    generator = TrainedGenerator.load(run)
    config = _config(run)
    given = {
        "crop": crop,
        "detect": detect,
        "attributes": attributes,
        "file_column": file_column,
        "person_column": person_column,
        "label_column": label_column,
        "label_values": label_values,
    }
    size, channels = config.model.image_size, config.model.channels
    features = feature_network(network if inception is None else str(inception))
    with _telling() as tell:
        tell("reading the reference")
        real = load_faces(_source(config, reference, given), size, channels)
        others = None
        if holdout is not None:
            tell("reading the holdout")
            others = load_faces(_source(config, holdout, given), size, channels)
        found = evaluate_run(
            run,
            promise(config),
            generator,
            real,
            others,
            synthetic=synthetic,
            by=[name for name in dict.fromkeys(listed(by)) if name],
            network=features,
            seed=seed,
            tell=tell,
        )
    folder = out or run
    folder.mkdir(parents=True, exist_ok=True)
    # Told by the photographs, and the folder of a run is passed on.
    write_atomically(folder / "evaluation.json", (json.dumps(to_json(found), indent=2) + "\n").encode(), private=True)
    write_atomically(folder / "evaluation.md", to_markdown(found).encode(), private=True)
    for section in sections(found):
        console.print(_table(section))
        console.print(escape(section.remark), highlight=False, style="dim")
    for part, reason in found.skipped.items():
        console.print(f"{part} not done: {escape(reason)}", highlight=False, soft_wrap=True)
    console.print(f"[yellow]note:[/] {NOTE}", highlight=False, soft_wrap=True)
    told = escape(f"all figures: {folder / 'evaluation.md'}, {folder / 'evaluation.json'}")
    console.print(told, highlight=False, soft_wrap=True)


def _config(run: Path) -> "RunConfig":
    """As the run was made; of a generator that was passed on, as its card says, which leaves out how faces were read."""
    from common.config import RunConfig
    from common.fields import load_toml

    recipe = run / "config.toml"
    if recipe.exists():
        return RunConfig.from_flat(load_toml(recipe))
    return RunConfig.from_flat(json.loads((run / "generator.json").read_text(encoding="utf-8"))["config"])


def _source(config: "RunConfig", data: str, given: dict[str, str | float | None]) -> "FaceSource":
    """How `data` is read: as the run's own recipe says, but for what is given.

    A recipe's table of attributes is of a folder of images; other sources bring their own, and refuse one.
    """
    from common.sections import FaceSource

    own = {f.name: getattr(config.simulation, f.name) for f in fields(FaceSource)}
    if not Path(data).expanduser().is_dir():
        own |= {"attributes": "", "person_column": ""}
    chosen = {key: value for key, value in given.items() if value is not None}
    return FaceSource(**{**own, **chosen, "data": data})


@contextmanager
def _telling() -> Iterator[Callable[[str], None]]:
    """Says what is being done: beside a spinner on a terminal, else a line each."""
    if not console.is_terminal:
        yield lambda what: console.print(f"{what} ...", highlight=False, markup=False, soft_wrap=True)
        return
    with console.status("") as status:
        yield lambda what: status.update(f"{escape(what)} ...")


def _table(section: "Section") -> Table:
    table = Table(title=escape(section.title), title_justify="left")
    for number, column in enumerate(section.columns):
        table.add_column(escape(column), justify="left" if number == 0 else "right")
    for row in section.rows:
        table.add_row(*("".join(char if char.isprintable() else "?" for char in escape(cell)) for cell in row))
    return table
