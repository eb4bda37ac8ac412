"""The moment stage: fit the generator to one noised release of mean random features.

The clients' sum of random features (`common.models.features`), noised once, is divided by a declared constant: the
target mean embeddings, one for each class. The generator then minimises the squared maximum mean discrepancy between
its fakes and the target (Harder, Adamczewski and Park 2021, "DP-MERF"). Everything here is post-processing of the
release: it costs no privacy, however long it runs.
"""

from typing import cast

import torch
from torch import nn

from common.errors import ConfigError
from common.models.features import RandomFeatures

_WARM_UP_STEPS = 20


def target_means(noised_sum: torch.Tensor, units_per_class: float) -> torch.Tensor:
    """Target mean embeddings (num_classes or 1, dim) float32 from the noised sum of that shape.

    units_per_class is the declared number of units behind one row, a public constant, never a count. Raises ConfigError
    when it is not positive or the sum is not a finite matrix.
    """
    if not units_per_class > 0:
        raise ConfigError(f"units_per_class is {units_per_class}; declare a number above 0")
    if noised_sum.ndim != 2 or not bool(noised_sum.isfinite().all()):
        raise ConfigError(
            f"the noised sum, shape {tuple(noised_sum.shape)}, must be a finite (num_classes, dim) matrix"
        )
    return noised_sum.float() / units_per_class


class MomentLoss:
    """Squared maximum mean discrepancy of a batch of fakes from the target, class by class.

    A U-statistic (Gretton et al. 2012, "A kernel two-sample test"): the pairs of a fake with itself are left out, so
    that the loss is unbiased for any batch; with them in, the spread of a small batch counts as an error and the
    generator turns to fewer shapes. It may therefore be negative. Noise in the target adds a constant, about its
    squared norm, and tilts the gradient by noise that averages out over the dimensions.
    """

    def __init__(self, features: RandomFeatures, target: torch.Tensor) -> None:
        """target: (num_classes, dim), or (1, dim) without classes, as `target_means` gives it."""
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


def balanced_labels(batch: int, num_classes: int) -> torch.Tensor | None:
    """Labels (batch,) int64 with every class equally often, as far as it goes; None without classes."""
    return torch.arange(batch) % num_classes if num_classes else None


def moment_learning_rate(step: int, num_steps: int, lr: float) -> float:
    """Rate of step (from 0) of num_steps: a short linear rise, constant, then a linear fall over the second half."""
    return lr * min(1.0, (step + 1) / _WARM_UP_STEPS, 2 * (1 - step / num_steps))


def moment_step(
    generator: nn.Module,
    optimizer: torch.optim.Optimizer,
    moment_loss: MomentLoss,
    *,
    step: int,
    num_steps: int,
    batch: int,
    lr: float,
    latent_dim: int,
    num_classes: int,
    random: torch.Generator,
) -> float:
    """One step of the generator towards the target; returns the loss before it.

    All that lasts from one step to the next is in `generator`, `optimizer` and `random`, so a run that saves the three
    with the step's number resumes exactly. `random` is a CPU generator. The forward pass is bfloat16 where that is
    fast; sums and losses are float32.
    """
    device = next(generator.parameters()).device
    for group in optimizer.param_groups:
        group["lr"] = moment_learning_rate(step, num_steps, lr)
    latent = torch.randn((batch, latent_dim), generator=random).to(device)
    labels = balanced_labels(batch, num_classes)
    labels = None if labels is None else labels.to(device)
    with torch.autocast(device.type, torch.bfloat16):
        fakes = cast(torch.Tensor, generator(latent, labels))
        loss = moment_loss(fakes.float(), labels)
    optimizer.zero_grad(set_to_none=True)
    torch.autograd.backward(loss)
    optimizer.step()
    return float(loss.detach())
