"""Discriminators: an image, and a class if there are classes, to one logit (high for real).

No layer mixes samples (no batch norm, no minibatch statistics): the gradient of one person's photographs must not
depend on another's, or clipping bounds nothing. `common.privacy.clipping.check_no_cross_sample` tests it. Where the
source of a network normalises over the batch, ours normalises over groups of an image's own channels (Wu and He 2018,
"Group normalization"). Dropout is no mixing, if its masks are drawn as `common.models.stochastic` says.

A conditional discriminator of real against fake adds the inner product of its last features with an embedding of the class (Miyato and
Koyama 2018, "cGANs with projection discriminator"); the features keep their positions here instead of being pooled,
as our networks are shallow. Under the loss `cross-entropy` it is a classifier instead, `ClassDiscriminator`.
"""

import math
from collections.abc import Callable
from functools import lru_cache
from itertools import pairwise
from typing import cast

import torch
from torch import nn

from common.errors import ConfigError
from common.models import build_initialised
from common.models.flat import num_parameters
from common.models.scattering import Scattering
from common.sections import ModelConfig

# image size -> number of halvings: 28 ends at 7x7, the others at 4x4
_HALVINGS = {28: 2, 32: 3, 64: 4, 128: 5}


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


class ConvDropoutDiscriminator(Discriminator):
    """Two convolutions (5, stride 2), the second of twice the channels, each with leaky ReLU 0.2 and dropout 0.3, then
    the logit.

    The discriminator of TensorFlow's DCGAN tutorial, which has `width` 64 and a leaky slope of 0.3. Its dropout draws
    from torch's global random numbers: run it in training mode within `common.models.stochastic.seeded_masks`.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, width: int) -> None:
        _check_shape(image_size, channels, num_classes, width)
        layers: list[nn.Module] = []
        for before, after in pairwise((channels, width, 2 * width)):
            layers += [nn.Conv2d(before, after, 5, stride=2, padding=2), nn.LeakyReLU(0.2), nn.Dropout(0.3)]
        super().__init__(nn.Sequential(*layers, nn.Flatten()), 2 * width * (image_size // 4) ** 2, num_classes)


# image size -> the strides of the seven convolutions, which end at 4x4
_DEEP_STRIDES = {
    28: (1, 2, 1, 2, 1, 2, 1),
    32: (1, 2, 1, 2, 1, 2, 1),
    64: (2, 2, 1, 2, 1, 2, 1),
    128: (2, 2, 1, 2, 1, 2, 2),
}


class DeepConvDiscriminator(Discriminator):
    """Seven convolutions (3) of 1, 2, 2, 4, 4, 8, 8 times `width` channels down to 4x4, two dense layers of 16 times
    `width`, leaky ReLU 0.2 after each (width 64: 64, 128 x 2, 256 x 2, 512 x 2, dense 1024 x 2).

    The manner of VGG (Simonyan and Zisserman 2015). Every convolution but the first has a group norm, of eight groups
    where they divide the channels, in place of the batch norm that so deep a stack usually has.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, width: int) -> None:
        _check_shape(image_size, channels, num_classes, width)
        layers: list[nn.Module] = [
            nn.Conv2d(channels, width, 3, stride=_DEEP_STRIDES[image_size][0], padding=1),
            nn.LeakyReLU(0.2),
        ]
        widths = [width * factor for factor in (1, 2, 2, 4, 4, 8, 8)]
        for (before, after), stride in zip(pairwise(widths), _DEEP_STRIDES[image_size][1:], strict=True):
            layers += [
                nn.Conv2d(before, after, 3, stride=stride, padding=1, bias=False),
                nn.GroupNorm(math.gcd(8, after), after),
                nn.LeakyReLU(0.2),
            ]
        layers += [nn.Flatten(), nn.Linear(widths[-1] * 16, 16 * width), nn.LeakyReLU(0.2)]
        layers += [nn.Linear(16 * width, 16 * width), nn.LeakyReLU(0.2)]
        super().__init__(nn.Sequential(*layers), 16 * width, num_classes)


