"""Discriminators: an image, and a class if there are classes, to one logit (high for real).

No layer mixes samples (no batch norm, no minibatch statistics): the gradient of one person's photographs must not
depend on another's, or clipping bounds nothing. `common.privacy.clipping.check_no_cross_sample` tests it.

A conditional discriminator adds the inner product of its last features with an embedding of the class (Miyato and
Koyama 2018, "cGANs with projection discriminator"); the features keep their positions here instead of being pooled,
as our networks are shallow.
"""

from typing import cast

import torch
from torch import nn

from common.config import ModelConfig
from common.errors import ConfigError
from common.models import build_initialised

# image size -> number of halvings: 28 ends at 7x7, 32 and 64 at 4x4
_HALVINGS = {28: 2, 32: 3, 64: 4}


class Discriminator(nn.Module):
    """`body` gives features (B, F); the logit is linear in them, plus the projection on the class's embedding."""

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.body = body
        self.head = nn.Linear(num_features, 1)
        self.projection = nn.Embedding(num_classes, num_features) if num_classes > 0 else None

    def forward(self, images: torch.Tensor, labels: torch.Tensor | None = None) -> torch.Tensor:
        """Logits (B,) of images (B, C, H, W) in [-1, 1] with labels (B,) int64 in 0..num_classes-1, or None when
        num_classes is 0.

        Raises ConfigError when labels are given to an unconditional discriminator or missing from a conditional one.
        """
        if (labels is None) != (self.projection is None):
            given = "no labels" if labels is None else "labels"
            raise ConfigError(
                f"got {given} for a discriminator of num_classes={self.num_classes}; give labels when it is > 0"
            )
        features = self.body(images)
        logits = self.head(features).squeeze(1)
        if self.projection is not None:
            logits = logits + (self.projection(labels) * features).sum(1)
        return cast(torch.Tensor, logits)


class DCGANDiscriminator(Discriminator):
    """Convolutions (4, stride 2) with leaky ReLU 0.2, each doubling the channels (Radford et al. 2016, without batch
    norm).

    `width` is the number of channels of the first feature map (64 px, width 64: 2.8 million parameters).
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, width: int) -> None:
        _check_shape(image_size, channels, num_classes, width)
        layers: list[nn.Module] = []
        before, side = channels, image_size
        for level in range(_HALVINGS[image_size]):
            after = width * 2**level
            layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
            before, side = after, side // 2
        super().__init__(nn.Sequential(*layers, nn.Flatten()), before * side * side, num_classes)


class MLPDiscriminator(Discriminator):
    """Flattened image, three hidden layers of 16, 8 and 4 times `width` with leaky ReLU 0.2 (width 64: 1024, 512,
    256)."""

    def __init__(self, *, image_size: int, channels: int, num_classes: int, width: int) -> None:
        _check_shape(image_size, channels, num_classes, width)
        layers: list[nn.Module] = [nn.Flatten()]
        before = channels * image_size * image_size
        for after in (16 * width, 8 * width, 4 * width):
            layers += [nn.Linear(before, after), nn.LeakyReLU(0.2)]
            before = after
        super().__init__(nn.Sequential(*layers), before, num_classes)


def _check_shape(image_size: int, channels: int, num_classes: int, width: int) -> None:
    if image_size not in _HALVINGS:
        raise ConfigError(f"image_size is {image_size}; discriminators take {sorted(_HALVINGS)}: choose one of these")
    if min(channels, width) < 1 or num_classes < 0:
        raise ConfigError(
            f"channels, width, num_classes are {channels}, {width}, {num_classes}; "
            "the first two must be at least 1 and num_classes at least 0"
        )


DISCRIMINATORS: dict[str, type[DCGANDiscriminator] | type[MLPDiscriminator]] = {
    "dcgan": DCGANDiscriminator,
    "mlp": MLPDiscriminator,
}


def build_discriminator(name: str, *, image_size: int, channels: int, num_classes: int, width: int) -> Discriminator:
    """Build a discriminator of the registry, its weights from a fixed seed; draw a run's own with
    `common.models.initialise`.

    num_classes 0 means unconditional. Raises ConfigError for an unknown name or an impossible shape.
    """
    if name not in DISCRIMINATORS:
        raise ConfigError(f"discriminator is {name!r}; known are {sorted(DISCRIMINATORS)}: choose one of these")
    kind = DISCRIMINATORS[name]
    module = build_initialised(
        lambda: kind(image_size=image_size, channels=channels, num_classes=num_classes, width=width)
    )
    return cast(Discriminator, module)


def discriminator_of(model: ModelConfig) -> Discriminator:
    """The discriminator that a run's configuration names, in channels-last memory, where clipping is quickest."""
    module = build_discriminator(
        model.discriminator,
        image_size=model.image_size,
        channels=model.channels,
        num_classes=model.num_classes,
        width=model.discriminator_width,
    )
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
