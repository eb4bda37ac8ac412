"""What is done to whom: error rates group by group. Shares and distances are in `representation`.

Rates come from fairlearn's MetricFrame. Max/GeoMean is the highest rate over the geometric mean of all groups' (Grother 2022,
NIST IR 8429, "Face recognition vendor test part 8: summarizing demographic differentials"). A rate on fewer than TOO_FEW errors
is flagged (Doddington et al. 2000, "The NIST speaker recognition evaluation: overview, methodology, systems, results, perspective":
30 errors for a rate that is within 30 % with a confidence of 90 %).

Intervals are percentiles of bootstraps that take what is in a group for independent: pairs and images that share a person are
not, and theirs should be wider. The group '' means unknown; what is in it is left out, and counted.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from common.errors import DataError
from common.evaluation.membership import CONFIDENCE, Estimate, clopper_pearson

# Errors under which a group's rate is too few to say.
TOO_FEW = 30
_BOOTSTRAPS, _PERMUTATIONS = 2000, 1999


@dataclass(frozen=True)
class GroupRates:
    """One group's error rate. count: pairs or images. rate: errors / count, 0 to 1, and its 95 % interval. too_few: under
    TOO_FEW errors.
    """

    group: str
    count: int
    errors: int
    rate: float
    low: float
    high: float
    too_few: bool


@dataclass(frozen=True)
class RatesByGroup:
    """Error rates of two groups or more, by name.

    gap: the highest rate minus the lowest. It is never below 0, so that its interval leaves 0 out even where groups are alike: ask
    `p_value`, the probability that groups of one rate differ as much as these do (Pearson's statistic, permuting who is in which
    group). worst: the group of the highest rate. max_over_geomean: None where a rate is 0 or a group has too few
    errors. unknown: left out, as their group is ''.
    """

    groups: tuple[GroupRates, ...]
    gap: Estimate
    p_value: float
    worst: str
    max_over_geomean: float | None
    unknown: int

    @property
    def differ(self) -> bool:
        """Groups of one rate would differ as much in less than 5 % of trials."""
        return self.p_value < 1 - CONFIDENCE


@dataclass(frozen=True)
class VerificationByGroup:
    """Both errors of a face matcher at one threshold."""

    threshold: float
    false_match: RatesByGroup
    false_non_match: RatesByGroup


@dataclass(frozen=True)
class GapAdded:
    """How much wider the gap between groups is under model a than under model b: added = gap_a - gap_b and its interval.

    too_few: a group has under TOO_FEW errors under one of them. unknown: images left out, as their group is ''.
    """

    gap_a: float
    gap_b: float
    added: Estimate
    too_few: bool
    unknown: int


def verification_by_group(
    scores: np.ndarray, same: np.ndarray, groups: np.ndarray, threshold: float, *, seed: int
) -> VerificationByGroup:
    """False match rate (pairs of two persons with score >= threshold) and false non-match rate (pairs of one person below it).

    scores: (N,) finite, higher for more alike; same: (N,) bool; groups: (N,) text, the group of both faces of a pair: pairs
    across groups are easier, and belong to none. Raises DataError for unlike lengths, scores that are not finite, fewer
    than two groups, or a group without pairs of either kind.
    """
    _check(groups, scores=scores, same=same)
    if not np.isfinite(scores).all():
        raise DataError(f"{int((~np.isfinite(scores)).sum())} of {len(scores)} scores are not finite: leave them out")
    same = same.astype(bool)
    for kind, which in (("pairs of two persons", ~same), ("pairs of one person", same)):
        without = sorted(set(groups[groups != ""].tolist()) - set(groups[which].tolist()))
        if without:
            raise DataError(f"group {without[0]!r} has 0 {kind}, a rate takes 1 or more: add some, or leave it out")
    rng = np.random.default_rng(seed)
    accepted = scores >= threshold
    return VerificationByGroup(
        threshold, _rates(accepted[~same], groups[~same], rng), _rates(~accepted[same], groups[same], rng)
    )


def accuracy_by_group(predicted: np.ndarray, truth: np.ndarray, groups: np.ndarray, *, seed: int) -> RatesByGroup:
    """The share of images labelled wrongly, by group. predicted, truth: (N,) of one kind; groups: (N,) text.

    Raises DataError for unlike lengths or fewer than two groups.
    """
    _check(groups, predicted=predicted, truth=truth)
    return _rates(predicted != truth, groups, np.random.default_rng(seed))


def gap_added(errors_a: np.ndarray, errors_b: np.ndarray, groups: np.ndarray, *, seed: int) -> GapAdded:
    """What model a (with privacy, say) adds to the gap between groups that model b (without) has on the same images.

    errors_a, errors_b: (N,) bool, whether each image was got wrong; groups: (N,) text. The bootstrap draws images within
    groups and keeps both models' answers to an image together. Raises DataError for unlike lengths or fewer than two groups.
    """
    _check(groups, errors_a=errors_a, errors_b=errors_b)
    known = groups != ""
    a, b, of = errors_a[known].astype(bool), errors_b[known].astype(bool), groups[known]
    rng = np.random.default_rng(seed)
    gap_a, gap_b = (float(_frame(errors, of).difference(method="between_groups")["rate"]) for errors in (a, b))
    drawn_a, drawn_b, fewest = [], [], []
    for group in np.unique(of):
        inside = of == group
        count = int(inside.sum())
        joint = np.bincount(2 * a[inside] + b[inside], minlength=4)
        drawn = rng.multinomial(count, joint / count, _BOOTSTRAPS)
        drawn_a.append((drawn[:, 2] + drawn[:, 3]) / count)
        drawn_b.append((drawn[:, 1] + drawn[:, 3]) / count)
        fewest += [int(a[inside].sum()), int(b[inside].sum())]
    low, high = _percentiles(np.ptp(drawn_a, axis=0) - np.ptp(drawn_b, axis=0))
    return GapAdded(gap_a, gap_b, Estimate(gap_a - gap_b, low, high), min(fewest) < TOO_FEW, int((~known).sum()))


def proportion(k: int, count: int, rng: np.random.Generator) -> Estimate:
    """k / count and its interval. To draw `count` with replacement is a binomial. Where all or none are counted it has no
    width, and the exact interval is taken.
    """
    if k in (0, count):
        return clopper_pearson(k, count)
    return Estimate(k / count, *_percentiles(rng.binomial(count, k / count, _BOOTSTRAPS) / count))


def two_or_more(groups: np.ndarray) -> list[str]:
    """The names of the known groups of text (N,), sorted. Raises DataError where they are fewer than two."""
    names = sorted(set(groups.tolist()) - {""})
    if len(names) < 2:
        only = f"only {names[0]!r}" if names else "none"
        raise DataError(f"of {len(groups)} groups given {only} is known: a comparison takes 2 groups or more")
    return names


def _frame(errors: np.ndarray, groups: np.ndarray) -> Any:
    """Counts and rates of errors (N,) bool by group."""
    try:
        from fairlearn.metrics import MetricFrame, count, mean_prediction
    except ImportError as error:
        raise DataError(f"rates by group need fairlearn ({error}): pip install 'visard[evaluation]'") from error
    wrong = errors.astype(np.int64)
    return MetricFrame(
        metrics={"count": count, "rate": mean_prediction},
        y_true=np.zeros_like(wrong),
        y_pred=wrong,
        sensitive_features=groups,
    )


def _rates(errors: np.ndarray, groups: np.ndarray, rng: np.random.Generator) -> RatesByGroup:
    known = groups != ""
    names = two_or_more(groups[known])
    frame = _frame(errors[known], groups[known])
    rates = [float(frame.by_group["rate"][name]) for name in names]
    counts = np.array([int(frame.by_group["count"][name]) for name in names])
    wrong = np.rint(np.array(rates) * counts).astype(np.int64)
    found = []
    for name, rate, count, k in zip(names, rates, counts.tolist(), wrong.tolist(), strict=True):
        of = proportion(k, count, rng)
        found.append(GroupRates(name, count, k, rate, of.low, of.high, k < TOO_FEW))
    drawn = rng.binomial(counts, wrong / counts, (_BOOTSTRAPS, len(names))) / counts
    gap = Estimate(float(frame.difference(method="between_groups")["rate"]), *_percentiles(np.ptp(drawn, axis=1)))
    few = min(wrong) < TOO_FEW
    ratio = None if few else float(max(rates) / np.exp(np.log(rates).mean()))
    worst = names[int(np.argmax(rates))]
    return RatesByGroup(tuple(found), gap, _p_value(wrong, counts, rng), worst, ratio, int((~known).sum()))


def _p_value(wrong: np.ndarray, counts: np.ndarray, rng: np.random.Generator) -> float:
    total, errors = counts.sum(), wrong.sum()
    if errors in (0, total):
        return 1.0
    # To shuffle who is in which group is to deal the errors out among places.
    dealt = np.concatenate([wrong[None], rng.multivariate_hypergeometric(counts, errors, _PERMUTATIONS)])
    unlike = ((dealt - counts * (errors / total)) ** 2 / counts).sum(1)
    return float((unlike >= unlike[0] * (1 - 1e-9)).mean())


def _percentiles(drawn: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def _check(groups: np.ndarray, **columns: np.ndarray) -> None:
    if groups.dtype.kind != "U" or groups.ndim != 1:
        raise DataError(f"groups are {groups.dtype} {groups.shape}: give text (N,)")
    for name, column in columns.items():
        if column.shape != groups.shape:
            raise DataError(
                f"{name} are {column.shape} and groups {groups.shape}: give one of each for everything judged"
            )
    two_or_more(groups)
