"""Random features of an image: what the moment stage releases the noised mean of.

Local random Fourier features (Rahimi and Recht 2007, "Random features for large-scale kernel machines"): at each scale
a bank of random filters slides over the image, and the cosine and the sine of each response are kept. The mean of such
features is a kernel mean embedding of the patches at each place (Harder, Adamczewski and Park 2021, "DP-MERF"). Two
sets of images with nearly the same mean look alike at every scale. Nothing here is learned: all follows from a public
seed, so the features cost no privacy.
"""

import math
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import ConfigError

# image size -> groups of (kernel, stride, filters, length scale over the usual one)
Spec = tuple[tuple[int, int, int, float], ...]
_SPECS: dict[int, Spec] = {
    28: ((6, 2, 16, 0.5), (10, 3, 32, 0.5), (14, 7, 128, 0.5), (28, 1, 1500, 0.5)),
    32: ((6, 2, 16, 0.5), (8, 4, 32, 0.5), (16, 8, 128, 0.5), (32, 1, 1500, 0.5)),
    64: ((10, 6, 16, 0.5), (16, 8, 32, 0.5), (32, 16, 128, 0.5), (64, 1, 1500, 0.5)),
}

# Mean squared difference of one pixel value, in [0, 1], between two handwritten digits: the usual length scale.
_PIXEL_VARIANCE = 105 / 784


class RandomFeatures(nn.Module):
    """Multi-scale local random Fourier features; no parameters, buffers drawn from `seed` (public).

    The norm bound. A group of m responses a_1..a_m gives the 2m entries cos(a_j) / sqrt(m G), sin(a_j) / sqrt(m G),
    where G is the number of groups. cos^2 + sin^2 = 1, so the group's squared norm is 1 / G and the joined vector's is
    exactly 1, whatever the image: no clipping is needed. Rounding moves the squared norm by a few units of 2^-23; the
    factor 1 - 2^-16 in the scale keeps it at most 1 all the same. Adding or removing one image therefore moves a sum of
    features by at most 1, and so does adding or removing one person whose images' features are averaged.
    """

    def __init__(self, image_size: int, channels: int, seed: int, spec: Spec | None = None) -> None:
        super().__init__()
        if image_size not in _SPECS or channels not in (1, 3):
            raise ConfigError(
                f"features of {channels} channels at {image_size} pixels are asked for; known are 1 and 3 channels at "
                f"{sorted(_SPECS)} pixels: choose of these"
            )
        self.image_size, self.channels = image_size, channels
        self.spec = spec or _SPECS[image_size]
        generator = torch.Generator().manual_seed(seed)
        self.dim = 0
        for index, (kernel, stride, filters, length) in enumerate(self.spec):
            scale = 1 / math.sqrt(_PIXEL_VARIANCE * channels * kernel**2) / length
            weight = torch.randn((filters, channels, kernel, kernel), generator=generator) * scale
            self.register_buffer(f"weight{index}", weight)
            self.dim += 2 * filters * ((image_size - kernel) // stride + 1) ** 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, dim) float32, L2 norm <= 1 a row, of images (B, C, H, W) in [-1, 1].

        Raises ConfigError for another shape.
        """
        shape = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ConfigError(f"images of shape {tuple(images.shape)} were given; the features take (B, *{shape})")
        unit = (images + 1) / 2
        groups = []
        for index, (_, stride, _, _) in enumerate(self.spec):
            weight = cast(torch.Tensor, getattr(self, f"weight{index}"))
            response = F.conv2d(unit, weight, stride=stride).flatten(1).float()
            scale = (1 - 2**-16) / math.sqrt(len(self.spec) * response.shape[1])
            groups += [response.cos() * scale, response.sin() * scale]
        return torch.cat(groups, dim=1)
