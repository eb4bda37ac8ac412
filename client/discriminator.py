"""The private discriminator step (DP-SGD: Abadi et al. 2016) on the real half of the loss.

Claim, for neighbours that differ in one unit (`common.privacy.units`): `noised_gradient` is one Gaussian mechanism of
noise multiplier sigma on a Poisson sample of rate q. Each unit enters independently with probability q; what it adds to
the sum has L2 norm at most C (`common.privacy.clipping`); N(0, (sigma C)^2) is added to every coordinate, also when
nobody was drawn. Under `central` the noise is left to the coordinator, and the claim is about what leaves the
coordinator. Augmented views and dropout leave the claim as it is (`common.augmentation`, `common.models.stochastic`):
their seed is fresh for each step, comes from the operating system and stays here.

Only real faces are clipped here, and in rounds of one step nothing else is computed: fakes never share a sum, or a
clip, with faces.
"""

from functools import lru_cache, partial

import numpy as np
import torch
from torch import Tensor, nn

from common.augmentation import SEED_BYTES, augmentation_of, step_randomness
from common.device import pick_device
from common.errors import DataError, ProtocolError
from common.faces import FaceDataset
from common.gradients import fake_mean, from_uint8, real_sum
from common.messages import RoundInstructions
from common.models.discriminators import discriminator_of
from common.models.flat import get_flat, num_parameters, set_flat
from common.models.losses import LOSSES, project_weights
from common.privacy.clipping import check_no_cross_sample
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.privacy.units import PrivacyModel, PrivacyUnit
from common.sections import ModelConfig


def gradient_update(instructions: RoundInstructions, faces: FaceDataset, random: SecureRandom) -> np.ndarray:
    """The vector that answers a gradient round: (d,) float32; see `DiscriminatorUpdate`.

    Raises DataError where the faces have no persons or labels and the round needs them, ProtocolError where the weights
    do not fit.
    """
    discriminator = cached_discriminator(instructions.model)
    check_weights(instructions)
    set_flat(discriminator, np.array(instructions.discriminator))
    if instructions.local_steps == 1:
        return noised_gradient(discriminator, instructions, faces, random).numpy()
    return _local_gradient(discriminator, instructions, faces, random)


def check_weights(instructions: RoundInstructions) -> None:
    """Raise ProtocolError unless a gradient round carries as many parameters as the model it names has."""
    expected = num_parameters(cached_discriminator(instructions.model))
    given = 0 if instructions.discriminator is None else len(instructions.discriminator)
    if given != expected:
        raise ProtocolError(
            f"{given} discriminator parameters came for a model of {expected}: coordinator and client differ"
        )


def noised_gradient(
    discriminator: nn.Module, instructions: RoundInstructions, faces: FaceDataset, random: SecureRandom
) -> Tensor:
    """The sum over drawn units of their clipped gradients, noised as the privacy model says: (d,) float32 on the CPU."""
    privacy, loss = instructions.privacy, LOSSES[instructions.model.loss]
    indices, units, num_units = draw_units(faces, instructions, random)
    device = next(discriminator.parameters()).device
    images = faces.tensor(indices).to(device)
    labels = class_labels(faces, instructions.model, indices)
    labels = labels if labels is None else labels.to(device)
    place = torch.from_numpy(units).to(device)
    augmentation = augmentation_of(instructions.augmentation, instructions.model)
    with step_randomness(discriminator, augmentation, partial(secret_seed, random)):
        images, labels, place = augmentation.views_of(images, labels, place)
        total = real_sum(discriminator, loss, images, labels, place, num_units, privacy)
    if privacy.privacy_model is not PrivacyModel.LOCAL:
        return total.cpu()
    return add_gaussian_noise(total, privacy.noise_multiplier * privacy.max_grad_norm, random)


