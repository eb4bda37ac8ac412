"""`visard recognise`: face recognition at the owner of the photographs. What is slow to import is imported when it is used."""

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.fields import listed
from common.options import with_section_options
from common.recognition.settings import RecognitionConfig
from server.summary import run_directory
from simulations.recognise_report import shown_name, tables_of

if TYPE_CHECKING:
    from common.recognition.training import Observer

console = Console()
# Not among the runs: of those files are passed on, and of these none.
FOLDER = Path("recognisers")

Data = Annotated[
    list[str], typer.Option("--data", help="Folder of persons' folders, or another source; again for more")
]
Attributes = Annotated[str, typer.Option(help="CSV of attributes, a row an image, or 'utkface'")]
FileColumn = Annotated[str, typer.Option(help="The CSV's column of file names")]
PersonColumn = Annotated[str, typer.Option(help="The CSV's column that says who it is")]
Listed = Annotated[Path | None, typer.Option("--pairs", help="A list of pairs in the manner of LFW's pairs.txt")]
Folds = Annotated[str, typer.Option(help="Folds of that list, comma-separated; empty: all")]
Threshold = Annotated[float | None, typer.Option(help="Cosine from which two are one", show_default="the recogniser's")]
Run = Annotated[Path, typer.Argument(help="Folder of a trained recogniser")]


def _train(
    data: Data,
    attributes: Attributes = "",
    file_column: FileColumn = "file",
    person_column: PersonColumn = "",
    generator: Annotated[
        Path | None, typer.Option(help="Folder of a finished run: where synthetic faces come from")
    ] = None,
    label_column: Annotated[
        str, typer.Option(help="The attribute that the generator is conditional on (use = variation)")
    ] = "",
    label_values: Annotated[str, typer.Option(help="Its values in the order of the generator's labels")] = "",
    pairs: Annotated[
        Path | None, typer.Option(help="Leave out everybody who is in these pairs: they are to test with")
    ] = None,
    folds: Folds = "",
    name: Annotated[str, typer.Option(help="Name of the folder to write to")] = "recogniser",
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with an interrupted training, with its options")
    ] = False,
    runs_dir: Annotated[Path, typer.Option(help="Folder of all recognisers")] = FOLDER,
    overrides: dict[str, Any] | None = None,
) -> None:
    """Train a recogniser on photographs, alone or with synthetic faces beside them.

    What comes of it remembers the photographs: it is as private as they are, and no noise protects it.
    """
    from simulations.recognise_input import (
        CHECKPOINT,
        CONFIG,
        album_of,
        asked_config,
        fold_numbers,
        labels_of,
        refuse_ignored,
        sources_of,
    )

    folder = run_directory(runs_dir, name)
    config = asked_config(folder, overrides or {}, resume)
    if pairs is None:
        refuse_ignored("names folds of --pairs, and there is none", folds=folds)
    if config.use not in ("variation", "balance"):
        refuse_ignored(f"says nothing with use = {config.use}", label_column=label_column, label_values=label_values)
    elif not label_column:
        refuse_ignored("are values of --label-column, and there is none", label_values=label_values)
    from common.applications.generate import TrainedGenerator
    from common.recognition.preparation import prepare
    from common.recognition.training import train_recogniser
    from simulations.recognise import asked_pairs, without_pairs, write_figures

    source = None if generator is None else TrainedGenerator.load(generator)
    album = album_of(config, sources_of(data, attributes, file_column, person_column), console)
    if pairs is not None:
        album = without_pairs(album, asked_pairs(album, pairs, fold_numbers(folds)))
    labels = labels_of(album, label_column, listed(label_values))
    with console.status("preparing what is learned from"):
        prepared = prepare(album, config, source, labels)
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    write_figures(folder / CONFIG, config.to_flat())
    console.print(f"{prepared.told} -> {folder}", highlight=False, markup=False, soft_wrap=True)
    try:
        with _progress() as observer:
            trained = train_recogniser(
                prepared.lesson,
                prepared.kept,
                config,
                unlabelled=prepared.unlabelled,
                checkpoint=folder / CHECKPOINT,
                observer=observer,
            )
    except KeyboardInterrupt:
        command = ["visard", "recognise", "train", *(text for one in data for text in ("--data", one))]
        given = {
            "attributes": attributes,
            "file-column": file_column,
            "person-column": person_column,
            "generator": generator,
            "label-column": label_column,
        }
        given |= {"label-values": label_values, "pairs": pairs, "folds": folds, "name": name}
        given |= {"runs-dir": runs_dir if runs_dir != FOLDER else None}
        command += [text for key, value in given.items() if value for text in (f"--{key}", str(value))]
        told = f"stopped; nothing is lost. Go on with: {shlex.join([*command, '--resume'])}"
        console.print(
            f"\n{told}" if (folder / CHECKPOINT).exists() else "\nstopped before the first epoch: start anew",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )
        sys.exit(130)
    dataclasses.replace(trained, names=list(prepared.names)).save(folder)
    (folder / CHECKPOINT).unlink()
    figure = {"verify": "area under the ROC of the pairs kept", "identify": "recognised of the photographs kept"}[
        config.goal
    ]
    shown = Table(show_header=False, title=f"{folder.name}: done", title_justify="left")
    shown.add_row("epochs", str(trained.epochs))
    shown.add_row("time", f"{trained.seconds / 60:.1f} min")
    if trained.figure is not None:
        shown.add_row(figure, f"{trained.figure:.3f}")
    if trained.threshold is not None:
        shown.add_row("one person from a cosine of", f"{trained.threshold:.3f}")
    console.print(shown)
    again = shlex.join(["visard", "recognise", "evaluate", str(folder)])
    console.print(f"next: {again} --data PHOTOGRAPHS", highlight=False, markup=False, soft_wrap=True)


