"""From an album to a lesson: who is trained on, what is kept for validation, and which synthetic faces come beside it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.applications.generate import TrainedGenerator
from common.errors import ConfigError, DataError
from common.faces import FaceDataset
from common.recognition.album import Album
from common.recognition.lesson import Lesson, lesson_of, with_persons, with_variations
from common.recognition.settings import RecognitionConfig
from common.recognition.synthetic import as_generated, as_wanted, synthetic_persons, variations_of


@dataclass(frozen=True)
class Prepared:
    """What `train_recogniser` takes. names: of the persons of the lesson. told: what it is, in words."""

    lesson: Lesson
    kept: FaceDataset | None
    unlabelled: Tensor | None
    names: Sequence[str]
    told: str


def prepare(
    album: Album, config: RecognitionConfig, generator: TrainedGenerator | None = None, labels: np.ndarray | None = None
) -> Prepared:
    """Divide the album and add what `config.use` asks for.

    generator: needed unless use is `none`. labels: (N,) int64, the generator's condition for each photograph of the album: what
    variations are asked for, and what balance evens out. Raises ConfigError, and DataError where too few are left.
    """
    if (config.use == "none") != (generator is None):
        raise ConfigError(
            f"use = {config.use}: {'leave the generator out' if generator else 'name the run of a generator'}"
        )
    rng = np.random.default_rng([config.seed, 2])
    many = np.flatnonzero(np.bincount(album.persons)[album.persons] >= config.smallest)
    if not len(many):
        raise DataError(f"nobody has {config.smallest} photographs: lower --smallest")
    kept = _kept(album.persons[many], config, rng)
    if config.goal == "verify" and kept.any() and np.bincount(album.persons[many[kept]]).max() < 2:
        raise DataError(
            "nobody who is kept for validation has two photographs: raise --smallest to 2, or set --validation 0"
        )
    places = many[~kept]
    train = album.subset(places)
    lesson, told = lesson_of(train.faces, config), f"{len(train.files)} photographs of {len(train.names)} persons"
    unlabelled, own = None, None if labels is None else labels[places]
    classes = generator.model.num_classes if generator is not None else 0
    if classes and own is not None and own.max(initial=0) >= classes:
        raise ConfigError(
            f"label {own.max()} is not one of the generator's {classes}: name --label-values in the order of its own"
        )
    if generator is not None and config.use == "variation":
        if generator.model.num_classes and own is None:
            raise ConfigError(
                "the generator is conditional: name the attribute that it is conditional on with --label-column"
            )
        faces, of = variations_of(
            generator, as_generated(train.faces.images, generator), own, config.variations, config.spread, config.seed
        )
        lesson, told = with_variations(lesson, as_wanted(faces, config), of), f"{told}, {len(of)} variations of them"
    elif generator is not None and config.use == "balance":
        if not generator.model.num_classes or own is None:
            raise ConfigError(
                "use = balance takes a generator that is conditional on an attribute, and that attribute of the photographs: name it "
                "with --label-column, and its values with --label-values"
            )
        rare = _missing(own, train.persons, generator.model.num_classes)
        if len(rare):
            faces, whose = synthetic_persons(generator, len(rare), config.variations, config.spread, config.seed, rare)
            lesson = with_persons(lesson, as_wanted(faces, config), whose)
        told = f"{told}, {len(rare)} synthetic persons of the rarer groups"
    elif generator is not None and config.use == "identities":
        faces, whose = synthetic_persons(generator, config.synthetic, config.variations, config.spread, config.seed)
        lesson = with_persons(lesson, as_wanted(faces, config), whose)
        told = f"{told}, {len(faces)} faces of {config.synthetic} synthetic persons"
    elif generator is not None:
        faces, _ = generator.draw(config.synthetic, config.seed)
        unlabelled, told = (
            torch.from_numpy(as_wanted(faces, config)),
            f"{told}, after {config.synthetic} synthetic faces",
        )
    held = album.subset(many[kept]).faces if kept.any() else None
    if held is not None:
        told += f"; {len(held)} photographs of {held.num_persons} {'other' if config.goal == 'verify' else 'of these'} persons kept"
    return Prepared(lesson, held, unlabelled, train.names, told)


def _missing(labels: np.ndarray, persons: np.ndarray, classes: int) -> np.ndarray:
    """The labels of the persons who would make every label as common as the commonest, (M,) int64. A person's is that of the
    first photograph."""
    _, first = np.unique(persons, return_index=True)
    counts = np.bincount(labels[first], minlength=classes)
    return np.repeat(np.arange(classes), counts.max() - counts)


def _kept(persons: np.ndarray, config: RecognitionConfig, rng: np.random.Generator) -> np.ndarray:
    """Which photographs are kept for validation, (N,) bool."""
    distinct = np.unique(persons)
    if config.goal == "verify":
        count = round(config.validation * len(distinct))
        if config.validation > 0 and count < 2:
            raise DataError(
                f"validation = {config.validation:g} of {len(distinct)} persons is {count}: pairs of strangers need two or more; raise "
                "it, or set it to 0"
            )
        return np.isin(persons, rng.permutation(distinct)[:count])
    kept = np.zeros(len(persons), dtype=bool)
    if config.validation > 0:
        for person in distinct:
            places = np.flatnonzero(persons == person)
            # One of each at least, or nobody could say how well that person is recognised; and one to learn from.
            count = max(1, round(config.validation * len(places)))
            if count >= len(places):
                raise DataError(
                    f"a person has {len(places)} photograph, and --goal identify keeps some of each for validation: leave such persons "
                    "out with --smallest 2, or set --validation 0"
                )
            kept[rng.permutation(places)[:count]] = True
    return kept
