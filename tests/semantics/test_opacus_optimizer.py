"""Our noised sum is what Opacus's DPOptimizer would step along: same clipping, same noise, same normaliser."""

import copy

import numpy as np
import pytest
import torch
from opacus import GradSampleModule
from opacus.optimizers import DPOptimizer

from common.models.discriminators import discriminator_of
from common.models.losses import LOSSES
from common.privacy.clipping import FLOAT_SLACK, clipped_sum
from common.privacy.randomness import SecureRandom, add_gaussian_noise
from common.sections import ModelConfig

BATCH, NORM = 6, 0.05


def opacus_step(noise_multiplier: float, images: torch.Tensor, model: torch.nn.Module) -> np.ndarray:
    """The gradient that Opacus would step along, times the batch: (d,)."""
    wrapped = GradSampleModule(copy.deepcopy(model), loss_reduction="sum")
    optimizer = DPOptimizer(
        torch.optim.SGD(wrapped.parameters(), lr=1.0),
        noise_multiplier=noise_multiplier,
        max_grad_norm=NORM,
        expected_batch_size=BATCH,
        loss_reduction="mean",
        generator=torch.Generator().manual_seed(5),
    )
    LOSSES["bce"].real(wrapped(images)).sum().backward()
    optimizer.pre_step()
    flat = torch.cat([p.grad.reshape(-1) for p in wrapped.parameters() if p.grad is not None])
    return flat.mul(BATCH).numpy()


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
def test_the_sum_and_the_noise_are_those_of_opacus() -> None:
    model = discriminator_of(ModelConfig(image_size=28, channels=1, discriminator_width=4)).to(
        memory_format=torch.contiguous_format
    )
    images = torch.randn(BATCH, 1, 28, 28, generator=torch.Generator().manual_seed(1))
    ours = clipped_sum(model, LOSSES["bce"].real, images, None, torch.arange(BATCH), BATCH, NORM)
    theirs = opacus_step(0.0, images, model)
    assert 0 < np.linalg.norm(theirs) <= BATCH * NORM
    assert np.linalg.norm(ours.numpy() - theirs) <= 2 * FLOAT_SLACK * np.linalg.norm(theirs)

    sigma = 3.0
    our_noise = add_gaussian_noise(ours, sigma * NORM, SecureRandom(bytes(32))).numpy() - ours.numpy()
    their_noise = opacus_step(sigma, images, model) - theirs
    tolerance = 5 / np.sqrt(2 * len(theirs))  # five standard errors of a standard deviation
    for noise in (our_noise, their_noise):
        assert noise.std() == pytest.approx(sigma * NORM, rel=tolerance)
