"""The client's half of the moment stage: one noised release of mean random features.

Claim, for neighbours that differ in one unit: `moment_update` is one Gaussian mechanism of noise multiplier sigma
without sampling. A unit contributes one vector, the mean over its images of the features placed in the rows of their
labels. Its L2 norm is at most 1: features have norm at most 1 (`common.models.features`), so each image's vector has,
and so has a mean of them; it is clipped to 1 all the same. Class counts are not released: the coordinator divides by
declared constants.
"""

from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from client.discriminator import class_labels, fitting_units
from common.device import pick_device
from common.faces import FaceDataset
from common.messages import RoundInstructions
from common.models.features import RandomFeatures
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.privacy.units import PrivacyModel

# Images whose features are held at once.
_CHUNK = 512


def moment_update(instructions: RoundInstructions, faces: FaceDataset, random: SecureRandom) -> np.ndarray:
    """The vector that answers a moment round: (max(num_classes, 1) * dim,) float32; see `DiscriminatorUpdate`."""
    model = instructions.model
    features = cached_features(model.image_size, model.channels, instructions.feature_seed)
    units = [unit for unit in fitting_units(faces, model, instructions.privacy.unit) if len(unit)]
    labels = class_labels(faces, model, np.arange(len(faces)))
    total = moment_sum(features, faces, labels, units, max(model.num_classes, 1))
    if instructions.privacy.privacy_model is not PrivacyModel.LOCAL:
        return total.numpy()
    return add_gaussian_noise(total, instructions.moment_noise_multiplier, random).numpy()


@torch.no_grad()
def moment_sum(
    features: RandomFeatures, faces: FaceDataset, labels: Tensor | None, units: list[np.ndarray], num_rows: int
) -> Tensor:
    """Sum over units of their clipped mean feature vectors: (num_rows * dim,) float32 on the CPU.

    units: the image indices of each unit. Units are taken in groups of about _CHUNK images, so that memory stays
    bounded.
    """
    device = next(features.buffers()).device
    total = torch.zeros(num_rows, features.dim, device=device)
    for group in _groups(units):
        indices = np.concatenate(group)
        phi = features(faces.tensor(indices).to(device)).float()
        rows = torch.zeros(len(indices), dtype=torch.int64) if labels is None else labels[indices]
        place = torch.from_numpy(np.repeat(np.arange(len(group)), [len(unit) for unit in group]))
        # A unit with images of several labels fills several rows: norms are taken over the pairs (unit, row) it has.
        pairs, pair = torch.unique(torch.stack([place, rows]), dim=1, return_inverse=True)
        owner = pairs[0].to(device)
        sizes = torch.bincount(place).to(device, torch.float32)
        vectors = torch.zeros(pairs.shape[1], features.dim, device=device).index_add_(0, pair.to(device), phi)
        vectors /= sizes[owner, None]
        norms = torch.zeros(len(group), device=device).index_add_(0, owner, vectors.square().sum(1)).sqrt_()
        total.index_add_(0, pairs[1].to(device), vectors / norms.clamp(min=1.0)[owner, None])
    return total.reshape(-1).cpu()


@lru_cache(maxsize=1)
def cached_features(image_size: int, channels: int, seed: int) -> RandomFeatures:
    """One feature map for all simulated clients of a process."""
    return RandomFeatures(image_size, channels, seed).to(pick_device())


def _groups(units: list[np.ndarray]) -> list[list[np.ndarray]]:
    groups: list[list[np.ndarray]] = [[]]
    held = 0
    for unit in units:
        if held and held + len(unit) > _CHUNK:
            groups.append([])
            held = 0
        groups[-1].append(unit)
        held += len(unit)
    return groups if groups[-1] else []
