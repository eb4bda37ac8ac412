"""Faces of nobody: drawn by us from a seed, for tests, demonstrations and simulations without any photograph.

Every person is a set of measures (skull, jaw, eyes, nose, mouth, hair, skin ...) drawn from (seed, person); every picture of a
person adds pose, expression, light and background, drawn from (seed, person, picture). A client can so draw its own persons and no
others. The drawing itself is in `drawing.py`.
"""

from collections.abc import Sequence

import numpy as np

from common.errors import DataError
from common.faces.dataset import FaceDataset, FaceOptions
from common.faces.drawing import draw
from common.faces.persons import Person, make_person, make_pictures

# Part of the cache's key: raise it whenever the same seed would give other pictures.
PROCEDURAL_VERSION = 2
MAX_IMAGES = 1_000_000


def parse_source(text: str) -> tuple[range, int, int]:
    """`persons=40,images=10,seed=0,first=0` as (person numbers, images a person, seed). Raises DataError."""
    values = {"persons": 40, "images": 10, "seed": 0, "first": 0}
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        if key not in values or not value.isdecimal() or len(value) > 9:
            raise DataError(f"{part!r} in a procedural source: write procedural:persons=40,images=10,seed=0,first=0")
        values[key] = int(value)
    return range(values["first"], values["first"] + values["persons"]), values["images"], values["seed"]


def procedural_faces(persons: Sequence[int], images_per_person: int, options: FaceOptions, seed: int) -> FaceDataset:
    """Draw images_per_person pictures of each of `persons` (numbers >= 0), in that order.

    Attributes: hair (its style), beard (its kind, or none) and glasses (yes or no); no labels.

    A person looks the same whoever else is drawn beside them. `options.crop` below 1 goes closer to the face. The same machine
    gives the same bytes; another processor may round a pixel differently by 1. Raises DataError for no persons, no images, negative
    or repeated numbers, or more than MAX_IMAGES images.
    """
    if not len(persons) or images_per_person < 1 or len(persons) * images_per_person > MAX_IMAGES:
        raise DataError(
            f"{len(persons)} persons with {images_per_person} images each: use 1 or more of both, {MAX_IMAGES} in all at most"
        )
    numbers = [int(person) for person in persons]
    if len(set(numbers)) != len(numbers) or not all(0 <= number < 2**32 for number in [seed, *numbers]):
        raise DataError(f"persons {numbers[:5]} ... with seed {seed}: use different numbers from 0 to {2**32 - 1}")
    # Always three numbers: numpy takes [seed, number] and [seed, number, 0] for the same seed.
    made = [make_person(np.random.default_rng([seed, number, 0])) for number in numbers]
    images = [
        _draw_person(number, person, images_per_person, options, seed)
        for number, person in zip(numbers, made, strict=True)
    ]
    whose = np.repeat(np.arange(len(numbers), dtype=np.int64), images_per_person)
    attributes = {
        "hair": [person.style for person in made],
        "beard": [person.beard for person in made],
        "glasses": ["yes" if person.glasses else "no" for person in made],
    }
    return FaceDataset(
        np.concatenate(images), whose, attributes={name: np.array(each)[whose] for name, each in attributes.items()}
    )


def _draw_person(number: int, person: Person, count: int, options: FaceOptions, seed: int) -> np.ndarray:
    """uint8 (count, C, H, H)."""
    rngs = [np.random.default_rng([seed, number, 1 + picture]) for picture in range(count)]
    pixels = draw(person, make_pictures(person, rngs), options.image_size, options.crop)
    grain = np.stack([rng.normal(0, 0.008, pixels.shape[1:]) for rng in rngs])
    pixels = np.clip(pixels + grain, 0, 1)
    if options.channels == 1:
        pixels = (pixels * np.array([0.299, 0.587, 0.114])[:, None, None]).sum(1, keepdims=True)
    rounded: np.ndarray = np.rint(pixels * 255).astype(np.uint8)
    return rounded
