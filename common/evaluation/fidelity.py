"""How near generated faces come to a reference set, and how much of it they cover.

On features of both sets (`common.evaluation.networks`): the Frechet distance (Heusel et al. 2017, "GANs trained by a two time-scale
update rule converge to a local Nash equilibrium", equation 6) and the kernel distance (Binkowski et al. 2018, "Demystifying MMD
GANs", section 4), by torchmetrics; precision and recall (Kynkaanniemi et al. 2019, "Improved precision and recall metric"), density
and coverage (Naeem et al. 2020, "Reliable fidelity and diversity metrics"), by the latter's authors' package prdc.

On `visard-random-1` and `visard-drawn-1` **the distances are not FIDs and compare to no published one**; on `inception-2015-12-05`
they are. A figure always goes with the name of its network.
"""

import contextlib
import dataclasses
import io
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from common.errors import DataError
from common.evaluation.networks import FeatureNetwork, drawn_network, random_network

# Pairs of images beyond this are not looked at for precision, recall, density and coverage: 5,000 x 5,000 take some 400 MB.
MAX_NEIGHBOURS = 5000
# Of the published use of the four.
_NEAREST = 5
# Images of either side with fewer of which there are no figures.
FEWEST = _NEAREST + 2
_KERNEL_SUBSETS, _KERNEL_SUBSET_SIZE = 20, 1000
_BATCH = 100


@dataclasses.dataclass(frozen=True)
class Fidelity:
    """Figures of generated images beside reference images.

    network: whose features. generated, reference: images of each. frechet, at least 0, and kernel (an unbiased estimate, so
    that it may be a little below 0): smaller is better. precision: share of the generated images that lie among the
    reference images; recall: share of the reference images that lie among the generated ones; coverage: share of the
    reference images with a generated one near by; all 0 to 1. density: like precision, counting how many reference images each
    lies among; about 1 where the two sets are alike, above it where the generated ones crowd among the reference. Larger is
    better.
    """

    network: str
    generated: int
    reference: int
    frechet: float
    kernel: float
    precision: float
    recall: float
    density: float
    coverage: float

    def minus(self, other: "Fidelity") -> dict[str, float]:
        """How much each figure is above that of `other`. Raises DataError where they do not compare."""
        for field, remedy in (
            ("network", "measure both with one network"),
            ("generated", "the distances depend on how many: measure both with as many images"),
            ("reference", "the distances depend on how many: measure both with as many images"),
        ):
            mine, theirs = getattr(self, field), getattr(other, field)
            if mine != theirs:
                raise DataError(f"figures of {field} {mine} and of {field} {theirs} do not compare: {remedy}")
        names = ("frechet", "kernel", "precision", "recall", "density", "coverage")
        return {name: getattr(self, name) - getattr(other, name) for name in names}


def measure_fidelity(
    generated: Tensor, reference: Tensor, network: FeatureNetwork | None = None, *, seed: int = 0
) -> Fidelity:
    """All figures of generated (N, C, S, S) beside reference images (M, C', S', S'), uint8 both, on `visard-drawn-1` unless
    another network is given.

    Colours and sizes may differ, as every network brings images to one size. `seed` chooses the subsets of the kernel
    distance, and the MAX_NEIGHBOURS images where there are more: the same arguments give the same figures. Runs where the
    images are; nearest neighbours on the CPU. What prdc prints is kept back, so that what other threads print
    meanwhile may be lost. Raises DataError for other images, fewer than 7 of them, and where prdc is not installed.
    """
    for name, images in (("generated", generated), ("reference", reference)):
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] not in (1, 3):
            raise DataError(f"{name} images are {images.dtype} {tuple(images.shape)}: give uint8 (N, 1 or 3, S, S)")
        if len(images) < FEWEST:
            raise DataError(f"{len(images)} {name} images: {_NEAREST} nearest neighbours take {FEWEST} or more")
    network = network or drawn_network()
    real, fake = (_features(network, images) for images in (reference, generated))
    random = torch.Generator().manual_seed(seed)
    return Fidelity(
        network.name,
        len(fake),
        len(real),
        _frechet(real, fake),
        _kernel(real, fake, random),
        **_neighbours(real, fake, random),
    )


class FrechetDistance:
    """The distance of images to a fixed reference set. Both come in batches (B, C, H, W) in [-1, 1], 2 images or more in all.

    network: the name that goes beside every value.
    """

    def __init__(self, reference: Iterable[Tensor], network: FeatureNetwork | None = None) -> None:
        """On `visard-random-1`, the fastest, unless another network is given. Raises DataError for fewer than 2 images."""
        network = network or random_network()
        self.network = network.name
        self._metric = _frechet_metric(network)
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


class _Given(nn.Module):
    """For torchmetrics, which then takes features for images."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features

    def forward(self, features: Tensor) -> Tensor:
        """What was given."""
        return features


@torch.no_grad()
def _features(network: FeatureNetwork, images: Tensor) -> Tensor:
    """(N, D) float32 of uint8 images (N, C, S, S)."""
    network.to(images.device)
    return torch.cat([network(batch.float() / 127.5 - 1) for batch in images.split(_BATCH)])


def _frechet_metric(network: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the optional packages of torchmetrics
        from torchmetrics.image.fid import FrechetInceptionDistance
    return FrechetInceptionDistance(feature=network, reset_real_features=False, normalize=True)


def _frechet(real: Tensor, fake: Tensor) -> float:
    metric = _frechet_metric(_Given(real.shape[1])).to(real.device)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    return max(0.0, float(metric.compute()))


def _kernel(real: Tensor, fake: Tensor, random: torch.Generator) -> float:
    """Mean over random subsets of equal size, whose choice torchmetrics' own class takes from the global random numbers."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from torchmetrics.image.kid import poly_mmd
    size = min(_KERNEL_SUBSET_SIZE, len(real), len(fake))
    values = []
    for _ in range(_KERNEL_SUBSETS):
        a, b = (_drawn(x, size, random).double() for x in (real, fake))
        values.append(float(poly_mmd(a, b)))
    return sum(values) / len(values)


def _neighbours(real: Tensor, fake: Tensor, random: torch.Generator) -> dict[str, float]:
    """Precision, recall, density and coverage."""
    try:
        import prdc
    except ImportError as error:
        raise DataError(f"precision and recall need prdc ({error}): pip install 'visard[evaluation]'") from error
    some = [_drawn(x, MAX_NEIGHBOURS, random).cpu().numpy() for x in (real, fake)]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many images there are
        figures = prdc.compute_prdc(*some, nearest_k=_NEAREST)
    return {name: float(value) for name, value in figures.items()}


def _drawn(features: Tensor, count: int, random: torch.Generator) -> Tensor:
    """At most `count` of the rows."""
    return features[torch.randperm(len(features), generator=random)[:count].to(features.device)]
