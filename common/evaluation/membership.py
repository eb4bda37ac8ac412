"""Membership inference: who was in the training set, told from a discriminator or from generated images.

Three attacks, each a score that is higher where a record looks more like a member:
`logan_scores`: the discriminator's own logit (Hayes, Melis, Danezis and De Cristofaro 2019, "LOGAN", the white-box
attack). A loss trains it to be high on real images, whatever its zero means, or under least squares to be near 1.
`monte_carlo_scores`: the share of generated images near the record (Hilprecht, Haerterich and Bernau 2019, "Monte Carlo
and reconstruction membership inference attacks against generative models").
`gan_leaks_scores`: minus the distance to the nearest generated image (Chen, Yu, Zhang and Fritz 2020, "GAN-Leaks", the
full black-box attack).

How well an attack tells members from non-members is its AUC, and its true positive rate at a small false positive rate
(Carlini et al. 2022, "Membership inference attacks from first principles"). Intervals are over the draw of the records,
for one trained model: to train again may give another figure. `dp_ceiling` says what no attack can pass, on average
over training and records: it holds where members and non-members are of one distribution, as only then is a difference
between them the model's doing.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from common.errors import DataError
from common.gradients import from_uint8

CONFIDENCE = 0.95
_NORMAL = NormalDist()
# Images given to a discriminator at once, and distances held at once (64 MiB).
_BATCH, _MAX_DISTANCES = 1000, 2**24
# Distances are between images of at most this side: fine detail of large ones counts for little, and costs much.
_MAX_SIDE = 32
# The ceiling over many guarantees is integrated over this many false positive rates.
_GRID = 20_000


@dataclass(frozen=True)
class Estimate:
    """A figure and its 95 % interval."""

    value: float
    low: float
    high: float


# --- scores: higher for a member ---


@torch.no_grad()
def logan_scores(
    discriminator: nn.Module, images: np.ndarray, labels: np.ndarray | None = None, target: float = math.inf
) -> np.ndarray:
    """The discriminator's logit of each image (N,) in evaluation mode; its own mode is left as it was.

    images: uint8 (N, C, H, H); labels: int64 (N,) for a conditional discriminator, which its attacker knows. target:
    where its loss pulls real images to; where that is finite, the score is minus the logit's distance to it.
    """
    device, training = next(discriminator.parameters()).device, discriminator.training
    discriminator.eval()
    logits = [np.zeros(0)]
    for low in range(0, len(images), _BATCH):
        some = None if labels is None else torch.from_numpy(labels[low : low + _BATCH]).to(device)
        logits.append(discriminator(from_uint8(images[low : low + _BATCH]).to(device), some).double().cpu().numpy())
    discriminator.train(training)
    found = np.concatenate(logits)
    return found if target == math.inf else -np.abs(found - target)


def gan_leaks_scores(images: np.ndarray, generated: np.ndarray, device: torch.device | str = "cpu") -> np.ndarray:
    """Minus the Euclidean distance of each image (N,) to the nearest of the generated ones.

    images, generated: uint8 (N, C, H, H) and (M, C, H, H), neither empty. Not calibrated: the paper's calibration takes
    a second generator, trained on others.
    """
    return -np.concatenate([block.amin(1).double().cpu().numpy() for block in _distances(images, generated, device)])


def monte_carlo_scores(
    images: np.ndarray, generated: np.ndarray, radius: float, device: torch.device | str = "cpu"
) -> np.ndarray:
    """The share of generated images within `radius` of each image (N,); shapes and distance as in `gan_leaks_scores`.

    Distances are between pixels. The paper takes them between principal components of public images; none are at hand,
    and those of generated images would hide whatever the generator leaves out.
    """
    near = [(block <= radius).double().mean(1).cpu().numpy() for block in _distances(images, generated, device)]
    return np.concatenate(near)


def median_radius(members: np.ndarray, non_members: np.ndarray) -> float:
    """The paper's median heuristic for `radius`: the median distance to the nearest generated image, members (m,) and
    non-members (n,) counting half each, as the paper has as many of one as of the other.
    """
    distances = np.concatenate([members, non_members])
    weights = np.repeat([0.5 / len(members), 0.5 / len(non_members)], [len(members), len(non_members)])
    order = np.argsort(distances)
    return float(distances[order][np.searchsorted(np.cumsum(weights[order]), 0.5 - 1e-9)])


def unit_means(scores: np.ndarray, units: Sequence[np.ndarray]) -> np.ndarray:
    """The mean score of each unit's images (U,); units: the indices into scores (N,) of each, none empty."""
    return np.array([scores[unit].mean() for unit in units])