class _ResidualBlock(nn.Module):
    """(x's shortcut + conv(act(conv(act(x))))) / sqrt(2), half the side if `halve`.

    The factor keeps the variance of the sum that of its parts, so that a deep stack starts at the scale of a shallow
    one (as in StyleGAN2, Karras et al. 2020, appendix B).
    """

    def __init__(self, before: int, after: int, *, halve: bool, image: bool = False) -> None:
        super().__init__()
        first = nn.Conv2d(before, after if image else before, 3, padding=1)
        # The source pools after this convolution; a stride costs a quarter.
        second = (
            nn.Conv2d(first.out_channels, after, 4, 2, 1) if halve else nn.Conv2d(first.out_channels, after, 3, 1, 1)
        )
        self.branch = nn.Sequential(
            nn.Identity() if image else nn.LeakyReLU(0.2),
            first,
            nn.LeakyReLU(0.2),
            second,
        )
        self.shortcut = nn.Sequential(
            nn.AvgPool2d(2) if halve else nn.Identity(),
            nn.Conv2d(before, after, 1, bias=False) if before != after else nn.Identity(),
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return cast(torch.Tensor, (self.shortcut(x) + self.branch(x)) * math.sqrt(0.5))


class ResNetDiscriminator(Discriminator):
    """Residual blocks of 1, 2, 4, 4, ... times `width` channels, each of half the side, one more at the last side, a
    leaky ReLU.

    After SNGAN (Miyato et al. 2018, "Spectral normalization for generative adversarial networks", appendix B.4),
    without its spectral norm and with leaky ReLUs; no other normalisation, as there and in WGAN-GP (Gulrajani et al.
    2017). The source sums over the positions before the logit; here each keeps its own weights, as in our other
    networks: summed, the logits of a start lie many times their spread away from 0.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, width: int) -> None:
        _check_shape(image_size, channels, num_classes, width)
        widths = [width * min(2**level, 4) for level in range(_HALVINGS[image_size])]
        blocks = [_ResidualBlock(channels, width, halve=True, image=True)]
        blocks += [_ResidualBlock(before, after, halve=True) for before, after in pairwise(widths)]
        blocks += [_ResidualBlock(widths[-1], widths[-1], halve=False)]
        side = image_size // 2 ** len(widths)
        super().__init__(nn.Sequential(*blocks, nn.LeakyReLU(0.2), nn.Flatten()), widths[-1] * side**2, num_classes)


class ScatteringDiscriminator(Discriminator):
    """One linear layer on the fixed features of `common.models.scattering`; `width` has no part in it.

    Its gradient is the features, of norm 1 or less, and 1 for the bias, times one number a logit.
    """

    def __init__(self, *, image_size: int, channels: int, num_classes: int, width: int) -> None:
        _check_shape(image_size, channels, num_classes, width)
        body = Scattering(image_size, channels)
        super().__init__(body, body.num_features, num_classes)


class ClassDiscriminator(nn.Module):
    """A discriminator's body under one logit a class: it tells the classes of an image, not whether it is real.

    The classifier of an auxiliary-classifier GAN (Odena, Olah and Shlens 2017, "Conditional image synthesis with auxiliary
    classifier GANs") by itself; that an image looks real is left to the moment term.
    """

    def __init__(self, body: nn.Module, num_features: int, num_classes: int) -> None:
        super().__init__()
        self.body = body
        self.classes = nn.Linear(num_features, num_classes)

    def forward(self, images: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """The margin (B,) of each image's own class, l_y - log sum_{j != y} exp(l_j).

        Its logistic loss is the cross-entropy of the softmax: softplus(-margin) = -log softmax(l)_y.
        """
        logits = self.classify(images)
        own = labels[:, None] == torch.arange(logits.shape[1], device=logits.device)
        others = logits.masked_fill(own, -math.inf).logsumexp(1)
        return logits.gather(1, labels[:, None]).squeeze(1) - others

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Logits (B, num_classes) of images (B, C, H, W) in [-1, 1], float32: a margin is a small difference of large ones."""
        features = self.body(images).float()
        with torch.autocast(features.device.type, enabled=False):
            return cast(torch.Tensor, self.classes(features))


def _check_shape(image_size: int, channels: int, num_classes: int, width: int) -> None:
    if image_size not in _HALVINGS:
        raise ConfigError(f"image_size is {image_size}; discriminators take {sorted(_HALVINGS)}: choose one of these")
    if min(channels, width) < 1 or num_classes < 0:
        raise ConfigError(
            f"channels, width, num_classes are {channels}, {width}, {num_classes}; "
            "the first two must be at least 1 and num_classes at least 0"
        )


DISCRIMINATORS: dict[str, Callable[..., Discriminator]] = {
    "dcgan": DCGANDiscriminator,
    "mlp": MLPDiscriminator,
    "conv-dropout": ConvDropoutDiscriminator,
    "deep-conv": DeepConvDiscriminator,
    "resnet": ResNetDiscriminator,
    "scattering": ScatteringDiscriminator,
}


def build_discriminator(
    name: str, *, image_size: int, channels: int, num_classes: int, width: int, classifier: bool = False
) -> Discriminator | ClassDiscriminator:
    """Build a discriminator of the registry, its weights from a fixed seed; draw a run's own with
    `common.models.initialise`.

    num_classes 0 means unconditional. classifier: its body as a `ClassDiscriminator`. Raises ConfigError for an unknown
    name or an impossible shape.
    """
    if name not in DISCRIMINATORS:
        raise ConfigError(f"discriminator is {name!r}; known are {sorted(DISCRIMINATORS)}: choose one of these")
    if classifier and num_classes < 2:
        raise ConfigError(f"a classifier of num_classes = {num_classes}; it takes 2 or more")

    module = build_initialised(
        lambda: _construct(
            name, classifier, image_size=image_size, channels=channels, num_classes=num_classes, width=width
        )
    )
    return cast(Discriminator | ClassDiscriminator, module)


def _construct(
    name: str, classifier: bool, *, image_size: int, channels: int, num_classes: int, width: int
) -> Discriminator | ClassDiscriminator:
    kind = DISCRIMINATORS[name]
    if not classifier:
        return kind(image_size=image_size, channels=channels, num_classes=num_classes, width=width)
    bare = kind(image_size=image_size, channels=channels, num_classes=0, width=width)
    return ClassDiscriminator(bare.body, bare.head.in_features, num_classes)


@lru_cache(maxsize=64)
def discriminator_size(model: ModelConfig) -> int:
    """Parameters of the discriminator that a run names, counted without memory for any of them."""
    with torch.device("meta"):
        network = _construct(
            model.discriminator,
            model.loss == "cross-entropy",
            image_size=model.image_size,
            channels=model.channels,
            num_classes=model.num_classes,
            width=model.discriminator_width,
        )
    return num_parameters(network)


def discriminator_of(model: ModelConfig) -> Discriminator | ClassDiscriminator:
    """The discriminator that a run's configuration names, in channels-last memory, where clipping is quickest."""
    module = build_discriminator(
        model.discriminator,
        image_size=model.image_size,
        channels=model.channels,
        num_classes=model.num_classes,
        width=model.discriminator_width,
        classifier=model.loss == "cross-entropy",
    )
    return module.to(memory_format=torch.channels_last)  # type: ignore[call-overload, no-any-return]
