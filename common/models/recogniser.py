"""Networks that recognise: a face to an embedding, and from there to a person or an attribute.

`cnn` is the textbook's: convolution and pooling four times, then a dense layer. `resnet` has a residual block (He et al. 2016) at each
size in place of the pooling, and more to learn from. Both give an embedding whose direction counts: two photographs are
of one person where the cosine of the angle between their embeddings is large (Schroff et al. 2015; Wang et al. 2018).
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import ConfigError
from common.models import build_initialised

_STAGES = 4


def _unit(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]


class _Residual(nn.Module):
    """x + f(x), f two convolutions (3x3) of as many channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(*_unit(channels, channels), *_unit(channels, channels)[:2])

    def forward(self, images: Tensor) -> Tensor:
        return functional.relu(images + self.body(images))


def _cnn(channels: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stage in range(_STAGES):
        layers += [*_unit(channels, width << stage), nn.MaxPool2d(2, ceil_mode=True)]
        channels = width << stage
    return layers


def _resnet(channels: int, width: int) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for stage in range(_STAGES):
        layers += [*_unit(channels, width << stage, stride=2), _Residual(width << stage)]
        channels = width << stage
    return layers


class Recogniser(nn.Module):
    """(B, C, S, S) in [-1, 1] -> embeddings (B, D), not normalised; heads of attributes read the embedding."""

    def __init__(
        self,
        architecture: str,
        image_size: int,
        channels: int,
        width: int,
        embedding: int,
        dropout: float,
        attributes: Mapping[str, int],
    ) -> None:
        super().__init__()
        side = -(-image_size >> _STAGES)  # each stage halves, and rounds up
        self.trunk = nn.Sequential(*RECOGNISERS[architecture](channels, width), nn.Flatten(), nn.Dropout(dropout))
        self.embed = nn.Sequential(
            nn.Linear((width << (_STAGES - 1)) * side**2, embedding, bias=False), nn.BatchNorm1d(embedding)
        )
        # A name may be any text, and a module's may not.
        self.heads = nn.ModuleList(nn.Linear(embedding, classes) for classes in attributes.values())

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings."""
        embeddings: Tensor = self.embed(self.trunk(images))
        return embeddings

    def attribute_logits(self, embeddings: Tensor) -> list[Tensor]:
        """Logits (B, classes) of each attribute, in the order in which they were given."""
        return [head(functional.normalize(embeddings)) for head in self.heads]


def build_recogniser(
    architecture: str,
    image_size: int,
    channels: int,
    *,
    width: int,
    embedding: int,
    dropout: float = 0.0,
    attributes: Mapping[str, int] | None = None,
) -> Recogniser:
    """A recogniser with weights from a fixed seed.

    architecture: one of RECOGNISERS. image_size: at least 16 pixels. width: channels of the first of four stages, each the
    double of the one before. embedding: its dimension D. dropout: before the dense layer. attributes: how many classes each
    has. Raises ConfigError.
    """
    if architecture not in RECOGNISERS:
        raise ConfigError(f"network = {architecture!r}: choose one of {', '.join(RECOGNISERS)}")
    if image_size < 1 << _STAGES:
        raise ConfigError(f"image-size = {image_size}: a recogniser needs {1 << _STAGES} pixels or more")
    network = build_initialised(
        lambda: Recogniser(architecture, image_size, channels, width, embedding, dropout, dict(attributes or {}))
    )
    if not isinstance(network, Recogniser):
        raise TypeError(f"built a {type(network).__name__}")
    return network


@torch.no_grad()
def embed(network: Recogniser, images: Tensor, batch: int = 256) -> Tensor:
    """Embeddings of unit length (N, D), float32, each of the sum of a face's and its mirror image's.

    images: (N, C, S, S) uint8. The network is put into evaluation mode and left there.
    """
    network.eval()
    device = next(network.parameters()).device
    found = []
    for few in images.split(batch):
        faces = few.to(device).float().div(127.5).sub(1).contiguous(memory_format=torch.channels_last)
        found.append(functional.normalize(network(faces).float() + network(faces.flip(3)).float()).cpu())
    return torch.cat(found)


# Each makes the convolutions from the number of colours and the width: (B, C, S, S) -> (B, 8 * width, S / 16, S / 16),
# rounded up.
RECOGNISERS: dict[str, Callable[[int, int], list[nn.Module]]] = {"cnn": _cnn, "resnet": _resnet}
