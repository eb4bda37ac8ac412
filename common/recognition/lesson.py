"""What a recogniser learns from: photographs of persons, and synthetic faces beside them."""

from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from common.errors import DataError
from common.faces import FaceDataset
from common.recognition.settings import RecognitionConfig


@dataclass
class Lesson:
    """What is learned from.

    images: (N, C, S, S) uint8. persons: (N,) int64, 0..num_persons-1; those from `real` on are synthetic. attributes:
    name -> (N,) int64, -1 where it is not known. classes: name -> its values.
    """

    images: Tensor
    persons: Tensor
    num_persons: int
    real: int
    attributes: dict[str, Tensor] = field(default_factory=dict)
    classes: dict[str, list[str]] = field(default_factory=dict)


def lesson_of(faces: FaceDataset, config: RecognitionConfig) -> Lesson:
    """Photographs as a lesson. Raises DataError where nobody is known, there is one person, or an attribute is unknown."""
    if faces.persons is None:
        raise DataError("it is not known who is on the photographs: give a folder of persons' folders")
    if faces.num_persons < 2:
        raise DataError(f"{faces.num_persons} person: to tell people apart takes two or more")
    attributes, classes = {}, {}
    for name in config.attribute_names:
        if name not in faces.attributes:
            raise DataError(f"there is no attribute {name!r}: there are {', '.join(faces.attributes) or 'none'}")
        values = [value for value in np.unique(faces.attributes[name]).tolist() if value]
        if len(values) < 2:
            raise DataError(f"attribute {name!r} has the values {values}: nothing to tell apart")
        classes[name] = values
        place = {value: number for number, value in enumerate(values)}
        attributes[name] = torch.tensor([place.get(value, -1) for value in faces.attributes[name].tolist()])
    persons = torch.from_numpy(faces.persons)
    return Lesson(torch.from_numpy(faces.images), persons, faces.num_persons, faces.num_persons, attributes, classes)


def with_persons(lesson: Lesson, images: np.ndarray, persons: np.ndarray) -> Lesson:
    """And synthetic persons beside the real ones. images: (M, C, S, S) uint8; persons: (M,), numbered from 0 without gaps."""
    count = len(images)
    return Lesson(
        torch.cat([lesson.images, torch.from_numpy(images)]),
        torch.cat([lesson.persons, torch.from_numpy(persons) + lesson.num_persons]),
        lesson.num_persons + int(persons.max()) + 1,
        lesson.real,
        {name: torch.cat([values, torch.full((count,), -1)]) for name, values in lesson.attributes.items()},
        lesson.classes,
    )


def with_variations(lesson: Lesson, images: np.ndarray, of: np.ndarray) -> Lesson:
    """And variations of photographs. images: (M, C, S, S) uint8; of: (M,), the photograph that each is a variation of."""
    places = torch.from_numpy(of)
    return Lesson(
        torch.cat([lesson.images, torch.from_numpy(images)]),
        torch.cat([lesson.persons, lesson.persons[places]]),
        lesson.num_persons,
        lesson.real,
        {name: torch.cat([values, values[places]]) for name, values in lesson.attributes.items()},
        lesson.classes,
    )
