"""Face verification: are two photographs of one person?

A recogniser gives each pair of photographs a score, higher where it is surer that they show one person, and a pair is accepted
where its score is at least a threshold. The figures are those of the field: accuracy at a threshold and over folds (Huang et al.
2007, "Labeled faces in the wild", View 2), the share of genuine pairs accepted at a fixed share of impostors (TAR at FAR; Maze
et al. 2018, "IARPA Janus benchmark C") and the equal error rate. AUC and ROC curve are by scikit-learn.

Of real pairs the figures are about private data unless the photographs are public.
"""

import dataclasses
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from common.errors import ConfigError, DataError

_CONFIDENCE = 0.95
_BOOTSTRAP_DRAWS = 10_000
# What rounding may take from a rate times a number of pairs that should be whole: 0.29 * 100 is 28.999...
_ROUNDING = 1e-9


@dataclasses.dataclass(frozen=True)
class Verification:
    """Figures of one set of pairs. All but the counts and the threshold are 0 to 1.

    pairs, genuine: how many in all, and of one person. accuracy: share of the pairs told rightly at `threshold`.
    accuracy_interval: its 95 % interval, percentile bootstrap over pairs: too narrow where pairs share photographs or persons,
    and of no width where all or none are right. auc: probability that a genuine pair scores above an impostor pair, ties half.
    tar_at_far: for each share of impostors the largest share of genuine pairs that any threshold accepts while it accepts no more
    of the impostors; None where that share is less than one impostor pair. eer: where the ROC curve, straight between its
    points, accepts as large a share of the impostors as it refuses of the genuine pairs; smaller is better.
    """

    pairs: int
    genuine: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    threshold: float
    auc: float
    tar_at_far: dict[float, float | None]
    eer: float


class FoldedAccuracy(NamedTuple):
    """mean: of the folds' accuracies, 0 to 1. standard_error: of that mean. per_fold: in order of the folds' numbers."""

    mean: float
    standard_error: float
    per_fold: tuple[float, ...]


def best_threshold(scores: np.ndarray, same: np.ndarray) -> float:
    """The threshold with the highest accuracy on these pairs, where those whose score is at least the threshold are accepted.

    scores: (N,), higher for one person; same: (N,) bool. It lies midway between two neighbouring scores; at the lowest score
    where to accept all is best, and just above the highest where to accept none is. Of several equally good ones it is the
    highest, which accepts the fewest. Compare with it in float64. Raises DataError as `verification_figures`.
    """
    scores, same = _checked(scores, same)
    values, place = np.unique(scores, return_inverse=True)
    # Of the thresholds "at least the j-th value", j = len(values) accepts none.
    genuine_below, impostors_below = (
        np.concatenate([[0], np.cumsum(np.bincount(place[of], minlength=len(values)))]) for of in (same, ~same)
    )
    right = impostors_below + same.sum() - genuine_below
    best = len(values) - int(right[::-1].argmax())
    if best == 0:
        return float(values[0])
    if best == len(values):
        return float(np.nextafter(values[-1], math.inf))
    below, above = float(values[best - 1]), float(values[best])
    middle = below / 2 + above / 2
    return middle if below < middle <= above else above


def verification_figures(
    scores: np.ndarray, same: np.ndarray, threshold: float, *, fars: Sequence[float] = (0.1, 0.01, 0.001), seed: int = 0
) -> Verification:
    """All figures of pairs with `scores` (N,), higher for one person, of which `same` (N,) bool are of one person.

    threshold: a pair is accepted where its score is at least this; take it from other pairs (`best_threshold`), or the accuracy
    flatters. fars: shares of impostors, above 0 and below 1. seed: of the bootstrap. Raises DataError for no pairs, for none
    that are of one person or none that are of two, unequal lengths, scores that are not finite, and where scikit-learn is not
    installed; ConfigError for another threshold or share.
    """
    scores, same = _checked(scores, same)
    if not math.isfinite(threshold):
        raise ConfigError(f"threshold {threshold} is not finite: take it from other pairs (best_threshold)")
    for far in fars:
        if not 0 < far < 1:
            raise ConfigError(f"a share of impostors of {far}: give one above 0 and below 1")
    metrics = scikit_learn("metrics", "the AUC")
    accepted_impostors, accepted_genuine, _ = metrics.roc_curve(same, scores, drop_intermediate=False)
    accuracy = float(((scores >= threshold) == same).mean())
    return Verification(
        len(scores),
        int(same.sum()),
        accuracy,
        _bootstrap(accuracy, len(scores), np.random.default_rng(seed)),
        float(threshold),
        float(metrics.roc_auc_score(same, scores)),
        {far: _tar(scores[same], scores[~same], far) for far in fars},
        # Their sum grows from point to point, and is 1 where refused genuine = accepted impostors.
        float(np.interp(1.0, accepted_impostors + accepted_genuine, accepted_impostors)),
    )


