import itertools
import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from common.errors import DataError
from common.evaluation import membership
from common.evaluation.membership import (
    auc,
    clopper_pearson,
    dp_ceiling,
    gan_leaks_scores,
    gdp_ceiling,
    gdp_mu,
    logan_scores,
    median_radius,
    monte_carlo_scores,
    tpr_at_fpr,
    unit_means,
)
from common.models.discriminators import build_discriminator


def _wins(members: np.ndarray, others: np.ndarray) -> np.ndarray:
    """(m, n): 1 where the member scores above, 1/2 where they tie."""
    return np.array([[(a > b) + (a == b) / 2 for b in others] for a in members])


@pytest.mark.parametrize("seed", range(8))
def test_auc_and_its_variance_are_those_of_all_pairs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    # Few values: many ties.
    members, others = rng.integers(1, 9, 23).astype(float), rng.integers(0, 8, 31).astype(float)
    wins = _wins(members, others)
    found = auc(members, others)
    assert found.value == pytest.approx(wins.mean(), abs=1e-12)
    variance = wins.mean(1).var(ddof=1) / 23 + wins.mean(0).var(ddof=1) / 31
    odds = math.log(wins.mean() / (1 - wins.mean()))
    reach = stats.norm.ppf(0.975) * math.sqrt(variance) / (wins.mean() * (1 - wins.mean()))
    assert found.low == pytest.approx(1 / (1 + math.exp(reach - odds)), abs=1e-12)
    assert found.high == pytest.approx(1 / (1 + math.exp(-reach - odds)), abs=1e-12)


def test_auc_reverses_with_the_roles_and_knows_only_the_order() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.normal(0.7, 1, 40), rng.normal(0, 1, 60)
    one, other = auc(members, others), auc(others, members)
    assert (one.value, one.low, one.high) == pytest.approx((1 - other.value, 1 - other.high, 1 - other.low))
    assert auc(np.exp(members), np.exp(others)) == one


@pytest.mark.parametrize(("shift", "skewed"), [(0.0, False), (0.3, False), (1.2, False), (2.9, False), (1.2, True)])
def test_the_interval_of_the_auc_covers_the_truth(shift: float, skewed: bool) -> None:
    """Normal scores, whose AUC is Phi(shift / sqrt 2), and exponential ones, with 1 / (1 + rate)."""
    rng = np.random.default_rng(1)
    truth = 1 / (1 + math.exp(-shift)) if skewed else stats.norm.cdf(shift / math.sqrt(2))
    covered, runs = 0, 1000
    for _ in range(runs):
        if skewed:
            members, others = rng.exponential(math.exp(shift), 80), rng.exponential(1, 300)
        else:
            members, others = rng.normal(shift, 1, 80), rng.normal(0, 1, 300)
        found = auc(members, others)
        covered += found.low <= truth <= found.high
    # 95 % but for chance (0.7 points are one standard error) and for 80 members being few.
    assert 0.93 <= covered / runs <= 0.975


def test_where_all_pairs_compare_alike_the_interval_is_not_a_point() -> None:
    apart = auc(np.arange(10) + 100.0, np.arange(50.0))
    assert apart == membership.Estimate(1.0, pytest.approx(0.025 ** (1 / 10)), 1.0)
    below = auc(np.arange(50.0), np.arange(10) + 100.0)
    assert below == membership.Estimate(0.0, 0.0, pytest.approx(1 - 0.025 ** (1 / 10)))
    same = auc(np.zeros(20), np.zeros(30))
    assert same.value == 0.5
    assert 0.4 < same.low < 0.46
    assert same.high == pytest.approx(1 - same.low)


@pytest.mark.parametrize(
    ("members", "others", "says"),
    [
        (np.zeros(1), np.zeros(5), "1 members"),
        (np.zeros(5), np.zeros(0), "0 non-members"),
        (np.array([0.0, np.nan]), np.zeros(5), "scores of members are not finite"),
        (np.zeros(5), np.array([0.0, np.inf]), "scores of non-members are not finite"),
    ],
)
def test_scores_that_cannot_be_judged_are_refused(members: np.ndarray, others: np.ndarray, says: str) -> None:
    with pytest.raises(DataError, match=says):
        auc(members, others)
    with pytest.raises(DataError, match=says):
        tpr_at_fpr(members, others, 0.5)


