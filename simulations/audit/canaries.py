"""Canary persons: faces whose contributions to a gradient round the auditor knows, so that draws can be read off it.

Contributions come from plain autograd, one image at a time, with nothing of the client's own clipping: an independent
account of what the claim says that a unit adds. The photographs are random dots, of strong and of faint contrast, one or
several a person, with several labels: to clip images or labels instead of persons shows.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from common.config import RunConfig
from common.errors import ConfigError
from common.faces import FaceDataset
from common.models import initialise
from common.models.discriminators import discriminator_of
from common.models.features import RandomFeatures
from common.models.flat import get_flat, num_parameters, set_flat
from common.models.losses import LOSSES
from common.privacy.clipping import FLOAT_SLACK
from common.privacy.units import PrivacyUnit
from common.sections import AugmentationConfig

# The contributions of all canaries together fit into this many floats.
_MAX_FLOATS = 2**26
# Standard error of a coefficient that is read off a release, at sigma 1, up to which canaries are told apart.
_MAX_ERROR = 3.0
_LEAST, _SEEDS = 8, 4
# Photographs of the persons, in turn: how many, as a multiple of images-per-person, and whether all are the same.
_KINDS = ((0, True), (1, False), (1, True), (2, True))


@dataclass(frozen=True)
class Canaries:
    """config: the run's, fit for reading draws. faces: one unit after the other. units: the images of each, by the auditor's own
    account. weights (d,) float32: what a round carries. layers: sizes of its parameter tensors. contributions (K, d) float32: of each
    unit, over C, at most 1 long. seed: of the weights.
    """

    config: RunConfig
    faces: FaceDataset
    weights: np.ndarray
    layers: list[int]
    contributions: np.ndarray
    units: list[np.ndarray]
    seed: int = 0

    def weights_for(self, config: RunConfig) -> np.ndarray:
        """Weights of another run's discriminator, drawn as these were."""
        discriminator = discriminator_of(config.model)
        initialise(discriminator, torch.Generator().manual_seed(self.seed))
        return get_flat(discriminator)


