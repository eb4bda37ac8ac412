"""Generators: latent noise, and a class if there are classes, to an image.

A generator never sees a photograph, so batch normalisation is allowed here; it is not in a discriminator.
"""

from collections.abc import Callable
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from common.errors import ConfigError
from common.models import build_initialised
from common.sections import ModelConfig

# image size -> (side of the first feature map, number of doublings)
_SHAPES = {28: (7, 2), 32: (4, 3), 64: (4, 4), 128: (4, 5)}


class Generator(nn.Module):
    """What all generators share: the latent, to which the class is joined as a one-hot vector times
    sqrt(num_classes), which gives its entries the latent's second moment, 1.

    A subclass draws from the two joined, (B, num_inputs), in `draw`. `width` is the number of channels of its last
    hidden feature map.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int) -> None:
        super().__init__()
        if image_size not in _SHAPES:
            raise ConfigError(f"image_size is {image_size}; generators draw {sorted(_SHAPES)}: choose one of these")
        if min(channels, latent_dim, width) < 1 or num_classes < 0:
            raise ConfigError(
                f"channels, latent_dim, width, num_classes are {channels}, {latent_dim}, {width}, {num_classes}; "
                "the first three must be at least 1 and num_classes at least 0"
            )
        self.image_size, self.channels = image_size, channels
        self.num_classes, self.latent_dim = num_classes, latent_dim
        self.num_inputs = latent_dim + num_classes

    def forward(self, latent: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Draw images (B, C, H, W) in [-1, 1] from latent (B, latent_dim) ~ N(0, 1) and labels (B,) int64 in
        0..num_classes-1.

        Raises ConfigError when labels are given to an unconditional generator or missing from a conditional one.
        """
        if (labels is None) != (self.num_classes == 0):
            given = "no labels" if labels is None else "labels"
            raise ConfigError(
                f"got {given} for a generator of num_classes={self.num_classes}; give labels when it is > 0"
            )
        if labels is not None:
            classes = torch.arange(self.num_classes, device=latent.device)
            one_hot = (labels[:, None] == classes).to(latent.dtype) * self.num_classes**0.5
            latent = torch.cat([latent, one_hot], dim=1)
        return self.draw(latent)

    def draw(self, joined: torch.Tensor) -> torch.Tensor:
        """Images (B, C, H, W) from latent and class, (B, num_inputs)."""
        raise NotImplementedError


class DCGANGenerator(Generator):
    """Dense layer, batch norm, leaky ReLU, then transposed convolutions (4, stride 2) up to the image, tanh (Radford,
    Metz and Chintala 2016, "Unsupervised representation learning with deep convolutional generative adversarial
    networks").

    Each feature map has twice as many channels as the one after it (28 px, width 32: 7x7x64, 14x14x32, image; 32 px,
    width 64: 4x4x256 first). With latent_dim 64, width 32 and ten classes at 28 px grey it has 265,537 parameters.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int) -> None:
        super().__init__(
            image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=latent_dim, width=width
        )
        self._base, doublings = _SHAPES[image_size]
        hidden = width * 2 ** (doublings - 1)
        # No biases before a batch norm: its shift replaces them.
        self.dense = nn.Linear(self.num_inputs, hidden * self._base**2, bias=False)
        layers: list[nn.Module] = [nn.BatchNorm2d(hidden), nn.LeakyReLU(0.2)]
        for _ in range(doublings - 1):
            layers += [
                nn.ConvTranspose2d(hidden, hidden // 2, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(hidden // 2),
                nn.LeakyReLU(0.2),
            ]
            hidden //= 2
        layers += [nn.ConvTranspose2d(hidden, channels, 4, stride=2, padding=1), nn.Tanh()]
        self.upsample = nn.Sequential(*layers)

    def draw(self, joined: torch.Tensor) -> torch.Tensor:
        """Images from latent and class; see `Generator`."""
        features = self.dense(joined).unflatten(1, (-1, self._base, self._base))
        return cast(torch.Tensor, self.upsample(features))


# image size -> the sides at which the four groups of three convolutions work, from 4x4
_DENSE_CONV_SIDES = {28: (4, 7, 14, 28), 32: (4, 8, 16, 32), 64: (8, 16, 32, 64), 128: (8, 16, 32, 64)}


class DenseConvGenerator(Generator):
    """Six dense layers of 2, 2, 16, 16, 64, 64 times `width`, reshaped to 4x4; three convolutions (3) each of 8, 4, 2
    and 1 times `width` channels; batch norm and leaky ReLU after each; a convolution to the image, tanh.

    Width 64 is the source's size: dense 128, 128, 1024, 1024, 4096, 4096, then 512 x 3, 256 x 3, 128 x 3, 64 x 3. The
    last 4096 become 4x4x256, and the first convolution takes those 256 channels to 512: a dense layer to 4x4x512 would
    alone be larger than all the others. Nearest-neighbour upsampling stands before a group whose side is larger (at 64
    and 128 px before the first too) and, at 128 px, before the image.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int) -> None:
        super().__init__(
            image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=latent_dim, width=width
        )
        dense: list[nn.Module] = []
        before = self.num_inputs
        for factor in (2, 2, 16, 16, 64, 64):
            dense += [
                nn.Linear(before, factor * width, bias=False),
                nn.BatchNorm1d(factor * width),
                nn.LeakyReLU(0.2),
            ]
            before = factor * width
        self.dense = nn.Sequential(*dense)
        layers: list[nn.Module] = []
        before, side = 4 * width, 4
        for factor, next_side in zip((8, 4, 2, 1), _DENSE_CONV_SIDES[image_size], strict=True):
            layers += _upsampling(side, next_side)
            side = next_side
            for _ in range(3):
                layers += [
                    nn.Conv2d(before, factor * width, 3, padding=1, bias=False),
                    nn.BatchNorm2d(factor * width),
                    nn.LeakyReLU(0.2),
                ]
                before = factor * width
        self.convolutions = nn.Sequential(*layers, *_upsampling(side, image_size), *_to_image(width, channels))

    def draw(self, joined: torch.Tensor) -> torch.Tensor:
        """Images from latent and class; see `Generator`."""
        return cast(torch.Tensor, self.convolutions(self.dense(joined).unflatten(1, (-1, 4, 4))))


