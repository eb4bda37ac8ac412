"""GAN losses, one value a sample: logits (B,) -> losses (B,), never averaged here.

A discriminator's loss is the sum of a real half and a fake half, and only the real half sees photographs; each half
is clipped a unit at a time (`common.privacy.clipping`), which is why nothing is averaged over the batch.
"""

from typing import Protocol

import torch
from torch.nn import functional


class GANLoss(Protocol):
    """Logits (B,), high for real, to losses (B,)."""

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss on real images."""
        ...

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss on generated images."""
        ...

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """The generator's loss on its own images."""
        ...


class BCELoss:
    """Binary cross-entropy on logits, non-saturating for the generator (Goodfellow et al. 2014).

    real(l) = -log s(l), fake(l) = -log(1 - s(l)), generator(l) = -log s(l), where s is the logistic function.
    """

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """-log s(l) = softplus(-l)."""
        return functional.softplus(-logits)

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """-log(1 - s(l)) = softplus(l)."""
        return functional.softplus(logits)

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """-log s(l) = softplus(-l)."""
        return functional.softplus(-logits)


class HingeLoss:
    """Hinge loss (Lim and Ye 2017, "Geometric GAN"; Tran et al. 2017).

    real(l) = max(0, 1 - l), fake(l) = max(0, 1 + l), generator(l) = -l.
    """

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """max(0, 1 - l)."""
        return functional.relu(1.0 - logits)

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """max(0, 1 + l)."""
        return functional.relu(1.0 + logits)

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """-l."""
        return -logits


LOSSES: dict[str, GANLoss] = {"bce": BCELoss(), "hinge": HingeLoss()}
