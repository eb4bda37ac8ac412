"""Every figure of verification is what a plain loop finds, and says which scores are better."""

import itertools
import math
import sys

import numpy as np
import pytest

from common.errors import ConfigError, DataError
from common.evaluation.verification import best_threshold, folded_accuracy, verification_figures

FARS = (0.3, 0.1, 0.05)


def drawn(seed: int, *, ties: bool = False, count: int = 90, apart: float = 1.0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    same = random.random(count) < 0.4
    same[:2] = True, False
    scores = random.standard_normal(count) + apart * same
    return (np.round(scores * 2) / 2 if ties else scores), same


def accuracy_at(scores: np.ndarray, same: np.ndarray, threshold: float) -> float:
    return sum((score >= threshold) == truth for score, truth in zip(scores, same, strict=True)) / len(scores)


def thresholds_of(scores: np.ndarray) -> list[float]:
    """One for every way to tell these pairs, the highest first."""
    values = sorted(set(scores.tolist()), reverse=True)
    between = [(above + below) / 2 for above, below in itertools.pairwise(values)]
    return [math.nextafter(values[0], math.inf), *between, values[-1]]


def auc_of(scores: np.ndarray, same: np.ndarray) -> float:
    right = 0.0
    for genuine in scores[same]:
        for impostor in scores[~same]:
            right += 1.0 if genuine > impostor else 0.5 if genuine == impostor else 0.0
    return right / (same.sum() * (~same).sum())


def rates(scores: np.ndarray, same: np.ndarray) -> list[tuple[float, float]]:
    """The shares of impostors and of genuine pairs that each threshold accepts, the highest threshold first."""
    return [
        (float((scores[~same] >= threshold).mean()), float((scores[same] >= threshold).mean()))
        for threshold in thresholds_of(scores)
    ]


def tar_of(scores: np.ndarray, same: np.ndarray, far: float) -> float | None:
    if far * (~same).sum() < 1:
        return None
    return max(genuine for impostors, genuine in rates(scores, same) if impostors <= far)


def eer_of(scores: np.ndarray, same: np.ndarray) -> float:
    points = rates(scores, same)
    for (far, tar), (next_far, next_tar) in itertools.pairwise(points):
        before, after = far - (1 - tar), next_far - (1 - next_tar)
        if before <= 0 <= after:
            return far + (next_far - far) * -before / (after - before)
    raise AssertionError("the curve runs from 0 to 1")


@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("seed", range(12))
def test_every_figure_is_its_loop(seed: int, ties: bool) -> None:
    scores, same = drawn(seed, ties=ties, apart=seed / 4 - 0.5)
    best = best_threshold(scores, same)
    # The first of the best is the highest.
    assert best == max(thresholds_of(scores), key=lambda threshold: accuracy_at(scores, same, threshold))
    found = verification_figures(scores, same, 0.3, fars=FARS)
    assert (found.pairs, found.genuine, found.threshold) == (len(scores), same.sum(), 0.3)
    assert found.accuracy == pytest.approx(accuracy_at(scores, same, 0.3))
    assert accuracy_at(scores, same, best) >= found.accuracy
    assert found.auc == pytest.approx(auc_of(scores, same))
    assert found.tar_at_far == {far: tar_of(scores, same, far) for far in FARS}
    assert found.eer == pytest.approx(eer_of(scores, same))


def test_a_share_of_less_than_one_impostor_is_not_measured() -> None:
    same = np.arange(200) < 100
    scores = np.where(same, 2.0, 0.0) + np.arange(200) / 1000
    found = verification_figures(scores, same, 1.0, fars=(0.29, 0.01, 0.0099))
    assert found.tar_at_far == {0.29: 1.0, 0.01: 1.0, 0.0099: None}
    assert verification_figures(scores, same, 1.0).tar_at_far == {0.1: 1.0, 0.01: 1.0, 0.001: None}
    # 29 of 100 impostors may be accepted, though 0.29 * 100 is below 29.
    impostors_first = np.where(same, 70.5, np.arange(200) - 100.0)
    assert verification_figures(impostors_first, same, 1.0, fars=(0.29, 0.28)).tar_at_far == {0.29: 1.0, 0.28: 0.0}


def test_known_answers() -> None:
    scores, same = np.array([0.9, 0.8, 0.7, 0.6, 0.2, 0.1]), np.array([True, True, False, True, False, False])
    # 0.75 and 0.4 tell five of six.
    assert best_threshold(scores, same) == pytest.approx(0.75)
    # Who scores as high as the threshold is accepted.
    found = verification_figures(scores, same, 0.8, fars=(0.4,))
    assert found.accuracy == pytest.approx(5 / 6)
    assert found.auc == pytest.approx(8 / 9)
    assert found.tar_at_far == {0.4: 1.0}
    assert found.eer == pytest.approx(1 / 3)


def test_scores_that_tell_all_some_and_none() -> None:
    same = np.arange(4000) % 2 == 0
    noise = np.random.default_rng(0).standard_normal(4000)
    perfect = verification_figures(same + 0.1 * np.tanh(noise), same, 0.5)
    assert (perfect.accuracy, perfect.accuracy_interval, perfect.auc, perfect.eer) == (1.0, (1.0, 1.0), 1.0, 0.0)
    assert perfect.tar_at_far == {0.1: 1.0, 0.01: 1.0, 0.001: 1.0}
    blind = verification_figures(noise, same, 0.0)
    assert blind.auc == pytest.approx(0.5, abs=0.03)
    assert blind.eer == pytest.approx(0.5, abs=0.03)
    assert blind.accuracy == pytest.approx(0.5, abs=0.03)
    assert blind.tar_at_far[0.1] == pytest.approx(0.1, abs=0.03)
    constant = verification_figures(np.zeros(4000), same, 0.0)
    assert (constant.accuracy, constant.auc, constant.eer) == (0.5, 0.5, 0.5)
    assert constant.tar_at_far == {0.1: 0.0, 0.01: 0.0, 0.001: 0.0}
    inverted = verification_figures(-same.astype(float), same, -0.5)
    assert (inverted.accuracy, inverted.auc, inverted.eer) == (0.0, 0.0, 1.0)


def test_scores_in_other_units_and_another_order_change_nothing() -> None:
    scores, same = drawn(3)
    threshold = best_threshold(scores, same)
    figures = verification_figures(scores, same, threshold)
    order = np.random.default_rng(1).permutation(len(scores))
    assert best_threshold(scores[order], same[order]) == threshold
    assert verification_figures(scores[order], same[order], threshold) == figures
    other = best_threshold(np.exp(scores), same)
    assert ((np.exp(scores) >= other) == (scores >= threshold)).all()
    in_other_units = verification_figures(np.exp(scores), same, other)
    for name in ("accuracy", "accuracy_interval", "auc", "tar_at_far", "eer"):
        assert getattr(in_other_units, name) == getattr(figures, name), name
    # Who scores distances, and takes their negatives, finds the mirror image.
    mirrored = verification_figures(-scores, ~same, 0.0)
    assert mirrored.auc == pytest.approx(figures.auc)
    assert mirrored.eer == pytest.approx(figures.eer)


def test_of_equally_good_thresholds_the_highest() -> None:
    alternating = np.array([True, False, True, False])
    assert best_threshold(np.array([4.0, 3.0, 2.0, 1.0]), alternating) == 3.5
    assert best_threshold(np.array([2.0, 2.0]), np.array([True, False])) == math.nextafter(2.0, math.inf)
    mostly_genuine = np.array([False, True, True, True])
    assert best_threshold(np.array([3.0, 1.0, 1.0, 2.0]), mostly_genuine) == 1.0
    # No number lies between these two.
    above = math.nextafter(1.0, math.inf)
    assert best_threshold(np.array([1.0, above]), np.array([False, True])) == above
    assert best_threshold(np.array([0, 1]), np.array([False, True])) == 0.5
    # In float32 the threshold between these would be one of them.
    near = np.array([1, np.nextafter(np.float32(1), np.float32(2))], np.float32)
    between = best_threshold(near, np.array([False, True]))
    assert verification_figures(near, np.array([False, True]), between).accuracy == 1.0


def test_the_interval_is_that_of_drawn_pairs() -> None:
    scores, same = drawn(5, count=2000)
    found = verification_figures(scores, same, 0.5, seed=1)
    assert found == verification_figures(scores, same, 0.5, seed=1)
    random, right = np.random.default_rng(0), (scores >= 0.5) == same
    drawn_again = [right[random.integers(0, 2000, 2000)].mean() for _ in range(4000)]
    low, high = np.quantile(drawn_again, [0.025, 0.975])
    assert found.accuracy_interval == pytest.approx((low, high), abs=0.0015)
    assert found.accuracy_interval[0] < found.accuracy < found.accuracy_interval[1]
    wide, narrow = (verification_figures(*drawn(6, count=count), 0.5).accuracy_interval for count in (100, 10000))
    assert (wide[1] - wide[0]) / (narrow[1] - narrow[0]) == pytest.approx(10, rel=0.3)


@pytest.mark.parametrize("seed", range(4))
def test_each_fold_is_told_by_the_others(seed: int) -> None:
    scores, same = drawn(seed, ties=seed % 2 == 0)
    folds = np.random.default_rng(seed).integers(3, 8, len(scores))
    accuracies = []
    for fold in sorted(set(folds.tolist())):
        others = [i for i in range(len(scores)) if folds[i] != fold]
        threshold = max(
            thresholds_of(scores[others]),
            key=lambda t, o=others: accuracy_at(scores[o], same[o], t),
        )
        inside = [i for i in range(len(scores)) if folds[i] == fold]
        accuracies.append(accuracy_at(scores[inside], same[inside], threshold))
    mean = sum(accuracies) / len(accuracies)
    deviation = math.sqrt(sum((a - mean) ** 2 for a in accuracies) / (len(accuracies) - 1))
    found = folded_accuracy(scores, same, folds)
    assert found.per_fold == pytest.approx(accuracies)
    assert found.mean == pytest.approx(mean)
    assert found.standard_error == pytest.approx(deviation / math.sqrt(len(accuracies)))


def test_a_fold_does_not_choose_its_own_threshold() -> None:
    # Fold 1 is told perfectly at 10.5, but most pairs say 0.5.
    scores, folds = np.array([0.0, 1.0] * 4 + [10.0, 11.0]), np.array([0] * 4 + [2] * 4 + [1] * 2)
    mean, error, per_fold = folded_accuracy(scores, np.array([False, True] * 5), folds)
    assert per_fold == (1.0, 0.5, 1.0)
    assert (mean, error) == pytest.approx((5 / 6, 1 / 6))


GOOD = (np.array([0.1, 0.9]), np.array([False, True]))
BAD = {
    "0 pairs: give at least one": (np.zeros(0), np.zeros(0, bool)),
    "0 of 2 pairs are of one person": (np.zeros(2), np.zeros(2, bool)),
    "0 of 2 pairs are of two persons": (np.zeros(2), np.ones(2, bool)),
    r"\(3,\), truths bool \(2,\): give both": (np.zeros(3), np.ones(2, bool)),
    r"\(2, 1\)": (np.zeros((2, 1)), np.zeros((2, 1), bool)),
    "truths int64": (np.zeros(2), np.array([0, 1])),
    "scores are bool": (np.zeros(2, bool), np.array([False, True])),
    "1 of 2 scores are not finite": (np.array([0.0, np.nan]), GOOD[1]),
    "2 of 2 scores are not finite": (np.array([-np.inf, np.inf]), GOOD[1]),
}


@pytest.mark.parametrize("message", BAD)
def test_pairs_that_cannot_be_told_are_refused(message: str) -> None:
    scores, same = BAD[message]
    with pytest.raises(DataError, match=message):
        best_threshold(scores, same)
    with pytest.raises(DataError, match=message):
        verification_figures(scores, same, 0.5)
    with pytest.raises(DataError, match=message):
        folded_accuracy(scores, same, np.arange(len(scores)))


def test_what_else_cannot_be_used_is_refused() -> None:
    with pytest.raises(ConfigError, match="threshold nan is not finite"):
        verification_figures(*GOOD, math.nan)
    for far in (0.0, 1.0, -0.1, math.nan):
        with pytest.raises(ConfigError, match="above 0 and below 1"):
            verification_figures(*GOOD, 0.5, fars=(far,))
    with pytest.raises(DataError, match=r"1 fold: .* give 2 or more"):
        folded_accuracy(*GOOD, np.array([7, 7]))
    for folds in (np.zeros(3, int), np.zeros(2), np.zeros((2, 1), int)):
        with pytest.raises(DataError, match="give each pair the number of its fold"):
            folded_accuracy(*GOOD, folds)
    with pytest.raises(DataError, match="0 of 1 pairs outside fold 0 are of two persons"):
        folded_accuracy(*GOOD, np.array([0, 1]))


def test_what_scikit_learn_is_needed_for_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.metrics", None)
    with pytest.raises(DataError, match=r"the AUC needs scikit-learn .* pip install 'visard\[evaluation\]'"):
        verification_figures(*GOOD, 0.5)
    assert best_threshold(*GOOD) == 0.5