class _UpBlock(nn.Module):
    """Residual block of twice the side: norm, ReLU, upsample, conv, norm, ReLU, conv, beside a shortcut."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.branch = nn.Sequential(
            nn.BatchNorm2d(before),
            nn.LeakyReLU(0.2),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(before, after, 3, padding=1, bias=False),
            nn.BatchNorm2d(after),
            nn.LeakyReLU(0.2),
            nn.Conv2d(after, after, 3, padding=1),
        )
        # The source's convolution of one pixel stands after the upsampling: the same, at four times the cost.
        self.shortcut = nn.Sequential(nn.Conv2d(before, after, 1, bias=False), nn.Upsample(scale_factor=2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, self.shortcut(x) + self.branch(x))


class ResNetGenerator(Generator):
    """Dense layer, a residual block for each doubling, batch norm, leaky ReLU, a convolution to the image, tanh.

    After SNGAN (Miyato et al. 2018, appendix B.4) and WGAN-GP (Gulrajani et al. 2017, appendix F), with leaky ReLUs.
    Each block ends with half the channels of the one before, at most 4 times `width` (32 px, width 32: 4x4x128,
    8x8x128, 16x16x64, 32x32x32).
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int) -> None:
        super().__init__(
            image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=latent_dim, width=width
        )
        self._base, doublings = _SHAPES[image_size]
        widths = [width * min(2**level, 4) for level in range(doublings, -1, -1)]
        self.dense = nn.Linear(self.num_inputs, widths[0] * self._base**2)
        self.blocks = nn.Sequential(
            *(_UpBlock(before, after) for before, after in pairwise(widths)),
            nn.BatchNorm2d(width),
            nn.LeakyReLU(0.2),
            *_to_image(width, channels),
        )

    def draw(self, joined: torch.Tensor) -> torch.Tensor:
        """Images from latent and class; see `Generator`."""
        return cast(torch.Tensor, self.blocks(self.dense(joined).unflatten(1, (-1, self._base, self._base))))


def _upsampling(side: int, wanted: int) -> list[nn.Module]:
    return [] if side == wanted else [nn.Upsample(size=wanted)]


def _to_image(width: int, channels: int) -> list[nn.Module]:
    # Of stride 1 a transposed convolution is a convolution; as one it starts small, so that tanh is not saturated.
    return [nn.ConvTranspose2d(width, channels, 3, padding=1), nn.Tanh()]


GENERATORS: dict[str, Callable[..., Generator]] = {
    "dcgan": DCGANGenerator,
    "dense-conv": DenseConvGenerator,
    "resnet": ResNetGenerator,
}


def build_generator(
    name: str, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int
) -> Generator:
    """Build a generator of the registry, its weights from a fixed seed; draw a run's own with
    `common.models.initialise`.

    num_classes 0 means unconditional. Raises ConfigError for an unknown name or an impossible shape.
    """
    if name not in GENERATORS:
        raise ConfigError(f"generator is {name!r}; known are {sorted(GENERATORS)}: choose one of these")
    kind = GENERATORS[name]
    module = build_initialised(
        lambda: kind(
            image_size=image_size, channels=channels, num_classes=num_classes, latent_dim=latent_dim, width=width
        )
    )
    return cast(Generator, module)


def generator_of(model: ModelConfig) -> Generator:
    """The generator that a run's configuration names."""
    return build_generator(
        model.generator,
        image_size=model.image_size,
        channels=model.channels,
        num_classes=model.num_classes,
        latent_dim=model.latent_dim,
        width=model.generator_width,
    )
