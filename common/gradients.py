"""The two halves of a discriminator's gradient: reals at the clients, fakes at whoever holds the fakes.

L_D = mean over units of real(D(x)) + mean over fakes of fake(D(G(z))). Both halves are clipped to the same C, sample by
sample: clipping the reals alone would make them too weak beside the fakes. The fakes' half costs no privacy and gets no
noise. Augmented views and dropout's masks are the caller's to seed (`common.augmentation.step_randomness`).
"""

import numpy as np
import torch
from torch import Tensor, nn

from common.device import half_precision
from common.models.losses import GANLoss
from common.privacy.clipping import clipped_sum
from common.privacy.units import PrivacyModel
from common.sections import PrivacyConfig


def real_sum(
    discriminator: nn.Module,
    loss: GANLoss,
    images: Tensor,
    labels: Tensor | None,
    units: Tensor,
    num_units: int,
    privacy: PrivacyConfig,
) -> Tensor:
    """Sum over units of the clipped mean gradient of each unit's images; unclipped without a privacy model.

    images: (B, C, H, W) in [-1, 1]; labels: (B,) int64 or None; units: (B,) int64, the place 0..num_units-1 of each
    image's unit, contiguous. Returns (d,) float32, zeros for an empty batch.
    """
    images = images.contiguous(memory_format=torch.channels_last)
    if privacy.privacy_model is not PrivacyModel.NONE:
        return clipped_sum(
            discriminator, loss.real, images, labels, units, num_units, privacy.max_grad_norm, chunk_size=_chunk(images)
        )
    if len(images) == 0:
        return torch.zeros(sum(p.numel() for p in discriminator.parameters()), device=images.device)
    weights = 1.0 / torch.bincount(units, minlength=num_units).to(torch.float32)[units]
    with half_precision(images.device):
        logits = discriminator(images, labels).float()
    return _flat_gradient(discriminator, (loss.real(logits) * weights).sum())


def fake_mean(
    discriminator: nn.Module, loss: GANLoss, images: Tensor, labels: Tensor | None, privacy: PrivacyConfig
) -> Tensor:
    """Mean over fakes of their clipped gradients, unclipped without a privacy model: (d,) float32.

    Shapes as `real_sum`. Zeros under a loss without a half on fakes.
    """
    if not loss.sees_fakes:
        return torch.zeros(sum(p.numel() for p in discriminator.parameters()), device=images.device)
    images = images.contiguous(memory_format=torch.channels_last)
    if privacy.privacy_model is PrivacyModel.NONE:
        with half_precision(images.device):
            logits = discriminator(images, labels).float()
        return _flat_gradient(discriminator, loss.fake(logits).mean())
    own = torch.arange(len(images), device=images.device)
    total = clipped_sum(
        discriminator, loss.fake, images, labels, own, len(images), privacy.max_grad_norm, chunk_size=_chunk(images)
    )
    return total / len(images)


def to_uint8(images: Tensor) -> np.ndarray:
    """Images in [-1, 1], (B, C, H, W), to uint8 0..255."""
    return images.detach().float().add(1.0).mul(127.5).round_().clamp_(0, 255).to(torch.uint8).cpu().numpy()


def from_uint8(images: np.ndarray) -> Tensor:
    """Images uint8 0..255, (B, C, H, W), to float32 in [-1, 1]."""
    return torch.from_numpy(np.array(images)).to(torch.float32).div_(127.5).sub_(1.0)


def _chunk(images: Tensor) -> int | None:
    """Images clipped at a time: enough to fill a GPU; on a processor what suits its caches."""
    return 1024 if images.device.type == "cuda" else None


def _flat_gradient(model: nn.Module, loss: Tensor) -> Tensor:
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    return torch.cat([g.reshape(-1) for g in gradients])