def make_canaries(config: RunConfig, count: int, seed: int = 0) -> Canaries:
    """Canaries for a run's discriminator and loss: at most `count`, fewer where it is large.

    Augmentation is left out, and a discriminator with dropout replaced by dcgan of the same width: their chance is the
    client's secret, and contributions could not be known. The clipping norm becomes half the median norm of the units, and
    the box of weights so large that it is not felt. Raises ConfigError where canaries cannot be told apart.
    """
    config = dataclasses.replace(config, augmentation=AugmentationConfig())
    model = dataclasses.replace(config.model, weight_clip=10.0)
    if has_dropout(config):
        model = dataclasses.replace(model, discriminator="dcgan")
    config = dataclasses.replace(config, model=model)
    discriminator = discriminator_of(config.model)
    initialise(discriminator, torch.Generator().manual_seed(seed))
    weights = get_flat(discriminator)
    rng = np.random.default_rng(seed)
    count = max(_LEAST, min(count, _MAX_FLOATS // len(weights)))
    faces, units = _faces(config, count, rng)
    gradients = _unit_gradients(discriminator, config, faces, units)
    norms = np.linalg.norm(gradients, axis=1)
    clip = float(np.float32(np.median(norms) / 2))
    privacy = dataclasses.replace(config.privacy, max_grad_norm=clip)
    factors = np.minimum(1 / clip, (1 - FLOAT_SLACK) / norms)
    contributions = gradients * factors[:, None].astype(np.float32)
    # Of many canaries some are nearly sums of others, and who was drawn could not be read.
    error = math.sqrt(np.diag(inverse_gram(contributions)).max())
    if error > _MAX_ERROR and count > _LEAST:
        return make_canaries(config, count // 2, seed)
    if error > _MAX_ERROR and seed < _SEEDS:
        return make_canaries(config, count, seed + 1)
    if error > _MAX_ERROR:
        raise ConfigError(
            f"the gradients of {count} canaries are so alike in {model.discriminator} of width {model.discriminator_width} that "
            f"draws cannot be read (error {error:.1f}, limit {_MAX_ERROR:g}): audit with another --discriminator or width"
        )
    layers = [p.numel() for p in discriminator.parameters()]
    return Canaries(dataclasses.replace(config, privacy=privacy), faces, weights, layers, contributions, units, seed)


def has_dropout(config: RunConfig) -> bool:
    """Whether the run's discriminator draws masks."""
    return any(isinstance(layer, nn.Dropout) for layer in discriminator_of(config.model).modules())


def clipped_harder(canaries: Canaries, factor: float) -> Canaries:
    """The same canaries at a clipping norm `factor` times as small, at which every unit is clipped."""
    privacy = canaries.config.privacy
    clip = float(np.float32(privacy.max_grad_norm / factor))
    norms = np.linalg.norm(canaries.contributions, axis=1, keepdims=True)
    longest = np.minimum(factor * norms, 1 - FLOAT_SLACK)
    config = dataclasses.replace(canaries.config, privacy=dataclasses.replace(privacy, max_grad_norm=clip))
    contributions = (canaries.contributions * (longest / norms)).astype(np.float32)
    return dataclasses.replace(canaries, config=config, contributions=contributions)


def inverse_gram(contributions: np.ndarray) -> np.ndarray:
    """Inverse of the units' inner products: the covariance of the coefficients that are read off a release, at sigma 1."""
    return np.linalg.inv((contributions @ contributions.T).astype(np.float64))


def _faces(config: RunConfig, units: int, rng: np.random.Generator) -> tuple[FaceDataset, list[np.ndarray]]:
    """Canary persons, or photographs, and the images of each."""
    model, privacy = config.model, config.privacy
    side = (model.channels, model.image_size, model.image_size)
    images, persons, turns = [], [], []
    for unit in range(units):
        multiple, same = _KINDS[unit % len(_KINDS)]
        number = max(1, multiple * min(privacy.images_per_person, 3))
        if same and multiple == 2:  # more than may be drawn
            number = privacy.images_per_person + 1
        if (
            privacy.unit is PrivacyUnit.IMAGE
        ):  # faces cut from one photograph, the same so that it is known what is drawn
            number, same = 1 + unit % 2, True
        contrast = np.exp(rng.uniform(np.log(0.2), 0.0))
        dots = rng.choice([-1.0, 1.0], size=(1 if same else number, *side))
        photographs = np.round(127.5 + 127.5 * contrast * dots).astype(np.uint8)
        images.append(np.broadcast_to(photographs, (number, *side)))
        persons += [unit] * number
        turns += [0] * number if same else list(range(number))
    owners = np.array(persons, dtype=np.int64)
    # Different photographs of a person have different labels: a person is one unit all the same.
    labels = (owners + np.array(turns)) % model.num_classes if model.num_classes else None
    of_units = [np.flatnonzero(owners == unit) for unit in range(units)]
    if privacy.unit is PrivacyUnit.PERSON:
        return FaceDataset(np.concatenate(images), owners, labels), of_units
    return FaceDataset(np.concatenate(images), None, labels, photographs=owners), of_units


def _unit_gradients(
    discriminator: nn.Module, config: RunConfig, faces: FaceDataset, units: list[np.ndarray]
) -> np.ndarray:
    """The mean gradient of each unit's images, unclipped: (K, d) float32. The same images are looked at once."""
    loss = LOSSES[config.model.loss]
    rows = []
    for unit in units:
        distinct = unit[np.unique(faces.images[unit], axis=0, return_index=True)[1]]
        total = torch.zeros(num_parameters(discriminator))
        for index in distinct:
            one = np.array([index])
            labels = None if faces.labels is None else torch.from_numpy(faces.labels[one])
            total += _gradient(discriminator, loss.real, faces.tensor(one), labels)
        rows.append((total / len(distinct)).numpy())
    return np.stack(rows)


def fakes_for(canaries: Canaries, steps: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray | None, np.ndarray]:
    """Fakes of a round of several steps, their labels, and the mean of their clipped gradients over C, (d,) float32: zeros
    under a loss without a half on fakes.
    """
    model, rng = canaries.config.model, np.random.default_rng(seed)
    count = steps * canaries.config.training.fake_batch
    images = rng.integers(0, 256, (count, model.channels, model.image_size, model.image_size), dtype=np.uint8)
    labels = rng.integers(0, model.num_classes, count, dtype=np.int64) if model.num_classes else None
    discriminator = discriminator_of(model)
    set_flat(discriminator, canaries.weights)
    clip = canaries.config.privacy.max_grad_norm
    total = np.zeros(len(canaries.weights))
    if not LOSSES[model.loss].sees_fakes:
        return images, labels, total.astype(np.float32)
    for index in range(count):
        one = torch.from_numpy(images[index : index + 1]).float() / 127.5 - 1
        own = None if labels is None else torch.from_numpy(labels[index : index + 1])
        gradient = _gradient(discriminator, LOSSES[model.loss].fake, one, own).numpy()
        total += gradient * min(1 / clip, (1 - FLOAT_SLACK) / np.linalg.norm(gradient))
    return images, labels, (total / count).astype(np.float32)


def moment_sums(canaries: Canaries) -> np.ndarray:
    """What each unit adds to the moment release: the mean over its images of their features, in the row of its label.

    (K, rows * dim) float32.
    """
    model = canaries.config.model
    features = RandomFeatures(model.image_size, model.channels, canaries.config.moments.feature_seed)
    rows = []
    for unit in canaries.units:
        row = np.zeros((max(model.num_classes, 1), features.dim), dtype=np.float64)
        for index in unit:
            label = 0 if canaries.faces.labels is None else canaries.faces.labels[index]
            row[label] += features(canaries.faces.tensor(np.array([index])))[0].numpy() / len(unit)
        rows.append(row.reshape(-1).astype(np.float32))
    return np.stack(rows)


def _gradient(
    discriminator: nn.Module, loss: Callable[[Tensor], Tensor], images: Tensor, labels: Tensor | None
) -> Tensor:
    parameters = list(discriminator.parameters())
    gradients = torch.autograd.grad(loss(discriminator(images, labels)).sum(), parameters)
    return torch.cat([gradient.reshape(-1) for gradient in gradients])
