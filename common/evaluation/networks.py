"""Networks whose features images are compared by. Figures of two networks mean different things, so each has a name.

`visard-random-1`: random convolutions from a public seed (Naeem et al. 2020, "Reliable fidelity and diversity metrics",
section 4.3, find such embeddings fair where the images are far from ImageNet). Nothing in it is learned, so it knows no face.

`visard-drawn-1`: a small network trained on pictures that a program drew (faces of nobody, glyphs, scenes) to tell what was
drawn, how it was spoilt and how it was turned (benchmarks/feature_network.py). It has seen no photograph.

`inception-2015-12-05`: the Inception network of the published FIDs (Heusel et al. 2017), as the TorchScript file of that name
which the metrics of StyleGAN2-ADA and StyleGAN3 use, where the user has it; nothing is downloaded. A file of the same
interface with other content is named after its SHA-256: `inception:` and 12 digits.
"""

import hashlib
import io
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from safetensors.torch import load
from torch import Tensor, nn
from torch.nn import functional

from common.errors import DataError
from common.models import build_initialised

DRAWN_FILE = Path(__file__).with_name("visard-drawn-1.safetensors")
DRAWN_SHA256 = "71a58e0d0d2d551871bd32c793a8b37cb599f4f14a387aa845f1cece11d4026f"
# Of inception-2015-12-05.pt as StyleGAN2-ADA publishes it (95,607,719 bytes); k-diffusion checks for the same.
INCEPTION_SHA256 = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
INCEPTION_FEATURES = 2048
_MAX_FILE_BYTES = 2**30
_SIDE = 32


class FeatureNetwork(nn.Module):
    """What figures are computed on: images (B, C, H, W) in [-1, 1], C 1 or 3, to features (B, D) float32.

    name: stored beside every figure. num_features: D.
    """

    def __init__(self, name: str, num_features: int) -> None:
        super().__init__()
        self.name, self.num_features = name, num_features


class ConvolutionFeatures(FeatureNetwork):
    """Means of each channel of some convolutions (3x3, leaky ReLU), times a scale.

    Images are brought to 32 x 32 and to three channels first, so that the features mean the same at every size.
    """

    def __init__(
        self, name: str, *, widths: tuple[int, ...], strides: tuple[int, ...], first: int, scale: float
    ) -> None:
        """`first`: the index of the first convolution whose means are kept; those before it only feed it."""
        super().__init__(name, sum(widths[first:]))
        self._first, self._scale = first, scale
        sides = zip((3, *widths), widths, strides, strict=False)
        self.layers = nn.ModuleList(nn.Conv2d(a, b, 3, stride=stride, padding=1) for a, b, stride in sides)

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, D) of images (B, C, H, W) in [-1, 1]."""
        x = images.float().expand(-1, 3, -1, -1)
        if x.shape[-1] != _SIDE:
            x = functional.interpolate(x, size=(_SIDE, _SIDE), mode="bilinear", antialias=True, align_corners=False)
        pooled = []
        for index, layer in enumerate(self.layers):
            x = functional.leaky_relu(layer(x), 0.2)
            if index >= self._first:
                pooled.append(x.mean((2, 3)))
        return torch.cat(pooled, 1) * self._scale


class InceptionFeatures(FeatureNetwork):
    """A TorchScript module that takes uint8 images (B, 3, H, W), resizes them itself and gives (B, 2048)."""

    def __init__(self, name: str, module: nn.Module) -> None:
        super().__init__(name, INCEPTION_FEATURES)
        self._module = module

    def forward(self, images: Tensor) -> Tensor:
        """Features (B, 2048) float32 of images (B, C, H, W) in [-1, 1], C 1 or 3."""
        pixels = ((images.float() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).expand(-1, 3, -1, -1)
        return cast(Tensor, self._module(pixels.contiguous(), return_features=True)).float()


def random_network() -> ConvolutionFeatures:
    """`visard-random-1`: 224 features, three convolutions of stride 2."""

    def construct() -> nn.Module:
        # At this scale distances between sets of photographs lie between about 0 and a few hundred.
        return ConvolutionFeatures("visard-random-1", widths=(32, 64, 128), strides=(2, 2, 2), first=0, scale=10.0)

    return cast(ConvolutionFeatures, build_initialised(construct).eval().requires_grad_(False))


def drawn_network() -> ConvolutionFeatures:
    """`visard-drawn-1`: 192 features, of the last two of four convolutions. Raises DataError where its file is damaged."""
    blob = _read(DRAWN_FILE)
    if hashlib.sha256(blob).hexdigest() != DRAWN_SHA256:
        raise DataError(f"{DRAWN_FILE} is not the file that this version came with: install Visard anew")

    def construct() -> nn.Module:
        return ConvolutionFeatures("visard-drawn-1", widths=(24, 48, 96, 96), strides=(1, 2, 2, 2), first=2, scale=1.0)

    network = build_initialised(construct)
    network.load_state_dict(load(blob))
    return cast(ConvolutionFeatures, network.eval().requires_grad_(False))


def inception_network(path: Path) -> InceptionFeatures:
    """The TorchScript file at `path`: `inception-2015-12-05` where its bytes are the published ones, else `inception:SHA`.

    A TorchScript file is a program, which this runs: use files of a source you trust. Raises DataError for one that cannot be
    read or does not give (B, 2048) finite features.
    """
    blob = _read(path)
    digest = hashlib.sha256(blob).hexdigest()
    name = "inception-2015-12-05" if digest == INCEPTION_SHA256 else f"inception:{digest[:12]}"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the format is deprecated, and the one in which the network is published
            network = InceptionFeatures(name, torch.jit.load(io.BytesIO(blob), map_location="cpu").eval())
            with torch.no_grad():
                probe = network(torch.zeros(2, 1, _SIDE, _SIDE))
    except (RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise DataError(f"{path} ({reason}): {_INCEPTION_REMEDY}") from error
    if probe.shape != (2, INCEPTION_FEATURES) or not bool(probe.isfinite().all()):
        raise DataError(f"{path} gives features {tuple(probe.shape)} of 2 images: {_INCEPTION_REMEDY}")
    return network


def feature_network(name: str) -> FeatureNetwork:
    """The network of that name in NETWORKS, else that in the TorchScript file of that path. Raises DataError."""
    if name in NETWORKS:
        return NETWORKS[name]()
    if not Path(name).is_file():
        raise DataError(
            f"feature network {name!r}: choose one of {', '.join(NETWORKS)}, or give the path of inception-2015-12-05.pt"
        )
    return inception_network(Path(name))


def _read(path: Path) -> bytes:
    try:
        size = path.stat().st_size
        if size <= _MAX_FILE_BYTES:
            return path.read_bytes()
    except OSError as error:
        raise DataError(f"{path} cannot be read ({error.strerror}): give the path of a weights file") from error
    raise DataError(
        f"{path} has {size:,} bytes, the limit is {_MAX_FILE_BYTES:,}: this is no file of a feature network"
    )


_INCEPTION_REMEDY = (
    "give inception-2015-12-05.pt of StyleGAN2-ADA's metrics, or a TorchScript file that takes uint8 (B, 3, H, W) and "
    f"return_features=True and gives (B, {INCEPTION_FEATURES}) finite numbers"
)

NETWORKS: dict[str, Callable[[], FeatureNetwork]] = {
    "visard-random-1": random_network,
    "visard-drawn-1": drawn_network,
}