def folded_accuracy(scores: np.ndarray, same: np.ndarray, folds: np.ndarray) -> FoldedAccuracy:
    """Accuracy over folds (N,), whole numbers: each fold is told at the best threshold of all others (Huang et al. 2007).

    scores, same: as in `verification_figures`. The standard error is the deviation of the folds' accuracies, with one degree of
    freedom less, over the root of their number, as in the protocol. Raises DataError as there, for one fold only, and where
    the pairs outside a fold are all of one person or all of two.
    """
    scores, same = _checked(scores, same)
    folds = np.asarray(folds)
    if folds.shape != scores.shape or folds.dtype.kind not in "iu":
        raise DataError(
            f"folds are {folds.dtype} {folds.shape} for {len(scores)} pairs: give each pair the number of its fold"
        )
    numbers = np.unique(folds)
    if len(numbers) < 2:
        raise DataError("1 fold: the threshold of one comes from the others, give 2 or more")
    per_fold = []
    for number in numbers:
        inside = folds == number
        _checked(scores[~inside], same[~inside], f"pairs outside fold {number}")
        threshold = best_threshold(scores[~inside], same[~inside])
        per_fold.append(float(((scores[inside] >= threshold) == same[inside]).mean()))
    return FoldedAccuracy(
        float(np.mean(per_fold)), float(np.std(per_fold, ddof=1) / math.sqrt(len(per_fold))), tuple(per_fold)
    )


def scikit_learn(module: str, what: str) -> Any:
    """A module of scikit-learn, which `what` needs. Raises DataError where it is not installed."""
    try:
        return importlib.import_module(f"sklearn.{module}")
    except ImportError as error:
        raise DataError(f"{what} needs scikit-learn ({error}): pip install 'visard[evaluation]'") from error


def _checked(scores: np.ndarray, same: np.ndarray, which: str = "pairs") -> tuple[np.ndarray, np.ndarray]:
    """The scores as float64 and the truths."""
    scores, same = np.asarray(scores), np.asarray(same)
    if scores.ndim != 1 or scores.shape != same.shape or same.dtype != bool or scores.dtype.kind not in "fiu":
        raise DataError(
            f"scores are {scores.dtype} {scores.shape}, truths {same.dtype} {same.shape}: give both (N,), a number and "
            "a bool for each pair"
        )
    if not len(scores):
        raise DataError(f"0 {which}: give at least one of one person and one of two")
    scores = scores.astype(np.float64)
    if bad := int((~np.isfinite(scores)).sum()):
        raise DataError(f"{bad} of {len(scores)} scores are not finite: leave out pairs that have no score")
    for count, kind in ((int(same.sum()), "one person"), (int((~same).sum()), "two persons")):
        if not count:
            raise DataError(f"0 of {len(same)} {which} are of {kind}: give at least one")
    return scores, same


def _tar(genuine: np.ndarray, impostors: np.ndarray, far: float) -> float | None:
    """The largest share of `genuine` that is accepted with at most `far` of `impostors`."""
    allowed = int(far * len(impostors) + _ROUNDING)
    if allowed < 1:
        return None
    # The highest of those that must be refused; who scores as high is refused too.
    refused = np.sort(impostors)[len(impostors) - 1 - allowed]
    return float((genuine > refused).mean())


def _bootstrap(accuracy: float, pairs: int, random: np.random.Generator) -> tuple[float, float]:
    """Percentiles over draws of as many pairs with replacement, of which the right ones are binomial."""
    drawn = random.binomial(pairs, accuracy, _BOOTSTRAP_DRAWS) / pairs
    low, high = np.quantile(drawn, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)
