"""Generators: latent noise, and a class if there are classes, to an image.

`dcgan` follows Radford, Metz and Chintala 2016, "Unsupervised representation learning with deep convolutional
generative adversarial networks". A generator never sees a photograph, so batch normalisation is allowed here; it is
not in a discriminator.
"""

from typing import cast

import torch
from torch import nn

from common.config import ModelConfig
from common.errors import ConfigError
from common.models import build_initialised

# image size -> (side of the first feature map, number of doublings)
_SHAPES = {28: (7, 2), 32: (4, 3), 64: (4, 4)}


class DCGANGenerator(nn.Module):
    """Dense layer, batch norm, leaky ReLU, then transposed convolutions (4, stride 2) up to the image, tanh.

    `width` is the number of channels of the last hidden feature map; each map before it has twice as many (28 px,
    width 32: 7x7x64, 14x14x32, image). The class is joined to the latent as a one-hot vector times sqrt(num_classes),
    which gives its entries the latent's second moment, 1. With latent_dim 64, width 32 and ten classes at 28 px grey
    it has 265,537 parameters.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int) -> None:
        super().__init__()
        if image_size not in _SHAPES:
            raise ConfigError(
                f"image_size is {image_size}; the dcgan generator draws {sorted(_SHAPES)}: choose one of these"
            )
        if min(channels, latent_dim, width) < 1 or num_classes < 0:
            raise ConfigError(
                f"channels, latent_dim, width, num_classes are {channels}, {latent_dim}, {width}, {num_classes}; "
                "the first three must be at least 1 and num_classes at least 0"
            )
        self.image_size, self.channels = image_size, channels
        self.num_classes, self.latent_dim = num_classes, latent_dim
        self._base, doublings = _SHAPES[image_size]
        hidden = width * 2 ** (doublings - 1)
        # No biases before a batch norm: its shift replaces them.
        self.dense = nn.Linear(latent_dim + num_classes, hidden * self._base**2, bias=False)
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
        features = self.dense(latent).unflatten(1, (-1, self._base, self._base))
        return cast(torch.Tensor, self.upsample(features))


GENERATORS = {"dcgan": DCGANGenerator}


def build_generator(
    name: str, *, image_size: int, channels: int, num_classes: int, latent_dim: int, width: int
) -> DCGANGenerator:
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
    return cast(DCGANGenerator, module)


def generator_of(model: ModelConfig) -> DCGANGenerator:
    """The generator that a run's configuration names."""
    return build_generator(
        model.generator,
        image_size=model.image_size,
        channels=model.channels,
        num_classes=model.num_classes,
        latent_dim=model.latent_dim,
        width=model.generator_width,
    )