@pytest.mark.parametrize("seed", range(8))
def test_tpr_is_the_best_of_all_thresholds_within_the_fpr(seed: int) -> None:
    rng = np.random.default_rng(seed)
    members, others = rng.integers(2, 30, 37).astype(float), rng.integers(0, 25, 40).astype(float)
    for fpr in (0.025, 0.1, 0.34, 0.99):
        thresholds = [t for t in np.arange(-1.0, 31) if (others > t).mean() <= fpr]
        found = tpr_at_fpr(members, others, fpr)
        assert found is not None
        assert found.value == max((members > t).mean() for t in thresholds)


def test_tpr_at_too_small_an_fpr_for_so_few_is_not_said() -> None:
    rng = np.random.default_rng(0)
    assert tpr_at_fpr(rng.normal(size=50), rng.normal(size=999), 0.001) is None
    assert tpr_at_fpr(rng.normal(size=50), rng.normal(size=1000), 0.001) is not None
    # 0.29 * 100 is 28.999999999999996 as floats: 29 may pass all the same.
    found = tpr_at_fpr(np.arange(100.0), np.arange(100.0), 0.29)
    assert found is not None
    assert found.value == 0.29


def test_the_exact_interval_is_scipy_s_and_covers() -> None:
    for successes, trials in [(0, 1), (0, 10), (1, 1), (3, 10), (10, 10), (12, 10_000), (9_999, 10_000)]:
        found = clopper_pearson(successes, trials)
        oracle = stats.binomtest(successes, trials).proportion_ci(method="exact")
        assert (found.low, found.high) == pytest.approx((oracle.low, oracle.high), abs=1e-9)
    intervals = [clopper_pearson(k, 30) for k in range(31)]
    for truth in np.linspace(0.001, 0.999, 97):
        inside = [k for k, i in enumerate(intervals) if i.low <= truth <= i.high]
        assert stats.binom.pmf(inside, 30, truth).sum() >= 0.95
    with pytest.raises(ValueError, match="6 of 5"):
        clopper_pearson(6, 5)


@pytest.mark.parametrize(("epsilon", "delta"), [(0.0, 0.0), (0.5, 0.0), (1.0, 1e-5), (3.0, 0.01), (10.0, 0.1)])
def test_the_dp_ceiling_is_reached_by_the_worst_mechanism_and_passed_by_none(epsilon: float, delta: float) -> None:
    """Randomised response that fails with probability delta dominates all (epsilon, delta)-DP mechanisms (Kairouz, Oh
    and Viswanath 2015): its likelihood-ratio test, enumerated, is the ceiling."""
    yes = (1 - delta) * math.exp(epsilon) / (1 + math.exp(epsilon))
    inside = np.array([0.0, 1 - delta - yes, yes, delta])  # outcomes in the order of their likelihood ratio
    outside = inside[::-1]
    area = sum(inside[a] * outside[b] * ((a > b) + (a == b) / 2) for a, b in itertools.product(range(4), repeat=2))
    assert dp_ceiling([(epsilon, delta)], 0.001).auc == pytest.approx(area, abs=1e-12)
    for fpr in (1e-6, 0.001, 0.02, 0.3, 0.9, 1.0):
        left, best = fpr, 0.0  # Neyman and Pearson: reject at the greatest ratios until the FPR is used up
        for p, q in zip(inside[::-1], outside[::-1], strict=True):
            share = 1.0 if q <= left else left / q
            best, left = best + share * p, left - share * q
        assert dp_ceiling([(epsilon, delta)], fpr).tpr == pytest.approx(best, abs=1e-12)


def test_more_guarantees_only_lower_the_ceiling() -> None:
    one, two = (1.0, 1e-5), (0.3, 0.02)
    alone, twice, both = (dp_ceiling(some, 0.1) for some in ([one], [one, one], [one, two]))
    assert twice.auc == pytest.approx(alone.auc, abs=1e-6)
    assert alone.auc <= twice.auc
    assert both.auc < min(alone.auc, dp_ceiling([two], 0.1).auc)
    assert both.tpr == min(alone.tpr, dp_ceiling([two], 0.1).tpr)


def test_no_float_overflows_at_a_huge_epsilon() -> None:
    assert dp_ceiling([(1e9, 1e-5)], 0.001) == membership.Ceiling(1.0, 1.0)
    assert gdp_ceiling(gdp_mu(1e4, 1e-5), 0.001).auc == pytest.approx(1.0)