def secret_seed(random: SecureRandom) -> bytes:
    """SEED_BYTES bytes that nobody else can know, for the views and dropout masks of one step."""
    return random.words(SEED_BYTES // 8).tobytes()


def draw_units(
    faces: FaceDataset, instructions: RoundInstructions, random: SecureRandom
) -> tuple[np.ndarray, np.ndarray, int]:
    """Poisson-sample units at the declared rate, and at most `images_per_person` photographs of each drawn person.

    Returns the image indices (B,), the place 0..U-1 of each image's unit among the drawn ones (B,), contiguous, and U.
    Where few were drawn by chance, B is small, perhaps 0: it is private and stays here.
    """
    privacy = instructions.privacy
    members = fitting_units(faces, instructions.model, privacy.unit)
    drawn = random.poisson_sample(len(members), privacy.sample_rate)
    limit = privacy.images_per_person if privacy.unit is PrivacyUnit.PERSON else 1
    chosen = [random.choose(members[unit], limit) for unit in drawn]
    if not chosen:
        return np.empty(0, np.int64), np.empty(0, np.int64), 0
    return np.concatenate(chosen), np.repeat(np.arange(len(chosen)), [len(c) for c in chosen]), len(chosen)


def fitting_units(faces: FaceDataset, model: ModelConfig, unit: PrivacyUnit) -> list[np.ndarray]:
    """The image indices of each unit, without images whose label the model does not know: these count for nothing.

    An error for them would tell the coordinator of a single face. Raises DataError where no image has a label and the
    model is conditional, or none has a person and the unit is one: that is public.
    """
    members = faces.units(unit)
    if model.num_classes == 0:
        return members
    if faces.labels is None:
        raise DataError(
            f"the model is conditional on {model.num_classes} labels and these faces have none: set num-classes 0"
        )
    known = (faces.labels >= 0) & (faces.labels < model.num_classes)
    return members if known.all() else [images[known[images]] for images in members]


def class_labels(faces: FaceDataset, model: ModelConfig, indices: np.ndarray) -> Tensor | None:
    """Labels (B,) int64 of images for a conditional model, else None."""
    if model.num_classes == 0 or faces.labels is None:
        return None
    return torch.from_numpy(faces.labels[indices])


@lru_cache(maxsize=1)
def cached_discriminator(model: ModelConfig) -> nn.Module:
    """One discriminator for all rounds and all simulated clients of a process; the weights come with each round."""
    discriminator = discriminator_of(model)
    # The clipping bounds a unit's influence only where no layer mixes images: two random ones tell.
    random = torch.Generator().manual_seed(0)
    example = torch.randn(2, model.channels, model.image_size, model.image_size, generator=random)
    labels = torch.arange(2) % model.num_classes if model.num_classes else None
    check_no_cross_sample(discriminator, example, labels)
    return discriminator.to(pick_device())


def _local_gradient(
    discriminator: nn.Module, instructions: RoundInstructions, faces: FaceDataset, random: SecureRandom
) -> np.ndarray:
    """Several SGD steps on both halves of the loss; returns (start - end) / (learning rate * steps), the mean gradient.

    Post-processing of `local_steps` noised sums and of fakes, whose number is the coordinator's and never tied to the
    draw. So are the weights' projections after each step, where the loss has them: they look at nothing else.
    """
    privacy, steps, rate = instructions.privacy, instructions.local_steps, instructions.local_lr
    loss = LOSSES[instructions.model.loss]
    if instructions.fakes is None:
        raise ValueError("rounds of several steps carry fakes")
    fakes = np.split(instructions.fakes, steps)
    labels = [None] * steps if instructions.fake_labels is None else np.split(instructions.fake_labels, steps)
    start = get_flat(discriminator)
    weights = torch.from_numpy(start.copy())
    device = next(discriminator.parameters()).device
    augmentation = augmentation_of(instructions.augmentation, instructions.model)
    for fake, fake_labels in zip(fakes, labels, strict=True):
        gradient = noised_gradient(discriminator, instructions, faces, random).div_(privacy.expected_batch)
        classes = None if fake_labels is None else torch.from_numpy(fake_labels.copy()).to(device)
        with step_randomness(discriminator, augmentation, partial(secret_seed, random)):
            images = augmentation(from_uint8(fake).to(device))
            gradient += fake_mean(discriminator, loss, images, classes, privacy).cpu()
        weights -= rate * gradient
        set_flat(discriminator, weights)
        project_weights(discriminator, loss, instructions.model.weight_clip)
        weights = torch.from_numpy(get_flat(discriminator))
    return (torch.from_numpy(start) - weights).div_(rate * steps).numpy()