train = with_section_options(_train, RecognitionConfig, "Recogniser")


def evaluate(
    run: Run,
    data: Data,
    attributes: Attributes = "",
    file_column: FileColumn = "file",
    person_column: PersonColumn = "",
    pairs: Listed = None,
    folds: Folds = "",
    threshold: Threshold = None,
    by: Annotated[str, typer.Option(help="Attributes to tell error rates by, comma-separated (verify)")] = "",
    robust: Annotated[
        bool, typer.Option("--robust", help="Also under noise, blur, JPEG, occlusion and low resolution")
    ] = False,
    seed: Annotated[int, typer.Option(help="Of the pairs that are drawn where no list is given")] = 0,
) -> None:
    """Measure a recogniser on other photographs; figures in RUN/evaluation.json."""
    from common.recognition.recogniser import TrainedRecogniser
    from simulations.recognise import (
        asked_pairs,
        evaluate_attributes,
        evaluate_identification,
        evaluate_verification,
        write_figures,
    )
    from simulations.recognise_input import album_of, fold_numbers, limit_of, refuse_ignored, sources_of

    recogniser = TrainedRecogniser.load(run)
    album = album_of(recogniser.config, sources_of(data, attributes, file_column, person_column), console)
    verifying = recogniser.config.goal == "verify" or pairs is not None
    if pairs is None:
        refuse_ignored("names folds of --pairs, and there is none", folds=folds)
    if not verifying:
        refuse_ignored("is for a recogniser trained to verify", by=by, threshold=threshold)
    known = len(set(album.names) & set(recogniser.names))
    if known and verifying:
        note = f"it was trained on {known} of these {len(album.names)} persons, and the figures flatter it"
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    with console.status("measuring"):
        if verifying:
            limit = limit_of(recogniser, threshold)
            asked = asked_pairs(album, pairs, fold_numbers(folds), seed)
            told = evaluate_verification(recogniser, album, asked, limit, listed(by), robust)
        else:
            told = evaluate_identification(recogniser, album, robust)
        if recogniser.classes:
            told["attributes"] = evaluate_attributes(recogniser, album.faces)
    write_figures(run / "evaluation.json", told)
    for shown in tables_of(told):
        console.print(shown)
    console.print(f"all figures: {run / 'evaluation.json'}", highlight=False, markup=False, soft_wrap=True)