@pytest.mark.parametrize(("epsilon", "area", "rate"), [(1.0, 0.575, 0.0024), (2.0, 0.639, 0.0048), (8.0, 0.881, 0.077)])
def test_the_gaussian_ceiling_is_that_of_the_integrated_trade_off(epsilon: float, area: float, rate: float) -> None:
    mu = gdp_mu(epsilon, 1e-5)

    # The hockey-stick divergence itself, integrated.
    def excess(x: float) -> float:
        return max(0.0, float(stats.norm.pdf(x - mu) - math.exp(epsilon) * stats.norm.pdf(x)))

    assert integrate.quad(excess, epsilon / mu + mu / 2, 40, epsabs=1e-14)[0] == pytest.approx(1e-5, rel=1e-6)
    found = gdp_ceiling(mu, 0.001)
    power = integrate.quad(lambda a: stats.norm.cdf(stats.norm.ppf(a) + mu), 0, 1)[0]
    assert found.auc == pytest.approx(power, abs=1e-6)
    assert (found.auc, found.tpr) == pytest.approx((area, rate), rel=0.02)


def test_a_gaussian_s_whole_privacy_curve_is_its_trade_off() -> None:
    """Dong, Roth and Su 2022, section 2: all its (epsilon, delta) together say what mu does; one alone says less."""
    mu = 1.0
    epsilons = np.linspace(0, 8, 200)
    deltas = stats.norm.cdf(-epsilons / mu + mu / 2) - np.exp(epsilons) * stats.norm.cdf(-epsilons / mu - mu / 2)
    curve, exact = dp_ceiling(list(zip(epsilons, deltas, strict=True)), 0.001), gdp_ceiling(mu, 0.001)
    assert exact.auc <= curve.auc < exact.auc + 1e-3
    assert exact.tpr <= curve.tpr < 1.05 * exact.tpr
    assert dp_ceiling([(epsilons[100], deltas[100])], 0.001).auc > exact.auc + 0.1


def _pictures(count: int, seed: int, side: int = 28, channels: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, channels, side, side), dtype=np.uint8)


@pytest.mark.parametrize("max_distances", [1, 40, 2**24])
def test_distances_are_naive_ones_however_they_are_cut(max_distances: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(membership, "_MAX_DISTANCES", max_distances)
    images, generated = _pictures(31, 0), _pictures(17, 1)
    generated[3] = images[5]
    apart = (images[:, None] / 127.5 - generated[None] / 127.5).reshape(31, 17, -1)
    distances = np.sqrt((apart**2).sum(2))
    scores = gan_leaks_scores(images, generated)
    assert scores == pytest.approx(-distances.min(1), abs=0.05)
    assert scores.argmax() == 5
    radius = float(np.median(distances))
    assert monte_carlo_scores(images, generated, radius).tolist() == (distances <= radius).mean(1).tolist()


def test_the_radius_is_the_median_over_as_many_members_as_non_members() -> None:
    rng = np.random.default_rng(0)
    members, others = rng.random(7), rng.random(5)
    balanced = np.concatenate([np.repeat(members, 5), np.repeat(others, 7)])
    assert median_radius(members, others) == np.sort(balanced)[34]
    # Where a generator has learned all members by heart, it lies between them and the others.
    assert median_radius(np.array([0.1, 0.2, 0.3]), np.arange(1.0, 99)) == 0.3


def test_large_images_are_compared_at_32_pixels() -> None:
    small, other = _pictures(5, 0, 32, 3), _pictures(6, 1, 32, 3)
    large, other_large = (np.repeat(np.repeat(some, 4, 2), 4, 3) for some in (small, other))
    assert gan_leaks_scores(large, other_large) == pytest.approx(gan_leaks_scores(small, other), abs=1e-4)


def test_logan_is_the_logit_without_dropout_in_batches_of_any_size(monkeypatch: pytest.MonkeyPatch) -> None:
    network = build_discriminator("conv-dropout", image_size=28, channels=1, num_classes=3, width=4).train()
    images, labels = _pictures(10, 0), np.arange(10) % 3
    whole = logan_scores(network, images, labels)
    monkeypatch.setattr(membership, "_BATCH", 3)
    assert logan_scores(network, images, labels) == pytest.approx(whole, abs=1e-5)
    assert network.training
    with torch.no_grad():
        network.eval()
        naive = network(torch.from_numpy(images).float() / 127.5 - 1, torch.from_numpy(labels))
    assert whole == pytest.approx(naive.numpy(), abs=1e-5)
    assert logan_scores(network, images, labels, 1.0) == pytest.approx(-abs(naive.numpy() - 1), abs=1e-5)


def test_a_person_s_score_is_the_mean_of_their_images() -> None:
    units = [np.array([0, 3]), np.array([1]), np.array([2, 4, 5])]
    assert unit_means(np.array([1.0, 5.0, 2.0, 3.0, 4.0, 9.0]), units).tolist() == [2.0, 5.0, 5.0]
