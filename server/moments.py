"""The moment stage: fit the generator to one noised release of mean random features.

The clients' sum of random features (`common.models.features`), noised once, is divided by a declared constant: the
target mean embeddings, one for each class. The generator then minimises the squared maximum mean discrepancy between
its fakes and the target (Harder, Adamczewski and Park 2021, "DP-MERF"). Everything here is post-processing of the
release: it costs no privacy, however long it runs.
"""

from typing import cast

import torch

from common.errors import ConfigError
from common.models.features import RandomFeatures


class MomentLoss:
    """Squared maximum mean discrepancy of a batch of fakes from the target, class by class.

    A U-statistic (Gretton et al. 2012, "A kernel two-sample test"): the pairs of a fake with itself are left out, so
    that the loss is unbiased for any batch; with them in, the spread of a small batch counts as an error and the
    generator turns to fewer shapes. It may therefore be negative. Noise in the target adds a constant, about its
    squared norm, and tilts the gradient by noise that averages out over the dimensions.
    """

    def __init__(self, features: RandomFeatures, target: torch.Tensor) -> None:
        """target: (num_classes, dim), or (1, dim) without classes, the noised sum over a declared constant."""
        if target.ndim != 2 or target.shape[1] != features.dim:
            raise ConfigError(f"the target has shape {tuple(target.shape)}; these features need (_, {features.dim})")
        self.features = features
        self.target = target

    def __call__(self, fakes: torch.Tensor, labels: torch.Tensor | None) -> torch.Tensor:
        """The mean over the classes of the batch, a scalar; fakes: (B, C, S, S) in [-1, 1], labels: (B,) int64 or None.

        Classes with fewer than two fakes are left out. Raises ConfigError when that is every class, and when labels are
        given without classes or missing with them.
        """
        num_classes = len(self.target)
        if (labels is None) != (num_classes == 1):
            raise ConfigError(
                f"the target has {num_classes} rows and the fakes {'no' if labels is None else 'some'} labels; "
                "give labels when there is more than one row"
            )
        if labels is None:
            labels = torch.zeros(len(fakes), dtype=torch.int64, device=fakes.device)
        embedded = self.features(fakes)
        # As a product: index_add would be slower and, on a GPU, not deterministic.
        member = (labels == torch.arange(num_classes, device=labels.device)[:, None]).to(embedded.dtype)
        counts = member.sum(dim=1)
        used = counts >= 2
        if not bool(used.any()):
            raise ConfigError(f"{len(fakes)} fakes of {num_classes} classes: no class has two; use a larger batch")
        with torch.autocast(embedded.device.type, enabled=False):
            sums = member @ embedded
            own = member @ embedded.square().sum(dim=1)
        counts = counts.clamp(min=2)
        among_fakes = (sums.square().sum(dim=1) - own) / (counts * (counts - 1))
        across = (sums * self.target).sum(dim=1) / counts
        losses = among_fakes - 2 * across + self.target.square().sum(dim=1)
        return cast(torch.Tensor, losses[used].mean())
