"""GAN losses, one value a sample: logits (B,) -> losses (B,), never averaged here.

A discriminator's loss is the sum of a real half and a fake half, and only the real half sees photographs; each half
is clipped a unit at a time (`common.privacy.clipping`), which is why nothing is averaged over the batch.

Below, l is a logit and s the logistic function.
"""

import math
from typing import Protocol

import torch
from torch import nn
from torch.nn import functional

from common.errors import ConfigError


class GANLoss(Protocol):
    """Logits (B,), high for real, to losses (B,).

    bounded_weights: whether the discriminator's weights must be projected after each of its steps (`project_weights`).
    sees_fakes: whether there is a half on fakes at all.
    """

    bounded_weights: bool
    sees_fakes: bool

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss on real images."""
        ...

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """The discriminator's loss on generated images."""
        ...

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """The generator's loss on its own images."""
        ...


class MinimaxLoss:
    """The value of the game itself, which saturates for the generator (Goodfellow et al. 2014, equation 1).

    real(l) = -log s(l), fake(l) = -log(1 - s(l)), generator(l) = log(1 - s(l)). The generator's gradient vanishes where
    the discriminator is sure of a fake, -s(l); `bce` is the remedy of the same paper.
    """

    bounded_weights = False
    sees_fakes = True

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """-log s(l) = softplus(-l)."""
        return functional.softplus(-logits)

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """-log(1 - s(l)) = softplus(l)."""
        return functional.softplus(logits)

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """log(1 - s(l)) = -softplus(l)."""
        return -functional.softplus(logits)


class BCELoss(MinimaxLoss):
    """Binary cross-entropy on logits, non-saturating for the generator (Goodfellow et al. 2014, section 3).

    real(l) = -log s(l), fake(l) = -log(1 - s(l)), generator(l) = -log s(l).
    """

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """-log s(l) = softplus(-l)."""
        return functional.softplus(-logits)


class HingeLoss:
    """Hinge loss (Lim and Ye 2017, "Geometric GAN"; Tran et al. 2017).

    real(l) = max(0, 1 - l), fake(l) = max(0, 1 + l), generator(l) = -l.
    """

    bounded_weights = False
    sees_fakes = True

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """max(0, 1 - l)."""
        return functional.relu(1.0 - logits)

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """max(0, 1 + l)."""
        return functional.relu(1.0 + logits)

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """-l."""
        return -logits


class LeastSquaresLoss:
    """Least squares (Mao et al. 2017, "Least squares generative adversarial networks", equation 9: a = 0, b = c = 1).

    real(l) = (l - 1)^2 / 2, fake(l) = l^2 / 2, generator(l) = (l - 1)^2 / 2.
    """

    bounded_weights = False
    sees_fakes = True

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """(l - 1)^2 / 2."""
        return (logits - 1.0).square() / 2

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """l^2 / 2."""
        return logits.square() / 2

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """(l - 1)^2 / 2."""
        return (logits - 1.0).square() / 2


class WassersteinLoss:
    """The dual of the earth mover's distance (Arjovsky, Chintala and Bottou 2017, "Wasserstein GAN", algorithm 1).

    real(l) = -l, fake(l) = l, generator(l) = -l. The discriminator must be Lipschitz: its weights are projected onto a
    box after each of its steps (`project_weights`), and nothing else bounds the loss from below.
    """

    bounded_weights = True
    sees_fakes = True

    def real(self, logits: torch.Tensor) -> torch.Tensor:
        """-l."""
        return -logits

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """l."""
        return logits

    def generator(self, logits: torch.Tensor) -> torch.Tensor:
        """-l."""
        return -logits


class CrossEntropyLoss(BCELoss):
    """Cross-entropy of the classes, of margins instead of logits (`common.models.discriminators.ClassDiscriminator`).

    real(m) = generator(m) = softplus(-m) = -log softmax(l)_y: the discriminator learns the classes of the photographs, and the
    generator is to draw what it takes for the class asked for. Fakes teach the discriminator nothing: fake(m) = 0.
    """

    sees_fakes = False

    def fake(self, logits: torch.Tensor) -> torch.Tensor:
        """0, with a gradient of 0."""
        return logits * 0.0


def project_weights(discriminator: nn.Module, loss: GANLoss, weight_clip: float) -> None:
    """Clamp every parameter to [-weight_clip, weight_clip], in place, if the loss asks for bounded weights; else do
    nothing.

    For after each step of a discriminator (Arjovsky et al. 2017, algorithm 1, line 7), and once on its start. It looks
    at the weights alone, so on weights that were released with privacy it costs none. Raises ConfigError unless
    weight_clip is finite and above 0.
    """
    if not loss.bounded_weights:
        return
    if not 0 < weight_clip < math.inf:
        raise ConfigError(f"weight_clip is {weight_clip}; it must be finite and above 0, for instance 0.1")
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter.clamp_(-weight_clip, weight_clip)


LOSSES: dict[str, GANLoss] = {
    "minimax": MinimaxLoss(),
    "bce": BCELoss(),
    "hinge": HingeLoss(),
    "least-squares": LeastSquaresLoss(),
    "wasserstein": WassersteinLoss(),
    "cross-entropy": CrossEntropyLoss(),
}
