"""`visard recognise`: face recognition at the owner of the photographs. What is slow to import is imported when it is used."""

import dataclasses
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from common.errors import ConfigError
from common.fields import listed
from common.options import with_section_options
from common.recognition.settings import RecognitionConfig
from common.sections import FaceSource
from server.summary import run_directory
from simulations.recognise_report import shown_name, tables_of

if TYPE_CHECKING:
    from common.recognition.album import Album
    from common.recognition.recogniser import TrainedRecogniser
    from common.recognition.training import Observer

console = Console()
CONFIG, CHECKPOINT = "recognition.json", "checkpoint.safetensors"
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
    folder = run_directory(runs_dir, name)
    config = _config(folder, overrides or {}, resume)
    if pairs is None:
        _ignored("names folds of --pairs, and there is none", folds=folds)
    if config.use not in ("variation", "balance"):
        _ignored(f"says nothing with use = {config.use}", label_column=label_column, label_values=label_values)
    elif not label_column:
        _ignored("are values of --label-column, and there is none", label_values=label_values)
    from common.applications.generate import TrainedGenerator
    from common.recognition.preparation import prepare
    from common.recognition.training import train_recogniser
    from simulations.recognise import asked_pairs, without_pairs, write_figures

    source = None if generator is None else TrainedGenerator.load(generator)
    album = _album(config, _sources(data, attributes, file_column, person_column))
    if pairs is not None:
        album = without_pairs(album, asked_pairs(album, pairs, _numbers(folds)))
    labels = _labels(album, label_column, listed(label_values))
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

    recogniser = TrainedRecogniser.load(run)
    album = _album(recogniser.config, _sources(data, attributes, file_column, person_column))
    verifying = recogniser.config.goal == "verify" or pairs is not None
    if pairs is None:
        _ignored("names folds of --pairs, and there is none", folds=folds)
    if not verifying:
        _ignored("is for a recogniser trained to verify", by=by, threshold=threshold)
    known = len(set(album.names) & set(recogniser.names))
    if known and verifying:
        note = f"it was trained on {known} of these {len(album.names)} persons, and the figures flatter it"
        console.print(f"[yellow]note:[/] {note}", highlight=False, soft_wrap=True)
    with console.status("measuring"):
        if verifying:
            limit = _limit(recogniser, threshold)
            asked = asked_pairs(album, pairs, _numbers(folds), seed)
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

    recogniser = TrainedRecogniser.load(run)
    limit = _limit(recogniser, threshold)
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

    recogniser = TrainedRecogniser.load(run)
    limit = _limit(recogniser, threshold)
    folder = out or run / "clusters"
    for source in data:
        refuse_among(folder, source)
    album = _album(recogniser.config, _sources(data, attributes, file_column, person_column))
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


def _config(folder: Path, overrides: dict[str, Any], resume: bool) -> RecognitionConfig:
    """Of the command line, or of the training that is gone on with."""
    import json

    from common.recognition.recogniser import FILE_NAME

    if (folder / FILE_NAME).exists():
        raise ConfigError(f"{folder} holds a finished recogniser: give another --name")
    if (folder / "config.toml").exists():
        raise ConfigError(f"{folder} holds a run, whose files are passed on: give another --name or --runs-dir")
    if not resume:
        if (folder / CHECKPOINT).exists():
            raise ConfigError(
                f"{folder} holds an unfinished training: --resume goes on with it; else give another --name"
            )
        return RecognitionConfig.from_flat(overrides)
    if overrides:
        raise ConfigError(
            f"--resume goes on with the options there were: leave out {', '.join(f'--{key}' for key in overrides)}"
        )
    try:
        return RecognitionConfig.from_flat(json.loads((folder / CONFIG).read_text(encoding="utf-8")))
    except (OSError, ValueError) as error:
        raise ConfigError(f"nothing to resume in {folder}: {error}") from error


def _sources(data: Sequence[str], attributes: str, file_column: str, person_column: str) -> list[FaceSource]:
    return [
        FaceSource(data=one, attributes=attributes, file_column=file_column, person_column=person_column)
        for one in data
    ]


def _album(config: RecognitionConfig, sources: Sequence[FaceSource]) -> "Album":
    from rich.progress import track

    from common.recognition.album import read_album

    def bar(pictures: Sequence[Any]) -> Any:
        return track(pictures, "reading the faces", console=console, transient=True, disable=not console.is_terminal)

    return read_album(sources, config, bar)


def _labels(album: "Album", column: str, values: Sequence[str]) -> Any:
    """What a conditional generator is to be asked for, (N,) int64; None where no attribute is named."""
    import numpy as np

    if not column:
        return None
    if column not in album.faces.attributes:
        raise ConfigError(
            f"the photographs have no attribute {column!r}: they have {', '.join(album.faces.attributes) or 'none'}"
        )
    place = {value: number for number, value in enumerate(values)}
    unknown = sorted(set(album.faces.attributes[column].tolist()) - place.keys())
    if unknown:
        raise ConfigError(f"{column} has the values {', '.join(unknown)}, which --label-values does not name")
    return np.array([place[value] for value in album.faces.attributes[column].tolist()])


def _limit(recogniser: "TrainedRecogniser", threshold: float | None) -> float:
    """The threshold given, or the recogniser's own. Raises ConfigError."""
    if threshold is None:
        return recogniser.needed_threshold()
    if not -1 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold:g} is no cosine: give one from -1 to 1")
    return threshold


def _ignored(why: str, **given: object) -> None:
    """Refuse options that would do nothing."""
    for name, value in given.items():
        if value:
            raise ConfigError(f"--{name.replace('_', '-')} {why}: leave it out")


def _numbers(folds: str) -> list[int]:
    try:
        return [int(word) for word in listed(folds)]
    except ValueError:
        raise ConfigError(f"--folds {folds}: give whole numbers, such as 9,10") from None


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
