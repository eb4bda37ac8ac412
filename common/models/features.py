"""Random features of an image: what the moment stage releases the noised mean of.

Local random Fourier features (Rahimi and Recht 2007, "Random features for large-scale kernel machines"): at each scale
a bank of random filters slides over the image, and the cosine and the sine of each response are kept. The mean of such
features is a kernel mean embedding of the patches at each place (Harder, Adamczewski and Park 2021, "DP-MERF"). Two
sets of images with nearly the same mean look alike at every scale. Nothing here is learned: all follows from a public
seed, so the features cost no privacy.
"""

import math
from typing import NamedTuple, cast

import torch
from torch import nn
from torch.nn import functional as F

from common.errors import ConfigError


class Group(NamedTuple):
    """One bank of filters, and what it looks at.

    kernel, stride: in pixels. filters: each gives a cosine and a sine at each place. length: the kernel's length scale, as
    the root mean square difference of a pixel value, in [0, 1], at which two patches count as half alike (exp(-1/2)).
    looks_at: "all"; "contrast": filters sum to 0 over space, so brightness, which else drowns the detail of a
    photograph, does not count; "colour": filters sum to 0 over the channels (the group is left out of grey images).
    shrink: the image is first averaged over squares of this many pixels, and kernel and stride are in such squares.
    """

    kernel: int
    stride: int
    filters: int
    length: float
    looks_at: str = "all"
    shrink: int = 1


# Tried on MNIST (28 px: twice this length cost 4 points of accuracy, 0.7 of it 1.5) and on photographs of faces (32 px).
_SPECS: dict[int, tuple[Group, ...]] = {
    28: (Group(6, 2, 16, 0.183), Group(10, 3, 32, 0.183), Group(14, 7, 128, 0.183), Group(28, 1, 1500, 0.183)),
    32: (
        Group(4, 2, 16, 0.073, "contrast"),
        Group(8, 4, 64, 0.092, "contrast"),
        Group(16, 8, 96, 0.11, "contrast"),
        Group(8, 4, 48, 0.092, "colour"),
        Group(16, 8, 96, 0.183),
        Group(32, 1, 1500, 0.183),
    ),
    64: (
        Group(8, 4, 16, 0.073, "contrast"),
        Group(16, 8, 64, 0.092, "contrast"),
        Group(32, 16, 96, 0.11, "contrast"),
        Group(16, 8, 48, 0.092, "colour"),
        Group(32, 16, 96, 0.183),
        Group(64, 1, 1500, 0.183),
    ),
    # As at 64 px, the larger patches at half the resolution: filters of 128x128 pixels would take 300 MB.
    128: (
        Group(16, 8, 16, 0.073, "contrast"),
        Group(16, 8, 64, 0.092, "contrast", shrink=2),
        Group(32, 16, 96, 0.11, "contrast", shrink=2),
        Group(16, 8, 48, 0.092, "colour", shrink=2),
        Group(32, 16, 96, 0.183, shrink=2),
        Group(64, 1, 1500, 0.183, shrink=2),
    ),
}


class RandomFeatures(nn.Module):
    """Multi-scale local random Fourier features; no parameters, buffers drawn from `seed` (public).

    The norm bound. A group of m responses a_1..a_m gives the 2m entries cos(a_j) / sqrt(m G), sin(a_j) / sqrt(m G),
    where G is the number of groups. cos^2 + sin^2 = 1, so the group's squared norm is 1 / G and the joined vector's is
    exactly 1, whatever the image: no clipping is needed. Rounding moves the squared norm by a few units of 2^-23; the
    factor 1 - 2^-16 in the scale keeps it at most 1 all the same. Adding or removing one image therefore moves a sum of
    features by at most 1, and so does adding or removing one person whose images' features are averaged.
    """

    def __init__(self, image_size: int, channels: int, seed: int, groups: tuple[Group, ...] | None = None) -> None:
        super().__init__()
        if image_size not in _SPECS or channels not in (1, 3):
            raise ConfigError(
                f"features of {channels} channels at {image_size} pixels are asked for; known are 1 and 3 channels at "
                f"{sorted(_SPECS)} pixels: choose of these"
            )
        self.image_size, self.channels = image_size, channels
        wanted = groups or _SPECS[image_size]
        self.groups = tuple(group for group in wanted if channels > 1 or group.looks_at != "colour")
        generator = torch.Generator().manual_seed(seed)
        self.dim = 0
        for index, group in enumerate(self.groups):
            shape = (group.filters, channels, group.kernel, group.kernel)
            weight = torch.randn(shape, generator=generator) / (group.length * math.sqrt(channels) * group.kernel)
            if group.looks_at == "contrast":
                weight -= weight.mean(dim=(2, 3), keepdim=True)
            elif group.looks_at == "colour":
                weight -= weight.mean(dim=1, keepdim=True)
            self.register_buffer(f"weight{index}", weight)
            self.dim += 2 * group.filters * ((image_size // group.shrink - group.kernel) // group.stride + 1) ** 2

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Features (B, dim) float32, L2 norm <= 1 a row, of images (B, C, H, W) in [-1, 1].

        Raises ConfigError for another shape.
        """
        shape = (self.channels, self.image_size, self.image_size)
        if images.ndim != 4 or tuple(images.shape[1:]) != shape:
            raise ConfigError(f"images of shape {tuple(images.shape)} were given; the features take (B, *{shape})")
        unit = (images + 1) / 2
        embedded = []
        for index, group in enumerate(self.groups):
            weight = cast(torch.Tensor, getattr(self, f"weight{index}"))
            seen = unit if group.shrink == 1 else F.avg_pool2d(unit, group.shrink)
            response = F.conv2d(seen, weight, stride=group.stride).flatten(1).float()
            scale = (1 - 2**-16) / math.sqrt(len(self.groups) * response.shape[1])
            embedded += [response.cos() * scale, response.sin() * scale]
        return torch.cat(embedded, dim=1)
