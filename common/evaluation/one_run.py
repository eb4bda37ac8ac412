"""A lower bound on epsilon from one run with canaries: Steinke, Nasr, Jagielski 2023, "Privacy auditing with one (1) training run".

Each of m canaries is in the data by a fair coin of the auditor's own, apart from all others. From what the mechanism
releases, and nothing else, the auditor guesses the coins of r canaries and abstains from the rest; v guesses are right.

Claim (theorem 5.2 there; neighbours: add or remove one canary): where the mechanism is (epsilon, delta)-DP and r is fixed
before anything is seen, P[at least v right] <= beta + alpha m delta, with W ~ Binomial(r, 1 / (1 + exp(-epsilon))),
beta = P[W >= v] and alpha = max over i = 1..v of (2 / i) P[v - i <= W < v]. No more is asked of the mechanism: not that
canaries are treated alike, nor that their scores are independent or good.

`log_ratios` scores canaries for who sees noised sums of vectors and knows each canary's vector.

It is evidence, not a gate. A bound above the claim refutes the claim (but for one audit in twenty at 95 %); a bound
below it proves nothing, and with a few hundred canaries it stays well below the epsilon of a right mechanism.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from common.errors import DataError

# Share of the canaries that are guessed. Near the best for every Gaussian mechanism of epsilon 1 to 8 with 200 to 1,000
# canaries, by simulation; guessing all of them halves the bound.
GUESSED_SHARE = 0.2
CONFIDENCE = 0.95
# The bound is searched to this much, and rounded down.
_TOLERANCE = 1e-6
_IMAGES_AT_ONCE = 64
_GROUPS = 8
# Canaries whose signals' variance can be told, and the median square of a standard normal.
_ENOUGH, _MEDIAN_SQUARE = 30, 0.4549


@dataclass(frozen=True)
class OneRunBound:
    """canaries: m. guesses: r, without abstentions. correct: v. epsilon: the bound, which holds at `confidence`."""

    canaries: int
    guesses: int
    correct: int
    epsilon: float
    confidence: float


def p_value(correct: int, guesses: int, canaries: int, epsilon: float, delta: float) -> float:
    """At most how probable `correct` or more right guesses are under (epsilon, delta)-DP, in [0, 1].

    It never falls as epsilon grows. For 2 m delta > 1, where the theorem's expression may, its terms with i < 2 m delta
    leave out their share of -beta, which only makes them larger. Raises DataError unless 0 <= correct <= guesses <=
    canaries, epsilon is at least 0 and finite, and delta in [0, 1].
    """
    if not 0 <= correct <= guesses <= canaries:
        raise DataError(f"{correct} right of {guesses} guesses of {canaries} canaries: each must be at most the next")
    if not (0 <= epsilon < math.inf and 0 <= delta <= 1):
        raise DataError(
            f"epsilon = {epsilon}, delta = {delta}: give a finite epsilon of 0 or more and a delta in [0, 1]"
        )
    at_least = _tails(guesses, epsilon)[correct::-1]  # P[W >= v - i] for i = 0..v
    beta = float(at_least[0])
    # beta + (c / i) (P[W >= v - i] - beta), c = 2 m delta
    share = 2 * canaries * delta / np.arange(1, correct + 1)
    terms = beta * np.maximum(1 - share, 0) + share * at_least[1:]
    return min(1.0, float(terms.max(initial=beta)))


def epsilon_bound(correct: int, guesses: int, canaries: int, delta: float, confidence: float = CONFIDENCE) -> float:
    """The largest epsilon, rounded down, for which so many right guesses have a p-value of at most 1 - confidence; 0 for none.

    A mechanism that is (epsilon, delta)-DP gets a bound above epsilon with probability at most 1 - confidence.
    """
    if not 0 < confidence < 1:
        raise DataError(f"confidence = {confidence}: it must be above 0 and below 1")

    def rejected(epsilon: float) -> bool:
        return p_value(correct, guesses, canaries, epsilon, delta) <= 1 - confidence

    if not rejected(0.0):
        return 0.0
    low, high = 0.0, 1.0
    while rejected(high):  # ends, since the p-value goes to 1
        low, high = high, 2 * high
    while high - low > _TOLERANCE:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def bound_of_scores(
    scores: np.ndarray,
    members: np.ndarray,
    delta: float,
    guessed_share: float = GUESSED_SHARE,
    confidence: float = CONFIDENCE,
) -> OneRunBound:
    """The bound from canaries' scores, (m,) float, high for in, and their coins, (m,) bool, True for in.

    The highest scores are guessed to be in and as many of the lowest to be out, `guessed_share` of the canaries in all:
    a number fixed before any score is seen, as the theorem wants it. Raises DataError on unlike lengths, on scores that
    are not finite and on a share outside (0, 1].
    """
    if scores.ndim != 1 or scores.shape != members.shape or members.dtype != np.bool_ or not np.isfinite(scores).all():
        raise DataError(
            f"scores {scores.shape} of {members.dtype} coins {members.shape}: give a finite score and a coin each"
        )
    if not 0 < guessed_share <= 1:
        raise DataError(f"guessed_share = {guessed_share}: give a share in (0, 1]")
    half = math.floor(guessed_share * len(scores) / 2)
    order = np.argsort(scores, kind="stable")
    correct = int(members[order[len(order) - half :]].sum() + (~members[order[:half]]).sum())
    epsilon = epsilon_bound(correct, 2 * half, len(scores), delta, confidence)
    return OneRunBound(len(scores), 2 * half, correct, epsilon, confidence)


def log_ratios(
    vectors: Tensor, others: Tensor, spread: float, total: Tensor, noise: float, rate: float, steps: int = 1
) -> np.ndarray:
    """What one noised sum tells of each canary: the log-likelihood ratio of in against out, about, (k,) float64.

    The model: total (d,) is the sum of x_i vectors_i (k, d), of others (n, d) with coefficients of variance `spread`,
    and of noise of this standard deviation; x_i is 0 for who is out, else Binomial(steps, rate). What lies in the span of
    the others' means, in _GROUPS groups, is left out, for their coefficients' means are not known. The other canaries
    count as Gaussian noise more, of the mean and covariance that unknown coins give them.
    """
    count, mean = len(vectors), steps * rate / 2
    variance = steps * rate * (1 - rate) / 2 + mean**2
    groups = others.tensor_split(min(_GROUPS, len(others))) if len(others) else ()
    basis = torch.linalg.qr(torch.stack([group.mean(0) for group in groups]).T).Q if groups else others.T
    rows = torch.cat([vectors, others])
    variances = torch.full((len(rows),), variance, dtype=torch.float64)
    variances[count:] = spread
    within = (rows @ basis).double().cpu()
    gram = (rows @ rows.T).double().cpu() - within @ within.T
    heard = (rows @ total).double().cpu() - within @ (basis.T @ total).double().cpu() - mean * gram[:, :count].sum(1)
    mixed = gram * variances + noise**2 * torch.eye(len(gram), dtype=torch.float64)
    solved = torch.linalg.solve(mixed, torch.cat([heard[:, None], gram], dim=1))[:count]
    precision, signal = solved[:, 1:].diagonal(), solved[:, 0]
    if count >= _ENOUGH:
        # By the model the precision is the signal's variance. Where it is more, that is noise which the model does not know.
        excess = ((signal.square() / precision.clamp(min=1e-30)).median() / _MEDIAN_SQUARE).clamp(min=1.0)
        precision, signal = precision / excess, signal / excess
    # All canaries were taken for noise; each leaves it again (Sherman and Morrison 1950).
    rest = 1 - variance * precision
    signal, precision = (signal + mean * precision) / rest, precision / rest
    times = torch.arange(steps + 1, dtype=torch.float64)[:, None]
    drawn = torch.distributions.Binomial(steps, torch.tensor(rate, dtype=torch.float64)).log_prob(times)
    return torch.logsumexp(drawn + times * signal - times.square() * precision / 2, dim=0).numpy()


def unit_gradients(
    discriminator: nn.Module,
    loss: Callable[[Tensor], Tensor],
    images: Tensor,
    labels: Tensor | None,
    units: Tensor | None,
    max_grad_norm: float,
) -> Tensor:
    """The mean gradient of each unit's images, clipped: (U, d) float32, by plain autograd of one image at a time.

    units: (B,) int64 on the images' device; None where each image is one. One that is not finite is zero.
    """
    weights = {name: parameter.detach() for name, parameter in discriminator.named_parameters()}

    def loss_of(weights: dict[str, Tensor], image: Tensor, label: Tensor | None) -> Tensor:
        given = (image[None],) if label is None else (image[None], label[None])
        return loss(functional_call(discriminator, weights, given)).sum()

    each = vmap(grad(loss_of), in_dims=(None, 0, None if labels is None else 0))
    units = torch.arange(len(images), device=images.device) if units is None else units
    sizes = torch.bincount(units)
    dimension = sum(weight.numel() for weight in weights.values())
    total = torch.zeros(len(sizes), dimension, device=images.device)
    for some in torch.arange(len(images)).split(_IMAGES_AT_ONCE):
        found = each(weights, images[some], None if labels is None else labels[some])
        flat = torch.cat([part.flatten(1) for part in found.values()], dim=1)
        total.index_add_(0, units[some], flat)
    total /= sizes[:, None]
    norms = total.norm(dim=1, keepdim=True)
    total *= max_grad_norm / norms.clamp(min=max_grad_norm)
    total[~norms.flatten().isfinite()] = 0.0
    return total


def _tails(guesses: int, epsilon: float) -> np.ndarray:
    """P[W >= k] for k = 0..guesses."""
    k = np.arange(guesses + 1)
    log_factorial = np.concatenate([[0.0], np.cumsum(np.log(np.arange(1, guesses + 1)))])
    log_choose = log_factorial[-1] - log_factorial - log_factorial[::-1]
    log_right = -math.log1p(math.exp(-epsilon))
    probability = np.exp(log_choose + k * log_right + (guesses - k) * (log_right - epsilon))
    return np.asarray(np.cumsum(probability[::-1])[::-1])