# --- how well they tell ---


def auc(members: np.ndarray, non_members: np.ndarray) -> Estimate:
    """The probability that a member scores above a non-member, ties half (Mann-Whitney), and its interval.

    The variance is that of DeLong, DeLong and Clarke-Pearson 1988, by midranks (Sun and Xu 2014): it assumes nothing of
    how scores are distributed. The interval is taken on the logit scale, so that it stays within 0 and 1. Where all
    pairs compare alike (perfect separation, or all scores equal) that variance is 0; then the min(m, n) disjoint pairs,
    which are independent, bound the share p of pairs that may compare otherwise: (1 - p)^min(m, n) >= 0.025.

    Raises DataError for fewer than 2 of either, or scores that are not finite.
    """
    _check(members, non_members)
    m, n = len(members), len(non_members)
    pooled = _midranks(np.concatenate([members, non_members]))
    above = (pooled[:m] - _midranks(members)) / n  # share of non-members below each member
    below = 1 - (pooled[m:] - _midranks(non_members)) / m
    value = float(above.mean())
    if np.ptp(above) == np.ptp(below) == 0:
        other = 1 - ((1 - CONFIDENCE) / 2) ** (1 / min(m, n))
        return Estimate(value, value * (1 - other), value + other * (1 - value))
    error = math.sqrt(above.var(ddof=1) / m + below.var(ddof=1) / n)
    middle = math.log(value / (1 - value))
    reach = _NORMAL.inv_cdf((1 + CONFIDENCE) / 2) * error / (value * (1 - value))
    return Estimate(value, _logistic(middle - reach), _logistic(middle + reach))


def tpr_at_fpr(members: np.ndarray, non_members: np.ndarray, fpr: float) -> Estimate | None:
    """The share of members above the least threshold that at most `fpr` of the non-members pass; None where the
    non-members are too few, under 1 / fpr.

    Its interval (Clopper and Pearson 1934) takes the threshold as given; that non-members chose it is not in it.
    Raises DataError as `auc` does.
    """
    _check(members, non_members)
    allowed = math.floor(fpr * len(non_members) + 1e-9)
    if allowed < 1:
        return None
    threshold = np.sort(non_members)[-allowed - 1] if allowed < len(non_members) else -math.inf
    return clopper_pearson(int((members > threshold).sum()), len(members))


def clopper_pearson(successes: int, trials: int) -> Estimate:
    """The exact interval of a probability (Clopper and Pearson 1934), rounded outwards by at most 1e-9."""
    if not 0 <= successes <= trials or trials < 1:
        raise ValueError(f"{successes} of {trials}: successes must be 0 to trials, and trials 1 or more")
    high = 1.0 if successes == trials else 1 - _least_probability(trials - successes, trials)
    low = 0.0 if successes == 0 else _least_probability(successes, trials)
    return Estimate(successes / trials, low, high)


def _least_probability(successes: int, trials: int) -> float:
    """The greatest p at which `successes` or more of `trials` has a probability of at most 0.025, from below."""
    counts = torch.arange(successes, trials + 1, dtype=torch.float64)
    total = torch.tensor(float(trials), dtype=torch.float64)
    ways = torch.lgamma(total + 1) - torch.lgamma(counts + 1) - torch.lgamma(total - counts + 1)
    low, high = 0.0, successes / trials
    while high - low > 1e-10:
        p = (low + high) / 2
        tail = torch.exp(ways + counts * math.log(p) + (total - counts) * math.log1p(-p)).sum()
        low, high = (p, high) if tail < (1 - CONFIDENCE) / 2 else (low, p)
    return low


# --- what no attack can pass ---


@dataclass(frozen=True)
class Ceiling:
    """The greatest AUC, and the greatest true positive rate at a given false positive rate."""

    auc: float
    tpr: float


