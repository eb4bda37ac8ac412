"""How near generated faces come to a reference set: the Frechet distance between features of both.

Heusel et al. 2017, "GANs trained by a two time-scale update rule converge to a local Nash equilibrium", equation 6, on
features of our own instead of the Inception network's: **its values are not FIDs and compare to no published one**, only to
each other, at one image size. The features are those of a small convolutional network with random weights (public seed;
Naeem et al. 2020, "Reliable fidelity and diversity metrics", section 4.3, find such embeddings fair where the images are far
from ImageNet). Nothing in it is learned, so it knows no face.
"""

import warnings
from collections.abc import Iterable
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import DataError
from common.models import build_initialised

_WIDTHS = (32, 64, 128)
# Distances between sets of photographs then lie between about 0 and a few hundred.
_SCALE = 10.0


class FidelityFeatures(nn.Module):
    """`visard-random-1`: means of each channel of three random convolutions (3x3, stride 2), (B, 224).

    Images are brought to 32 x 32 and to three channels first, so that the features mean the same at every size.
    """

    num_features = sum(_WIDTHS)

    def __init__(self) -> None:
        super().__init__()
        sides = zip((3, *_WIDTHS), _WIDTHS, strict=False)
        self.layers = build_initialised(
            lambda: nn.ModuleList(nn.Conv2d(before, after, 3, stride=2, padding=1) for before, after in sides)
        )

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, num_features) of images (B, C, H, W) in [-1, 1]."""
        x = images.float().expand(-1, 3, -1, -1)
        if x.shape[-1] != 32:
            x = functional.interpolate(x, size=(32, 32), mode="bilinear", antialias=True, align_corners=False)
        pooled = []
        for layer in cast(nn.ModuleList, self.layers):
            x = functional.leaky_relu(layer(x), 0.2)
            pooled.append(x.mean((2, 3)))
        return torch.cat(pooled, 1) * _SCALE


class FrechetDistance:
    """The distance of images to a fixed reference set. Both come in batches (B, C, H, W) in [-1, 1], 2 images or more in all."""

    def __init__(self, reference: Iterable[Tensor]) -> None:
        """Raises DataError for fewer than 2 images."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the optional packages of torchmetrics
            from torchmetrics.image.fid import FrechetInceptionDistance
        self._metric = FrechetInceptionDistance(feature=FidelityFeatures(), reset_real_features=False, normalize=True)
        self._update(reference, real=True)

    @torch.no_grad()
    def __call__(self, images: Iterable[Tensor]) -> float:
        """The distance, at least 0. Raises DataError for fewer than 2 images."""
        self._metric.reset()
        self._update(images, real=False)
        return max(0.0, float(self._metric.compute()))

    @torch.no_grad()
    def _update(self, batches: Iterable[Tensor], *, real: bool) -> None:
        count = 0
        for batch in batches:
            self._metric.to(batch.device)
            self._metric.update(batch, real=real)
            count += len(batch)
        if count < 2:
            raise DataError(f"{count} images: a covariance takes 2 or more")
