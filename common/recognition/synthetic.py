"""Faces of a generator for a recogniser to learn from: nobody's, with or without an identity, or near to a photograph.

A latent code is taken for a person, and codes near it for other photographs of that person (`synthetic_persons`), though no
training told the generator so: how far it is true is measured, not assumed (docs/recognition.md). What is near a
photograph is found by descent in the latent space (`variations_of`), at the photograph's owner and nowhere else: what comes of that is as
private as the photograph.
"""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from common.applications.generate import TrainedGenerator
from common.errors import ConfigError
from common.gradients import to_uint8
from common.recognition.settings import RecognitionConfig

_BATCH = 128
# Of the search for a photograph's latent.
_STEPS, _RATE, _PRIOR = 200, 0.05, 1e-3


def synthetic_persons(
    generator: TrainedGenerator, persons: int, each: int, spread: float, seed: int, labels: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """`each` faces of `persons` synthetic persons: images (N, C, S, S) uint8 and whose each is (N,) int64, person after person.

    Face k of a person p has the latent sqrt(1 - spread^2) z_p + spread e_pk, all standard normal: as likely a latent as any. Of a
    conditional generator each person has one label: of `labels` (persons,) int64, else in turn. spread: in [0, 1]; at 1 nothing
    is in common but the label.
    """
    rng = torch.Generator().manual_seed(seed)
    dim, classes = generator.model.latent_dim, generator.model.num_classes
    centres = torch.randn(persons, dim, generator=rng).repeat_interleave(each, 0)
    latents = (1 - spread**2) ** 0.5 * centres + spread * torch.randn(persons * each, dim, generator=rng)
    whose = torch.arange(persons).repeat_interleave(each)
    asked = whose % max(classes, 1) if labels is None else torch.from_numpy(labels)[whose]
    return _draw(generator, latents, asked if classes else None), whose.numpy()


def variations_of(
    generator: TrainedGenerator,
    images: np.ndarray,
    labels: np.ndarray | None,
    each: int,
    spread: float,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """`each` faces near every photograph: images (N * each, C, S, S) uint8 and the photograph (N * each,) each is near to.

    images: (N, C, S, S) uint8 of the generator's own size. The latent of each photograph is sought by Adam on the mean squared
    error of pixels at full and at a quarter of the size, with a weak pull to short latents (after Abdal et al. 2019,
    "Image2StyleGAN"); then it is varied as a synthetic person's is. Raises ConfigError for images of another shape.
    """
    model = generator.model
    if images.shape[1:] != (model.channels, model.image_size, model.image_size):
        raise ConfigError(
            f"images are {images.shape[1:]}, the generator's {(model.channels, model.image_size, model.image_size)}"
        )
    rng = torch.Generator().manual_seed(seed)
    found = []
    for start in range(0, len(images), _BATCH):
        few = slice(start, start + _BATCH)
        some = None if labels is None else torch.from_numpy(labels[few])
        found.append(_invert(generator, torch.from_numpy(images[few]), some, rng))
    centres = torch.cat(found).repeat_interleave(each, 0)
    noise = torch.randn(centres.shape, generator=rng)
    whose = np.repeat(np.arange(len(images)), each)
    latents = (1 - spread**2) ** 0.5 * centres + spread * noise
    return _draw(generator, latents, None if labels is None else torch.from_numpy(labels[whose])), whose


def as_wanted(images: np.ndarray, config: RecognitionConfig) -> np.ndarray:
    """Generated faces (N, c, s, s) uint8 in the recogniser's size and colours."""
    faces = torch.from_numpy(images).float()
    if faces.shape[1] > config.channels:
        faces = (faces * torch.tensor([0.299, 0.587, 0.114]).view(1, 3, 1, 1)).sum(1, keepdim=True)
    faces = faces.expand(-1, config.channels, -1, -1)
    if faces.shape[2] != config.image_size:
        side = (config.image_size, config.image_size)
        faces = functional.interpolate(faces, side, mode="bicubic", antialias=True, align_corners=False)
    return faces.round().clamp(0, 255).to(torch.uint8).numpy()


def as_generated(images: np.ndarray, generator: TrainedGenerator) -> np.ndarray:
    """Photographs (N, c, s, s) uint8 in the generator's size and colours."""
    model = generator.model
    return as_wanted(images, RecognitionConfig(image_size=model.image_size, channels=model.channels))


def _invert(generator: TrainedGenerator, images: Tensor, labels: Tensor | None, rng: torch.Generator) -> Tensor:
    """Latents (B, D) whose faces are near `images` (B, C, S, S) uint8."""
    device = next(generator.network.parameters()).device
    wanted = images.to(device).float().div(127.5).sub(1)
    labels = None if labels is None else labels.to(device)
    latents = torch.randn(len(images), generator.model.latent_dim, generator=rng).mul(0.1).to(device).requires_grad_()
    optimizer = torch.optim.Adam([latents], lr=_RATE)
    for _ in range(_STEPS):
        drawn = generator.network(latents, labels)
        loss = functional.mse_loss(drawn, wanted, reduction="sum") / wanted[0].numel()
        coarse = functional.avg_pool2d(drawn, 4), functional.avg_pool2d(wanted, 4)
        loss = loss + functional.mse_loss(*coarse, reduction="sum") / coarse[1][0].numel()
        optimizer.zero_grad()
        torch.autograd.backward(loss + _PRIOR * latents.square().sum() / latents.shape[1])
        optimizer.step()
    return latents.detach().cpu()


@torch.no_grad()
def _draw(generator: TrainedGenerator, latents: Tensor, labels: Tensor | None) -> np.ndarray:
    device = next(generator.network.parameters()).device
    drawn = []
    for start in range(0, len(latents), _BATCH):
        few = slice(start, start + _BATCH)
        some = None if labels is None else labels[few].to(device)
        drawn.append(to_uint8(generator.network(latents[few].to(device), some)))
    return np.concatenate(drawn)
