"""What the options of `visard recognise` ask for: each read, checked, and refused where it would do nothing."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import track

from common.errors import ConfigError
from common.fields import listed
from common.recognition.album import Album, read_album
from common.recognition.recogniser import FILE_NAME, TrainedRecogniser
from common.recognition.settings import RecognitionConfig
from common.sections import FaceSource

CONFIG, CHECKPOINT = "recognition.json", "checkpoint.safetensors"


def asked_config(folder: Path, overrides: dict[str, Any], resume: bool) -> RecognitionConfig:
    """Of the command line, or of the training that is gone on with."""
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


def sources_of(data: Sequence[str], attributes: str, file_column: str, person_column: str) -> list[FaceSource]:
    """One for each place; what is said of the CSV is of all."""
    return [
        FaceSource(data=one, attributes=attributes, file_column=file_column, person_column=person_column)
        for one in data
    ]


def album_of(config: RecognitionConfig, sources: Sequence[FaceSource], console: Console) -> Album:
    """The faces of all sources, with a progress bar. Raises DataError."""

    def bar(pictures: Sequence[Any]) -> Any:
        return track(pictures, "reading the faces", console=console, transient=True, disable=not console.is_terminal)

    return read_album(sources, config, bar)


def labels_of(album: Album, column: str, values: Sequence[str]) -> Any:
    """What a conditional generator is to be asked for, (N,) int64; None where no attribute is named."""
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


def limit_of(recogniser: TrainedRecogniser, threshold: float | None) -> float:
    """The threshold given, or the recogniser's own. Raises ConfigError."""
    if threshold is None:
        return recogniser.needed_threshold()
    if not -1 <= threshold <= 1:
        raise ConfigError(f"--threshold {threshold:g} is no cosine: give one from -1 to 1")
    return threshold


def refuse_ignored(why: str, **given: object) -> None:
    """Refuse options that would do nothing."""
    for name, value in given.items():
        if value:
            raise ConfigError(f"--{name.replace('_', '-')} {why}: leave it out")


def fold_numbers(folds: str) -> list[int]:
    """Folds, parsed. Raises ConfigError."""
    try:
        return [int(word) for word in listed(folds)]
    except ValueError:
        raise ConfigError(f"--folds {folds}: give whole numbers, such as 9,10") from None
