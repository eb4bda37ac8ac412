"""Faces drawn by us."""

from collections.abc import Sequence

import numpy as np

from common.errors import DataError
from common.faces.dataset import FaceDataset, FaceOptions

PROCEDURAL_VERSION = 0


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
    """Draw them."""
    if not len(persons) or images_per_person < 1:
        raise DataError(f"{len(persons)} persons with {images_per_person} images each: use at least 1 of both")
    size = options.image_size
    y, x = np.mgrid[0:size, 0:size] / (size - 1) * 2 - 1
    images = []
    for person in persons:
        who = np.random.default_rng([seed, person])
        wide, eye, tone = who.uniform(0.55, 0.8), who.uniform(0.22, 0.35), who.uniform([140, 90, 60], [250, 200, 170])
        for image in range(images_per_person):
            rng = np.random.default_rng([seed, person, image])
            dx, dy, back = *rng.uniform(-0.08, 0.08, 2), rng.uniform(20, 230, 3)
            face = ((x - dx) / wide) ** 2 + ((y - dy) / 0.85) ** 2 < 1
            dark = (np.hypot(np.abs(x - dx) - eye, y - dy + 0.15) < 0.08) | (
                (np.abs(x - dx) < 0.25) & (np.abs(y - dy - 0.45) < 0.05)
            )
            picture = np.where(face, tone[:, None, None], back[:, None, None]) * np.where(dark, 0.2, 1.0)
            images.append(picture if options.channels == 3 else picture.mean(0, keepdims=True))
    numbers = np.repeat(np.arange(len(persons)), images_per_person)
    return FaceDataset(np.stack(images).astype(np.uint8), numbers.astype(np.int64))