def dp_ceiling(guarantees: Sequence[tuple[float, float]], fpr: float) -> Ceiling:
    """What (epsilon, delta)-DP allows, for every one of `guarantees` at once: RIGOROUS.

    A test of "was this unit in it" that is wrong with probability a without it misses it, when in, with probability at
    least f(a) = max(0, 1 - delta - e^epsilon a, e^-epsilon (1 - delta - a)) (Wasserman and Zhou 2010; Dong, Roth and Su
    2022, section 2). So TPR <= 1 - f(FPR) and AUC <= 1 - (integral of f). f is two straight pieces that meet at
    a = f(a) = (1 - delta) / (1 + e^epsilon), so for one guarantee the integral is (1 - delta)^2 / (1 + e^epsilon). For
    several, f is their maximum, which is convex: the midpoint rule then errs upwards in the AUC, if at all.

    1 - f is concave, so what holds for each record holds for averages over records, and over runs.
    """
    epsilon, delta = np.array(guarantees, dtype=np.float64).T[:, :, None]
    epsilon = np.minimum(epsilon, 700.0)  # above, e^epsilon has no float64; less is no looser than 1e-300

    def missed(a: np.ndarray) -> np.ndarray:
        steep, flat = 1 - delta - np.exp(epsilon) * a, np.exp(-epsilon) * (1 - delta - a)
        best: np.ndarray = np.maximum(np.maximum(steep, flat).max(0), 0.0)
        return best

    if len(guarantees) == 1:
        area = float((1 - delta.item()) ** 2 / (1 + np.exp(epsilon.item())))
    else:
        area = float(missed((np.arange(_GRID) + 0.5) / _GRID).mean())
    return Ceiling(1 - area, 1 - float(missed(np.array([fpr]))[0]))


def gdp_mu(epsilon: float, delta: float) -> float:
    """The mu for which mu-Gaussian DP has exactly this delta at this epsilon (Dong, Roth and Su 2022, section 2):
    delta = Phi(-epsilon / mu + mu / 2) - e^epsilon Phi(-epsilon / mu - mu / 2).
    """

    def delta_of(mu: float) -> float:
        near, far = torch.tensor([-epsilon / mu + mu / 2, -epsilon / mu - mu / 2], dtype=torch.float64)
        return float(torch.special.ndtr(near) - torch.exp(epsilon + torch.special.log_ndtr(far)))

    low, high = 1e-9, 1.0
    while delta_of(high) < delta:
        low, high = high, 2 * high
    while high / low > 1 + 1e-12:
        middle = math.sqrt(low * high)
        low, high = (middle, high) if delta_of(middle) < delta else (low, middle)
    return high


def gdp_ceiling(mu: float, fpr: float) -> Ceiling:
    """What mu-Gaussian DP allows: to tell N(mu, 1) from N(0, 1). NOT rigorous for a run of DP-SGD.

    TPR <= Phi(Phi^-1(FPR) + mu), and AUC <= P(N(mu, 1) > N(0, 1)) = Phi(mu / sqrt(2)). A run that promises (epsilon,
    delta) need not be mu-GDP for the mu of `gdp_mu`: sampled Gaussian releases tend to it as they grow many and small
    (Bu, Dong, Long and Su 2020), and no bound says how near they are.
    """
    return Ceiling(_NORMAL.cdf(mu / math.sqrt(2)), _NORMAL.cdf(_NORMAL.inv_cdf(fpr) + mu))


def _points(images: np.ndarray, device: torch.device | str) -> Tensor:
    """Images uint8 (N, C, H, H) as points (N, d), each pixel in [-1, 1], at most 32 pixels a side."""
    found = []
    for low in range(0, len(images), _BATCH):
        batch = from_uint8(images[low : low + _BATCH]).to(device)
        factor = max(1, batch.shape[-1] // _MAX_SIDE)
        found.append(functional.avg_pool2d(batch, factor).flatten(1))
    return torch.cat(found)


def _distances(images: np.ndarray, generated: np.ndarray, device: torch.device | str) -> Iterator[Tensor]:
    """Distances (B, M) of some of the images to all of the generated ones, in order."""
    samples = _points(generated, device)
    rows = max(1, _MAX_DISTANCES // len(samples))
    for low in range(0, len(images), rows):
        yield torch.cdist(_points(images[low : low + rows], device), samples)


def _midranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, those of equal values averaged: (N,)."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = (np.cumsum(counts) - (counts - 1) / 2)[place]
    return ranks


def _logistic(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def _check(members: np.ndarray, non_members: np.ndarray) -> None:
    for name, scores in (("members", members), ("non-members", non_members)):
        if len(scores) < 2:
            raise DataError(f"{len(scores)} {name}: a membership attack is judged on 2 or more of each")
        if not np.isfinite(scores).all():
            raise DataError(f"the scores of {name} are not finite: the model has diverged, and tells nothing")