def identify(
    run: Run,
    photographs: Annotated[list[Path], typer.Argument(help="Photographs of one face each")],
    most: Annotated[int, typer.Option(min=1, help="How many names for each")] = 3,
) -> None:
    """Say which of the persons it was trained on are likeliest on photographs.

    Whoever it does not know is given the likeliest name all the same.
    """
    from common.recognition.recogniser import TrainedRecogniser
    from simulations.recognise import identify as find

    recogniser = TrainedRecogniser.load(run)
    shown = Table("photograph", "person", "cosine")
    for path, found in zip(photographs, find(recogniser, photographs, most), strict=True):
        for place, (name, cosine) in enumerate(found):
            shown.add_row("" if place else shown_name(path.name), shown_name(name), f"{cosine:.3f}")
    console.print(shown)


def verify(
    run: Run,
    one: Annotated[Path, typer.Argument(help="A photograph")],
    other: Annotated[Path, typer.Argument(help="Another")],
    threshold: Threshold = None,
) -> None:
    """Say whether two photographs are of one person."""
    from common.recognition.recogniser import TrainedRecogniser
    from simulations.recognise import compare
    from simulations.recognise_input import limit_of

    recogniser = TrainedRecogniser.load(run)
    limit = limit_of(recogniser, threshold)
    cosine = compare(recogniser, one, other)
    verdict = "one person" if cosine >= limit else "two persons"
    console.print(f"{verdict}: cosine {cosine:.3f}, one person from {limit:.3f}", highlight=False)


def cluster(
    run: Run,
    data: Data,
    attributes: Attributes = "",
    file_column: FileColumn = "file",
    person_column: PersonColumn = "",
    threshold: Threshold = None,
    out: Annotated[Path | None, typer.Option(help="Folder to write to", show_default="RUN/clusters")] = None,
) -> None:
    """Group photographs by who might be on them, without names: a table and a picture."""
    from common.faces.places import refuse_among
    from common.recognition.recogniser import TrainedRecogniser
    from simulations.recognise import group
    from simulations.recognise_input import album_of, limit_of, sources_of

    recogniser = TrainedRecogniser.load(run)
    limit = limit_of(recogniser, threshold)
    folder = out or run / "clusters"
    for source in data:
        refuse_among(folder, source)
    album = album_of(recogniser.config, sources_of(data, attributes, file_column, person_column), console)
    told = group(recogniser, album, limit, folder)
    shown = Table(show_header=False)
    for key, value in told.items():
        what = "photographs" if key == "count" else key.replace("_", " ")
        shown.add_row(what, f"{value:.3f}" if isinstance(value, float) else str(value))
    console.print(shown)
    console.print(
        f"{folder / 'clusters.csv'}, {folder / 'clusters.png'}", highlight=False, markup=False, soft_wrap=True
    )


def app() -> typer.Typer:
    """The sub-commands."""
    found = typer.Typer(
        help="Face recognition at the owner of the photographs, with synthetic faces beside them.", no_args_is_help=True
    )
    for name, command in (
        ("train", train),
        ("evaluate", evaluate),
        ("identify", identify),
        ("verify", verify),
        ("cluster", cluster),
    ):
        found.command(name)(command)
    return found


@contextmanager
def _progress() -> "Iterator[Observer]":
    """A bar on a terminal, lines elsewhere."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    def told(loss: float, figure: float | None) -> str:
        return f"loss {loss:.3f}" + ("" if figure is None else f"  validation {figure:.3f}")

    if not console.is_terminal:

        def line(stage: str, epoch: int, epochs: int, loss: float, figure: float | None) -> None:
            print(f"{stage}: epoch {epoch} of {epochs}  {told(loss, figure)}", flush=True)

        yield line
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("[dim]{task.fields[told]}"), console=console) as progress:
        bars: dict[str, Any] = {}

        def move(stage: str, epoch: int, epochs: int, loss: float, figure: float | None) -> None:
            if stage not in bars:
                bars[stage] = progress.add_task(stage, total=epochs, told="")
            progress.update(bars[stage], completed=epoch, told=told(loss, figure))

        yield move
