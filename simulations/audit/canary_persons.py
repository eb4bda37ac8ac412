"""Canary persons: made-up units that an auditor puts among a client's faces, or leaves out."""

import numpy as np

from common.config import RunConfig
from common.faces import FaceDataset
from common.privacy.units import PrivacyUnit

# Photographs of a canary person, at most: some have one, some have several.
MAX_IMAGES = 2


def draw_canaries(config: RunConfig, count: int, rng: np.random.Generator) -> FaceDataset:
    """`count` persons of one or, for unit person, some of several images of random black and white pixels.

    The cosine of two such patterns of n pixels has standard deviation 1 / sqrt(n). Labels are random.
    """
    model, privacy = config.model, config.privacy
    most = min(privacy.images_per_person, MAX_IMAGES) if privacy.unit is PrivacyUnit.PERSON else 1
    persons = np.repeat(np.arange(count), 1 + np.arange(count) % most)
    shape = (len(persons), model.channels, model.image_size, model.image_size)
    images = rng.integers(0, 2, shape, dtype=np.uint8) * np.uint8(255)
    labels = rng.integers(0, model.num_classes, len(persons)) if model.num_classes else None
    return FaceDataset(images, persons.astype(np.int64), labels)


def with_canaries(faces: FaceDataset, canaries: FaceDataset, chosen: np.ndarray) -> FaceDataset:
    """A client's faces and the canary persons `chosen`, each a person, and each image a photograph, of their own.

    Persons, labels and photographs are known of canaries where they are known of the faces.
    """
    more = canaries.subset(np.flatnonzero(np.isin(persons_of(canaries), chosen)))
    persons, photographs = faces.persons, faces.photographs
    if persons is not None:
        persons = np.concatenate([persons, faces.num_persons + persons_of(more)])
    if photographs is not None:
        photographs = np.concatenate([photographs, photographs.max(initial=-1) + 1 + np.arange(len(more))])
    labels = faces.labels
    if labels is not None:
        labels = np.concatenate([labels, np.zeros(len(more), np.int64) if more.labels is None else more.labels])
    return FaceDataset(np.concatenate([faces.images, more.images]), persons, labels, photographs=photographs)


def persons_of(faces: FaceDataset) -> np.ndarray:
    """The person on each image, where all are known to be persons."""
    if faces.persons is None:
        raise ValueError("canaries are persons")
    return faces.persons
